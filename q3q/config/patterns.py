"""Name patterns of blocks, sites and linears, and the linears that they match.

A linear has three names: its own (`blocks.3.self_attn.q_proj`), its site's (`blocks.3.qkv`) and its
block's (`blocks.3`). A pattern selects each linear that it matches by one of them, as the shell
matches file names: `*` is any run of characters, dots included, `?` one, `[0-3]` one of these. So
`blocks.1` is one block, and `blocks.1*` also 10 to 19.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from q3q.models.facts import ModelFacts


@dataclass(frozen=True)
class Linear:
    """One linear of one block (all experts' of that kind).

    columns: of its input; a group size must divide them.
    site: the input's name
    beside: how many linears of the block read that input, this one included
    apart: it may stay unquantized where the input of the others is rounded
    """

    block: int
    name: str
    columns: int
    site: str
    beside: int
    apart: bool = False

    @property
    def names(self) -> tuple[str, str, str]:
        """The linear's own name, its site's and its block's."""
        block = f"blocks.{self.block}"
        return f"{block}.{self.name}", f"{block}.{self.site}", block


def linears(facts: ModelFacts) -> dict[str, Linear]:
    """Return the linears that are quantized by default, by full name."""
    by_name = {}
    for k in range(facts.layers):
        shapes = facts.block_shapes(k)
        for site in facts.sites(k):
            for name in site.weights:
                columns, beside, apart = shapes[name][-1], len(site.weights), name in site.apart
                linear = Linear(k, name.removesuffix(".weight"), columns, site.name, beside, apart)
                by_name[linear.names[0]] = linear
    return by_name


def matching_linears(pattern: str, model: Mapping[str, Linear]) -> list[str]:
    """Return the full names of the linears that a pattern matches."""
    return [
        full_name
        for full_name, linear in model.items()
        if any(fnmatchcase(name, pattern) for name in linear.names)
    ]


def similar_names(pattern: str, model: Mapping[str, Linear]) -> list[str]:
    """Return up to three names that the pattern's author may have meant."""
    names: set[str] = set()
    for linear in model.values():
        short_names = linear.site, linear.name, linear.name.rpartition(".")[2]
        names |= {*linear.names, *(f"*.{name}" for name in short_names)}
    return difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.4)


def summarize_linears(linears: Iterable[Linear]) -> str:
    """Summarize as `down of blocks 0-5, self_attn.q_proj of block 7`; whole sites by their name."""
    blocks: dict[str, list[int]] = {}
    sites: dict[tuple[int, str], list[Linear]] = {}
    for linear in linears:
        sites.setdefault((linear.block, linear.site), []).append(linear)
    for (block, site), members in sites.items():
        complete = len(members) == members[0].beside
        for name in [site] if complete else [linear.name for linear in members]:
            blocks.setdefault(name, []).append(block)
    return ", ".join(
        f"{name} of block{'s' if len(indices) > 1 else ''} {_ranges(sorted(indices))}"
        for name, indices in blocks.items()
    )


def _ranges(numbers: list[int]) -> str:
    """Format 0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

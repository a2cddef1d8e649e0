"""Name patterns of blocks, sites and linears, and which linears of a model they mean.

A linear has three names: its own (`blocks.3.self_attn.q_proj`), its site's (`blocks.3.qkv`) and its block's
(`blocks.3`). A pattern means every linear that it fits by one of them, as the shell fits file names: `*` is any run of
characters, dots included, `?` one, `[0-3]` one of these. So `blocks.1` is one block, and `blocks.1*` also 10 to 19.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from q3q.models.facts import ModelFacts

# As in `models.anatomy`, which needs torch.
SITES = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "o": "o",
    "gate": "gate_up",
    "up": "gate_up",
    "down": "down",
}


@dataclass(frozen=True)
class Linear:
    """One linear of one block (all experts' of that kind). columns: of its input, which a group size must divide."""

    block: int
    name: str
    columns: int

    @property
    def site(self) -> str:
        return SITES[self.name.rpartition(".")[2].removesuffix("_proj")]

    @property
    def names(self) -> tuple[str, str, str]:
        """Its own, its site's, its block's."""
        return (
            f"blocks.{self.block}.{self.name}",
            f"blocks.{self.block}.{self.site}",
            f"blocks.{self.block}",
        )


def linears(facts: ModelFacts) -> dict[str, Linear]:
    """Every linear that is quantized unless something else is said, by full name."""
    return {
        linear.names[0]: linear
        for k in range(facts.layers)
        for name, shape in facts.block_shapes(k).items()
        if name.endswith("_proj.weight")
        for linear in [Linear(k, name.removesuffix(".weight"), shape[-1])]
    }


def meant(pattern: str, model: Mapping[str, Linear]) -> list[str]:
    """Full names of the linears that a pattern means."""
    return [
        full
        for full, linear in model.items()
        if any(fnmatchcase(name, pattern) for name in linear.names)
    ]


def near(pattern: str, model: Mapping[str, Linear]) -> list[str]:
    """Up to three names that somebody who wrote this pattern may have had in mind."""
    names: set[str] = set()
    for linear in model.values():
        names |= {
            *linear.names,
            f"*.{linear.site}",
            f"*.{linear.name}",
            f"*.{linear.name.rpartition('.')[2]}",
        }
    return difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.4)


def together(some: Iterable[Linear]) -> str:
    """Linears in few words: `down of blocks 0-5, self_attn.q_proj of block 7`; a site by name where it is whole."""
    blocks: dict[str, list[int]] = {}
    sites: dict[tuple[int, str], list[Linear]] = {}
    for linear in some:
        sites.setdefault((linear.block, linear.site), []).append(linear)
    for (block, site), mine in sites.items():
        whole = len(mine) == sum(one == site for one in SITES.values())
        for name in [site] if whole else [linear.name for linear in mine]:
            blocks.setdefault(name, []).append(block)
    return ", ".join(
        f"{name} of block{'s' if len(where) > 1 else ''} {_ranges(sorted(where))}"
        for name, where in blocks.items()
    )


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

"""A model card's part on what was measured: the checkpoint beside the unquantized model."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from q3q.evaluation import change_in_words, change_of, is_share, value_in_words
from q3q.export.marker import CARD
from q3q.formatting import bytes_in_words, signed
from q3q.storage.files import write_atomically

# The part's bounds in a card. It is written again when the unquantized model has been measured.
BEGIN, END = "<!-- q3q: measured -->", "<!-- q3q: end of measured -->"
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
# Of a trial's costs, and of the distribution of a divergence whose mean is listed.
UNLISTED = re.compile(r"(seconds|peak_bytes|gpu_peak_bytes|kl_p[\d.]+|top1_agreement)(_quick)?/")
UNMEASURED = (
    "The unquantized model was not measured beside this checkpoint. Run the command with "
    "`method=none`, then run this command again. It measures nothing twice, and fills in this "
    "table."
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a card says was measured.

    metrics, intervals, diverged: of the checkpoint, by the record's names
    unquantized: metrics of the unquantized model; empty if it has not been measured
    weights, original: bytes of the tensors, and of those of the given checkpoint
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    diverged: Collection[str] = ()
    unquantized: Mapping[str, float] = field(default_factory=dict)
    weights: float | None = None
    original: float | None = None

    def lines(self) -> list[str]:
        """Return the part in Markdown: perplexities first, then accuracies, others, divergences."""
        names = {name for name in (*self.metrics, *self.diverged) if "/" in name}
        listed = sorted((name for name in names if not UNLISTED.match(name)), key=_rank)
        rows = [self._row(name) for name in listed]
        if self.weights is not None and self.original:
            share = f"{signed(100 * (self.weights / self.original - 1), 0)} %"
            sizes = (bytes_in_words(self.weights), bytes_in_words(self.original), share)
            rows.append(f"| weights on disk | {' | '.join(sizes)} |")
        return [
            BEGIN,
            "| metric | this checkpoint (95 % interval) | unquantized | change |",
            "|---|---|---|---|",
            *(rows or ["| none | | | |"]),
            "",
            *([] if self.unquantized or not listed else [UNMEASURED, ""]),
            END,
        ]

    def _row(self, name: str) -> str:
        ours, theirs = self.metrics.get(name), self.unquantized.get(name)
        shown = "diverged: not a finite number" if ours is None else value_in_words(ours, name)
        if ours is not None and name in self.intervals:
            low, high = (value_in_words(end, name) for end in self.intervals[name])
            shown += f" ({low} to {high})"
        if name.startswith("kl"):
            return f"| {_label(name)} | {shown} | 0 by definition | |"
        other = "" if theirs is None else value_in_words(theirs, name)
        change = ""
        if ours is not None and theirs is not None:
            change = change_in_words(name, change_of(name, ours, theirs))
        return f"| {_label(name)} | {shown} | {other} | {change} |"


def update_card(folder: Path, measured: Measured) -> bool:
    """Write the part of an export's card again; return True if it changed.

    A card that is not here, or without this part because somebody rewrote it, stays as it is.
    """
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    updated = before + "\n".join(measured.lines()) + after
    if updated == text:
        return False
    write_atomically(path, updated.encode())
    return True


def _rank(name: str) -> tuple[int, str]:
    kind = name.partition("/")[0].removesuffix("_quick")
    if kind in PERPLEXITIES:
        return 0, name
    if is_share(name):
        return 1, name
    return (3 if kind.startswith("kl") else 2), name


def _label(name: str) -> str:
    """Return a metric in words: `perplexity, stories`, `accuracy of piqa, %`."""
    kind, _, rest = name.partition("/")
    measure, text = kind.removesuffix("_quick"), rest
    quick = " (a quick look)" if kind.endswith("_quick") else ""
    if measure in PERPLEXITIES:
        return f"{measure.replace('_', ' ')}, {text}{quick}"
    if measure.startswith("kl"):
        part = "" if measure == "kl" else " (99 % of the tokens are below)"
        return f"KL divergence from the unquantized model, {text}, nats per token{part}{quick}"
    if is_share(name):
        task, _, accuracy = name.rpartition("/")
        return f"{'accuracy' if accuracy == 'acc' else accuracy} of {task}, %"
    return name

"""The size of a trial's model: that of its files where there are files, else counted.

Both kinds may stand in one table or plot, which then says which is which.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from q3q.kv_scheme import CacheShape, KvScheme
from q3q.models.footprint import cache_shape
from q3q.models.hub import facts_of_trial
from q3q.record import CACHE, TrialRecord

BITS_PER_WEIGHT, BITS_PER_WEIGHT_MODEL = "bits_per_weight", "bits_per_weight_model"
SIZES = (BITS_PER_WEIGHT, BITS_PER_WEIGHT_MODEL)
FILES = "files"
COUNTED = "counted"  # nothing was written: what the numbers would take
COUNTED_IN_16 = "counted, the rest in 16 bits"  # as earlier versions did
PARTS = "codes, scales and zero points of the quantized linear layers"
RULES = {
    FILES: "the checkpoint's files",
    COUNTED: f"counted, as no checkpoint was written: {PARTS}, and all else in the type that the "
    "original checkpoint stores",
    COUNTED_IN_16: f"counted, as no checkpoint was written: {PARTS}, and all else in 16 bits, "
    "whatever type the original checkpoint stores (an earlier version of q3q measured this)",
}


RULES_OF_LINEARS = {
    FILES: "the checkpoint's files",
    COUNTED: f"counted, as no checkpoint was written: {PARTS}",
    COUNTED_IN_16: "16 bits for what is not quantized, whatever type the original checkpoint "
    "stores (an earlier version of q3q measured this)",
}


@dataclass(frozen=True)
class Size:
    """A size, and which of `RULES` it follows."""

    value: float
    rule: str


def bytes_of(record: TrialRecord) -> Size | None:
    """Return the bytes of the whole model; None if the record does not know them."""
    metrics = record.metrics
    if "export_bytes" in metrics:
        return Size(metrics["export_bytes"], FILES)
    if "model_bytes" not in metrics:
        return None
    return Size(metrics["model_bytes"], _rule(record))


def bits_of_weight(record: TrialRecord, metric: str) -> Size | None:
    """Return one of `SIZES`; None if the record does not know it.

    Those of the whole model follow its bytes. Those of the quantized linear layers are read from
    files only where these hold codes, which an export in 16 bits does not.
    """
    stored = record.metrics.get(metric)
    if stored is None:
        return None
    packed = "export_bytes" in record.metrics and record.spec.export != "hf"
    if metric == BITS_PER_WEIGHT:
        counted = COUNTED if record.spec.scheme is not None else _rule(record)
        return Size(stored, FILES if packed else counted)
    size, parameters = bytes_of(record), parameters_of(record)
    if size is None or parameters is None:
        return Size(stored, _rule(record))
    return Size(8 * size.value / parameters, size.rule)


def cache_shape_of(records: Sequence[TrialRecord]) -> CacheShape | None:
    """Return what a token leaves in the cache of these trials' one model; None if nothing says so.

    Records say it of trials that were asked for a scheme of the cache or for a context; for others,
    the model's config.json does.
    """
    for record in records:
        note = record.notes.get(CACHE)
        if isinstance(note, dict):
            return CacheShape(numbers=int(note["numbers"]), head_dim=int(note["head_dim"]))
    facts_of_trials = (facts_of_trial(record.trial) for record in records)
    return next((cache_shape(facts) for facts in facts_of_trials if facts is not None), None)


def cache_scheme_of(record: TrialRecord) -> KvScheme | None:
    """Return how the cache was stored that the trial was measured with; None: in 16 bits."""
    note = record.notes.get(CACHE)
    stored = note.get("kv") if isinstance(note, dict) else None
    return KvScheme(**stored) if isinstance(stored, dict) else record.spec.kv


def parameters_of(record: TrialRecord) -> float | None:
    """Return how many parameters a trial's model has, from its bytes and bits."""
    if not {"model_bytes", BITS_PER_WEIGHT_MODEL} <= record.metrics.keys():
        return None
    return 8 * record.metrics["model_bytes"] / record.metrics[BITS_PER_WEIGHT_MODEL]


def sizes_note(rules: Iterable[str], metric: str = BITS_PER_WEIGHT_MODEL) -> str:
    """Return a note on the rules that one table's or plot's sizes follow, counted ones marked."""
    words = RULES_OF_LINEARS if metric == BITS_PER_WEIGHT else RULES
    used = [rule for rule in words if rule in set(rules)]
    if len(used) < 2:
        return "".join(f"Sizes: {words[rule]}." for rule in used)
    marks = [f"{number_of(rule, used)}: {words[rule]}" for rule in used if rule != FILES]
    unmarked = f"Sizes without a mark: {words[FILES]}. " if FILES in used else ""
    return unmarked + ". ".join(marks).strip() + "."


def number_of(rule: str, used: Iterable[str]) -> str:
    """Return the mark of a size in a table with several rules: none for files, else †, ††."""
    counted = [name for name in RULES if name in set(used) and name != FILES]
    several = len(set(used)) > 1
    return "†" * (1 + counted.index(rule)) if several and rule in counted else ""


def _rule(record: TrialRecord) -> str:
    stored = record.notes.get("stored")
    if not isinstance(stored, dict):
        return COUNTED_IN_16
    return FILES if stored.get("in_files") else COUNTED

"""Against the study: every published cell that was run, ours beside theirs.

The numbers are Tables 1 to 4 of "An Empirical Study of Qwen3 Quantization" (arXiv 2505.02214v1), in
`paper_results.csv` beside this file; one row is one printed number. Its printed means over six tasks are wrong in 29 of
250 rows, so that means are not compared. What of the rest cannot be taken at its word is in `NOTES`.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from q3q.config.texts import RANDOM_TEXTS
from q3q.quantize.methods.registry import settings_class
from q3q.record import TrialRecord
from q3q.report.measures import DIVERGED, cell, in_order, shown
from q3q.report.tables import Table
from q3q.spec import Json, TrialSpec

SOURCE = "An Empirical Study of Qwen3 Quantization, arXiv 2505.02214v1, Tables 1 to 4"
PUBLISHED = Path(__file__).with_name("paper_results.csv")
PERPLEXITY_TOLERANCE = 0.02  # of the published value
ACCURACY_TOLERANCE = 1.5  # percentage points
COLLAPSED = 1000.0  # perplexities beyond it say that the model is broken, and their digits nothing
CLOSE = 3  # times the tolerance
REPRODUCED, NEAR, DIFFERENT = "reproduced", "close", "different"

# Ours -> the study's. A model is found by its name without case and punctuation: qwen3_8b_base, Qwen/Qwen3-8B-Base.
METHODS = {
    "none": "FP16",
    "rtn": "RTN",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "smoothquant": "SmoothQuant",
    "billm": "BiLLM",
}
GROUPS = {-1: "per-channel", 128: "128"}
DATASETS = {
    "perplexity/wikitext2": "wikitext2",
    "perplexity/c4": "c4",
    **{
        f"{task}/acc": task
        for task in ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq")
    },
    "mmlu_paper/acc": "mmlu",
    "mmlu/acc": "mmlu",
}
# What +study=paper sets itself; all else are a method's defaults.
PROTOCOL_DTYPE = "bfloat16"  # in which every Qwen3 was released
WINDOWS: Json = {"window": 2048, "limit": None}
DRAWS: dict[str, Json] = {
    "perplexity/c4": {"draw": "random", "samples": RANDOM_TEXTS["c4"]},
    "perplexity/wikitext2": {"draw": "first"},
}
MMLU_SHOTS = 5
LEFT_OUT = (
    "Of the 2,500 printed numbers the 250 means over six tasks are not compared: in 29 of 250 rows the printed mean is "
    "not that of the row's numbers, by up to 3.4 points."
)


@dataclass(frozen=True)
class Published:
    """One printed number. bits: of a weight, 1 for BiLLM's nominal 1.04 to 1.07. value: nan where NaN is printed."""

    model: str
    method: str
    bits: int
    act_bits: int
    group: str
    dataset: str
    value: float
    source: str


@dataclass(frozen=True)
class Compared:
    """One published number and what a trial of ours found. ours: nan if it diverged. departs: from the protocol."""

    published: Published
    record: TrialRecord
    metric: str
    ours: float
    verdict: str
    departs: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def difference(self) -> str:
        """In percent of a perplexity, in points of an accuracy; as decades between two that collapsed."""
        theirs = self.published.value
        if not math.isfinite(self.ours) or not math.isfinite(theirs):
            return "-"
        if not self.metric.startswith("perplexity/"):
            return f"{100 * self.ours - theirs:+.1f} points"
        if max(self.ours, theirs) > COLLAPSED:
            return f"{math.log10(self.ours / theirs):+.1f} decades"
        return f"{100 * (self.ours / theirs - 1):+.1f} %"


@dataclass(frozen=True)
class Note:
    """Why some published numbers cannot be taken at their word."""

    text: str
    concerns: Callable[[Published], bool]


NOTES = (
    Note(
        "AWQ with groups of 128 is printed worse than per channel in 43 of 44 perplexities at 3 and 4 bits, and its "
        "MMLU in 22 of 22: the two blocks are probably exchanged, or the groups were left out when evaluating.",
        lambda it: it.method == "AWQ" and it.bits in (3, 4),
    ),
    Note(
        "Table 2 prints AWQ's zero-shot scores of 8B under 14B and the other way round.",
        lambda it: (
            it.source == "Table 2"
            and it.method == "AWQ"
            and it.model in ("Qwen3-8B", "Qwen3-14B")
            and it.dataset not in ("wikitext2", "c4", "mmlu")
        ),
    ),
    Note(
        "Table 2 prints for GPTQ, 8 bits, 4B the row of 1.7B.",
        lambda it: (
            it.source == "Table 2" and (it.model, it.method, it.bits) == ("Qwen3-4B", "GPTQ", 8)
        ),
    ),
    Note(
        "An 80.1 among neighbours of about 25: a misprint.",
        lambda it: (
            it.source == "Table 2"
            and (it.model, it.method, it.bits, it.dataset) == ("Qwen3-4B", "GPTQ", 2, "arc_easy")
        ),
    ),
    Note(
        "The published script never smooths: it rounds weights per channel and activations per token "
        "(here method.smooth=false).",
        lambda it: it.method == "SmoothQuant",
    ),
    Note(
        "Nearly the perplexities of the 0.6B row: probably a copy.",
        lambda it: (
            (it.model, it.method, it.act_bits) == ("Qwen3-8B", "SmoothQuant", 4)
            and it.dataset in ("wikitext2", "c4")
        ),
    ),
    Note(
        "Above the unquantized model's 72.1 by 5 points: probably a misprint.",
        lambda it: (
            (it.model, it.method, it.dataset) == ("Qwen3-8B-Base", "SmoothQuant", "winogrande")
            and (it.bits, it.act_bits) == (8, 8)
        ),
    ),
    Note(
        "HellaSwag at or above the unquantized model's: probably acc_norm where other rows print acc.",
        lambda it: (
            it.method == "BiLLM"
            and it.dataset == "hellaswag"
            and it.model in ("Qwen3-14B", "Qwen3-32B")
        ),
    ),
    Note(
        "The unquantized model is printed twice, 19.2 and 19.3.",
        lambda it: (it.model, it.method, it.dataset) == ("Qwen3-1.7B", "FP16", "c4"),
    ),
)


@cache
def published() -> tuple[Published, ...]:
    """All printed numbers but the means over six tasks."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] != "avg6"]
    return tuple(
        Published(
            model=row["model"],
            method=row["method"],
            bits=math.floor(float(row["w_bits"])),
            act_bits=int(row["a_bits"]),
            group=row["group_size"],
            dataset=row["dataset"],
            value=float(row["value"]),
            source=row["source"],
        )
        for row in rows
    )


def compare_with_paper(records: Iterable[TrialRecord]) -> list[Compared]:
    """Every published number that a completed trial measured, in the order of the trials."""
    found = []
    for record in in_order(records):
        place = cell_of(record.spec)
        if place is None or not record.completed:
            continue
        for metric, dataset in DATASETS.items():
            value = cell(record, metric)
            if not isinstance(value, float) and value != DIVERGED:
                continue
            ours = value if isinstance(value, float) else math.nan
            for theirs in _cells().get((*place, dataset), ()):
                found.append(_compared(theirs, record, metric, ours))
    return found


def cell_of(spec: TrialSpec) -> tuple[str, str, int, int, str] | None:
    """The study's model, method, bits, activation bits and group that a trial's are, or None if it has no such row."""
    model = _models().get(_plain(study_model(spec)))
    method = METHODS.get(str(spec.method["name"]))
    if model is None or method is None or spec.departures or spec.overrides or spec.skip:
        return None
    if spec.scheme is None:
        return model, method, 16, 16, ""
    group = GROUPS.get(spec.scheme.group_size)
    return (
        None
        if group is None
        else (model, method, spec.scheme.bits, spec.scheme.act_bits or 16, group)
    )


def study_model(spec: TrialSpec) -> str:
    """A model as the study writes it, Qwen3-8B-Base; one that it does not have by its own name."""
    name, source = (
        str(spec.model.get("name") or ""),
        str(spec.model.get("source", "")).rpartition("/")[2],
    )
    return _models().get(_plain(name)) or _models().get(_plain(source)) or name or source


def departures(spec: TrialSpec, metric: str) -> tuple[str, ...]:
    """In what a trial departs from what `+study=paper` runs for that cell: such cells are shown, and not counted.

    A seed is no departure: the study names none.
    """
    wanted = {
        "dtype": PROTOCOL_DTYPE,
        **_protocol_of_evaluation(metric),
        **_protocol_of_method(spec),
    }
    return tuple(
        f"{key}={_typed(value)}"
        for key, value in _settings(spec, metric).items()
        if value != wanted.get(key, value)
    )


def _protocol_of_evaluation(metric: str) -> Json:
    if metric.startswith("perplexity/"):
        return WINDOWS | DRAWS.get(metric, {})
    shots = {"mmlu/acc": MMLU_SHOTS}.get(metric)
    return {"task_limit": None, "limits": None, "shots": shots, "chat": None, "include": None}


def _protocol_of_method(spec: TrialSpec) -> Json:
    """The method's own defaults, and C4 as its calibration text."""
    kind = settings_class(str(spec.method["name"]))
    if kind is None or spec.scheme is None:
        return {}
    method = kind()
    return {
        **{
            f"method.{key}": value
            for key, value in method.knobs(spec.scheme).items()
            if key != "name"
        },
        "symmetric": method.default_symmetric,
        "head_bits": None,
        "embedding_bits": None,
        "scales": None,
        "calibration": "c4",
        "calibration.samples": method.default_samples,
        "calibration.length": method.default_length,
        "calibration.draw": method.default_draw,
    }


def _settings(spec: TrialSpec, metric: str) -> Json:
    """What a trial did, by the names that `departures` compares."""
    found: Json = {"dtype": spec.model.get("dtype")}
    if metric.startswith("perplexity/"):
        text = next(it for it in spec.evaluation["texts"] if f"perplexity/{it['name']}" == metric)
        found |= {
            key: text.get(key) for key in ("window", "limit", "draw", "samples") if key in text
        }
    else:
        task = metric.removesuffix("/acc")
        found |= {key: spec.evaluation.get(key) for key in ("task_limit", "chat", "include")}
        found |= {key: spec.evaluation.get(key, {}).get(task) for key in ("limits", "shots")}
    if spec.scheme is not None:
        found |= {f"method.{key}": value for key, value in spec.method.items() if key != "name"}
        found |= {"symmetric": spec.scheme.symmetric, "scales": spec.scheme.scales}
    if spec.calibration is not None:
        found["calibration"] = spec.calibration["source"]
        found |= {
            f"calibration.{key}": spec.calibration[key]
            for key in ("samples", "length", "draw")
            if key in spec.calibration
        }
    return found


def _typed(value: object) -> str:
    """As one types it."""
    return value if isinstance(value, str) else json.dumps(value)


def verdict(
    metric: str, ours: float, theirs: float, interval: tuple[float, float] | None = None
) -> str:
    """Whether a published number holds.

    Reproduced: a perplexity within 2 %, an accuracy within 1.5 points or with the published value inside our 95 %
    interval; two perplexities that both collapsed (above 1000, or not finite) agree in what matters. Close: within
    three times the tolerance. Half a unit of the last printed digit is granted on top.

    Args:
        ours: nan if it diverged; an accuracy as a share. theirs: as printed, an accuracy in percent.
    """
    finite = math.isfinite(ours) and math.isfinite(theirs)
    if metric.startswith("perplexity/"):
        if all(not math.isfinite(value) or value > COLLAPSED for value in (ours, theirs)):
            return REPRODUCED
        if not finite:
            return DIFFERENT
        off = max(0.0, abs(ours - theirs) - half_a_digit(theirs)) / theirs / PERPLEXITY_TOLERANCE
    else:
        if not finite:
            return REPRODUCED if math.isnan(ours) and math.isnan(theirs) else DIFFERENT
        if interval is not None and 100 * interval[0] <= theirs <= 100 * interval[1]:
            return REPRODUCED
        off = max(0.0, abs(100 * ours - theirs) - 0.05) / ACCURACY_TOLERANCE
    return REPRODUCED if off <= 1 else NEAR if off <= CLOSE else DIFFERENT


def half_a_digit(value: float) -> float:
    """Perplexities are printed to three significant digits."""
    return 0.5 * 10.0 ** (math.floor(math.log10(value)) - 2)


def share_reproduced(found: Sequence[Compared]) -> str:
    """One sentence: of the published cells that were run by the study's protocol, how many hold."""
    by_cell: dict[Published, list[Compared]] = {}
    for it in found:
        if not it.departs:
            by_cell.setdefault(it.published, []).append(it)
    if not by_cell:
        left = (
            f" {len(found)} comparisons depart from its protocol and are not counted."
            if found
            else ""
        )
        return f"None of the study's {len(published())} cells was run by its protocol.{left} {LEFT_OUT}"
    good = sum(all(it.verdict == REPRODUCED for it in mine) for mine in by_cell.values())
    close = sum(
        any(it.verdict != REPRODUCED for it in mine) and all(it.verdict != DIFFERENT for it in mine)
        for mine in by_cell.values()
    )
    return (
        f"{good} of {len(by_cell)} cells reproduced ({100 * good / len(by_cell):.0f} %), {close} close, "
        f"{len(by_cell) - good - close} different; the study has {len(published())}."
    )


def paper_table(found: Sequence[Compared]) -> Table:
    """A row per compared cell."""
    marks = {note: number for number, note in enumerate(_used(found), start=1)}
    rows = tuple(
        (
            f"{it.published.model} {it.record.spec.name}",
            it.published.dataset,
            it.published.source,
            _printed(it),
            "diverged" if math.isnan(it.ours) else shown(it.ours, it.metric),
            it.difference,
            it.verdict + (" (not counted: " + ", ".join(it.departs) + ")" if it.departs else ""),
            ", ".join(str(marks[note]) for note in it.notes) or "-",
        )
        for it in found
    )
    tolerance = (
        f"Reproduced: perplexity within {100 * PERPLEXITY_TOLERANCE:g} %, accuracy within {ACCURACY_TOLERANCE} points "
        f"or the published value in our 95 % interval; perplexities above {COLLAPSED:g} have all collapsed. "
        f"Close: within {CLOSE} times that."
    )
    notes = [f"[{number}] {note}" for note, number in marks.items()]
    columns = (
        "trial",
        "measured on",
        "printed in",
        "published",
        "ours",
        "difference",
        "verdict",
        "notes",
    )
    return Table(
        "Against the paper",
        columns,
        rows,
        "\n\n".join([tolerance, LEFT_OUT, *notes, f"Published numbers: {SOURCE}."]),
    )


def _compared(theirs: Published, record: TrialRecord, metric: str, ours: float) -> Compared:
    notes = [note.text for note in NOTES if note.concerns(theirs)]
    found = verdict(metric, ours, theirs.value, record.intervals.get(metric))
    if theirs.method == "AWQ" and found != REPRODUCED and theirs.bits in (3, 4):
        place = (
            theirs.model,
            "AWQ",
            theirs.bits,
            16,
            "128" if theirs.group == "per-channel" else "per-channel",
        )
        [other] = _cells()[(*place, theirs.dataset)]
        if verdict(metric, ours, other.value, record.intervals.get(metric)) == REPRODUCED:
            notes.append("Ours is the number printed for the other group size.")
    return Compared(
        theirs, record, metric, ours, found, departures(record.spec, metric), tuple(notes)
    )


def _used(found: Sequence[Compared]) -> list[str]:
    return list(dict.fromkeys(note for it in found for note in it.notes))


def _printed(it: Compared) -> str:
    value = it.published.value
    if not math.isfinite(value):
        return "NaN"
    return f"{value:.1f}" if not it.metric.startswith("perplexity/") else shown(value, it.metric)


@cache
def _models() -> dict[str, str]:
    return {_plain(it.model): it.model for it in published()}


@cache
def _cells() -> dict[tuple, list[Published]]:
    found: dict[tuple, list[Published]] = {}
    for it in published():
        found.setdefault(
            (it.model, it.method, it.bits, it.act_bits, it.group, it.dataset), []
        ).append(it)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

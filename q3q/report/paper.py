"""Comparison with the study: each published cell that was run, our number beside the printed one.

`published` has the printed numbers. Their means over six tasks are not compared.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from q3q.config.texts import RANDOM_TEXTS
from q3q.evaluation import is_perplexity, is_share
from q3q.formatting import fixed, percent, signed
from q3q.quantize.methods.registry import settings_class
from q3q.quantize.methods.settings import SETTINGS
from q3q.record import TrialRecord
from q3q.report.measures import DIVERGED, cell, given_format, in_order, shown
from q3q.report.published import (
    NOTES,
    SOURCE,
    Published,
    plain_name,
    published,
    published_cells,
    published_models,
)
from q3q.report.sizes import parameters_of
from q3q.report.tables import Table
from q3q.spec import SELDOM_OF_SCHEME, Json, ModelRef, TaskRef, TrialSpec

MAKERS = "Qwen"  # the organization that releases the models, as the Hub calls it
PERPLEXITY_TOLERANCE = 0.02  # of the published value
ACCURACY_TOLERANCE = 1.5  # percentage points
COLLAPSED = 1000.0  # a perplexity beyond it shows a broken model; its digits carry no information
CLOSE = 3  # times the tolerance
REPRODUCED, NEAR, DIFFERENT = "reproduced", "close", "different"

# Our names -> the study's. Models match without case and punctuation: qwen3_8b is Qwen3-8B.
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
# Of each release and its base model: a folder of that name is that model only if it has as many.
PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}
# Settings of +study=paper; all others are a method's defaults.
PROTOCOL_DTYPE = "bfloat16"  # of every Qwen3 release
WINDOWS: Json = {"window": 2048, "limit": None}
DRAWS: dict[str, Json] = {
    "perplexity/c4": {"draw": "random", "samples": RANDOM_TEXTS["c4"]},
    "perplexity/wikitext2": {"draw": "first"},
}
MMLU_SHOTS = 5
LEFT_OUT = (
    "Of the 2,500 printed numbers, the 250 means over six tasks are not compared: in 29 of 250 "
    "rows the printed mean differs from that of the row's numbers, by up to 3.4 points."
)


@dataclass(frozen=True)
class Compared:
    """A published number beside one of ours.

    ours: nan if it diverged.
    departs: the settings in which the trial departs from the study's protocol.
    """

    published: Published
    record: TrialRecord
    metric: str
    ours: float
    verdict: str
    departs: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def difference(self) -> str:
        """In percent of a perplexity (in decades if one collapsed), in points of an accuracy."""
        theirs = self.published.value
        if not math.isfinite(self.ours) or not math.isfinite(theirs):
            return "-"
        if not self.metric.startswith("perplexity/"):
            return f"{signed(100 * self.ours - theirs)} points"
        if max(self.ours, theirs) > COLLAPSED:
            return f"{signed(math.log10(self.ours / theirs))} decades"
        return f"{signed(100 * (self.ours / theirs - 1))} %"


def compare_with_paper(records: Iterable[TrialRecord]) -> list[Compared]:
    """Compare every published number that a completed trial measured, in the order of trials."""
    compared = []
    for record in in_order(records):
        place = cell_of(record.spec)
        if place is None or not record.completed or given_format(record) or is_misnamed(record):
            continue
        for metric, dataset in DATASETS.items():
            value = cell(record, metric)
            if not isinstance(value, float) and value != DIVERGED:
                continue
            ours = value if isinstance(value, float) else math.nan
            cells = published_cells().get((*place, dataset), ())
            compared += [_compare(theirs, record, metric, ours) for theirs in cells]
    return compared


def is_misnamed(record: TrialRecord) -> bool:
    """Return True for a folder with the name of one of the study's models, and not its size.

    Nor can it be that model if its record does not hold the size. A fine-tuned model has the same
    size, so its folder's name decides.
    """
    model = record.spec.model
    if model.source is not None or (studied := _studied(model)) is None:
        return False
    parameters = parameters_of(record)
    released = PARAMETERS[studied.removesuffix("-Base")]
    return parameters is None or not math.isclose(parameters, released, rel_tol=1e-3)


def misnamed(records: Iterable[TrialRecord]) -> str | None:
    """Say in a line which models are not compared as they are misnamed; None: there are none."""
    found = dict[str, str]()
    for record in in_order(records):
        if record.completed and is_misnamed(record):
            size = parameters_of(record)
            held = "unknown size" if size is None else f"{round(size):,} parameters"
            found[record.spec.model.label] = f"{record.spec.model.label} ({held})"
    if not found:
        return None
    return (
        "No published number is compared with a folder that is called like a released model and "
        f"has not its number of parameters: {', '.join(found.values())}."
    )


def cell_of(spec: TrialSpec) -> tuple[str, str, int, int, str] | None:
    """Return a trial's cell in the study: model, method, bits, activation bits and group.

    Returns:
        None if the study has no such row.
    """
    model = _studied(spec.model)
    settings = SETTINGS.get(spec.method.name)  # of another package's methods the study has none
    if model is None or settings is None or spec.departures or spec.overrides or spec.skip:
        return None
    if spec.scheme is not None and set(SELDOM_OF_SCHEME) & spec.scheme.to_json().keys():
        return None  # the study knows whole numbers only
    method = settings.appearance.title
    if spec.scheme is None:
        return model, method, 16, 16, ""
    if (group := GROUPS.get(spec.scheme.group_size)) is None:
        return None
    return model, method, spec.scheme.bits, spec.scheme.act_bits or 16, group


def study_model(spec: TrialSpec) -> str:
    """Return a model as the study writes it, Qwen3-8B-Base; another by a name of its own."""
    model = spec.model
    if (studied := _studied(model)) is not None:
        return studied
    names = (model.name, (model.source or "").rpartition("/")[2])
    own = (name for name in names if name and plain_name(name) not in published_models())
    return next(own, model.label if model.source is None else model.source)


def is_released(spec: TrialSpec) -> bool:
    """Return True for a model that Qwen3's makers released, by its Hub id or its folder's name."""
    model = spec.model
    return _studied(model) is not None or (model.source or "").startswith(f"{MAKERS}/Qwen3-")


def _studied(model: ModelRef) -> str | None:
    """Return which of the study's models this is, None if it is another.

    A Hub model is what its id says: another organization's Qwen3-8B is another model. Records of
    older versions may have the name of one of the study's models and the source of another; they
    are neither. A model in a folder is what its name says, unless it `is_misnamed`.
    """
    by_name = published_models().get(plain_name(model.name or ""))
    if model.source is None:
        return by_name
    makers, _, title = model.source.rpartition("/")
    released = makers.lower() == MAKERS.lower()
    by_source = published_models().get(plain_name(title)) if released else None
    return None if by_name not in (None, by_source) else by_source


def departures(spec: TrialSpec, metric: str) -> tuple[str, ...]:
    """Return the settings in which a trial departs from `+study=paper` for that cell.

    Cells with departures are shown and not counted. A seed is no departure: the study names none.
    """
    protocol = {
        "dtype": PROTOCOL_DTYPE,
        **_protocol_of_evaluation(metric),
        **_protocol_of_method(spec),
    }
    return tuple(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in _settings(spec, metric).items()
        if value != protocol.get(key, value)
    )


def _protocol_of_evaluation(metric: str) -> Json:
    if metric.startswith("perplexity/"):
        return WINDOWS | DRAWS.get(metric, {})
    shots = {"mmlu/acc": MMLU_SHOTS}.get(metric)
    return {"task_limit": None, "limits": None, "shots": shots, "chat": None, "include": None}


def _protocol_of_method(spec: TrialSpec) -> Json:
    """Return the method's own defaults, with C4 as the calibration text."""
    kind = settings_class(spec.method.name)
    if kind is None or spec.scheme is None:
        return {}
    method = kind()
    knobs = method.knobs(spec.scheme)
    return {
        **{f"method.{key}": value for key, value in knobs.items() if key != "name"},
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
    """Return a trial's settings under the names that `departures` compares."""
    settings: Json = {"dtype": spec.model.dtype}
    evaluation, calibration = spec.evaluation, spec.calibration
    if metric.startswith("perplexity/"):
        name = metric.removeprefix("perplexity/")
        text = next(text for text in evaluation.texts if text.name == name)
        settings |= {key: getattr(text, key) for key in ("window", "limit", "draw", "samples")}
    else:
        name = metric.removesuffix("/acc")
        task = next((task for task in evaluation.tasks if task.name == name), TaskRef(name=name))
        settings |= {key: getattr(evaluation, key) for key in ("task_limit", "chat", "include")}
        settings |= {"limits": task.limit, "shots": task.shots}
    if spec.scheme is not None:
        method = spec.method.to_json()
        settings |= {f"method.{key}": value for key, value in method.items() if key != "name"}
        settings |= {"symmetric": spec.scheme.symmetric, "scales": spec.scheme.scales}
    if calibration is not None:
        settings["calibration"] = calibration.source
        keys = ("samples", "length", "draw")
        settings |= {f"calibration.{key}": getattr(calibration, key) for key in keys}
    return settings


def verdict(
    metric: str,
    ours: float,
    theirs: float,
    interval: tuple[float, float] | None = None,
    half: float | None = None,
) -> str:
    """Judge whether a published number is reproduced.

    Reproduced: an accuracy within 1.5 points or with the published value inside our 95 % interval,
    any other number within 2 %. Two perplexities that both collapsed (above 1000, or not finite)
    count as reproduced. Close: within three times the tolerance. Half a unit of the last printed
    digit is allowed in addition.

    Args:
        ours: nan if it diverged; an accuracy as a fraction.
        theirs: as printed; an accuracy in percent.
        half: half a unit of its last digit; None: as the study prints them.
    """
    if is_perplexity(metric) and _collapsed(ours) and _collapsed(theirs):
        return REPRODUCED
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        neither = not math.isfinite(ours) and not math.isfinite(theirs)
        return REPRODUCED if neither else DIFFERENT
    if is_share(metric):
        if interval is not None and 100 * interval[0] <= theirs <= 100 * interval[1]:
            return REPRODUCED
        half = 0.05 if half is None else half
        off, allowed = abs(100 * ours - theirs) - half, ACCURACY_TOLERANCE
    else:
        if half is None:  # three significant digits are printed
            half = 0.5 * 10.0 ** (math.floor(math.log10(theirs)) - 2)
        off, allowed = abs(ours - theirs) - half, PERPLEXITY_TOLERANCE * abs(theirs)
    return REPRODUCED if off <= allowed else NEAR if off <= CLOSE * allowed else DIFFERENT


def _collapsed(perplexity: float) -> bool:
    return not math.isfinite(perplexity) or perplexity > COLLAPSED


def share_reproduced(compared: Sequence[Compared]) -> str:
    """Say in a sentence how many of the cells run by the study's protocol are reproduced."""
    verdicts: dict[Published, set[str]] = {}
    for item in compared:
        if not item.departs:
            verdicts.setdefault(item.published, set()).add(item.verdict)
    total = len(published())
    if not verdicts:
        departed = f" {len(compared)} comparisons depart from its protocol and are not counted."
        departed = departed if compared else ""
        return f"None of the study's {total} cells was run by its protocol.{departed} {LEFT_OUT}"
    return f"{of_verdicts(verdicts.values())}; the study has {total}."


def of_verdicts(verdicts: Collection[set[str]]) -> str:
    """Count the cells that are reproduced, by the verdicts on each."""
    good, run = sum(own == {REPRODUCED} for own in verdicts), len(verdicts)
    different = sum(DIFFERENT in own for own in verdicts)
    return (
        f"{good} of {run} cells reproduced ({percent(good / run, 0)} %), "
        f"{run - good - different} close, {different} different"
    )


def paper_table(compared: Sequence[Compared]) -> Table:
    """Return a row per compared cell."""
    used = dict.fromkeys(note for item in compared for note in item.notes)
    marks = {note: number for number, note in enumerate(used, start=1)}
    rows = tuple(
        (
            f"{item.published.model} {item.record.spec.name}",
            item.published.dataset,
            item.published.source,
            _printed(item),
            "diverged" if math.isnan(item.ours) else shown(item.ours, item.metric),
            item.difference,
            item.verdict + (f" (not counted: {', '.join(item.departs)})" if item.departs else ""),
            ", ".join(str(marks[note]) for note in item.notes) or "-",
        )
        for item in compared
    )
    tolerance = (
        f"Reproduced: perplexity within {100 * PERPLEXITY_TOLERANCE:g} %, accuracy within "
        f"{ACCURACY_TOLERANCE} points or the published value in our 95 % interval; two "
        f"perplexities above {COLLAPSED:g} have both collapsed. Close: within {CLOSE} times that "
        "tolerance."
    )
    notes = [f"[{number}] {note}" for note, number in marks.items()]
    columns = (
        *("trial", "measured on", "printed in", "published", "ours", "difference", "verdict"),
        "notes",
    )
    note = "\n\n".join([tolerance, LEFT_OUT, *notes, f"Published numbers: {SOURCE}."])
    return Table("Against the paper", columns, rows, note)


def _compare(theirs: Published, record: TrialRecord, metric: str, ours: float) -> Compared:
    notes = [note.text for note in NOTES if note.concerns(theirs)]
    judgement = verdict(metric, ours, theirs.value, record.intervals.get(metric))
    if theirs.method == "AWQ" and judgement != REPRODUCED and theirs.bits in (3, 4):
        group = "128" if theirs.group == "per-channel" else "per-channel"
        [other] = published_cells()[(theirs.model, "AWQ", theirs.bits, 16, group, theirs.dataset)]
        if verdict(metric, ours, other.value, record.intervals.get(metric)) == REPRODUCED:
            notes.append("Our number is the one printed for the other group size.")
    departs = departures(record.spec, metric)
    return Compared(theirs, record, metric, ours, judgement, departs, tuple(notes))


def _printed(item: Compared) -> str:
    value, metric = item.published.value, item.metric
    if not math.isfinite(value):
        return "NaN"
    return shown(value, metric) if metric.startswith("perplexity/") else fixed(value, 1)

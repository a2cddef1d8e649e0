"""What a trial leaves behind: its record, durable and plain, and the events it sends meanwhile."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from q3q.errors import UNREADABLE
from q3q.masking import masked
from q3q.placement import Placement, Trial
from q3q.spec import Json, TrialSpec
from q3q.storage.aside import clear_for_file, put_aside
from q3q.storage.files import SEAL, read_file, sealed, unsealed, write_atomically
from q3q.storage.names import file_name

COMPLETED, FAILED = "COMPLETED", "FAILED"
UNQUANTIZED = "unquantized"  # a note: that model's metrics, each [value] or [value, low, high]
ALLOTMENT = "allotment"  # a note, and beside the blocks that were made with it
# A note: numbers that a token leaves in the cache, of them in a head, how they are stored unless in
# 16 bits, and the context, if given.
CACHE = "cache"
JUDGED = "judged"  # a note: what a published checkpoint holds, beside its original (`likeness`)
ANSWER = "answer.md"  # the artifact that a tracker shows on the sweep's front page


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """The error of one quantized linear.

    weight_error: ||W - Q|| / ||W||, Frobenius; for AWQ, W after its scales have moved
    output_error: ||X (W - Q)^T|| / ||X W^T|| over the calibration tokens; None for a method that
        saw none, and where the outputs X W^T are all zero and those of Q are not
    experts: of a linear that every expert has, each expert's output error (its weight error where
        there is none), to four digits

    An error of nothing, relative to nothing, is 0.
    """

    block: int
    site: str
    linear: str
    weight_error: float
    output_error: float | None
    experts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.experts is not None:  # a list, where it was read from JSON
            object.__setattr__(self, "experts", tuple(self.experts))


@dataclass(frozen=True, kw_only=True)
class Check:
    """One integrity check. A trial with a failed one is FAILED, whatever its metrics."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of a trial against its baseline's, sample by sample.

    difference: the trial's mean less the baseline's; of a perplexity in nats per token, so that
        its exp is the ratio of the two perplexities; None if one of them is not finite
    low, high: its 95 % interval, None where there is none
    distinguishable: p_value < 0.05
    p_value: how often chance alone gives such a difference, None if unknown
    n: pairs
    test: what gave the p-value and the interval
    ratio: the difference is of logarithms, so its exp is the ratio of the two numbers; older
        records do not say so
    higher_is_better: None if unknown, or in an older record
    freedom: degrees of freedom of the Student's t that the interval comes from; None if it comes
        from none
    """

    metric: str
    difference: float | None
    low: float | None
    high: float | None
    distinguishable: bool
    p_value: float | None
    n: int
    test: str
    ratio: bool = False
    higher_is_better: bool | None = None
    freedom: float | None = None

    def to_json(self) -> Json:
        # What an older record lacks.
        later = {"ratio": False, "higher_is_better": None, "freedom": None}
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in later or value != later[key]
        }

    def describes(self, number: float, baseline: float) -> bool:
        """Return True if the difference is that of these two numbers, or of their logarithms."""
        if self.difference is None:
            return True
        rounding = 1e-6 * (abs(number) + abs(baseline)) + 1e-9  # a sum may be in float32
        if math.isclose(self.difference, number - baseline, rel_tol=1e-6, abs_tol=rounding):
            return True
        if number <= 0 or baseline <= 0:
            return False
        return math.isclose(
            self.difference, math.log(number / baseline), rel_tol=1e-6, abs_tol=1e-6
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Comparison":
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial's outcome.

    metrics: finite numbers by stable name (`perplexity/<text>`, `<task>/acc`, `bits_per_weight`,
        `seconds/<phase>`)
    intervals: 95 % interval of those that have one
    diverged: metrics whose value is not finite (a result too)
    sites: error of each quantized linear
    checks: integrity
    environment: code, packages, hardware, times, and what was planned beside what it took
    results: what the evaluation harness returned, unchanged
    notes: facts by name: fallbacks, damping raised, `stored` (see `quantize.ledger.stored_note`),
        `export` (see `export.publish`)
    comparisons: with the unquantized model, by metric, once its trial has finished too
    files: others in the trial's folder, with their SHA-256 (hex); None where an older version of
        q3q wrote the record, which did not note it
    """

    spec: TrialSpec
    placement: Placement = field(default=Placement(), compare=False)
    status: str
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    diverged: tuple[str, ...] = ()
    sites: tuple[SiteError, ...] = ()
    checks: tuple[Check, ...] = ()
    environment: Json = field(default_factory=dict)
    results: Json = field(default_factory=dict)
    notes: Json = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    files: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"metrics must be finite, list these under `diverged`: {wrong}")

    @classmethod
    def failed(cls, trial: Trial, reason: str, environment: Json | None = None) -> "TrialRecord":
        shown = {
            key: masked(fact) if isinstance(fact, str) else fact
            for key, fact in (environment or {}).items()
        }
        return cls(
            spec=trial.spec,
            placement=trial.placement,
            status=FAILED,
            reason=masked(reason),
            environment=shown,
        )

    @property
    def trial(self) -> Trial:
        return Trial(self.spec, self.placement)

    @property
    def completed(self) -> bool:
        return self.status == COMPLETED

    @property
    def unchecked(self) -> bool:
        """Return True if it names files without their checksums, as older versions' records do."""
        return None in self.files.values()

    @property
    def numbers(self) -> dict[str, float]:
        """All metrics, nan for those that are not finite."""
        return {**dict.fromkeys(self.diverged, math.nan), **self.metrics}

    def to_json(self) -> Json:
        facts = vars(self) | {
            "spec": self.trial.to_json(complete=True),
            "sites": [asdict(site) for site in self.sites],
            "checks": [asdict(check) for check in self.checks],
            "comparisons": {name: row.to_json() for name, row in self.comparisons.items()},
            # As an older version wrote it, if it did.
            "files": self.files if any(self.files.values()) else list(self.files),
        }
        del facts["placement"]
        return facts

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialRecord":
        facts = {key: value for key, value in data.items() if key != SEAL}
        trial = Trial.from_json(data["spec"])
        return cls(
            **facts
            | {
                "spec": trial.spec,
                "placement": trial.placement,
                "intervals": {name: (low, high) for name, (low, high) in data["intervals"].items()},
                "diverged": tuple(data["diverged"]),
                "sites": tuple(SiteError(**site) for site in data["sites"]),
                "checks": tuple(Check(**check) for check in data["checks"]),
                "comparisons": {
                    name: Comparison(**row) for name, row in data.get("comparisons", {}).items()
                },
                "files": _files(data.get("files", ())),
            }
        )

    def save(self) -> None:
        """Write `record.json`, or `failed.json`, so that no failure ever replaces a result."""
        folder = self.trial.folder
        content = sealed(self.to_json(), finite=True)
        write_atomically(folder / ("record.json" if self.completed else "failed.json"), content)
        if self.completed:
            forget_failure(self.trial)

    @classmethod
    def load(cls, path: Path) -> "TrialRecord":
        """Read a record; its placement is where the file lies.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is torn, or not what was written.
        """
        record = cls.from_json(unsealed(read_file(path)))
        return replace(record, placement=_as_found(path, record.trial).placement)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A trial's progress: `done` of `total` steps of a phase.

    phase: load, calibrate, quantize, evaluate ...
    metrics: what these steps have measured, finite, by the record's names
    system: what the process takes meanwhile, by MLflow's names of system metrics
    remark: a line that people should keep, such as that a damaged file was put aside
    """

    trial: str
    phase: str
    done: int = 0
    total: int = 0
    note: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    system: dict[str, float] = field(default_factory=dict)
    remark: str = ""


Report = Callable[[Progress], None]


@dataclass
class Scores:
    """An evaluation's results so far.

    diverged: metrics that are not finite
    results: lm-eval's own
    samples: what each sample scored
    """

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)
    results: Json = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)

    def add(self, part: Json) -> None:
        for name, value in part["metrics"].items():
            if value is None or not math.isfinite(value):
                self.diverged.append(name)
                continue
            self.metrics[name] = value
            low, high = part["intervals"].get(name) or (math.nan, math.nan)
            if math.isfinite(low) and math.isfinite(high):
                self.intervals[name] = (low, high)
        self.results.update(part["results"])
        self.samples += part["samples"]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, as it is filed before it runs.

    id: the same for the same set of trials
    command: what a person types to get it again
    config: composed, as YAML
    question, expectation: of a saved study, in its own words
    predicted: seconds of each trial still to run, by id
    experiment: what a tracker files it under
    names: each trial's name among these, by id
    started, ended: of a sweep that is filed after the fact (ISO 8601); empty means now
    """

    id: str
    name: str
    command: str
    config: str
    trials: tuple[Trial, ...]
    question: str = ""
    expectation: str = ""
    predicted: dict[str, float] = field(default_factory=dict)
    experiment: str = "q3q"
    names: dict[str, str] = field(default_factory=dict)
    started: str = ""
    ended: str = ""

    @property
    def context(self) -> int | None:
        """The tokens for which the sweep's report counts caches, as the user asked."""
        contexts = (trial.placement.context for trial in self.trials)
        return next((context for context in contexts if context is not None), None)

    @property
    def file_name(self) -> str:
        """The name of its file and of its report's folder, without an ending."""
        return f"{file_name(self.name)}_{self.id}"

    def save(self, storage: Path) -> None:
        """Write `<storage>/sweeps/<name>_<id>.json`, where reports and new trackers look."""
        path = storage / "sweeps" / f"{self.file_name}.json"
        try:
            self.load(path)
        except FileNotFoundError:
            pass
        except UNREADABLE as error:
            put_aside(path, f"cannot be read ({error})")
        write_atomically(path, sealed(self.to_json()))

    def to_json(self) -> Json:
        return vars(self) | {"trials": [trial.to_json() for trial in self.trials]}

    @classmethod
    def load(cls, path: Path) -> "Sweep":
        """Read a sweep; its trials are placed in the storage folder where the file lies.

        Earlier versions put a sweep called `a/b` into a folder `a` of its own.
        """
        data, folders = unsealed(read_file(path)), path.absolute().parents
        storage = next((folder.parent for folder in folders if folder.name == "sweeps"), folders[1])
        trials = tuple(Trial.from_json(trial).moved(storage) for trial in data["trials"])
        return cls(**{**data, "trials": trials})


def finished_baseline(trial: Trial) -> TrialRecord | None:
    """Return the record on disk that a trial is compared with, if that trial has finished."""
    if (baseline := trial.placement.baseline) is None:
        return None
    try:
        record = TrialRecord.load(trial.placement.trials / baseline / "record.json")
    except UNREADABLE:
        return None
    return record if record.completed and record.spec.id == baseline else None


def load_trial(path: Path) -> Trial:
    """Read a trial's spec.json; its placement is where the file lies."""
    return _as_found(path, Trial.from_json(json.loads(read_file(path))))


def _files(data: Mapping[str, str] | Iterable[str]) -> dict[str, str | None]:
    return dict(data) if isinstance(data, Mapping) else dict.fromkeys(data)


def _as_found(path: Path, trial: Trial) -> Trial:
    folder = path.absolute().parent
    in_its_place = (folder.parent.name, folder.name) == ("trials", trial.id)
    return trial.moved(folder.parents[1]) if in_its_place else trial


def forget_failure(trial: Trial) -> None:
    """Delete the record of a failed attempt."""
    path = trial.folder / "failed.json"
    clear_for_file(path)
    with suppress(NotADirectoryError):  # whoever claims the trial puts aside what is there
        path.unlink(missing_ok=True)


def forget_progress(trial: Trial) -> None:
    """Delete all but kept blocks, and the last record, which stays until a new one replaces it."""
    for folder in (trial.blocks_folder, trial.folder / "evaluations"):
        shutil.rmtree(folder, ignore_errors=True)


def block_errors(sites: Iterable[SiteError]) -> dict[int, dict[str, float]]:
    """Return the mean error of each block's linears, as metrics; without what is not finite."""
    errors: dict[int, dict[str, list[float]]] = {}
    for site in sites:
        of_block = errors.setdefault(site.block, {})
        of_block.setdefault("block/weight_error", []).append(site.weight_error)
        if site.output_error is not None:
            of_block.setdefault("block/output_error", []).append(site.output_error)
    means = {
        block: {name: sum(values) / len(values) for name, values in lists.items()}
        for block, lists in errors.items()
    }
    return {
        block: {name: mean for name, mean in of_block.items() if math.isfinite(mean)}
        for block, of_block in means.items()
    }

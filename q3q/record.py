"""What a trial left behind: its record, durable and plain, and the small events it sends while it works."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from q3q.masking import masked
from q3q.spec import Json, TrialSpec
from q3q.storage.files import SEAL, sealed, unsealed, write_atomically

COMPLETED, FAILED = "COMPLETED", "FAILED"


@dataclass(frozen=True, kw_only=True)
class SiteError:
    """How far one quantized linear is from the original.

    weight_error: ||W - Q|| / ||W||, Frobenius (of AWQ, W after its scales have moved). output_error:
    ||X (W - Q)^T|| / ||X W^T|| over the calibration tokens, None for a method that saw none.
    experts: of a linear that every expert has, each one's output error, its weight error where there is none; to four
    digits.
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

    difference: the trial's mean less the baseline's; of a perplexity in nats per token, so that its exp is the ratio of
    the two perplexities. None if one of them is not finite. low, high: its 95 % interval, None where there is none.
    distinguishable: p_value < 0.05. p_value: how often chance alone would give such a difference, None if unknown.
    n: pairs. test: what gave the p-value and the interval.
    """

    metric: str
    difference: float | None
    low: float | None
    high: float | None
    distinguishable: bool
    p_value: float | None
    n: int
    test: str

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Comparison":
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial's outcome.

    metrics: finite numbers by stable name (`perplexity/<text>`, `<task>/acc`, `bits_per_weight`, `seconds/<phase>`).
    intervals: 95 % interval of those that have one. diverged: metrics whose value is not finite (a result too).
    sites: error of each quantized linear. checks: integrity. environment: code, packages, hardware, times, and what was
    planned beside what it took.
    results: what the evaluation harness returned, as it returned it. notes: facts by name (fallbacks, damping raised).
    comparisons: with the unquantized model, by metric, once its trial is there too.
    files: others in the trial's folder.
    """

    spec: TrialSpec
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
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"metrics must be finite, list these under `diverged`: {wrong}")

    @classmethod
    def failed(cls, spec: TrialSpec, reason: str, environment: Json | None = None) -> "TrialRecord":
        told = {
            key: masked(fact) if isinstance(fact, str) else fact
            for key, fact in (environment or {}).items()
        }
        return cls(spec=spec, status=FAILED, reason=masked(reason), environment=told)

    @property
    def completed(self) -> bool:
        return self.status == COMPLETED

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialRecord":
        return cls(
            **{
                **{key: value for key, value in data.items() if key != SEAL},
                "spec": TrialSpec.from_json(data["spec"]),
                "intervals": {name: (low, high) for name, (low, high) in data["intervals"].items()},
                "diverged": tuple(data["diverged"]),
                "sites": tuple(SiteError(**site) for site in data["sites"]),
                "checks": tuple(Check(**check) for check in data["checks"]),
                "comparisons": {
                    name: Comparison(**row) for name, row in data.get("comparisons", {}).items()
                },
                "files": tuple(data.get("files", ())),
            }
        )

    def save(self) -> None:
        """To the trial's folder: `record.json`, or `failed.json`, so that no failure ever replaces a result."""
        content = sealed(self.to_json(), finite=True)
        write_atomically(
            trial_folder(self.spec) / ("record.json" if self.completed else "failed.json"), content
        )
        if self.completed:
            (trial_folder(self.spec) / "failed.json").unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "TrialRecord":
        """Raises ValueError if the file is torn, or not what was written. Its places are where it lies: see `moved`."""
        record = cls.from_json(unsealed(path.read_bytes()))
        return replace(record, spec=_at(path, record.spec))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A trial tells how far it is. phase: load, calibrate, quantize, evaluate ... done of total steps of that phase.

    metrics: what these steps have measured, by the name that the record will have it under; finite.
    system: what the process takes meanwhile, now and then; names as MLflow's own system metrics.
    """

    trial: str
    phase: str
    done: int = 0
    total: int = 0
    note: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    system: dict[str, float] = field(default_factory=dict)


def block_errors(sites: Iterable[SiteError]) -> dict[int, dict[str, float]]:
    """Of each block the mean error of its linears, as metrics; what is not finite is left out."""
    found: dict[int, dict[str, list[float]]] = {}
    for site in sites:
        of_block = found.setdefault(site.block, {})
        of_block.setdefault("block/weight_error", []).append(site.weight_error)
        if site.output_error is not None:
            of_block.setdefault("block/output_error", []).append(site.output_error)
    means = {
        k: {name: sum(some) / len(some) for name, some in lists.items()}
        for k, lists in found.items()
    }
    return {
        k: {name: mean for name, mean in some.items() if math.isfinite(mean)}
        for k, some in means.items()
    }


def trial_folder(spec: TrialSpec) -> Path:
    """Where a trial's durable state lies: spec, evaluations so far, record."""
    return Path(spec.places["trials"]) / spec.id


def load_spec(path: Path) -> TrialSpec:
    """A trial's spec.json. Its places are where it lies: see `moved`."""
    return _at(path, TrialSpec.from_json(json.loads(path.read_text(encoding="utf-8"))))


def _at(path: Path, spec: TrialSpec) -> TrialSpec:
    folder = path.absolute().parent
    return (
        moved(spec, folder.parents[1])
        if (folder.parent.name, folder.name) == ("trials", spec.id)
        else spec
    )


def moved(spec: TrialSpec, storage: Path) -> TrialSpec:
    """The spec as it is in a storage folder, which may have been moved or copied since the spec was written: what lay
    in the old one lies in this one, and the store that the old one mirrored is not this one's."""
    old = Path(spec.places["trials"]).parent if "trials" in spec.places else storage
    if old == storage:
        return spec
    places = {key: value for key, value in spec.places.items() if key != "store"} | {
        "trials": str(storage / "trials")
    }
    if "export" in places and Path(places["export"]).is_relative_to(old):
        places["export"] = str(storage / Path(places["export"]).relative_to(old))
    return spec.with_places(places)


def blocks_folder(spec: TrialSpec) -> Path:
    """Where a trial under way writes its quantized blocks."""
    return trial_folder(spec) / "blocks"


def kept_blocks_folder(spec: TrialSpec) -> Path:
    """Where finished blocks are kept (keep=blocks); trials that differ in their evaluation alone share them."""
    return Path(spec.places["trials"]) / "blocks" / spec.quantization_id


def forget_progress(spec: TrialSpec) -> None:
    """Start from nothing the next time, but for kept blocks. The last record stays until a new one replaces it."""
    for folder in (blocks_folder(spec), trial_folder(spec) / "evaluations"):
        shutil.rmtree(folder, ignore_errors=True)


ANSWER = "answer.md"  # the artifact that a tracker shows on the sweep's front page


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is known of a sweep before it runs.

    id: the same for the same set of trials. command: what a person types to get it again. config: composed, as YAML.
    question, expectation: of a saved study, in its own words. predicted: seconds of each trial still to run, by id.
    experiment: what a tracker files it under. names: what each trial is called among these, by id.
    started, ended: when it ran, of one that is filed after the fact (ISO 8601); empty: now.
    """

    id: str
    name: str
    command: str
    config: str
    trials: tuple[TrialSpec, ...]
    question: str = ""
    expectation: str = ""
    predicted: dict[str, float] = field(default_factory=dict)
    experiment: str = "q3q"
    names: dict[str, str] = field(default_factory=dict)
    started: str = ""
    ended: str = ""

    def save(self, storage: Path) -> None:
        """To `<storage>/sweeps/<name>_<id>.json`: a report, or a new tracker, finds its trials there."""
        write_atomically(
            storage / "sweeps" / f"{self.name}_{self.id}.json", json.dumps(self.to_json()).encode()
        )

    def to_json(self) -> Json:
        return {**asdict(self), "trials": [spec.to_json() for spec in self.trials]}

    @classmethod
    def load(cls, path: Path) -> "Sweep":
        """Its trials' places are in the storage folder where it lies: see `moved`."""
        data, storage = json.loads(path.read_text(encoding="utf-8")), path.absolute().parent.parent
        return cls(
            **{
                **data,
                "trials": tuple(
                    moved(TrialSpec.from_json(spec), storage) for spec in data["trials"]
                ),
            }
        )


@dataclass
class Scores:
    """What evaluation found so far: metrics with intervals, names of those that are not finite, lm-eval's results, and
    what each sample scored."""

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

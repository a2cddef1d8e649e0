"""What a trial is: everything that can change one of its numbers, and nothing else.

A spec's id is a digest of its JSON, so the JSON is canonical: what a method ignores is absent,
defaults are resolved, and a setting that is seldom given is left out where it is not. New settings
must keep this, or old ids would change.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from q3q.bit_budget import BitBudget

# Everybody imports these from here, methods of other packages too.
from q3q.calibration import MIX as MIX  # noqa: PLC0414
from q3q.calibration import OWN_TEXT as OWN_TEXT  # noqa: PLC0414
from q3q.calibration import TRACES as TRACES  # noqa: PLC0414
from q3q.calibration import WRITTEN as WRITTEN  # noqa: PLC0414
from q3q.calibration import Calibration as Calibration  # noqa: PLC0414
from q3q.calibration import CalibrationPart as CalibrationPart  # noqa: PLC0414
from q3q.canonical import Json as Json  # noqa: PLC0414
from q3q.canonical import checked, without_none
from q3q.canonical import digest as digest  # noqa: PLC0414
from q3q.errors import ConfigError
from q3q.evaluation import AUTO_DRIFT as AUTO_DRIFT  # noqa: PLC0414
from q3q.evaluation import MEAN_ACCURACY as MEAN_ACCURACY  # noqa: PLC0414
from q3q.evaluation import QUICK_SEED as QUICK_SEED  # noqa: PLC0414
from q3q.evaluation import Evaluation as Evaluation  # noqa: PLC0414
from q3q.evaluation import TaskRef as TaskRef  # noqa: PLC0414
from q3q.evaluation import TextRef as TextRef  # noqa: PLC0414
from q3q.evaluation import text_metric as text_metric  # noqa: PLC0414
from q3q.kv_scheme import KvScheme
from q3q.number_formats import INT, short_name
from q3q.scheme import ACTIVATION_KEYS
from q3q.scheme import SELDOM_OF_SCHEME as SELDOM_OF_SCHEME  # noqa: PLC0414
from q3q.scheme import Scheme as Scheme  # noqa: PLC0414
from q3q.scheme import Schemes as Schemes  # noqa: PLC0414

# Absent from a spec's JSON where they are not given.
SELDOM = (
    *("overrides", "skip", "head_bits", "embedding_bits", "kv", "export", "reference", "rules"),
    "budget",
)


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model's weights, and the type that they are computed in.

    name: label for people, not part of any id
    digest: of the files in a local folder
    source, revision: Hub id and commit
    dtype: float32, bfloat16 or float16
    package: `name version` of the package that offers its family; None for q3q's own
    """

    name: str | None
    digest: str | None = None
    source: str | None = None
    revision: str | None = None
    dtype: str
    package: str | None = None

    @property
    def label(self) -> str:
        return str(self.name or self.source)

    @property
    def files(self) -> str:
        """Identify the files alone, whatever type they are computed in."""
        return self.digest or f"{self.source}@{self.revision}"

    @property
    def identity(self) -> Json:
        facts = self.to_json()
        del facts["name"]
        return facts

    def to_json(self) -> Json:
        return without_none(asdict(self), keep=("name",))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelRef":
        return cls(**{"name": None, "dtype": None, **data})


@dataclass(frozen=True, kw_only=True)
class MethodRef:
    """A method, the version of its numerics, and its knobs.

    package: `name version` of the package that offers it; None for q3q's own
    """

    name: str
    version: int | None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None

    def to_json(self) -> Json:
        ends = {"version": self.version, "package": self.package}
        return {"name": self.name, **self.knobs, **without_none(ends)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MethodRef":
        knobs = {"version": None, "package": None, **data}
        name = checked("the method's name", knobs.pop("name"), str)
        version, package = knobs.pop("version"), knobs.pop("package")
        return cls(name=name, version=version, knobs=knobs, package=package)


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial.

    calibration: None for a method that observes nothing
    overrides, skip: linears, by full name, that differ from the scheme, and in what, or that
        stay as they are
    head_bits, embedding_bits: rounded to nearest; None leaves them in 16 bits. One tensor, and
        equal, where the model ties them
    kv: how the evaluated model's cache stores keys and values; None leaves them in 16 bits
    export: format of the checkpoint that the trial writes too
    reference: the original of a published checkpoint, which this one is compared with
    rules: the name patterns that overrides and skip were given as; for people, not part of the id
    budget: allots bits to the linears while the trial runs; then they stand in its overrides, and
        are no part of the id, as they follow from the rest
    """

    model: ModelRef
    method: MethodRef
    scheme: Scheme | None
    calibration: Calibration | None
    evaluation: Evaluation
    seed: int
    overrides: dict[str, Json] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None
    kv: KvScheme | None = None
    export: str | None = None
    reference: ModelRef | None = None
    rules: Json = field(default_factory=dict, compare=False)
    budget: BitBudget | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        for key in ("head_bits", "embedding_bits"):
            bits = getattr(self, key)
            if bits is not None and not 2 <= bits <= 8:
                raise ConfigError(
                    f"{key}={bits} is out of range: give 2 to 8, or null to leave it in 16 bits"
                )

    @cached_property
    def id(self) -> str:
        """Ten hex digits, the same on every machine, so that no finished trial runs twice."""
        facts = self.quantization | {
            "evaluation": self.evaluation.to_json(),
            "act_bits": self.scheme.act_bits if self.scheme else None,
        }
        if self.scheme is not None:
            acts = ("act_format", "act_group_size")
            facts |= {key: value for key, value in self.scheme.to_json().items() if key in acts}
            if changes := _some_of(self.overrides, lambda key: key in ACTIVATION_KEYS):
                facts["act_overrides"] = changes
        if self.kv is not None:
            facts["kv"] = self.kv.to_json()
        return digest(facts | ({"export": self.export} if self.export else {}))[:10]

    @cached_property
    def quantization_id(self) -> str:
        """Ten hex digits of the quantized weights, however they are evaluated."""
        return digest(self.quantization)[:10]

    @property
    def quantization(self) -> Json:
        """Return all that determines the quantized weights.

        Activations are quantized later, keys and values too.
        """
        facts = self.to_json()
        for later in ("evaluation", "export", "kv", "rules"):
            facts.pop(later, None)
        facts["model"] = self.model.identity
        if self.reference is not None:
            facts["reference"] = self.reference.identity
        if self.scheme is not None:
            overrides = self.overrides if self.budget is None else without_bits(self.overrides)
            facts.pop("overrides", None)
            if changes := _some_of(overrides, lambda key: key not in ACTIVATION_KEYS):
                facts["overrides"] = changes
            for later in ACTIVATION_KEYS:
                facts["scheme"].pop(later, None)
        return facts

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The model, and what it is compared with."""
        return (self.model,) if self.reference is None else (self.model, self.reference)

    @property
    def schemes(self) -> Schemes | None:
        """Return None if nothing is quantized."""
        if self.scheme is None:
            return None
        head, embedding = (
            None
            if bits is None
            else replace(self.scheme, bits=bits, format=INT, group_rows=1, four_over_six=False)
            for bits in (self.head_bits, self.embedding_bits)
        )
        return Schemes(self.scheme, self.overrides, frozenset(self.skip), head, embedding)

    @property
    def rounds_nothing(self) -> bool:
        """True if the model is evaluated as it is: neither weights nor its cache are rounded.

        And is not itself compared with another, whose rounding it is.
        """
        return self.scheme is None and self.kv is None and self.reference is None

    @property
    def heads(self) -> int:
        """Return 2 where logits are compared with those of another head, the original's, else 1."""
        another = self.reference is not None or self.head_bits is not None
        return 2 if another and self.evaluation.drift is not None else 1

    @property
    def generates(self) -> tuple[str, ...]:
        """Name what has the model write text, token by token: tasks, and its own calibration."""
        writes = self.calibration is not None and self.calibration.writes
        return (*self.evaluation.generates, *((OWN_TEXT,) if writes else ()))

    @property
    def name(self) -> str:
        """Name the trial for people: `gptq w3 g128 blocks.0:w8 -*.down head:w8`."""
        if self.scheme is None:
            return f"{self.method.name} {self.departures}".rstrip()
        scheme = self.scheme
        between = " " if scheme.format != INT and scheme.act_bits else ""
        codes = scheme.codes if self.budget is None else "mixed"
        stored = f"{codes}{between}{scheme.activations} {scheme.groups}"
        return f"{self.method.name} {stored} {self.departures}".rstrip()

    @property
    def label(self) -> str:
        """Name the trial and its model: `gptq w3 g128 · qwen3_8b`."""
        return f"{self.name} · {self.model.label}"

    @property
    def departures(self) -> str:
        """List what differs from the scheme, for people: `blocks.0:w8 -*.down head:w8`."""
        words = [
            f"{pattern}:{_override_in_a_word(changes)}"
            for pattern, changes in self.rules.get("overrides", {}).items()
        ]
        words += [f"-{pattern}" for pattern in self.rules.get("skip", ())]
        ends = {"head": self.head_bits, "embedding": self.embedding_bits}
        words += [f"{end}:w{bits}" for end, bits in ends.items() if bits]
        words += [self.kv.name] if self.kv else []
        words += [self.budget.words] if self.budget else []
        words += [f"export:{self.export}"] if self.export else []
        return " ".join(words)

    def to_json(self, *, complete: bool = False) -> Json:
        """Return plain JSON; `complete` keeps what is seldom given also where it is not."""
        facts: Json = {part.name: getattr(self, part.name) for part in fields(self)}
        facts |= {
            "model": self.model.to_json(),
            "method": self.method.to_json(),
            "scheme": self.scheme and self.scheme.to_json(),
            "calibration": self.calibration and self.calibration.to_json(),
            "evaluation": self.evaluation.to_json(),
            "kv": self.kv and self.kv.to_json(),
            "reference": self.reference and self.reference.to_json(),
            "overrides": {name: dict(changes) for name, changes in self.overrides.items()},
            "skip": list(self.skip),
            "budget": self.budget and self.budget.to_json(),
        }
        for newer in ("kv", "reference"):  # than the first records, which lack them
            if facts[newer] is None:
                del facts[newer]
        if complete:
            # A record of a trial without a budget looks as it always has.
            return {key: value for key, value in facts.items() if key != "budget" or value}
        if self.scheme is not None and self.scheme.scales is None:
            del facts["scheme"]["scales"]
        return {key: value for key, value in facts.items() if key not in SELDOM or value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialSpec":
        """Read what any version wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not a spec.
        """
        facts = {key: value for key, value in data.items() if key != "places"}
        for part in ("model", "method", "evaluation"):
            checked(part, data[part], dict)
        scheme, calibration = data["scheme"], data["calibration"]
        budget = data.get("budget")
        return cls(
            **facts
            | {
                "model": ModelRef.from_json(data["model"]),
                "method": MethodRef.from_json(data["method"]),
                "scheme": None if scheme is None else Scheme(**scheme),
                "calibration": None if calibration is None else Calibration.from_json(calibration),
                "evaluation": Evaluation.from_json(data["evaluation"]),
                "skip": tuple(data.get("skip", ())),
                "reference": data.get("reference") and ModelRef.from_json(data["reference"]),
                "kv": None if data.get("kv") is None else KvScheme(**data["kv"]),
                "rules": checked("rules", data.get("rules", {}), dict),
                "budget": None if budget is None else BitBudget.from_json(budget),
            }
        )


def without_bits(overrides: Mapping[str, Json]) -> dict[str, Json]:
    """Return what overrides say beside bits, for the linears of which they say anything else."""
    return _some_of(overrides, lambda key: key != "bits")


def _some_of(overrides: Mapping[str, Json], keeps: Callable[[str], bool]) -> dict[str, Json]:
    """Return some keys of overrides, and only the linears that have any of them."""
    parts = {
        name: {key: value for key, value in own.items() if keeps(key)}
        for name, own in overrides.items()
    }
    return {name: part for name, part in parts.items() if part}


def _override_in_a_word(changes: Json) -> str:
    """Return `w8`, `w4g64sym` or `nvfp4anvfp4`."""
    words: dict[str, Callable[[Any], str]] = {
        "format": short_name,
        "bits": lambda bits: f"w{bits}",
        "group_size": lambda size: "pc" if size == -1 else f"g{size}",
        "symmetric": lambda symmetric: "sym" if symmetric else "asym",
        "act_format": lambda name: f"a{short_name(name)}",
        "act_bits": lambda bits: f"a{bits}",
        "act_scales": lambda scales: f" {scales}",
    }
    return "".join(word(changes[key]) for key, word in words.items() if key in changes)

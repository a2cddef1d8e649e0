"""What a trial is: everything that can change a number, in canonical form, and nothing that cannot."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from q3q.errors import ConfigError
from q3q.storage.mirror import settled

if TYPE_CHECKING:
    pass

Json = dict[str, Any]
FEW_SHOT, WORD_TASK = (
    ("mmlu", "mmlu_paper"),
    "wikitext",
)  # tasks that are no part of a mean accuracy
MEAN_ACCURACY = "accuracy"  # the metric that is the mean over the others
SELDOM = ("overrides", "skip", "head_bits", "embedding_bits", "export", "rules")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How numbers are stored.

    bits: bits of a weight's code. group_size: neighbouring input columns that share a scale, -1 for the whole row.
    symmetric: codes lie evenly around zero. act_bits: bits of each quantized linear's input (dynamic, per token), or
    None to leave activations alone. scales: types that scales are rounded to, in turn (`bfloat16 float16`), because an
    export stores them so; None leaves them in float32.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_bits: int | None = None
    scales: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits} is out of range: give 1 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(
                f"group_size={self.group_size}: give a positive number of columns, or -1 for whole rows"
            )
        if self.act_bits is not None and not 2 <= self.act_bits <= 16:
            raise ConfigError(f"act_bits={self.act_bits} is out of range: give 2 to 16, or null")


@dataclass(frozen=True)
class Schemes:
    """The scheme of every linear by its full name, `blocks.3.mlp.down_proj`: the base's, but for some.

    overrides: what differs from the base. skip: linears that stay as they are. head, embedding: None leaves them alone.
    """

    base: Scheme
    overrides: Mapping[str, Json] = field(default_factory=dict)
    skip: Collection[str] = ()
    head: Scheme | None = None
    embedding: Scheme | None = None

    def of(self, linear: str) -> Scheme | None:
        """None for a linear that is not quantized."""
        if linear in self.skip:
            return None
        changed = self.overrides.get(linear)
        return replace(self.base, **changed) if changed else self.base


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial. What a method ignores is absent (None), its defaults are resolved, files are content digests.

    model: name, source (folder or hub id), digest (of a folder) or revision (of a hub id), dtype.
    method: name, version of its numerics, and its knobs.
    calibration: source, digest, samples, length, draw; None for a method that observes nothing.
    evaluation: what is measured, on which texts (with digests) and tasks.
    overrides, skip: which linears, by full name, differ from the scheme and in what, or stay as they are.
    head_bits, embedding_bits: of the head and the embedding, rounded to nearest; None leaves them alone. One tensor and
    equal where they are tied.
    export: format of the checkpoint that is written too, None for none.
    places: where on this machine the files are. rules: the name patterns that overrides and skip were given as, for
    people. Neither is part of what the trial *is*: `id` does not see them.
    """

    model: Json
    method: Json
    scheme: Scheme | None
    calibration: Json | None
    evaluation: Json
    seed: int
    overrides: dict[str, Json] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    head_bits: int | None = None
    embedding_bits: int | None = None
    export: str | None = None
    places: Json = field(default_factory=dict, compare=False)
    rules: Json = field(default_factory=dict, compare=False)

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
        """Ten hex digits; equal specs share an id on every machine, so a finished trial is never run twice."""
        act_bits = self.scheme.act_bits if self.scheme else None
        whole = {**self.quantization, "evaluation": self.evaluation, "act_bits": act_bits}
        return _digest(whole | ({"export": self.export} if self.export else {}))

    @cached_property
    def quantization_id(self) -> str:
        """Ten hex digits that say which quantized weights these are, however they are evaluated."""
        return _digest(self.quantization)

    @property
    def quantization(self) -> Json:
        """All that determines the quantized weights. Activations are quantized later; a model's name is for people."""
        whole = self.to_json()
        del whole["places"], whole["evaluation"]
        for later in ("export", "rules"):
            whole.pop(later, None)
        whole["model"] = {key: value for key, value in self.model.items() if key != "name"}
        if self.scheme is not None:
            del whole["scheme"]["act_bits"]
        return whole

    @property
    def schemes(self) -> Schemes | None:
        """How each linear, the head and the embedding are stored; None if nothing is quantized."""
        if self.scheme is None:
            return None
        head, embedding = (
            None if bits is None else replace(self.scheme, bits=bits)
            for bits in (self.head_bits, self.embedding_bits)
        )
        return Schemes(self.scheme, self.overrides, frozenset(self.skip), head, embedding)

    @property
    def heads(self) -> int:
        return heads_held(self.head_bits, self.evaluation)

    @property
    def name(self) -> str:
        """Short, for people: `gptq w3 g128`, `gptq w3 g128 blocks.0:w8 -*.down head:w8`."""
        if self.scheme is None:
            return str(self.method["name"])
        group = "pc" if self.scheme.group_size == -1 else f"g{self.scheme.group_size}"
        act = f"a{self.scheme.act_bits}" if self.scheme.act_bits else ""
        return f"{self.method['name']} w{self.scheme.bits}{act} {group} {self.departures}".rstrip()

    @property
    def departures(self) -> str:
        """What is stored otherwise than the scheme says, for people: `blocks.0:w8 -*.down head:w8`; or nothing."""
        words = [
            f"{pattern}:{_brief(changed)}"
            for pattern, changed in self.rules.get("overrides", {}).items()
        ]
        words += [f"-{pattern}" for pattern in self.rules.get("skip", ())]
        ends = {"head": self.head_bits, "embedding": self.embedding_bits}
        words += [f"{end}:w{bits}" for end, bits in ends.items() if bits]
        words += [f"export:{self.export}"] if self.export else []
        return " ".join(words)

    def flat(self) -> dict[str, str]:
        """Dotted keys and printable values, as trackers like their params."""
        whole = self.to_json()
        del whole["places"]
        # A pattern says in a word what it means in each of a hundred blocks.
        whole |= {key: json.dumps(value) for key, value in whole.pop("rules", {}).items()}
        whole["evaluation"] = _brief_data(whole["evaluation"])
        return dict(_flatten(whole))

    def to_json(self) -> Json:
        """What is seldom given is absent where it is not: the id of a trial without it must not change."""
        whole = asdict(self)
        if self.scheme is not None and self.scheme.scales is None:
            del whole["scheme"]["scales"]
        return {key: value for key, value in whole.items() if key not in SELDOM or value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialSpec":
        """Its places are those of this machine, whichever wrote it."""
        scheme, places = data["scheme"], settled(data.get("places", {}))
        return cls(
            **{
                **data,
                "scheme": None if scheme is None else Scheme(**scheme),
                "skip": tuple(data.get("skip", ())),
                "places": places,
            }
        )

    def with_places(self, places: Json) -> "TrialSpec":
        return replace(self, places=places)


def text_metric(measure: str, text: str, quick: bool) -> str:
    """`perplexity/wikitext2`; of a quick evaluation `perplexity_quick/wikitext2`."""
    return f"{measure}{'_quick' if quick else ''}/{text}"


def task_metric(name: str, quick: bool) -> str:
    """A metric as lm-eval names it under the name that records use: `mmlu/acc`, of a quick evaluation `mmlu_quick/acc`.

    lm-eval's `wikitext` task measures a text: what it calls wikitext/word_perplexity is word_perplexity/wikitext2.
    """
    task, _, metric = name.partition("/")
    return (
        text_metric(metric, "wikitext2", quick)
        if task == "wikitext"
        else text_metric(task, metric, quick)
    )


def mean_metrics(spec: TrialSpec) -> list[str]:
    """The accuracies that a trial's mean is over; as in the study, not MMLU's, which has five shots."""
    tasks = [task for task in spec.evaluation.get("tasks", []) if task != WORD_TASK]
    zero_shot = [task for task in tasks if task not in FEW_SHOT]
    return [accuracy_metric(spec, task) for task in zero_shot or tasks]


def accuracy_metric(spec: TrialSpec, task: str) -> str:
    return text_metric(task, "acc", bool(spec.evaluation.get("quick")))


def _brief_data(evaluation: Json) -> Json:
    """An evaluation with one digest for each repository of data sets: MMLU has 57."""
    parts: dict[str, list[str]] = {}
    for name, identity in evaluation.get("data", {}).items():
        parts.setdefault(name.partition(":")[0], []).append(identity)
    brief = {
        name: found[0] if len(set(found)) == 1 else _digest({"all": found})
        for name, found in parts.items()
    }
    return {**evaluation, "data": brief} if brief else evaluation


def heads_held(head_bits: int | None, evaluation: Mapping[str, Any]) -> int:
    """How many heads a trial holds: two where what a quantized one says is compared with what the original says."""
    return 2 if head_bits is not None and evaluation.get("drift") is not None else 1


def _brief(changed: Json) -> str:
    """An override in a word: `w8`, `w4g64sym`."""
    parts = {
        "bits": lambda bits: f"w{bits}",
        "group_size": lambda size: "pc" if size == -1 else f"g{size}",
        "symmetric": lambda symmetric: "sym" if symmetric else "asym",
    }
    return "".join(word(changed[key]) for key, word in parts.items() if key in changed)


def _digest(data: Json) -> str:
    return hashlib.sha256(
        json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()[:10]


def _flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            pairs += _flatten({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return pairs


QUICK_SEED = 0  # of the questions that evaluation.quick draws

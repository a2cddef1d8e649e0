"""What a trial is: everything that can change a number, in canonical form, and nothing that cannot."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from q3q.errors import ConfigError

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How numbers are stored.

    bits: bits of a weight's code. group_size: neighbouring input columns that share a scale, -1 for the whole row.
    symmetric: codes lie evenly around zero. act_bits: bits of each quantized linear's input (dynamic, per token), or
    None to leave activations alone.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_bits: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits} is out of range: give 1 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(f"group_size={self.group_size}: give a positive number of columns, or -1 for whole rows")
        if self.act_bits is not None and not 2 <= self.act_bits <= 16:
            raise ConfigError(f"act_bits={self.act_bits} is out of range: give 2 to 16, or null")


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial. What a method ignores is absent (None), its defaults are resolved, files are content digests.

    model: name, source (folder or hub id), digest (of a folder) or revision (of a hub id), dtype.
    method: name, version of its numerics, and its knobs.
    calibration: source, digest, samples, length, draw; None for a method that observes nothing.
    evaluation: what is measured, on which texts (with digests) and tasks.
    places: where on this machine the files are. Not part of what the trial *is*: `id` does not see it.
    """

    model: Json
    method: Json
    scheme: Scheme | None
    calibration: Json | None
    evaluation: Json
    seed: int
    places: Json = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")

    @cached_property
    def id(self) -> str:
        """Ten hex digits; equal specs share an id on every machine, so a finished trial is never run twice."""
        act_bits = self.scheme.act_bits if self.scheme else None
        return _digest({**self.quantization, "evaluation": self.evaluation, "act_bits": act_bits})

    @cached_property
    def quantization_id(self) -> str:
        """Ten hex digits that say which quantized weights these are, however they are evaluated."""
        return _digest(self.quantization)

    @property
    def quantization(self) -> Json:
        """All that determines the quantized weights. Activations are quantized later; a model's name is for people."""
        whole = self.to_json()
        del whole["places"], whole["evaluation"]
        whole["model"] = {key: value for key, value in self.model.items() if key != "name"}
        if self.scheme is not None:
            del whole["scheme"]["act_bits"]
        return whole

    @property
    def name(self) -> str:
        """Short, for people: `gptq w3 g128`."""
        if self.scheme is None:
            return str(self.method["name"])
        group = "pc" if self.scheme.group_size == -1 else f"g{self.scheme.group_size}"
        act = f"a{self.scheme.act_bits}" if self.scheme.act_bits else ""
        return f"{self.method['name']} w{self.scheme.bits}{act} {group}"

    def flat(self) -> dict[str, str]:
        """Dotted keys and printable values, as trackers like their params."""
        whole = self.to_json()
        del whole["places"]
        return dict(_flatten(whole))

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialSpec":
        scheme = data["scheme"]
        return cls(**{**data, "scheme": None if scheme is None else Scheme(**scheme)})

    def with_places(self, places: Json) -> "TrialSpec":
        return replace(self, places=places)


def _digest(data: Json) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:10]


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

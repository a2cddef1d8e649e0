"""Rotary position embeddings' frequencies, scaled as transformers scales them for longer contexts.

config.json is read without torch, so that a plan or a refusal costs milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q3q.models.config_values import Values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALINGS = ("default", "linear", "llama3", "yarn", "dynamic")
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies differ from the plain ones.

    kind: one of `SCALINGS` but `default`; `dynamic` is plain up to the model's most positions, and
        what transformers computes beyond them is not computed
    factor: by how much the context is longer than the one of training, `original`
    low, high: of `llama3`: wavelengths above original / low are stretched by the factor, those
        below original / high stay; of `yarn`: turns within the original context, `beta_slow` and
        `beta_fast`
    truncate: of `yarn`: the bounds are whole dimensions
    amplitude: factor of the embedding's cosines and sines
    """

    kind: str
    factor: float
    original: int = 1
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0


def read_rope(values: Values) -> tuple[float, RopeScaling | None]:
    """Return the base of the frequencies, and their scaling.

    Raises:
        CheckpointError: the scaling is none of `SCALINGS`, or makes no sense.
    """
    section = _section(values)
    theta_in = section if section.get("rope_theta") is not None else values.config
    theta = Values(theta_in, values.wrong).positive("rope_theta", 10_000.0)
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in SCALINGS:
        raise values.wrong(f"rope_type={kind!r} is not supported, only {', '.join(SCALINGS)}")
    if any(isinstance(value, Mapping) for value in section.values()):
        raise values.wrong("rope_parameters that differ between layers are not supported")
    if kind == "default":
        return theta, None
    own = Values(section, values.wrong)
    if kind in ("linear", "dynamic"):
        return theta, RopeScaling(kind=kind, factor=own.positive("factor"))
    longest = values.count("max_position_embeddings", 32_768)
    within = own if values.config.get(ORIGINAL) is None else values
    original = within.count(ORIGINAL, longest)
    if kind == "llama3":
        scaling = RopeScaling(
            kind=kind,
            factor=own.positive("factor"),
            original=original,
            low=own.positive("low_freq_factor"),
            high=own.positive("high_freq_factor"),
        )
        if scaling.low >= scaling.high:
            raise values.wrong(
                f"low_freq_factor={scaling.low:g} must be below high_freq_factor={scaling.high:g}"
            )
        return theta, scaling
    factor = own.positive("factor", longest / original)
    return theta, RopeScaling(
        kind=kind,
        factor=factor,
        original=original,
        low=own.positive("beta_slow", 1.0),
        high=own.positive("beta_fast", 32.0),
        truncate=own.flag("truncate", True),
        amplitude=_amplitude(own, factor),
    )


def _section(values: Values) -> Mapping[str, Any]:
    """Return config.json's table of rotary positions, under transformers 5's name or 4's.

    Raises:
        CheckpointError: both are there and differ. transformers would take the older one, and
            its base of the frequencies from elsewhere, or a default.
    """
    new, old = values.table("rope_parameters"), values.table("rope_scaling")
    given = {"rope_type" if key == "type" else key: value for key, value in old.items()}
    if new and any(new.get(key) != value for key, value in given.items()):
        raise values.wrong(
            "rope_parameters and rope_scaling are both given, and differ: keep one of them, with "
            "its rope_theta"
        )
    return new or old


def rotary_share(values: Values) -> float:
    """Return the share of a head's dimensions, the first ones, that positions turn.

    Raises:
        CheckpointError: it is no share.
    """
    key = "partial_rotary_factor"
    section = _section(values)
    within = values if section.get(key) is None else Values(section, values.wrong)
    share = within.positive(key, 1.0)
    if share > 1:
        raise values.wrong(f"{key}={share:g} is more than a whole head")
    return share


def _amplitude(section: Values, factor: float) -> float:
    """Return YaRN's factor of cosines and sines (arXiv 2309.00071, equation 22)."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    given = section.config.get
    default = of(1.0)
    if given("mscale") and given("mscale_all_dim"):
        default = of(section.positive("mscale")) / of(section.positive("mscale_all_dim"))
    return section.positive("attention_factor", default)


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | str
) -> Tensor:
    """Return the angle by which each pair of a head's dimensions turns a position, [D / 2].

    Args:
        head_dim: of those that are turned.
    """
    import torch

    even = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float()
    plain = 1.0 / (theta ** (even / head_dim))
    if scaling is None or scaling.kind == "dynamic":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / plain
        blend = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
        between = (1 - blend) * plain / scaling.factor + blend * plain
        stretched = torch.where(
            wavelength > scaling.original / scaling.low, plain / scaling.factor, between
        )
        return torch.where(wavelength < scaling.original / scaling.high, plain, stretched)
    return _yarn(head_dim, theta, scaling, theta ** (even / head_dim))


def _yarn(head_dim: int, theta: float, scaling: RopeScaling, periods: Tensor) -> Tensor:
    """Return YaRN's frequencies (arXiv 2309.00071): slow pairs stretched, fast ones as they are."""
    import torch

    def dimension(turns: float) -> float:
        """Return the pair's dimension that makes `turns` turns within the original context."""
        length = math.log(scaling.original / (turns * 2 * math.pi))
        return head_dim * length / (2 * math.log(theta))

    first, last = dimension(scaling.high), dimension(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    steps = torch.arange(head_dim // 2, dtype=torch.float32, device=periods.device)
    kept = 1 - ((steps - first) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept

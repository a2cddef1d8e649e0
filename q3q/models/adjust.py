"""Change a loaded model's blocks: route tokens to all experts, round activations or the cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from q3q.errors import IntegrityError
from q3q.models.block import Block
from q3q.models.decoder import Decoder
from q3q.models.kv_cache import KvRounding
from q3q.numerics.stored_scales import input_factor
from q3q.scheme import InputRounding
from q3q.spec import TrialSpec


def set_route(model: Decoder, spec: TrialSpec) -> None:
    """Show calibration's tokens to all experts, or to the router's choice.

    The router alone always decides which experts a block's output comes from.
    """
    if model.facts.experts:
        every_expert = spec.calibration is not None and spec.calibration.route == "all"
        model.adjust(partial(route, every_expert))


def route(every_expert: bool, _: int, block: Block) -> None:
    block.every_expert = every_expert


def set_activations(
    model: Decoder, spec: TrialSpec, peaks: Mapping[str, float] | None = None
) -> None:
    """Fake-quantize each site's input from here on, if the scheme says so.

    A model that is evaluated as it is may have been stored with activations to quantize, and
    keeps them.

    Args:
        peaks: by site, `blocks.3.down`: the largest number that calibration showed it, for inputs
            that are rounded below a factor.
    """
    if spec.scheme is not None:
        scheme, schemes = spec.scheme, spec.schemes
        assert schemes is not None
        otherwise = {
            name: own.inputs
            for name in spec.overrides
            if (own := schemes.of(name)) is not None and own.inputs != scheme.inputs
        }
        model.adjust(RoundedInputs(scheme.inputs, frozenset(spec.skip), otherwise, peaks or {}))


def set_cache(model: Decoder, spec: TrialSpec) -> None:
    """Round keys and values from here on as the spec says its cache stores them, if it does.

    16 bits turn off what a checkpoint's own config says.
    """
    if spec.kv is not None:
        model.round_cache(KvRounding(spec.kv) if spec.kv.rounds else None)


@dataclass(frozen=True)
class RoundedInputs:
    """A change of every block; picklable.

    skip: linears that stay as they are
    otherwise: by full name, linears whose site's input is rounded in another way
    peaks: as `set_activations` takes them
    """

    rounding: InputRounding | None
    skip: frozenset[str]
    otherwise: Mapping[str, InputRounding | None] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, k: int, block: Block) -> None:
        usual = self.rounding
        own: dict[str, InputRounding | None] = {
            site.name: self.otherwise[full]
            for site in block.sites
            for name in site.weights
            if (full := f"blocks.{k}.{name.removesuffix('.weight')}") in self.otherwise
        }
        skipped = {
            name
            for site in block.sites
            for name in site.weights
            if f"blocks.{k}.{name.removesuffix('.weight')}" in self.skip
        }
        sites = {site.name for site in block.sites if skipped.issuperset(site.weights)}
        if usual is not None and usual.scales == "factor":  # each site has a number of its own
            factored = {site.name: usual for site in block.sites if site.name not in sites}
            own = {**factored, **own}
            usual = None
        block.rounding = usual
        block.own_rounding = {
            name: self._numbered(how, f"blocks.{k}.{name}", block.dtype)
            for name, how in own.items()
            if how is not None
        }
        apart = {name for site in block.sites for name in site.apart if name in skipped}
        left_alone = {name for name, how in own.items() if how is None}
        block.unrounded = frozenset(sites | apart | left_alone)

    def _numbered(self, how: InputRounding, site: str, dtype: torch.dtype) -> InputRounding:
        """Return a rounding with the factor that it takes from calibration, if it takes one.

        Raises:
            IntegrityError: calibration did not find it.
        """
        if how.scales != "factor":
            return how
        if site not in self.peaks:
            raise IntegrityError(f"{site}: no factor was stored for its input with its block")
        return replace(how, number=input_factor(self.peaks[site], how.format, dtype))

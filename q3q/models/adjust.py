"""Change every block of a loaded model: route tokens to all experts, or quantize activations."""

from dataclasses import dataclass

from q3q.models.decoder import Decoder
from q3q.models.qwen3 import Qwen3Block
from q3q.models.qwen3_moe import Qwen3MoeBlock
from q3q.spec import TrialSpec


def set_route(model: Decoder, spec: TrialSpec) -> None:
    """Whether calibration shows every token to every expert. What the experts pass on is the router's choice always."""
    if model.facts.experts:
        model.adjust(Route(spec.calibration is not None and spec.calibration.get("route") == "all"))


@dataclass(frozen=True)
class Route:
    """A change of every block, which can go to other processes."""

    every_expert: bool

    def __call__(self, _: int, block: Qwen3Block) -> None:
        if isinstance(block, Qwen3MoeBlock):
            block.every_expert = self.every_expert


def set_activations(model: Decoder, spec: TrialSpec) -> None:
    """From here on each site's input is fake-quantized, if the scheme says so. Calibration saw 16-bit activations."""
    if (
        spec.scheme is not None
    ):  # a model that is evaluated as it is may have been stored with activations to quantize
        model.adjust(RoundedInputs(spec.scheme.act_bits, frozenset(spec.skip)))


@dataclass(frozen=True)
class RoundedInputs:
    """A change of every block, which can go to other processes. skip: linears that stay as they are."""

    act_bits: int | None
    skip: frozenset[str]

    def __call__(self, k: int, block: Qwen3Block) -> None:
        block.act_bits = self.act_bits
        block.unrounded = frozenset(
            site.name
            for site in block.sites
            if all(
                f"blocks.{k}.{name.removesuffix('.weight')}" in self.skip for name in site.weights
            )
        )

"""What a decoder block is made of, as data: its sites and its scale groups.

A *site* is one tensor that several linears read; statistics and solves belong to the site. A *scale group* is a site,
and the weight before it that can take over a scale per channel without changing what the block computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from q3q.models.facts import ModelFacts
    from q3q.models.qwen3 import Qwen3Block


@dataclass(frozen=True)
class Site:
    """One tensor and the weights that read it, by their names in the block; 3-D weights have an expert axis first.

    also: weights that read the same tensor and stay unquantized (the router).
    """

    name: str
    weights: tuple[str, ...]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScaleGroup:
    """producer: the weight whose outputs the site reads, a norm's gain or a linear's rows (dense or per expert).

    repeat, head_dim: grouped-query attention; each run of head_dim outputs of the producer appears `repeat` times, one
    after the other, in the site's input.
    """

    site: Site
    producer: str
    repeat: int = 1
    head_dim: int = 1


@dataclass(frozen=True)
class SiteInput:
    """What flows into a site. Shapes: T tokens, I channels.

    whole_TI: all tokens, None where the tensor exists per expert only. experts: the tokens each expert reads (in a
    dense block one entry, the whole); go through them once and in order, they may be made on the way. The walk knows:
    windows: in how many calibration windows the tokens came, of_windows: of how many in all (each as long), 0 if that
    is not known. first_window: the place of its first among all, None if they follow those that came before. linears:
    how many read it. unrouted: every expert reads all tokens, be it in a tensor of its own.
    """

    whole_TI: Tensor | None
    experts: Sequence[Tensor]
    windows: int = 1
    of_windows: int = 0
    first_window: int | None = None
    linears: int = 0
    unrouted: bool = False

    @property
    def shared(self) -> bool:
        """Whether every expert reads all tokens."""
        return self.whole_TI is not None and all(tokens is self.whole_TI for tokens in self.experts)


QKV = Site("qkv", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"))
O = Site("o", ("self_attn.o_proj.weight",))  # noqa: E741  (the field's name for it)
GATE_UP = Site("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"))
DOWN = Site("down", ("mlp.down_proj.weight",))
EXPERT_GATE_UP = Site(
    "gate_up",
    ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight"),
    also=("mlp.gate.weight",),
)
EXPERT_DOWN = Site("down", ("mlp.experts.down_proj.weight",))


def block_class(facts: "ModelFacts", layer: int) -> "Callable[..., Qwen3Block]":
    """The class that runs this layer. A new model family adds its line here."""
    from q3q.models.qwen3 import Qwen3Block
    from q3q.models.qwen3_moe import Qwen3MoeBlock

    return Qwen3MoeBlock if facts.sparse(layer) else Qwen3Block

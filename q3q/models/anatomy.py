"""A decoder block's anatomy as data: its sites and its scale groups.

A *site* is one tensor that several linears read; statistics and solves belong to the site. A *scale
group* is a site with the weight before it, which can take over a scale per channel without changing
the block's function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Site:
    """One tensor and the names of the block's weights that read it.

    A 3-D weight's first axis is its experts.

    unquantized: weights that read it too and are not quantized (a router)
    scores: weights whose outputs are multiplied with each other, as queries with keys
    mixes_tokens: what reads it mixes the tokens of a window, so a window runs as a whole
    apart: weights that may stay unquantized beside the others and then read the input unrounded
    """

    name: str
    weights: tuple[str, ...]
    unquantized: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    mixes_tokens: bool = False
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScaleGroup:
    """A site and the weight whose outputs it reads.

    In grouped-query attention each run of `head_dim` of the producer's outputs appears `repeat`
    times, one after the other, in the site's input.

    offset: what the forward adds to the producer, a norm's gain
    also: further sites that read the same tensor, and so take the same scale
    """

    site: Site
    producer: str  # a norm's gain, or a linear's rows (dense or per expert)
    repeat: int = 1
    head_dim: int = 1
    offset: float = 0.0
    also: tuple[Site, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """All weights that read the producer's outputs."""
        own = (*self.site.weights, *self.site.unquantized)
        others = (name for s in self.also for name in (*s.weights, *s.unquantized))
        return tuple(dict.fromkeys((*own, *others)))

    def over_repeats(self, values_EI: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """Reduce over the inputs that repeat one of the producer's outputs, for each of them."""
        if self.repeat == 1:
            return values_EI
        values_EKRD = values_EI.unflatten(1, (-1, self.repeat, self.head_dim))
        return reduce(values_EKRD, 2, keepdim=True).expand_as(values_EKRD).flatten(1)


@dataclass(frozen=True)
class SiteInput:
    """A site's input. Shapes: T tokens, I channels.

    The walk fills in the fields from `windows` on.

    all_TI: all tokens; None if the tensor exists per expert only.
    experts: each expert's tokens; a dense block has one entry, all tokens. Tokens that were routed
        are `GroupedRows`, which lie in one tensor; others may be computed when they are read, so
        iterate once and in order.
    windows: number of calibration windows that the tokens came in.
    total_windows: number of all calibration windows, each as long; 0 if unknown.
    first_window: index of the first window among all; None if it follows the previous input's.
    linears: number of linears that read the input.
    unrouted: every expert reads all tokens, even if each has a tensor of its own.
    """

    all_TI: Tensor | None
    experts: Sequence[Tensor]
    windows: int = 1
    total_windows: int = 0
    first_window: int | None = None
    linears: int = 0
    unrouted: bool = False

    @property
    def shared(self) -> bool:
        """True if all experts read one and the same tensor."""
        return self.all_TI is not None and all(tokens is self.all_TI for tokens in self.experts)


class Computed(Sequence["Tensor"]):
    """Tensors that are computed when they are read, as all at once would not fit.

    Args:
        read: returns the tensor of an index.
    """

    def __init__(self, indices: Sequence[int], read: Callable[[int], Tensor]) -> None:
        self._indices, self._read = indices, read

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Computed: ...

    def __getitem__(self, index: int | slice) -> Tensor | Computed:
        if isinstance(index, slice):
            return Computed(self._indices[index], self._read)
        return self._read(self._indices[index])


def bias_of(weight: str) -> str:
    """Return the name of a linear's bias: `mlp.up_proj.bias` of `mlp.up_proj.weight`."""
    return f"{weight.removesuffix('weight')}bias"


QKV = Site(
    "qkv",
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    scores=("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    mixes_tokens=True,
)
O = Site("o", ("self_attn.o_proj.weight",))  # noqa: E741  (the field's name for it)
GATE_UP = Site("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"))
DOWN = Site("down", ("mlp.down_proj.weight",))
EXPERT_GATE_UP = Site(
    "gate_up",
    ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight"),
    unquantized=("mlp.gate.weight",),
)
EXPERT_DOWN = Site("down", ("mlp.experts.down_proj.weight",))
SHARED_GATE_UP = Site(
    "shared_gate_up", ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight")
)
SHARED_DOWN = Site("shared_down", ("mlp.shared_expert.down_proj.weight",))

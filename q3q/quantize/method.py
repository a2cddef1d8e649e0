"""The seam that every quantization method fills: three hooks, all but the last with a default.

A method sees one site or one scale group at a time; the walk owns loops, devices and memory. Shapes: E experts (1 in
a dense block), O out features (of all the site's weights, row-concatenated), I in features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from q3q.calibrate.statistics import Statistics
from q3q.models.anatomy import ScaleGroup
from q3q.numerics.weights import StoredWeight
from q3q.spec import Scheme


@dataclass
class SiteTask:
    """One site, to be quantized.

    weight_EOI: float32, the site's weights concatenated by rows; rows names each one's slice. statistics: what the
    method's own accumulator saw, None if it observes nothing. notes: facts for the record (a raised damping, experts
    that fell back), filled by the method.
    """

    block: int
    site: str
    weight_EOI: Tensor
    rows: dict[str, slice]
    statistics: Any
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScaleTask:
    """One scale group, to be rebalanced.

    weights: the block's weights by name, current. rows: the site's inputs [R, T, I] as rows that the piece of the block
    which reads them treats one by one: windows for attention, tokens (T is 1) for an MLP. run: that piece's outputs for
    some rows, with some of its weights exchanged. apply: shift `scale` [E or 1, I] from the producer to the readers.
    """

    group: ScaleGroup
    weights: Mapping[str, Tensor]
    statistics: Any
    rows: Callable[[], Tensor]
    run: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    apply: Callable[[Tensor], None]


class Method(ABC):
    """One post-training quantization method.

    sequential: each site of a block sees inputs that the block's already quantized sites produced (one forward pass);
    otherwise all sites are observed with the block's original weights first.
    passes_on_quantized: the next block is calibrated on the quantized block's outputs, or on the original one's.
    """

    sequential: ClassVar[bool] = False
    passes_on_quantized: ClassVar[bool] = True
    search_windows: int = 8

    def variants(self) -> dict[str, "Method"]:
        """Ways to set the method up, by name, of which `quantize.search` is to find the one that serves the model best.

        Empty, as here, if there is nothing to search. `search_windows` calibration windows are what they are tried on.
        """
        return {}

    def observe(self) -> Statistics | None:
        """A fresh accumulator for one site's inputs, or None if the method needs no calibration data."""
        return None

    def rebalance(self, task: ScaleTask, scheme: Scheme) -> None:  # noqa: B027  (a hook, not a duty)
        """Shift scale between a producer and its readers, leaving the block's function unchanged."""

    @abstractmethod
    def quantize(self, task: SiteTask, scheme: Scheme) -> StoredWeight:
        """Choose the codes of one site's weights. `task.weight_EOI` is not modified."""

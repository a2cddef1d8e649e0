"""The seam that every quantization method fills: three hooks, all but the last with a default.

A method sees one site or one scale group at a time; the walk owns loops, devices and memory. Shapes: E experts (1 in
a dense block), O out features (of all the site's weights, row-concatenated), I in features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from q3q.models.anatomy import ScaleGroup
from q3q.models.spool import Spool
from q3q.numerics.weights import StoredWeight
from q3q.quantize.statistics import Statistics, starved_experts
from q3q.spec import Scheme


@dataclass
class SiteTask:
    """One site, to be quantized.

    weight_EOI: float32, the site's weights concatenated by rows; rows names each one's slice. statistics: what the
    method's own accumulator saw, None if it observes nothing. notes: facts for the record (a raised damping, experts
    that fell back), filled by the method. first_expert: where these experts begin among all of the site's.
    """

    block: int
    site: str
    weight_EOI: Tensor
    rows: dict[str, slice]
    statistics: Any
    notes: dict[str, Any] = field(default_factory=dict)
    first_expert: int = 0

    def starved_experts(self) -> list[int]:
        """The experts that too few calibration tokens reached: rounded to nearest by every method, and noted."""
        starved = starved_experts(self.statistics.tokens_E)
        if starved:
            self.notes["starved_experts"] = [self.first_expert + e for e in starved]
        return starved

    def note_damping(self, damping_E: Tensor, wanted: float) -> None:
        """Note the experts whose Hessian could be factored only with more damping than was asked for."""
        dampings = enumerate(damping_E.tolist(), start=self.first_expert)
        raised = {e: damping for e, damping in dampings if damping > wanted * 1.01}
        if raised:
            self.notes["damping_raised"] = raised


@dataclass
class ScaleTask:
    """One scale group, to be rebalanced.

    weights: the block's weights by name, current. windows: the site's inputs, [T, I] for each calibration window; they
    may lie on disk. row: how many tokens the piece of the block that reads them treats as one: a window's in
    attention, 1 in an MLP. run: that piece's outputs for some rows [R, row, I], with some of its weights exchanged.
    spool: where to put what is as large as the inputs. apply: shift `scale` [E or 1, I] from the producer to the
    readers.
    """

    group: ScaleGroup
    weights: Mapping[str, Tensor]
    statistics: Any
    windows: Sequence[Tensor]
    row: int
    run: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    spool: Callable[[], Spool]
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

    def row_step(self, device: torch.device) -> int | None:
        """Rows of a dense site may be quantized apart, given the same statistics, in runs of a multiple of so many (but
        for the last) without changing a bit; None: only all together. So the ranks of a gang divide them."""
        return None

    @abstractmethod
    def quantize(self, task: SiteTask, scheme: Scheme) -> StoredWeight:
        """Choose the codes of one site's weights. `task.weight_EOI` is not modified."""

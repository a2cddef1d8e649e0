"""Sums over calibration windows, taken in lanes that ranks can share.

Sums over calibration tokens are the same bit for bit however many ranks of a gang share the work.
Each calibration window belongs to one of `LANES` lanes by its index alone (`lane_of`), a batch to
that of its first window. Each lane sums its batches in order; the total is lane 0 + lane 1 + ... in
order. In a gang, rank r receives the batches of `lanes_of(r, ranks)`, a run of lanes, cut as one
process would cut them and with `SiteInput.first_window` set:

    own = method.observe()
    own.keep_lanes()           # before the first batch
    own.update(...)            # this rank's batches in order; perhaps none
    total = method.observe()
    for rank in range(ranks):  # in this order; a part can be pickled
        total.absorb(own if rank == this_rank else received_from(rank))

Each rank that does so has what one process has that saw all batches. The ranks may also form a
chain, which sends one matrix a hop instead of all lanes: rank 0 absorbs its own part and sends
`total` to rank 1, which absorbs its own, and so on; the last rank has the sum of all. Absorbing a
part uses it up.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from q3q.models.footprint import LANES


def lane_of(window: int, windows: int) -> int:
    """Return the lane of a window by its index; there is one lane if `windows` is unknown (0)."""
    return window * LANES // windows if windows else 0


def lanes_of(rank: int, ranks: int) -> range:
    """Return one rank's lanes; some ranks have none where there are more ranks than lanes."""
    return range(rank * LANES // ranks, (rank + 1) * LANES // ranks)


class LaneSum:
    """A sum of tensors over lanes, in order.

    One process holds two tensors at most: the total and the current lane.

    Args:
        add: add the second tensor to the first, in place.

    Attributes:
        lanes: tensors not in the total yet: the current lane's or, if kept apart, all lanes'.
        separate: keep lanes apart until they are absorbed.
    """

    def __init__(self, add: Callable[[Tensor, Tensor], object]) -> None:
        self.lanes: dict[int, Tensor] = {}
        self.separate = False
        self._add = add
        self._total: Tensor | None = None
        self._last = 0  # lanes before it can no longer be added
        self._spare: Tensor | None = None

    def accumulator(
        self, lane: int, shape: Sequence[int], device: torch.device
    ) -> tuple[Tensor, bool]:
        """Return the tensor for this lane's next batch, and True if it is to be overwritten."""
        if lane in self.lanes:
            return self.lanes[lane], False
        if lane < max(self.lanes, default=self._last):
            raise ValueError(
                f"a batch of lane {lane} came after one of a later lane; show windows in order"
            )
        if not self.separate:
            self._add_up()
        spare, self._spare = self._spare, None
        self.lanes[lane] = torch.zeros(*shape, device=device) if spare is None else spare
        return self.lanes[lane], True

    def total(self) -> Tensor:
        """Return the sum of all lanes, not a copy of it; to be read after the last batch."""
        self._add_up()
        self._spare = None
        return torch.empty(0) if self._total is None else self._total

    def absorb(self, later: "LaneSum") -> None:
        """Add the lanes of another sum, or begin with its total; `later` loses them."""
        self._add_up()
        self._spare = None
        if self._total is None:
            self._total, self._last, later._total = later._total, later._last, None
        if later._total is not None or min(later.lanes, default=LANES) < self._last:
            raise ValueError("parts of a sum are absorbed in the order of their lanes")
        for lane in sorted(later.lanes):
            self.lanes[lane] = later.lanes.pop(lane)
            self._add_up()
            self._spare = None

    def _add_up(self) -> None:
        for lane in sorted(self.lanes):
            part = self.lanes.pop(lane)
            self._last = lane
            if self._total is None:
                self._total = part
            else:
                self._add(self._total, part)
                self._spare = part

"""Forward passes of a block that halt at each site, so that its weights can change meanwhile."""

from collections.abc import Iterator

from torch import Tensor

from q3q.models.anatomy import Site, SiteInput
from q3q.models.block import Block, Rope, Stages, finish
from q3q.quantize.activations import Activations


class Runs:
    """A block's forward passes over all batches, halted at the same site.

    As many stay halted as `activations.room` holds. Each of the others starts again from the
    block's input at every site, through the weights that the block has by then: to the same bits.
    """

    def __init__(self, block: Block, activations: Activations, rope: Rope) -> None:
        self._block, self._activations, self._rope = block, activations, rope
        self._hidden = activations.hidden
        self._halted: list[_HaltedRun] = []
        room = activations.room
        for x_BTH in self._hidden:
            size = x_BTH.numel() // x_BTH.shape[-1] * block.halted_width * x_BTH.element_size()
            if room is not None and (room := room - size) < 0:
                break
            self._halted.append(_HaltedRun(block.stages(x_BTH, rope)))

    def inputs_of(self, site: Site) -> Iterator[SiteInput]:
        """Yield each batch's input at a site.

        Ask for the sites in order; the same site may be asked for again.
        """
        for b in range(len(self._hidden)):
            if b < len(self._halted):
                inputs, windows = self._halted[b].advance_to(site), len(self._hidden[b])
            else:
                x_BTH = self._hidden[b]
                run, windows = self._block.stages(x_BTH, self._rope), len(x_BTH)
                inputs = advance_to(run, site)
            yield self._activations.number_windows(inputs, b, windows)

    def finish(self) -> None:
        """Replace the block's inputs by its outputs."""
        for b in range(len(self._hidden)):
            if b < len(self._halted):
                self._hidden[b] = self._halted[b].finish()
            else:
                self._hidden[b] = self._block(self._hidden[b], self._rope)


class _HaltedRun:
    """One forward pass, and its input at the site where it is halted."""

    def __init__(self, run: Stages) -> None:
        self._run = run
        self._reached: tuple[Site, SiteInput] | None = None

    def advance_to(self, site: Site) -> SiteInput:
        if self._reached is None or self._reached[0] != site:
            self._reached = None  # frees the last site's input before the next one is made
            self._reached = site, advance_to(self._run, site)
        return self._reached[1]

    def finish(self) -> Tensor:
        self._reached = None
        return finish(self._run)


def advance_to(run: Stages, site: Site) -> SiteInput:
    """Continue a forward pass up to a site, and return its input there."""
    while True:
        reached, inputs = next(run)
        if reached == site:
            return inputs

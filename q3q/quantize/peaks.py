"""The largest number that each site of a quantized block reads, over the calibration tokens.

Servers round such a site's inputs below one factor, which follows from this number
(`Scheme.act_scales`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from q3q.errors import IntegrityError, NumericsError
from q3q.models.anatomy import Site, SiteInput
from q3q.models.block import Block, Rope
from q3q.quantize.activations import Activations
from q3q.quantize.sites import SiteQuantizer
from q3q.quantize.statistics import Peak
from q3q.team import Team


class SitePeaks:
    """The peaks of those sites of a block whose inputs are rounded below a calibrated factor.

    All experts of a block count as one, because servers run them with one factor. So an expert that
    no token reaches has a factor too.
    """

    def __init__(self, quantizers: Sequence[SiteQuantizer]) -> None:
        self._of = {
            quantizer.site: Peak()
            for quantizer in quantizers
            if any(scheme.calibrates_inputs for _, scheme in quantizer.parts)
        }

    def __bool__(self) -> bool:
        return bool(self._of)

    def update(self, site: Site, inputs: SiteInput) -> None:
        """Take a batch's input at one of the block's sites, if its peak is wanted."""
        if site in self._of:
            self._of[site].update(inputs)

    def read(self, block: Block, x_BTH: Tensor, rope: Rope) -> Tensor:
        """Run one batch through the block, and take its input at each site; return the output."""
        run = block.stages(x_BTH, rope)
        while True:
            try:
                site, inputs = next(run)
            except StopIteration as end:
                output: Tensor = end.value
                return output
            self.update(site, inputs)

    def numbers(self, index: int, team: Team) -> dict[str, float]:
        """Return the peaks of all ranks' batches by site, on every rank.

        Args:
            index: the block's.

        Raises:
            NumericsError: an input was not finite.
            IntegrityError: no calibration token reached a site.
        """
        by_site = {
            site.name: peak.peak_EI.max() for site, peak in self._of.items() if len(peak.tokens_E)
        }
        values = torch.stack(list(by_site.values())).tolist() if by_site else []  # one question
        own = dict(zip(by_site, values, strict=True))
        peaks: dict[str, float] = {}
        for ranks in team.gather(own) if team.size > 1 else [own]:
            for site, peak in ranks.items():
                if not 0 <= peak < float("inf"):
                    raise NumericsError(
                        f"blocks.{index}.{site}: calibration activations are not finite"
                    )
                peaks[site] = max(peak, peaks.get(site, 0.0))
        if unread := sorted({site.name for site in self._of} - peaks.keys()):
            raise IntegrityError(
                f"blocks.{index}.{unread[0]}: the block was quantized without calibration tokens, "
                "which the factor of its input needs; give the same command again"
            )
        return peaks


def read_peaks(
    block: Block,
    activations: Activations,
    rope: Rope,
    peaks: SitePeaks,
    *,
    passes_on: Block | None,
) -> None:
    """Run all batches through a quantized block to read its peaks.

    Args:
        passes_on: the block whose outputs replace the inputs; None to keep them.
    """
    hidden = activations.hidden
    for b in range(len(hidden)):
        x_BTH = hidden[b]
        output_BTH = peaks.read(block, x_BTH, rope)
        if passes_on is not None:
            hidden[b] = output_BTH if passes_on is block else passes_on(x_BTH, rope)

"""BiLLM's weights: a sign and a group for each, and a few numbers for each row of a block.

Shapes: E experts (1 in a dense block), O out features, I in features, G blocks of columns, S
columns per block, 4 groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from q3q.errors import ShapeError
from q3q.number_formats import SCALE_BITS
from q3q.numerics.stored import StoredWeight


@dataclass(frozen=True)
class BinarizedWeight(StoredWeight):
    """BiLLM's codes (arXiv 2402.04291): each weight is its group's mean +- its group's scale.

    Each row of each block of S neighbouring columns has three groups. *Small* and *large* weights
    are distinguished one by one; *salient* weights fill whole columns of a linear, and their
    remainder is binarized once more.

    codes_EOI: uint8. Bit 0: sign. Bit 1: large, or a salient remainder's sign. Bit 2: salient.
    mean_EOG4: float32, the means of small, large, salient, and the salient remainder.
    scale_EOG4: float32, the scales of the same four.
    """

    mean_EOG4: Tensor
    scale_EOG4: Tensor

    kind: ClassVar[str] = "binarized"
    TENSORS: ClassVar[Mapping[str, str]] = {
        "codes": "codes_EOI",
        "mean": "mean_EOG4",
        "scale": "scale_EOG4",
    }
    SALIENT: ClassVar[int] = 4  # codes from here on

    def __post_init__(self) -> None:
        shape = self.mean_EOG4.shape
        if shape != self.scale_EOG4.shape or shape[:2] != self.codes_EOI.shape[:2]:
            shapes = [tuple(t.shape) for t in (self.codes_EOI, self.mean_EOG4, self.scale_EOG4)]
            raise ShapeError("codes {}, means {}, scales {} do not fit".format(*shapes))

    @property
    def code_bits(self) -> int:
        return 3

    def dequantize(self) -> Tensor:
        signs_2 = torch.tensor([-1.0, 1.0], device=self.mean_EOG4.device)
        value_EOG42 = self.mean_EOG4[..., None] + signs_2 * self.scale_EOG4[..., None]
        once_EOG4 = value_EOG42[..., :2, :].flatten(-2)
        twice_EOG4 = (value_EOG42[..., 3, :, None] + value_EOG42[..., 2, None, :]).flatten(-2)
        level_EOG8 = torch.cat([once_EOG4, twice_EOG4], dim=-1)
        codes_EOGS = self.codes_EOI.unflatten(2, (self.mean_EOG4.shape[2], -1))
        return level_EOG8.gather(-1, codes_EOGS.long()).flatten(2)

    def storage_bits(self) -> int:
        """Count one linear's bits: about 3 bits a weight with blocks of 128 columns.

        Each weight takes two bits (its sign, and its group or second sign), each row of a block 8
        numbers of 16 bits, and each column a bit that marks salient ones.
        """
        experts, _, columns = self.codes_EOI.shape
        numbers = 2 * self.mean_EOG4.numel()
        return 2 * self.codes_EOI.numel() + numbers * SCALE_BITS["float"] + experts * columns

    def nominal_bits(self) -> int:
        """Count as BiLLM's paper does: a bit a weight, and one more for salient ones.

        The published code counts the salient share of each linear's last block only, not of all.
        """
        return self.codes_EOI.numel() + int((self.codes_EOI >= self.SALIENT).sum())

    def largest_scale(self) -> float:
        return max(float(self.scale_EOG4.amax()), float(self.mean_EOG4.abs().amax()))

    def too_fine(self) -> bool:
        """Return True if a code has more than three bits or a column is salient in some rows only.

        To be called for one linear: each has its own salient columns.
        """
        salient_EOI = self.codes_EOI >= self.SALIENT
        whole_columns = torch.equal(salient_EOI.all(1), salient_EOI.any(1))
        return super().too_fine() or not whole_columns

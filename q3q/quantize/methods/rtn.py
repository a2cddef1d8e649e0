"""Round to nearest: the baseline that every other method must beat."""

import torch

from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.weights import QuantizedWeight, round_to_grid
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.methods.settings import RtnSettings
from q3q.spec import Scheme


class Rtn(Method):
    """Rounds each weight to its group's min-max grid (GPTQ's Quantizer), without calibration."""

    def __init__(self, settings: RtnSettings) -> None:
        self.settings = settings

    def row_step(self, device: torch.device) -> int:
        return 1  # rows are independent

    def quantize(self, task: SiteTask, scheme: Scheme) -> QuantizedWeight:
        groups = into_groups(task.weight_EOI, scheme.group_size)
        grid = minmax_grid(groups, scheme.bits, symmetric=scheme.symmetric, mse=self.settings.mse)
        return round_to_grid(
            task.weight_EOI, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric
        )

"""Round to nearest: the baseline that every other method must beat."""

import torch

from q3q.numerics.grid import into_groups
from q3q.numerics.levels import StoredLevels
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.methods.settings import RtnSettings
from q3q.spec import Scheme


class Rtn(Method):
    """Rounds each weight to its group's min-max grid (GPTQ's Quantizer), without calibration."""

    settings: RtnSettings

    def row_step(self, device: torch.device) -> int:
        return 1  # rows are independent

    def quantize(self, task: SiteTask, scheme: Scheme) -> StoredLevels:
        levels, groups = task.levels_for(scheme), into_groups(task.weight_EOI, scheme.group_size)
        return levels.rounded(groups, levels.minmax(groups, mse=self.settings.mse))

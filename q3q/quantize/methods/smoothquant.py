"""SmoothQuant: move the range of activations' outlier channels into the weights.

Xiao et al. 2022, arXiv 2211.10438, as mit-han-lab/smoothquant codes it. Shapes: E experts (1 in a
dense block or where all read the same tensor), O out features, I in features, T tokens.

As in the official code, only linears that a norm feeds are smoothed (q/k/v; gate/up and the router
with all experts), and activations are rounded per token before every quantized linear. The official
code has no Qwen3 branch; experts follow its Mixtral branch.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from q3q.numerics.grid import into_groups
from q3q.numerics.levels import StoredLevels
from q3q.quantize.method import Method, ScaleTask, SiteTask, levels_for
from q3q.quantize.methods.settings import SmoothQuantSettings
from q3q.quantize.statistics import Peak, starved_experts
from q3q.spec import Scheme

SMALLEST = 1e-5  # bounds a channel's largest weight, and a scale, from below


def smoothquant_round_plain(
    weights: Sequence[Tensor], inputs_TI: Tensor, scheme: Scheme, *, alpha: float = 0.5
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Smooth and round linears as SmoothQuant does (arXiv 2211.10438), in the arguments' dtype.

    The plain algorithm for one tensor's linears: tests compare `SmoothQuant`, which trials run.

    Returns:
        The scale [I], which the inputs are divided by (in the norm before them); the smoothed
        weights; and these rounded.
    """
    act_I = inputs_TI.abs().amax(0)  # max |X_j|
    weight_I = torch.cat(list(weights)).abs().amax(0).clamp(min=SMALLEST)  # max |W_j|
    scale_I = (act_I**alpha / weight_I ** (1 - alpha)).clamp(min=SMALLEST)  # equation 4
    smoothed, rounded = [weight_OI * scale_I for weight_OI in weights], []  # equation 3
    for weight_OI in smoothed:
        groups_EOGS = into_groups(weight_OI[None], scheme.group_size)
        levels = levels_for(scheme, weight_OI[None])
        grid = levels.absmax(groups_EOGS)  # equation 1: Delta = max |W| / (2^(N-1) - 1)
        rounded.append(levels.on_grid(groups_EOGS, grid)[0].flatten(1))
    return scale_I, smoothed, rounded


class SmoothQuant(Method):
    """Smooths by the full-precision model's activation ranges, and rounds to absmax grids.

    With `o_and_down` it also smooths between v and o, where query heads that read one value head
    share its scale, and between up and down, except for experts that too few tokens reached.
    """

    settings: SmoothQuantSettings
    passes_on_quantized = False

    def __init__(self, settings: SmoothQuantSettings) -> None:
        super().__init__(settings)
        self.search_windows = settings.search_windows

    def variants(self) -> dict[str, Method]:
        if not self.settings.search:
            return {}
        return {
            f"alpha={alpha:g}": SmoothQuant(replace(self.settings, alpha=alpha, search=False))
            for alpha in self.settings.alpha_grid
        }

    def observe(self) -> Peak | None:
        return Peak() if self.settings.smooth else None

    def rebalance(self, task: ScaleTask, scheme: Scheme) -> None:
        group = task.group
        fed_by_norm = task.weights[group.producer].ndim == 1
        if not self.settings.smooth or not (fed_by_norm or self.settings.o_and_down):
            return
        act_EI = group.over_repeats(task.statistics.peak_EI, torch.amax)
        weight_EI = group.over_repeats(_largest_weights(task, len(act_EI)), torch.amax)
        alpha, weight_EI = self.settings.alpha, weight_EI.clamp(min=SMALLEST)
        scale_EI = (act_EI.pow(alpha) / weight_EI.pow(1 - alpha)).clamp(min=SMALLEST)  # equation 4
        if len(scale_EI) > 1:  # each expert has its own; a shared scale comes from all tokens
            scale_EI[starved_experts(task.statistics.tokens_E)] = 1
        task.apply(scale_EI)

    def row_step(self, device: torch.device) -> int:
        return 1  # rows are independent

    def quantize(self, task: SiteTask, scheme: Scheme) -> StoredLevels:
        if self.settings.smooth and self.settings.o_and_down and task.site == "down":
            task.starved_experts()
        levels, groups = task.levels_for(scheme), into_groups(task.weight_EOI, scheme.group_size)
        return levels.rounded(groups, levels.absmax(groups))


def _largest_weights(task: ScaleTask, experts: int) -> Tensor:
    """Compute the largest |w| of each input channel over the site's readers and the router.

    There is a row for each expert if experts have inputs of their own, else one row.
    """
    names = (*task.group.site.weights, *task.group.site.unquantized)
    chosen = task.experts if experts > 1 else slice(None)
    weights = [task.weights[name] for name in names]
    weights = [weight[chosen] if weight.ndim == 3 else weight for weight in weights]
    largest = [torch.maximum(weight.amax(-2), -weight.amin(-2)).float() for weight in weights]
    if experts > 1:
        return torch.stack(largest).amax(0)
    return torch.cat([part.view(-1, part.shape[-1]) for part in largest]).amax(0, keepdim=True)

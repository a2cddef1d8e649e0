"""SmoothQuant: move the range of activations' outlier channels into the weights, so that both round well.

Xiao et al. 2022, arXiv 2211.10438, as mit-han-lab/smoothquant codes it. Shapes: E experts (1 in a dense block or where
all read the same tensor), O out features, I in features.

As there, only what a norm feeds is smoothed (q/k/v; gate/up and the router with all experts), and activations are
rounded per token before every quantized linear. There is no Qwen3 branch there; experts follow its Mixtral branch.
"""

from dataclasses import replace

import torch
from torch import Tensor

from q3q.models.anatomy import ScaleGroup
from q3q.numerics.grid import absmax_grid, into_groups
from q3q.numerics.weights import QuantizedWeight, round_to_grid
from q3q.quantize.method import Method, ScaleTask, SiteTask
from q3q.quantize.methods.settings import SmoothQuantSettings
from q3q.quantize.statistics import Peak, starved_experts
from q3q.spec import Scheme

SMALLEST = 1e-5  # of a channel's largest weight, and of a scale


class SmoothQuant(Method):
    """Activation ranges are the full-precision model's. Without smoothing it is absmax rounding, and observes nothing.

    o_and_down: also between v and o, where query heads that read one value head share its scale, and between up and
    down, where an expert that too few tokens reached is left as it is, and named.
    """

    passes_on_quantized = False

    def __init__(self, settings: SmoothQuantSettings) -> None:
        self.settings = settings
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
        act_EI = _shared_by_repeats(task.statistics.peak_EI, group)
        weight_EI = _shared_by_repeats(_largest_weights(task, len(act_EI)), group)
        scale_EI = smoothing_scale(act_EI, weight_EI, self.settings.alpha)
        if len(scale_EI) > 1:  # an expert's own; one that all share is that of all tokens
            scale_EI[starved_experts(task.statistics.tokens_E)] = 1
        task.apply(scale_EI)

    def row_step(self, device: torch.device) -> int:
        return 1  # each weight is rounded by itself

    def quantize(self, task: SiteTask, scheme: Scheme) -> QuantizedWeight:
        if self.settings.smooth and self.settings.o_and_down and task.site == "down":
            task.starved_experts()
        grid = absmax_grid(into_groups(task.weight_EOI, scheme.group_size), scheme.bits)
        return round_to_grid(task.weight_EOI, grid, scheme.bits, scheme.group_size, symmetric=True)


def smoothing_scale(act_EI: Tensor, weight_EI: Tensor, alpha: float) -> Tensor:
    """What each channel is divided by: max|x|^alpha / max|w|^(1 - alpha), equation 4 of the paper.

    Args:
        act_EI, weight_EI: largest |x| and |w| of each channel, float32.
    """
    return (act_EI.pow(alpha) / weight_EI.clamp(min=SMALLEST).pow(1 - alpha)).clamp(min=SMALLEST)


def _largest_weights(task: ScaleTask, experts: int) -> Tensor:
    """Largest |w| of each input channel over all that read the site, the router too; of each expert if it has its own
    input."""
    site = task.group.site
    largest = [task.weights[name].float().abs().amax(-2) for name in (*site.weights, *site.also)]
    if experts > 1:
        return torch.stack(largest).amax(0)
    return torch.cat([one.view(-1, one.shape[-1]) for one in largest]).amax(0, keepdim=True)


def _shared_by_repeats(largest_EI: Tensor, group: ScaleGroup) -> Tensor:
    """Grouped-query attention: the largest over the query heads that read one value head, given to each of them."""
    if group.repeat == 1:
        return largest_EI
    largest_EKRD = largest_EI.unflatten(1, (-1, group.repeat, group.head_dim))
    return largest_EKRD.amax(2, keepdim=True).expand_as(largest_EKRD).flatten(1)

"""AWQ: scale salient input channels up before rounding, by what the activations say; then clip each group's range.

Lin et al. 2023, arXiv 2306.00978, as mit-han-lab/llm-awq codes it. Shapes: E experts (1 in a dense block), O out
features, I in features, G groups, S columns per group, T tokens.
"""

import torch
from torch import Tensor

from q3q.calibrate.statistics import Kept
from q3q.models.anatomy import ScaleGroup
from q3q.numerics.grid import awq_grid, into_groups, on_grid
from q3q.numerics.weights import QuantizedWeight, round_to_grid
from q3q.quantize.method import Method, ScaleTask, SiteTask
from q3q.quantize.methods.settings import AwqSettings
from q3q.spec import Scheme

SMALLEST_SCALE = 1e-4
# auto_clip: ranges of 1.0, 0.95 .. 0.55 of the largest weight, judged on at most about 512 tokens.
CLIP_SHARES = tuple(1 - i / 20 for i in range(10))
CLIP_TOKENS = 512
CLIP_ROWS = 256  # rows judged at a time; bounds memory, changes nothing
UNCLIPPED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


class Awq(Method):
    """All statistics come from the original model: the next block is calibrated on full-precision outputs."""

    passes_on_quantized = False

    def __init__(self, settings: AwqSettings) -> None:
        self.settings = settings

    def observe(self) -> Kept:
        return Kept()

    def rebalance(self, task: ScaleTask, scheme: Scheme) -> None:
        group = task.group
        shapes_equal = task.weights[group.producer].shape == task.weights[group.site.weights[0]].shape
        if not self.settings.scale or (group.site.name == "o" and not shapes_equal and not self.settings.v_to_o):
            # llm-awq scales v -> o only where both have one shape, which grouped-query attention never has.
            return
        mean_EI = _shared_by_repeats(task.statistics.mean_absolute_EI(), group)
        candidates = [scale_candidate(mean_EI, step / self.settings.grid) for step in range(self.settings.grid)]
        losses = _linear_losses if len(group.site.weights) == 1 else _piece_losses
        loss_CE = losses(task, candidates, scheme)
        best_EI = torch.ones_like(mean_EI)
        lowest_E = torch.full_like(loss_CE[0], torch.inf)
        for scale_EI, loss_E in zip(candidates, loss_CE, strict=True):
            better_E = loss_E < lowest_E
            lowest_E = torch.where(better_E, loss_E, lowest_E)
            best_EI = torch.where(better_E[:, None], scale_EI, best_EI)
        seen_E = task.statistics.tokens_E.to(best_EI.device) > 0
        if len(best_EI) == len(seen_E) > 1:
            best_EI = torch.where(seen_E[:, None], best_EI, torch.ones_like(best_EI))
        task.apply(best_EI)

    def quantize(self, task: SiteTask, scheme: Scheme) -> QuantizedWeight:
        weight_EOI = task.weight_EOI
        seen = [e for e, tokens in enumerate(task.statistics.tokens_E.tolist()) if tokens]
        if len(seen) < len(weight_EOI):  # neither scaled nor clipped: plain rounding, and the record says so
            task.notes["experts_without_tokens"] = sorted(set(range(len(weight_EOI))) - set(seen))
        if self.settings.clip:
            weight_EOI = weight_EOI.clone()
            for e in seen:
                inputs_TI = task.statistics.expert_tokens(e).float()
                for name, rows in task.rows.items():
                    if name not in UNCLIPPED:
                        weight_EOI[e, rows] = clip_search(weight_EOI[e, rows], inputs_TI, scheme)
        groups = into_groups(weight_EOI, scheme.group_size)
        grid = awq_grid(groups, scheme.bits, symmetric=scheme.symmetric)
        return round_to_grid(weight_EOI, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric)


def scale_candidate(mean_EI: Tensor, exponent: float) -> Tensor:
    """mean**exponent, normalized so that its largest and smallest entries are each other's inverse."""
    scale_EI = mean_EI.pow(exponent).clamp(min=SMALLEST_SCALE)
    return scale_EI / (scale_EI.amax(1, keepdim=True) * scale_EI.amin(1, keepdim=True)).sqrt()


def scaled_rounding(weight_xOI: Tensor, scale_xI: Tensor, scheme: Scheme) -> Tensor:
    """Q(W * s) / s: what the linear computes with scaled weights, seen from unscaled inputs."""
    scaled = weight_xOI.float() * scale_xI[..., None, :]
    groups = into_groups(scaled, scheme.group_size)
    rounded = on_grid(groups, awq_grid(groups, scheme.bits, symmetric=scheme.symmetric), scheme.bits)
    return rounded.flatten(-2) / scale_xI[..., None, :]


def clip_search(weight_OI: Tensor, inputs_TI: Tensor, scheme: Scheme) -> Tensor:
    """Clamp each group of each row to the share of its range that costs its output least (auto_clip_layer).

    Args:
        weight_OI, inputs_TI: float32; about `CLIP_TOKENS` of the tokens are looked at, evenly spaced.
    """
    inputs_TI = inputs_TI[:: max(1, len(inputs_TI) // CLIP_TOKENS)]
    inputs_GTS = into_groups(inputs_TI, scheme.group_size).transpose(0, 1)
    clipped = []
    for weight_RGS in into_groups(weight_OI, scheme.group_size).split(CLIP_ROWS):
        largest_RG1 = weight_RGS.abs().amax(-1, keepdim=True)
        lowest_RG = torch.full(weight_RGS.shape[:2], torch.inf, device=weight_RGS.device)
        best_RG1 = largest_RG1
        for share in CLIP_SHARES:
            limit_RG1 = largest_RG1 * share
            tried_RGS = weight_RGS.clamp(-limit_RG1, limit_RG1)
            wrong_RGS = on_grid(tried_RGS, awq_grid(tried_RGS, scheme.bits, symmetric=scheme.symmetric), scheme.bits)
            wrong_RGS = wrong_RGS - weight_RGS
            cost_RG = (inputs_GTS @ wrong_RGS.permute(1, 2, 0)).square().mean(1).T
            better_RG = cost_RG < lowest_RG
            lowest_RG = torch.where(better_RG, cost_RG, lowest_RG)
            best_RG1 = torch.where(better_RG[..., None], limit_RG1, best_RG1)
        clipped.append(weight_RGS.clamp(-best_RG1, best_RG1).flatten(1))
    return torch.cat(clipped)


def _shared_by_repeats(mean_EI: Tensor, group: ScaleGroup) -> Tensor:
    """Grouped-query attention: the query heads that read one value head share its scale, from their mean."""
    if group.repeat == 1:
        return mean_EI
    mean_EKRD = mean_EI.unflatten(1, (-1, group.repeat, group.head_dim))
    return mean_EKRD.mean(2, keepdim=True).expand_as(mean_EKRD).flatten(1)


def _linear_losses(task: ScaleTask, candidates: list[Tensor], scheme: Scheme) -> list[Tensor]:
    """The site feeds one linear: its mean squared output error is a trace with the Gram matrix, no token touched."""
    weight_EOI = task.weights[task.group.site.weights[0]]
    weight_EOI = (weight_EOI if weight_EOI.ndim == 3 else weight_EOI[None]).float()
    gram_EII = task.statistics.gram.mean_EII()
    losses = []
    for scale_EI in candidates:
        wrong_EOI = scaled_rounding(weight_EOI, scale_EI, scheme) - weight_EOI
        losses.append(((wrong_EOI @ gram_EII) * wrong_EOI).sum((1, 2)))
    return losses


def _piece_losses(task: ScaleTask, candidates: list[Tensor], scheme: Scheme) -> list[Tensor]:
    """The site feeds attention or an MLP: run that piece with each candidate's weights over all tokens."""
    original = list(task.run({}))
    losses = []
    for scale_1I in candidates:
        tried = {}
        for name in task.group.site.weights:
            weight = task.weights[name]
            tried[name] = scaled_rounding(weight, scale_1I[0], scheme).to(weight.dtype)
        pairs = zip(task.run(tried), original, strict=True)
        losses.append(torch.stack([(new.float() - old.float()).square().sum() for new, old in pairs]).sum()[None])
    return losses

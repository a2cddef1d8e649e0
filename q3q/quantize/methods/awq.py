"""AWQ: scale salient input channels up before rounding, by what the activations say; then clip each group's range.

Lin et al. 2023, arXiv 2306.00978, as mit-han-lab/llm-awq codes it. Shapes: E experts (1 in a dense block), O out
features, I in features, G groups, S columns per group, T tokens, C candidates for the scale; R rows, of inputs that a
piece of the block treats one by one or of a weight; W calibration windows; a small e or r in place of E or R is a part
of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from q3q.models.anatomy import ScaleGroup
from q3q.numerics.grid import awq_grid, awq_grid_of_range, into_groups, on_grid
from q3q.numerics.weights import QuantizedWeight, round_to_grid
from q3q.quantize.method import Method, ScaleTask, SiteTask
from q3q.quantize.methods.settings import AwqSettings
from q3q.quantize.statistics import Kept, starved_experts
from q3q.spec import Scheme

SMALLEST_SCALE = 1e-4
# auto_clip: ranges of 1.0, 0.95 .. 0.55 of the largest weight, judged on at most about 512 tokens.
CLIP_SHARES = tuple(1 - i / 20 for i in range(10))
CLIP_TOKENS = 512
UNCLIPPED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
# Racing: the shares of the calibration windows after which candidates are compared, the fewest windows to compare them
# on, and by how many standard errors one must be behind to be dropped.
RACE_SHARES = (1 / 8, 1 / 4, 1 / 2)
RACE_WINDOWS = 8
RACE_ERRORS = 6
# What follows changes speed and memory, and no choice.
FIRST_EXPONENT = 0.3  # tried before the others: the best one is usually near
WEIGHTS_AT_ONCE = {"cpu": 2**19, "cuda": 2**25}  # on a CPU so few that they stay in its caches
TOKENS_AT_ONCE = {"cpu": 2**10, "cuda": 2**14}


class Awq(Method):
    """All statistics come from the original model: the next block is calibrated on full-precision outputs.

    An expert that too few tokens reached has neither a scale of its own (before its down) nor a clipped range. The
    scale that gate and up of all experts share with the norm before them reaches it too, or the block's function would
    change; it is chosen by the paper's loss, the block's output error over all tokens, in which a starved expert counts
    for the few tokens that it answers.
    """

    passes_on_quantized = False

    def __init__(self, settings: AwqSettings) -> None:
        self.settings = settings

    def observe(self) -> Kept:
        return Kept(CLIP_TOKENS)

    def rebalance(self, task: ScaleTask, scheme: Scheme) -> None:
        group = task.group
        shapes_equal = (
            task.weights[group.producer].shape == task.weights[group.site.weights[0]].shape
        )
        if not self.settings.scale or (
            group.site.name == "o" and not shapes_equal and not self.settings.v_to_o
        ):
            # llm-awq scales v -> o only where both have one shape, which grouped-query attention never has.
            return
        mean_EI = _shared_by_repeats(task.statistics.mean_absolute_EI(), group)
        exponents = [step / self.settings.grid for step in range(self.settings.grid)]
        candidates_CEI = torch.stack([scale_candidate(mean_EI, exponent) for exponent in exponents])
        if len(group.site.weights) == 1:
            loss_CE = linear_losses(task, candidates_CEI, scheme)
        else:
            loss_CE = piece_losses(task, candidates_CEI, scheme, race=self.settings.race)
        best_EI = first_lowest(loss_CE, candidates_CEI)
        if len(best_EI) > 1:  # an expert's own; one that all share is chosen by the tokens of all
            best_EI[starved_experts(task.statistics.tokens_E)] = 1
        task.apply(best_EI)

    def quantize(self, task: SiteTask, scheme: Scheme) -> QuantizedWeight:
        weight_EOI = task.weight_EOI
        starved = task.starved_experts()
        if self.settings.clip:
            inputs = task.statistics.samples()
            for e in starved:
                inputs[e] = inputs[e][:0]
            weight_EOI = weight_EOI.clone()
            for name, rows in task.rows.items():
                if name not in UNCLIPPED:
                    weight_EOI[:, rows] = clip_search(weight_EOI[:, rows], inputs, scheme)
        groups = into_groups(weight_EOI, scheme.group_size)
        grid = awq_grid(groups, scheme.bits, symmetric=scheme.symmetric)
        return round_to_grid(
            weight_EOI, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric
        )


def scale_candidate(mean_EI: Tensor, exponent: float) -> Tensor:
    """mean**exponent, normalized so that its largest and smallest entries are each other's inverse."""
    scale_EI = mean_EI.pow(exponent).clamp(min=SMALLEST_SCALE)
    return scale_EI / (scale_EI.amax(1, keepdim=True) * scale_EI.amin(1, keepdim=True)).sqrt()


def first_lowest(loss_CE: Tensor, candidates_CEI: Tensor) -> Tensor:
    """Each expert's candidate of lowest loss [E, I], the first of equals; what is not a number is never the lowest."""
    loss_CE = loss_CE.nan_to_num(nan=math.inf, posinf=math.inf)
    step_E = (loss_CE == loss_CE.amin(0)).int().argmax(0).to(candidates_CEI.device)
    return candidates_CEI[step_E, torch.arange(len(step_E), device=step_E.device)]


def scaled_rounding(weight_xOI: Tensor, scale_xI: Tensor, scheme: Scheme) -> Tensor:
    """Q(W * s) / s: what the linear computes with scaled weights, seen from unscaled inputs."""
    groups = into_groups(weight_xOI.float() * scale_xI[..., None, :], scheme.group_size)
    rounded = on_grid(
        groups, awq_grid(groups, scheme.bits, symmetric=scheme.symmetric), scheme.bits
    )
    return rounded.flatten(-2).div_(scale_xI[..., None, :])


def linear_losses(task: ScaleTask, candidates_CEI: Tensor, scheme: Scheme) -> Tensor:
    """The site feeds one linear: its squared output error is a trace with the Gram matrix, no token touched [C, E]."""
    weight_EOI = task.weights[task.group.site.weights[0]]
    weight_EOI = weight_EOI if weight_EOI.ndim == 3 else weight_EOI[None]
    gram_EII = task.statistics.gram.sum_EII
    loss_CE = torch.zeros(candidates_CEI.shape[:2], dtype=torch.float64, device=weight_EOI.device)
    for e, rows in _parts(weight_EOI):
        for r in rows:
            part_erI = weight_EOI[e, r].float()
            for step, scale_EI in enumerate(candidates_CEI):
                wrong_erI = scaled_rounding(part_erI, scale_EI[e], scheme).sub_(part_erI)
                loss_CE[step, e] += (wrong_erI @ gram_EII[e]).mul_(wrong_erI).sum((1, 2))
    return loss_CE


def piece_losses(task: ScaleTask, candidates_CEI: Tensor, scheme: Scheme, *, race: bool) -> Tensor:
    """The site feeds attention or an MLP: that piece's squared output error with each candidate's weights [C, 1].

    race: judge all candidates on some of the windows, in an order drawn at random, and go on with those alone that may
    still be the best (`still_racing`); one that is dropped keeps an infinite loss.

    What is left is decided exactly, on every token. The error is a sum over windows of terms that are never negative,
    so a candidate is dropped once what it has cost already cannot be the first lowest: branch and bound. Windows that
    cost the best candidate so far most come first, so that others show early what they cost.

    Windows and the piece's outputs are read a few at a time: they may lie on disk.
    """
    windows, steps = len(task.windows), len(candidates_CEI)
    ends = [
        int(share * windows)
        for share in RACE_SHARES
        if race and int(share * windows) >= RACE_WINDOWS
    ]
    order = list(range(windows))
    if ends:
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(0)).tolist()
    read_E, length = task.statistics.tokens_E, len(task.windows[0])
    share_of_experts = int(read_E.sum()) / (windows * length * len(read_E))
    tokens = (
        _at_once(TOKENS_AT_ONCE, task.windows[0]) / share_of_experts
    )  # so that an expert, too, sees that many
    few, rows = max(1, int(tokens) // length), max(1, int(tokens) // task.row)

    def outputs(
        some: Sequence[int], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """A few windows, and what the piece makes of them [w * T, O]."""
        for start in range(0, len(some), few):
            group = some[start : start + few]
            inputs_RTI = torch.cat([task.windows[w] for w in group]).unflatten(0, (-1, task.row))
            made_RTO = torch.cat(
                [task.run(some_rTI, weights) for some_rTI in inputs_RTI.split(rows)]
            )
            yield group, made_RTO.flatten(0, 1)

    def costs(step: int, some: Sequence[int]) -> Iterator[dict[int, float]]:
        """What each window costs with this candidate's weights, some windows at a time."""
        tried = {
            name: _scaled_rounding_by_parts(task.weights[name], candidates_CEI[step, 0], scheme)
            for name in task.group.site.weights
        }
        for group, made_TO in outputs(some, tried):
            wanted_TO = torch.cat([wanted[places[w]] for w in group])
            cost_T = (made_TO.float() - wanted_TO).square_().sum(1)
            yield dict(
                zip(group, cost_T.double().view(len(group), -1).sum(1).tolist(), strict=True)
            )

    places = {w: place for place, w in enumerate(order)}
    with task.spool() as wanted:
        for group, made_TO in outputs(order, {}):
            for window_TO in made_TO.chunk(len(group)):
                wanted.append(window_TO)

        alive, loss_CW = list(range(steps)), torch.zeros(steps, 0, dtype=torch.float64)
        for end in ends:
            new = order[loss_CW.shape[1] : end]
            added_CW = torch.full((steps, len(new)), math.inf, dtype=torch.float64)
            for step in alive:
                known = {w: cost for some in costs(step, new) for w, cost in some.items()}
                added_CW[step] = torch.tensor([known[w] for w in new], dtype=torch.float64)
            loss_CW = torch.cat([loss_CW, added_CW], 1)
            alive = still_racing(loss_CW, alive, windows)

        rest = order[loss_CW.shape[1] :]
        loss_C1 = torch.full((steps, 1), math.inf, dtype=torch.float64)
        lowest, known_C = (math.inf, steps), loss_CW.sum(1).tolist()
        for step in sorted(
            alive, key=lambda step: (known_C[step], abs(step / steps - FIRST_EXPONENT))
        ):
            cost: dict[int, float] = {}
            for some in costs(step, rest):
                cost |= some
                if not (total := known_C[step] + math.fsum(cost.values()), step) < lowest:
                    break
            else:
                total = known_C[step] + math.fsum(cost.values())
                loss_C1[step], lowest = total, (total, step)
                rest.sort(key=lambda w: -cost[w])
    return loss_C1


def still_racing(loss_CW: Tensor, alive: Sequence[int], windows: int) -> list[int]:
    """The candidates in `alive` that may still have the lowest loss of all, by their losses in the first windows.

    One is dropped if its losses exceed, on average, those of the leader by more than `RACE_ERRORS` standard errors of
    their difference, window by window; windows were drawn without replacement from `windows`, which the error allows
    for. Equal candidates stay together.

    This takes the mean difference over at least `RACE_WINDOWS` windows drawn at random for close to normal; a rare
    window that outweighs all others would break it. To check a choice, search again with race=false.
    """
    judged = loss_CW.shape[1]
    loss_CW = loss_CW.nan_to_num(nan=math.inf, posinf=math.inf)
    leader = min(alive, key=lambda step: (float(loss_CW[step].sum()), step))
    behind_CW = loss_CW - loss_CW[leader]
    error_C = behind_CW.std(1) * math.sqrt(1 / judged - 1 / windows)
    keep_C = behind_CW.mean(1) <= RACE_ERRORS * error_C
    return [step for step in alive if step == leader or keep_C[step]]


def clip_search(weight_EOI: Tensor, inputs: Sequence[Tensor], scheme: Scheme) -> Tensor:
    """Clamp each group of each row to the share of its range that costs its output least (auto_clip_layer).

    A group's cost over its tokens X is |X (q - w)|**2, or, with fewer columns than tokens, a form in X^T X.

    Args:
        weight_EOI: float32. inputs: the tokens to judge by, [T, I] for each expert, float32; one without tokens is left
            as it is.
    """
    clipped_EOI = torch.empty_like(weight_EOI)
    for e, rows in _parts(weight_EOI):
        # Experts with fewer tokens get zeros for the rest, which cost nothing.
        inputs_eTI = pad_sequence(list(inputs[e]), batch_first=True)
        inputs_eGTS = into_groups(inputs_eTI, scheme.group_size).transpose(1, 2)
        _, _, tokens, columns = inputs_eGTS.shape
        gram_eGSS = inputs_eGTS.mT @ inputs_eGTS if columns < tokens else None
        for r in rows:
            weight_eGrS = (
                into_groups(weight_EOI[e, r], scheme.group_size).transpose(1, 2).contiguous()
            )
            low, high = weight_eGrS.amin(-1, keepdim=True), weight_eGrS.amax(-1, keepdim=True)
            largest = torch.maximum(-low, high)
            lowest_cost, best_limit = torch.full_like(largest, math.inf), largest
            for share in CLIP_SHARES:
                limit = largest * share
                grid = awq_grid_of_range(
                    low.clamp(-limit, limit),
                    high.clamp(-limit, limit),
                    scheme.bits,
                    symmetric=scheme.symmetric,
                )
                wrong_eGrS = on_grid(weight_eGrS.clamp(-limit, limit), grid, scheme.bits).sub_(
                    weight_eGrS
                )
                if gram_eGSS is None:
                    cost = (wrong_eGrS @ inputs_eGTS.mT).square_().sum(-1, keepdim=True)
                else:
                    cost = (wrong_eGrS @ gram_eGSS).mul_(wrong_eGrS).sum(-1, keepdim=True)
                better = cost < lowest_cost
                lowest_cost = torch.where(better, cost, lowest_cost)
                best_limit = torch.where(better, limit, best_limit)
            clipped_EOI[e, r] = (
                weight_eGrS.clamp(-best_limit, best_limit).transpose(1, 2).flatten(-2)
            )
    return clipped_EOI


def _shared_by_repeats(mean_EI: Tensor, group: ScaleGroup) -> Tensor:
    """Grouped-query attention: the query heads that read one value head share its scale, from their mean."""
    if group.repeat == 1:
        return mean_EI
    mean_EKRD = mean_EI.unflatten(1, (-1, group.repeat, group.head_dim))
    return mean_EKRD.mean(2, keepdim=True).expand_as(mean_EKRD).flatten(1)


def _at_once(limits: dict[str, int], tensor: Tensor) -> int:
    return limits.get(tensor.device.type, limits["cpu"])


def _parts(weight_EOI: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """A weight in parts of `WEIGHTS_AT_ONCE`: runs of experts, and within each runs of rows."""
    experts, rows, columns = weight_EOI.shape
    limit = _at_once(WEIGHTS_AT_ONCE, weight_EOI)
    many, few = max(1, limit // (rows * columns)), max(1, limit // columns)
    for e in range(0, experts, many):
        yield slice(e, e + many), [slice(r, r + few) for r in range(0, rows, few)]


def _scaled_rounding_by_parts(weight_xOI: Tensor, scale_I: Tensor, scheme: Scheme) -> Tensor:
    """The same for a large weight whose experts share a scale, in its own dtype."""
    rounded_xOI = weight_xOI.new_empty(weight_xOI.shape)
    few = max(1, _at_once(WEIGHTS_AT_ONCE, weight_xOI) // weight_xOI.shape[-1])
    parts = zip(
        weight_xOI.flatten(0, -2).split(few), rounded_xOI.flatten(0, -2).split(few), strict=True
    )
    for part_rI, rounded_rI in parts:
        rounded_rI.copy_(scaled_rounding(part_rI, scale_I, scheme))
    return rounded_xOI

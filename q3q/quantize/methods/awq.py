"""AWQ: scale up input channels with large activations before rounding; clip groups' ranges.

Lin et al. 2023, arXiv 2306.00978, as mit-han-lab/llm-awq codes it. Shapes: E experts (1 in a dense
block), O out features, I in features, G groups, S columns per group, T tokens, C candidates for the
scale, W calibration windows, R rows of a weight, or rows of inputs that a piece of the block treats
one by one. A small e or r is a part of E or R.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from q3q.models.spool import Spool
from q3q.numerics.grid import Grid, into_groups
from q3q.numerics.levels import FloatLevels, Levels, RowPeaks, StoredLevels
from q3q.quantize.method import Method, ScaleTask, SiteTask, plain_levels
from q3q.quantize.methods.settings import AwqSettings
from q3q.quantize.statistics import StoredInputs, starved_experts
from q3q.spec import Scheme

SMALLEST_SCALE = 1e-4
# auto_clip: ranges of 1.0, 0.95 .. 0.55 of the largest weight, judged on at most about 512 tokens.
CLIP_SHARES = tuple(1 - i / 20 for i in range(10))
CLIP_TOKENS = 512
# Racing: the shares of the calibration windows after which candidates are compared, the fewest
# windows to compare them on, and how many standard errors behind the leader a candidate is dropped.
RACE_SHARES = (1 / 8, 1 / 4, 1 / 2)
RACE_WINDOWS = 8
RACE_ERRORS = 6
# These constants change speed and memory, but no choice.
FIRST_EXPONENT = 0.3  # tried before the others: the best one is usually near
WEIGHTS_AT_ONCE = {"cpu": 2**19, "cuda": 2**25}  # few enough for a CPU's caches
TOKENS_AT_ONCE = {"cpu": 2**10, "cuda": 2**14}


def awq_round_plain(
    weight_OI: Tensor,
    inputs_TI: Tensor,
    scheme: Scheme,
    *,
    grid: int = 20,
    scale: bool = True,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scale, clip and round one linear as AWQ does (arXiv 2306.00978), in the arguments' dtype.

    The plain algorithm for a linear that alone reads its inputs: tests compare `Awq`, which trials
    run, with it. Linears that share their inputs also share a scale, which `Awq` judges by the
    output of attention or the MLP.

    Returns:
        The columns' scale [I], and the scaled weight after clipping and rounding [O, I].
    """

    scaled = ScaledLevels([weight_OI[None]], scheme)

    def rounded(weight_OGS: Tensor, scale_I: Tensor) -> Tensor:
        levels = scaled.at(scale_I[None])
        return levels.on_grid(weight_OGS[None], levels.awq(weight_OGS[None]))[0]

    best_scale_I, lowest = torch.ones_like(weight_OI[0]), math.inf
    for step in range(grid if scale else 0):
        # Equation 5: s = s_X^alpha with alpha in [0, 1), where s_X is the mean |x| of each channel.
        scale_I = inputs_TI.abs().mean(0).pow(step / grid).clamp(min=SMALLEST_SCALE)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        # Equation 4: the loss is |Q(W diag(s)) (diag(s)^-1 X) - W X|.
        scaled_OGS = into_groups(weight_OI * scale_I, scheme.group_size)
        rounded_OI = rounded(scaled_OGS, scale_I).flatten(1)
        loss = float((inputs_TI @ (rounded_OI / scale_I - weight_OI).T).square().sum())
        if loss < lowest:
            best_scale_I, lowest = scale_I, loss
    weight_OGS = into_groups(weight_OI * best_scale_I, scheme.group_size)
    if clip:  # auto_clip_layer: the range of each group that costs its part of the output least
        sample_TI = (inputs_TI / best_scale_I)[:: max(1, len(inputs_TI) // CLIP_TOKENS)]
        sample_GST = into_groups(sample_TI, scheme.group_size).permute(1, 2, 0)
        best_OGS, lowest_OG1 = weight_OGS, torch.full_like(weight_OGS[..., :1], math.inf)
        for share in CLIP_SHARES:
            limit_OG1 = weight_OGS.abs().amax(-1, keepdim=True) * share
            clipped_OGS = weight_OGS.clamp(-limit_OG1, limit_OG1)
            error_OGS = rounded(clipped_OGS, best_scale_I) - weight_OGS
            error_OGT = torch.einsum("ogs,gst->ogt", error_OGS, sample_GST)
            cost_OG1 = error_OGT.square().sum(-1, keepdim=True)
            best_OGS = torch.where(cost_OG1 < lowest_OG1, clipped_OGS, best_OGS)
            lowest_OG1 = torch.minimum(cost_OG1, lowest_OG1)
        weight_OGS = best_OGS
    return best_scale_I, rounded(weight_OGS, best_scale_I).flatten(1)


class Awq(Method):
    """Takes all statistics from the original model, whose outputs calibrate the next block.

    An expert that too few tokens reached has neither a scale of its own (before its down
    projection) nor a clipped range. It still takes part in the scale that all experts' gate and up
    projections share with the norm before them, or the block's function would change. That scale
    minimizes the paper's loss, the block's output error over all tokens, in which a starved expert
    counts for the few tokens that it answers.
    """

    settings: AwqSettings
    passes_on_quantized = False

    def observe(self) -> StoredInputs:
        return StoredInputs(CLIP_TOKENS)

    def rebalance(self, task: ScaleTask, scheme: Scheme) -> None:
        group = task.group
        producer, reader = task.weights[group.producer], task.weights[group.site.weights[0]]
        # llm-awq scales v -> o only where both have one shape, never in grouped-query attention.
        skips_o = producer.shape != reader.shape and not self.settings.v_to_o
        if not self.settings.scale or (group.site.name == "o" and skips_o):
            return
        mean_EI = group.over_repeats(task.statistics.mean_absolute_EI(), torch.mean)
        exponents = [step / self.settings.grid for step in range(self.settings.grid)]
        candidates_CEI = torch.stack([scale_candidate(mean_EI, exponent) for exponent in exponents])
        if len(group.site.weights) == 1:
            loss_CE = linear_losses(task, candidates_CEI, scheme)
        else:
            loss_CE = piece_losses(task, candidates_CEI, scheme, race=self.settings.race)
        best_EI = first_lowest(loss_CE, candidates_CEI)
        if len(best_EI) > 1:  # each expert has its own; a shared scale is chosen by all tokens
            best_EI[starved_experts(task.statistics.tokens_E)] = 1
        task.apply(best_EI)

    def quantize(self, task: SiteTask, scheme: Scheme) -> StoredLevels:
        # What rows share is that of the whole weights: clipping narrows a group's own range alone.
        weight_EOI, levels = task.weight_EOI, task.levels_for(scheme)
        starved = task.starved_experts()
        if self.settings.clip:
            inputs = task.statistics.samples()
            for e in starved:
                inputs[e] = inputs[e][:0]
            weight_EOI = weight_EOI.clone()
            for name, rows in task.rows.items():
                if name not in task.scores:
                    own = levels.part(slice(None), rows)
                    weight_EOI[:, rows] = clip_search(weight_EOI[:, rows], inputs, scheme, own)
        groups = into_groups(weight_EOI, scheme.group_size)
        return levels.rounded(groups, levels.awq(groups))


def scale_candidate(mean_EI: Tensor, exponent: float) -> Tensor:
    """Return mean**exponent, normalized so that its largest and smallest entries are inverses."""
    scale_EI = mean_EI.pow(exponent).clamp(min=SMALLEST_SCALE)
    return scale_EI / (scale_EI.amax(1, keepdim=True) * scale_EI.amin(1, keepdim=True)).sqrt()


def first_lowest(loss_CE: Tensor, candidates_CEI: Tensor) -> Tensor:
    """Return each expert's first candidate of lowest loss [E, I]; NaN counts as infinite."""
    loss_CE = loss_CE.nan_to_num(nan=math.inf, posinf=math.inf)
    step_E = (loss_CE == loss_CE.amin(0)).int().argmax(0).to(candidates_CEI.device)
    return candidates_CEI[step_E, torch.arange(len(step_E), device=step_E.device)]


class ScaledLevels:
    """What a scheme's codes stand for, of linears whose columns are multiplied by one scale.

    They share what linears share that are stored for one input: NVFP4's factor.

    Args:
        weights: [E, O, I], in the order in which their rows lie below each other.
    """

    def __init__(self, weights: Sequence[Tensor], scheme: Scheme) -> None:
        self._levels = levels = plain_levels(scheme)
        self._peaks: RowPeaks | None = None
        if isinstance(levels, FloatLevels) and levels.needs_peaks:
            peaks = [levels.peaks(weight_EOI, [weight_EOI.shape[1]]) for weight_EOI in weights]
            self._peaks = RowPeaks.joined(peaks)

    def at(self, scale_EI: Tensor) -> Levels:
        if self._peaks is None:
            return self._levels
        return self._levels.of(self._peaks.times(scale_EI))


def scaled_rounding(
    weight_xOI: Tensor, scale_xI: Tensor, scheme: Scheme, levels: Levels | None = None
) -> Tensor:
    """Return Q(W * s) / s, which does to unscaled inputs what Q(W * s) does to scaled ones.

    levels: of these rows; None if they are a whole linear [E, O, I].
    """
    levels = levels or ScaledLevels([weight_xOI], scheme).at(scale_xI)
    groups = into_groups(weight_xOI.float() * scale_xI[..., None, :], scheme.group_size)
    return levels.on_grid(groups, levels.awq(groups)).flatten(-2).div_(scale_xI[..., None, :])


def linear_losses(task: ScaleTask, candidates_CEI: Tensor, scheme: Scheme) -> Tensor:
    """Compute the output error of the one linear that the site feeds [C, E].

    It is a trace with the Gram matrix of the inputs, which themselves are not needed.
    """
    weight_EOI = task.weights[task.group.site.weights[0]]
    weight_EOI = weight_EOI[task.experts] if weight_EOI.ndim == 3 else weight_EOI[None]
    gram_EII = task.statistics.gram.sum_EII
    loss_CE = torch.zeros(candidates_CEI.shape[:2], dtype=torch.float64, device=weight_EOI.device)
    scaled = ScaledLevels([weight_EOI], scheme)
    levels_C = [scaled.at(scale_EI) for scale_EI in candidates_CEI]
    for e, rows in _parts(weight_EOI):
        for r in rows:
            part_erI = weight_EOI[e, r].float()
            for c, scale_EI in enumerate(candidates_CEI):
                levels = levels_C[c].part(e, r)
                error_erI = scaled_rounding(part_erI, scale_EI[e], scheme, levels).sub_(part_erI)
                loss_CE[c, e] += (error_erI @ gram_EII[e]).mul_(error_erI).sum((1, 2))
    return loss_CE


def piece_losses(task: ScaleTask, candidates_CEI: Tensor, scheme: Scheme, *, race: bool) -> Tensor:
    """Compute the squared output error of attention or an MLP with each candidate's weights [C, 1].

    With `race`, all candidates are first judged on some of the windows, drawn at random; only those
    that may still be the best go on (`still_racing`), and the others' loss is infinite.

    The rest is decided exactly, on every token, by branch and bound: the error is a sum over
    windows of terms that are never negative, so a candidate is dropped (loss infinite) as soon as
    its error so far cannot be the first lowest. Windows on which the best candidate so far is worst
    come first, so that others show their errors early.
    """
    windows, candidates = len(task.windows), len(candidates_CEI)
    order, stages = list(range(windows)), [int(share * windows) for share in RACE_SHARES]
    stages = [stage for stage in stages if race and stage >= RACE_WINDOWS]
    if stages:
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(0)).tolist()

    with task.spool() as original:
        piece = PieceErrors(task, candidates_CEI, scheme, order, original)
        alive, error_CW = list(range(candidates)), torch.zeros(candidates, 0, dtype=torch.float64)
        for stage in stages:
            new = order[error_CW.shape[1] : stage]
            new_error_CW = torch.full((candidates, len(new)), math.inf, dtype=torch.float64)
            for c in alive:
                errors = [error for part in piece.errors(c, new) for error in part.values()]
                new_error_CW[c] = torch.tensor(errors, dtype=torch.float64)
            error_CW = torch.cat([error_CW, new_error_CW], 1)
            alive = still_racing(error_CW, alive, windows)

        remaining, raced_C = order[error_CW.shape[1] :], error_CW.sum(1).tolist()
        loss_C1 = torch.full((candidates, 1), math.inf, dtype=torch.float64)
        best = (math.inf, candidates)  # loss and candidate: of equal losses, the first is the best
        alive.sort(key=lambda c: (raced_C[c], abs(c / candidates - FIRST_EXPONENT)))
        for c in alive:
            error_of_window: dict[int, float] = {}
            for part in piece.errors(c, remaining):
                error_of_window |= part
                loss = raced_C[c] + math.fsum(error_of_window.values())
                beaten = not (loss, c) < best
                if beaten:
                    break
            if not beaten:
                loss_C1[c], best = loss, (loss, c)
                remaining.sort(key=lambda w: -error_of_window[w])
    return loss_C1


class PieceErrors:
    """The squared output errors that candidates' weights cause in attention or an MLP, by window.

    A few windows are read at a time: they and the piece's original outputs may lie on disk.

    Args:
        order: the windows in the order in which their original outputs are stored.
        original: an empty spool, for these outputs.
    """

    def __init__(
        self,
        task: ScaleTask,
        candidates_CEI: Tensor,
        scheme: Scheme,
        order: Sequence[int],
        original: Spool,
    ) -> None:
        self._task, self._candidates_CEI, self._scheme = task, candidates_CEI, scheme
        length = len(task.windows[0])
        # Each expert reads a share of the tokens; so it reads as many at a time as a dense MLP.
        tokens = int(_limit(TOKENS_AT_ONCE, task.windows[0]) / task.share)
        tokens = min(tokens, task.most_tokens or tokens)
        self._windows_at_once = max(1, tokens // length)
        self._rows_at_once = max(1, tokens // task.row)
        self._place, self._original = {w: place for place, w in enumerate(order)}, original
        weights = {
            name: weight if weight.ndim == 3 else weight[None]
            for name in task.group.site.weights
            for weight in [task.weights[name]]
        }
        self._levels = ScaledLevels(list(weights.values()), scheme)
        ends = list(accumulate(weight.shape[1] for weight in weights.values()))
        self._rows = {
            name: slice(end - weight.shape[1], end)
            for (name, weight), end in zip(weights.items(), ends, strict=True)
        }
        for group, output_TO in self._outputs(order, {}):
            for window_TO in output_TO.chunk(len(group)):
                original.append(window_TO)

    def errors(self, candidate: int, windows: Sequence[int]) -> Iterator[dict[int, float]]:
        """Yield the candidate's squared error on each window, a few windows at a time."""
        scale_I = self._candidates_CEI[candidate, 0]
        levels = self._levels.at(scale_I[None])
        weights = {
            name: _scaled_rounding_by_parts(
                self._task.weights[name], scale_I, self._scheme, levels.part(slice(None), rows)
            )
            for name, rows in self._rows.items()
        }
        for group, output_TO in self._outputs(windows, weights):
            original_TO = torch.cat([self._original[self._place[w]] for w in group])
            error_T = (output_TO.float() - original_TO).square_().sum(1)
            error_W = error_T.double().view(len(group), -1).sum(1)
            yield dict(zip(group, error_W.tolist(), strict=True))

    def _outputs(
        self, windows: Sequence[int], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield a few windows at a time, and the piece's outputs for all their tokens [T, O]."""
        for start in range(0, len(windows), self._windows_at_once):
            group = windows[start : start + self._windows_at_once]
            inputs_RTI = torch.cat([self._task.windows[w] for w in group])
            inputs_RTI = inputs_RTI.unflatten(0, (-1, self._task.row))
            parts = [self._task.run(part, weights) for part in inputs_RTI.split(self._rows_at_once)]
            yield group, torch.cat(parts).flatten(0, 1)


def still_racing(loss_CW: Tensor, alive: Sequence[int], windows: int) -> list[int]:
    """Return the candidates in `alive` that may still win, by their losses in the first windows.

    A candidate is dropped if its mean loss exceeds the leader's by more than `RACE_ERRORS` standard
    errors of their difference, window by window. The standard error accounts for drawing without
    replacement from `windows` windows. Equal candidates stay together.

    This assumes that the mean difference over at least `RACE_WINDOWS` windows, drawn at random, is
    close to normal; a rare window that outweighs all others would break it. To check a choice,
    search again with race=false.
    """
    judged = loss_CW.shape[1]
    loss_CW = loss_CW.nan_to_num(nan=math.inf, posinf=math.inf)
    leader = min(alive, key=lambda c: (float(loss_CW[c].sum()), c))
    behind_CW = loss_CW - loss_CW[leader]
    error_C = behind_CW.std(1) * math.sqrt(1 / judged - 1 / windows)
    keep_C = behind_CW.mean(1) <= RACE_ERRORS * error_C
    return [c for c in alive if c == leader or keep_C[c]]


def clip_search(
    weight_EOI: Tensor, inputs: Sequence[Tensor], scheme: Scheme, levels: Levels | None = None
) -> Tensor:
    """Clamp each group of each row to the share of its range that costs its output least.

    Source: auto_clip_layer of mit-han-lab/llm-awq. A group's cost over its tokens X is |X (q -
    w)|**2, computed with X^T X if there are fewer columns than tokens.

    Args:
        weight_EOI: float32.
        inputs: each expert's tokens [T, I] to judge by, float32; without tokens it is not clipped.
        levels: of these rows; None if the weights are a whole linear.
    """
    levels = levels or ScaledLevels([weight_EOI], scheme).at(torch.ones_like(weight_EOI[:, 0]))
    clipped_EOI = torch.empty_like(weight_EOI)
    for e, rows in _parts(weight_EOI):
        # Experts with fewer tokens are padded with zeros, which cost nothing.
        inputs_eTI = pad_sequence(list(inputs[e]), batch_first=True)
        inputs_eGTS = into_groups(inputs_eTI, scheme.group_size).transpose(1, 2)
        _, _, tokens, columns = inputs_eGTS.shape
        gram_eGSS = inputs_eGTS.mT @ inputs_eGTS if columns < tokens else None
        for r in rows:
            weight_erGS = into_groups(weight_EOI[e, r], scheme.group_size)
            weight_eGrS = weight_erGS.transpose(1, 2).contiguous()
            low, high = weight_eGrS.amin(-1, keepdim=True), weight_eGrS.amax(-1, keepdim=True)
            largest = torch.maximum(-low, high)
            lowest_cost, best_limit = torch.full_like(largest, math.inf), largest
            own = levels.part(e, r)
            for share in CLIP_SHARES:
                limit = largest * share
                bounds = low.clamp(-limit, limit), high.clamp(-limit, limit)
                inside_eGrS = weight_eGrS.clamp(-limit, limit)
                low_erG1, high_erG1 = (bound.transpose(1, 2) for bound in bounds)
                taken = own.awq(inside_eGrS.transpose(1, 2), (low_erG1, high_erG1))
                grid = Grid(*(part.transpose(1, 2) for part in taken))
                error_eGrS = own.on_grid(inside_eGrS, grid).sub_(weight_eGrS)
                if gram_eGSS is None:
                    cost = (error_eGrS @ inputs_eGTS.mT).square_().sum(-1, keepdim=True)
                else:
                    cost = (error_eGrS @ gram_eGSS).mul_(error_eGrS).sum(-1, keepdim=True)
                better = cost < lowest_cost
                lowest_cost = torch.where(better, cost, lowest_cost)
                best_limit = torch.where(better, limit, best_limit)
            best_eGrS = weight_eGrS.clamp(-best_limit, best_limit)
            clipped_EOI[e, r] = best_eGrS.transpose(1, 2).flatten(-2)
    return clipped_EOI


def _limit(limits: dict[str, int], tensor: Tensor) -> int:
    return limits.get(tensor.device.type, limits["cpu"])


def _parts(weight_EOI: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Divide a weight into parts of `WEIGHTS_AT_ONCE`: runs of experts, and of rows within each."""
    experts, rows, columns = weight_EOI.shape
    limit = _limit(WEIGHTS_AT_ONCE, weight_EOI)
    expert_step, row_step = max(1, limit // (rows * columns)), max(1, limit // columns)
    for e in range(0, experts, expert_step):
        yield slice(e, e + expert_step), [slice(r, r + row_step) for r in range(0, rows, row_step)]


def _scaled_rounding_by_parts(
    weight_xOI: Tensor, scale_I: Tensor, scheme: Scheme, levels: Levels
) -> Tensor:
    """Apply `scaled_rounding` to a large weight whose experts share a scale, in its own dtype."""
    rounded_xOI = weight_xOI.new_empty(weight_xOI.shape)
    step = max(1, _limit(WEIGHTS_AT_ONCE, weight_xOI) // weight_xOI.shape[-1])
    parts = (matrix_xOI.flatten(0, -2).split(step) for matrix_xOI in (weight_xOI, rounded_xOI))
    levels = levels.as_one_linear()
    for k, (part_rI, rounded_rI) in enumerate(zip(*parts, strict=True)):
        own = levels.part(slice(None), slice(k * step, (k + 1) * step))
        rounded_rI.copy_(scaled_rounding(part_rI[None], scale_I[None], scheme, own)[0])
    return rounded_xOI

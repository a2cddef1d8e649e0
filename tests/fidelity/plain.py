"""The official drivers, transcribed plainly on transformers' own model: hooks, loops and all.

Written from descriptions of IST-DASLab/gptq, mit-han-lab/llm-awq, mit-han-lab/smoothquant and Aaronhuang-778/BiLLM.
Nothing here uses q3q, and nothing here is fast. Every driver quantizes the model in place and returns what it chose
for each linear, by the linear's name. Layers are called sample by sample (AWQ: all samples at once), linears are seen
one by one, and each has its own statistics.

Shapes: N windows, T tokens of one, O out features, I in features.
"""

import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy
import torch
from torch import nn
from transformers import AutoModelForCausalLM

MIN_EXPERT_TOKENS = (
    128  # below, what an expert's tokens say is not used (q3q's rule; official code has none)
)


@dataclass
class Rounded:
    """codes, scale, zero: of every single weight, all [O, I]; the weight is scale * (codes - zero).

    value: what was rounded, in units of scale. order: in which the columns were treated. lowest, doubtful (AWQ): the
    lowest of the weight's group; whether the group's grid hangs on the last bit of a number.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    value: torch.Tensor = None
    order: torch.Tensor = None
    lowest: torch.Tensor = None
    doubtful: torch.Tensor = None

    @classmethod
    def like(cls, w_OI):
        return cls(*(torch.empty_like(w_OI) for _ in range(4)), torch.arange(w_OI.shape[1]))

    @property
    def weight(self):
        return self.scale * (self.codes - self.zero)

    @property
    def from_tie(self):
        """How far each value was from the midpoint between two codes, in units of scale."""
        return (self.value - self.value.floor() - 0.5).abs()


# --------------------------------------------------------------------------------------------------- the model


class Expert(nn.Module):
    def __init__(self, gate_OI, up_OI, down_OI):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(as_linear, (gate_OI, up_OI, down_OI))

    def forward(self, x_TI):
        return self.down_proj(nn.functional.silu(self.gate_proj(x_TI)) * self.up_proj(x_TI))


class ListOfExperts(nn.Module):
    """Qwen3-MoE's sparse block as transformers 4 had it: one module of three linears per expert, so that hooks work."""

    def __init__(self, fused):
        super().__init__()
        self.top_k, self.renormalize = fused.gate.top_k, fused.gate.norm_topk_prob
        self.router = nn.Parameter(
            fused.gate.weight.detach().clone()
        )  # not a Linear: no driver may quantize it
        self.experts = nn.ModuleList()
        for gate_up, down in zip(fused.experts.gate_up_proj, fused.experts.down_proj, strict=True):
            gate, up = gate_up.detach().clone().chunk(2)
            self.experts.append(Expert(gate, up, down.detach().clone()))

    def forward(self, x_NTH):
        x_TH = x_NTH.reshape(-1, x_NTH.shape[-1])
        probability = torch.softmax(x_TH @ self.router.T, dim=-1)
        share, chosen = torch.topk(probability, self.top_k, dim=-1)
        if self.renormalize:
            share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(chosen == e)
            if len(token):
                out[token] += share[token, place, None] * expert(x_TH[token])
        return out.reshape(x_NTH.shape)


def as_linear(weight_OI):
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_OI)
    return linear


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.config.use_cache = False
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = ListOfExperts(layer.mlp)
    return model.requires_grad_(False)


def linears(layer):
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


class Stop(Exception):  # noqa: N818
    pass


def first_inputs(model, windows_NT):
    """What reaches the first layer: one hidden [1, T, H] per window, and the keyword arguments of every layer."""
    caught = []

    def catch(module, args, kwargs):
        caught.append(
            (
                args[0],
                {k: kwargs[k] for k in ("attention_mask", "position_ids", "position_embeddings")},
            )
        )
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window_T in windows_NT:
        with suppress(Stop):
            model(input_ids=window_T[None])
    handle.remove()
    return [x for x, _ in caught], caught[0][1]


@contextmanager
def watching(modules, see):
    """Call see(name, inputs) whenever one of the modules runs."""
    handles = [
        module.register_forward_hook(lambda _, inputs, __, name=name: see(name, inputs[0]))
        for name, module in modules.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def perplexity(model, windows_NT):
    """eval_ours' formula, but likelihoods in float32 and not 16 bits."""
    total = 0.0
    for window_T in windows_NT:
        logits = model(input_ids=window_T[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits.float(), window_T[1:])) * len(window_T)
    return math.exp(total / windows_NT.numel())


# ---------------------------------------------------------------------------------------------------------- RTN


def find_params(x_OS, bits, symmetric, mse=False):
    """GPTQ's Quantizer for each row of x. Returns scale and zero, both [O]."""
    maxq = 2**bits - 1
    low, high = torch.empty(len(x_OS)), torch.empty(len(x_OS))
    for o, row in enumerate(x_OS):
        low[o], high[o] = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        if symmetric:
            high[o] = max(abs(low[o]), high[o])
            low[o] = -high[o]
        if low[o] == 0 and high[o] == 0:
            low[o], high[o] = -1, 1
    scale = (high - low) / maxq
    middle = torch.full_like(scale, (maxq + 1) / 2)
    zero = middle if symmetric else torch.round(-low / scale)
    if mse:
        best = torch.full_like(scale, math.inf)
        scale, zero = scale.clone(), zero.clone()
        for i in range(80):
            p = 1 - i / 100
            tried = (p * high - p * low) / maxq
            tried_zero = middle if symmetric else torch.round(-p * low / tried)
            wrong = (
                tried[:, None] * (nearest(x_OS, tried, tried_zero, bits) - tried_zero[:, None])
                - x_OS
            )
            cost = wrong.abs().pow(2.4).sum(1)
            better = cost < best
            best[better], scale[better], zero[better] = (
                cost[better],
                tried[better],
                tried_zero[better],
            )
    return scale, zero


def nearest(x_OS, scale_O, zero_O, bits):
    return torch.clamp(torch.round(x_OS / scale_O[:, None]) + zero_O[:, None], 0, 2**bits - 1)


def round_to_nearest(w_OI, bits, group_size, symmetric, mse=False):
    size = w_OI.shape[1] if group_size == -1 else group_size
    rounded = Rounded.like(w_OI)
    for g in range(0, w_OI.shape[1], size):
        part = w_OI[:, g : g + size]
        scale, zero = find_params(part, bits, symmetric, mse)
        rounded.codes[:, g : g + size] = nearest(part, scale, zero, bits)
        rounded.scale[:, g : g + size], rounded.zero[:, g : g + size] = (
            scale[:, None],
            zero[:, None],
        )
        rounded.value[:, g : g + size] = part / scale[:, None]
    return rounded


@torch.no_grad()
def rtn(model, bits, group_size, symmetric=False, mse=False):
    found = {}
    for k, layer in enumerate(model.model.layers):
        for name, linear in linears(layer).items():
            rounded = round_to_nearest(linear.weight, bits, group_size, symmetric, mse)
            linear.weight.copy_(rounded.weight)
            found[f"{k}.{name}"] = rounded
    return found


# --------------------------------------------------------------------------------------------------------- GPTQ


class Hessian:
    """add_batch: running mean over calls of 2 X^T X."""

    def __init__(self, columns):
        self.H, self.samples, self.tokens = torch.zeros(columns, columns), 0, 0

    def add(self, x):
        if x.ndim == 2:
            x = x[None]
        self.H *= self.samples / (self.samples + len(x))
        self.samples += len(x)
        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        x = math.sqrt(2 / self.samples) * x.float()
        self.H += x.T @ x


def hessians_of(layer, names, hidden, kwargs):
    """Run the layer over every sample; the Hessian of each linear named."""
    some = {name: module for name, module in linears(layer).items() if name in names}
    seen = {name: Hessian(module.in_features) for name, module in some.items()}
    with watching(some, lambda name, x: seen[name].add(x)):
        for x in hidden:
            layer(x, **kwargs)
    return seen


def sequential_groups(layer):
    """[q, k, v], [o], [gate, up], [down], each of all experts."""
    names = list(linears(layer))
    return [[n for n in names if n.endswith(ends)] for ends in (
        ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",),
    )]  # fmt: skip


def upper_factor(H, damping):
    H = H.clone()
    H[range(len(H)), range(len(H))] += damping * torch.mean(torch.diag(H))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def gptq_linear(
    W, H, bits, group_size, symmetric, damping, block_size, act_order, static_groups, mse
):
    """fasterquant."""
    W, H = W.clone(), H.clone()
    rows, columns = W.shape
    if group_size == -1:
        scale, zero = find_params(W, bits, symmetric, mse)
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    if static_groups and group_size != -1:
        static = [
            find_params(W[:, g : g + group_size], bits, symmetric, mse)
            for g in range(0, columns, group_size)
        ]
    order = torch.arange(columns)
    if act_order:
        order = torch.argsort(torch.diag(H), descending=True, stable=True)
        W, H = W[:, order], H[order][:, order]
    Hinv = upper_factor(H, damping)
    out = Rounded.like(W)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = W[:, start:stop].clone(), torch.zeros(rows, stop - start)
        for i in range(start, stop):
            if group_size != -1:
                if static_groups:
                    scale, zero = static[int(order[i]) // group_size]
                elif i % group_size == 0:
                    scale, zero = find_params(W[:, i : i + group_size], bits, symmetric, mse)
            w = block[:, i - start]
            codes = nearest(w[:, None], scale, zero, bits)[:, 0]
            out.codes[:, i], out.scale[:, i], out.zero[:, i], out.value[:, i] = (
                codes,
                scale,
                zero,
                w / scale,
            )
            error = (w - scale * (codes - zero)) / Hinv[i, i]
            block[:, i - start :] -= error[:, None] * Hinv[i, i:stop][None, :]
            errors[:, i - start] = error
        W[:, stop:] -= errors @ Hinv[start:stop, stop:]
    back = torch.argsort(order)
    return Rounded(*(x[:, back] for x in (out.codes, out.scale, out.zero, out.value)), order)


@torch.no_grad()
def gptq(
    model, windows_NT, bits, group_size, symmetric=False, *, damping=0.01, block_size=128, act_order=True,
    true_sequential=True, static_groups=False, mse=False,
):  # fmt: skip
    found = {}
    hidden, kwargs = first_inputs(model, windows_NT)
    for k, layer in enumerate(model.model.layers):
        modules = linears(layer)
        groups = sequential_groups(layer) if true_sequential else [list(modules)]
        for names in groups:
            for name, seen in hessians_of(layer, names, hidden, kwargs).items():
                weight = modules[name].weight
                if "experts" in name and seen.tokens < MIN_EXPERT_TOKENS:
                    rounded = round_to_nearest(weight, bits, group_size, symmetric, mse)
                else:
                    rounded = gptq_linear(
                        weight, seen.H, bits, group_size, symmetric, damping, block_size, act_order, static_groups, mse
                    )  # fmt: skip
                found[f"{k}.{name}"] = rounded
            for name in names:
                modules[name].weight.copy_(found[f"{k}.{name}"].weight)
        hidden = [layer(x, **kwargs) for x in hidden]  # quantized outputs go on
    return found


# ---------------------------------------------------------------------------------------------------------- AWQ


def pseudo_quantize(w_OI, bits, group_size):
    """pseudo_quantize_tensor with a zero point: the range is the weights' own, zero not forced in."""
    size = w_OI.shape[1] if group_size == -1 else group_size
    out = Rounded.like(w_OI)
    out.lowest = torch.empty_like(w_OI)
    for g in range(0, w_OI.shape[1], size):
        part = w_OI[:, g : g + size]
        high, low = part.amax(1, keepdim=True), part.amin(1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / (2**bits - 1)
        zero = (-torch.round(low / scale)).clamp(0, 2**bits - 1)
        out.codes[:, g : g + size] = torch.clamp(torch.round(part / scale) + zero, 0, 2**bits - 1)
        out.scale[:, g : g + size], out.zero[:, g : g + size] = scale, zero
        out.value[:, g : g + size], out.lowest[:, g : g + size] = part / scale, low
    return out


def search_scale(inspect, modules, x, kwargs, bits, group_size, grid):
    """_search_module_scale: scales mean|x|^r, judged by the output of `inspect` on the unscaled inputs."""
    before = output(inspect, x, kwargs)
    mean = x.abs().reshape(-1, x.shape[-1]).mean(0)
    originals = [module.weight.clone() for module in modules]
    best, lowest = None, math.inf
    for step in range(grid):
        s = mean.pow(step / grid).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for module, original in zip(modules, originals, strict=True):
            module.weight.copy_(pseudo_quantize(original * s, bits, group_size).weight / s)
        loss = float((before - output(inspect, x, kwargs)).pow(2).mean())
        if loss < lowest:
            best, lowest = s, loss
        for module, original in zip(modules, originals, strict=True):
            module.weight.copy_(original)
    return best


def output(module, x, kwargs):
    out = module(x, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def search_clip(w_OI, x_TI, bits, group_size):
    """auto_clip_layer: the largest absolute value allowed to each row of each group, and where a tie decides; [O, I].

    A group cut to [-m, m] has its zero point at (2**bits - 1) / 2, halfway between two, and so its outermost weights. A
    choice is doubtful if rounding those the other way, or a change of costs by 0.1 %, could lead to another.
    """
    size = w_OI.shape[1] if group_size == -1 else group_size
    x_TI = x_TI[:: max(1, len(x_TI) // 512)]
    limits, doubts = [], []
    for g in range(0, w_OI.shape[1], size):
        part, x = w_OI[:, g : g + size], x_TI[:, g : g + size]
        largest = part.abs().amax(1, keepdim=True)
        best, lowest = largest.clone(), torch.full_like(largest, 1e9)
        at_best, at_least = torch.zeros_like(largest), []
        for i in range(10):
            limit = largest * (1 - i / 20)
            tried = pseudo_quantize(torch.clamp(part, -limit, limit), bits, -1)
            error = (x @ (tried.weight - part).T).pow(2).mean(0)[:, None]
            better = error < lowest
            lowest[better], best[better] = error[better], limit[better]
            errors = [error]
            for zero in (tried.zero, other_zero(tried)):
                for nudge in (1 - 1e-5, 1 + 1e-5):
                    codes = ((tried.value * nudge).round() + zero).clamp(0, 2**bits - 1)
                    errors.append(
                        (x @ (tried.scale * (codes - zero) - part).T).pow(2).mean(0)[:, None]
                    )
            at_best[better] = torch.cat(errors, 1).amax(1, keepdim=True)[better]
            at_least.append(torch.cat(errors, 1).amin(1, keepdim=True))
        doubtful = (torch.cat(at_least, 1) < 1.001 * at_best).sum(1, keepdim=True) > 1
        limits.append(best.expand(-1, size))
        doubts.append(doubtful.expand(-1, size))
    return torch.cat(limits, 1), torch.cat(doubts, 1)


def other_zero(rounded):
    """Zero points rounded the other way where they are halfway between two."""
    exact = -rounded.lowest / rounded.scale
    tied = (exact - exact.floor() - 0.5).abs() < 1e-3
    return torch.where(tied, exact.floor() + exact.ceil() - rounded.zero, rounded.zero)


@torch.no_grad()
def awq(model, windows_NT, bits, group_size, *, scale=True, clip=True, grid=20):
    found = {}
    hidden, kwargs = first_inputs(model, windows_NT)
    x = torch.cat(hidden)
    for k, layer in enumerate(model.model.layers):
        modules, feats = linears(layer), {}
        with watching({**modules, "mlp": layer.mlp}, feats.__setitem__):
            x = layer(x, **kwargs)  # full-precision outputs go on
        if scale:
            groups = find_scales(layer, modules, feats, kwargs, bits, group_size, grid)
            apply_scales(layer, modules, feats, groups)
        for name, module in modules.items():
            if clip and not starved(name, feats) and "q_" not in name and "k_" not in name:
                inputs = feats[name].reshape(-1, module.in_features)
                limit, doubtful = search_clip(module.weight, inputs, bits, group_size)
                module.weight.copy_(torch.clamp(module.weight, -limit, limit))
            else:
                doubtful = torch.zeros_like(module.weight, dtype=torch.bool)
            rounded = pseudo_quantize(module.weight, bits, group_size)
            rounded.doubtful = doubtful | (other_zero(rounded) != rounded.zero)
            module.weight.copy_(rounded.weight)
            found[f"{k}.{name}"] = rounded
    return found


def starved(name, feats):
    """Whether this is a linear of an expert that hardly any token reached, which has neither scale nor clip."""
    return "experts" in name and (
        name not in feats or feats[name].numel() < MIN_EXPERT_TOKENS * feats[name].shape[-1]
    )


def find_scales(layer, modules, feats, kwargs, bits, group_size, grid):
    """auto_scale_block: every group is searched before any is applied. Returns (producer, readers, scales)."""

    def search(inspect, names, x, kwargs):
        return search_scale(
            inspect, [modules[name] for name in names], x, kwargs, bits, group_size, grid
        )

    groups = []
    qkv = [f"self_attn.{c}_proj" for c in "qkv"]
    attention = {**kwargs, "past_key_values": None}
    groups.append(
        (layer.input_layernorm, qkv, search(layer.self_attn, qkv, feats[qkv[0]], attention))
    )
    v, o = modules["self_attn.v_proj"], modules["self_attn.o_proj"]
    if v.weight.shape == o.weight.shape:
        groups.append(
            (
                v,
                ["self_attn.o_proj"],
                search(o, ["self_attn.o_proj"], feats["self_attn.o_proj"], {}),
            )
        )
    gate_up = [name for name in modules if name.endswith(("gate_proj", "up_proj"))]
    groups.append(
        (layer.post_attention_layernorm, gate_up, search(layer.mlp, gate_up, feats["mlp"], {}))
    )
    for down in [name for name in modules if name.endswith("down_proj")]:
        if not starved(down, feats):
            up = modules[down.replace("down_proj", "up_proj")]
            groups.append((up, [down], search(modules[down], [down], feats[down], {})))
    return groups


def apply_scales(layer, modules, feats, groups):
    for producer, names, s in groups:
        producer.weight.div_(s if producer.weight.ndim == 1 else s[:, None])
        for name in names:
            modules[name].weight.mul_(s)
            if name in feats:
                feats[name] = feats[name] / s
        if producer is layer.post_attention_layernorm and hasattr(layer.mlp, "router"):
            layer.mlp.router.mul_(s)


# -------------------------------------------------------------------------------------------------- SmoothQuant


@torch.no_grad()
def smoothquant(model, windows_NT, bits, act_bits, *, alpha=0.5, smooth=True):
    """get_act_scales, smooth_lm and quantize_llama_like; from here on the model quantizes its own activations."""
    found = {}
    if smooth:
        largest = {}
        for k, layer in enumerate(model.model.layers):
            watched = {"attention": layer.self_attn.q_proj, "mlp": layer.mlp}
            layer.watch = watching(watched, lambda name, x, k=k: largest.setdefault((k, name), []).append(
                x.abs().reshape(-1, x.shape[-1]).amax(0)
            ))  # fmt: skip
            layer.watch.__enter__()
        for window_T in windows_NT:
            model(input_ids=window_T[None])
        for k, layer in enumerate(model.model.layers):
            layer.watch.__exit__(None, None, None)
            modules = linears(layer)
            for norm, name, ends in (
                (layer.input_layernorm, "attention", ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, "mlp", ("gate_proj", "up_proj")),
            ):
                readers = [module.weight for path, module in modules.items() if path.endswith(ends)]
                if name == "mlp" and hasattr(layer.mlp, "router"):
                    readers.append(layer.mlp.router)
                act = torch.stack(largest[k, name]).amax(0)
                weight = (
                    torch.cat([w.abs().amax(0, keepdim=True) for w in readers])
                    .amax(0)
                    .clamp(min=1e-5)
                )
                s = (act.pow(alpha) / weight.pow(1 - alpha)).clamp(min=1e-5)
                norm.weight.div_(s)
                for w in readers:
                    w.mul_(s)
    top = 2 ** (bits - 1) - 1
    for k, layer in enumerate(model.model.layers):
        for name, module in linears(layer).items():
            scale = module.weight.abs().amax(1, keepdim=True).clamp(min=1e-5) / top
            codes = torch.round(module.weight / scale)
            zero, value = torch.zeros_like(codes), module.weight / scale
            found[f"{k}.{name}"] = Rounded(
                codes, scale.expand_as(codes), zero, value, torch.arange(codes.shape[1])
            )
            module.weight.copy_(found[f"{k}.{name}"].weight)
            if act_bits is not None:
                module.register_forward_pre_hook(
                    lambda _, inputs: (per_token(inputs[0], act_bits),)
                )
    return found


def per_token(x, bits):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
    return torch.round(x / scale) * scale


# -------------------------------------------------------------------------------------------------------- BiLLM


def residual_binarize(x, mask, order):
    """high_order_residual: in each row, mean and mean absolute deviation over the mask, `order` times."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    approximation = torch.zeros_like(x)
    for _ in range(order):
        residual = x - approximation
        mean = (residual * mask).sum(1, keepdim=True) / count
        deviation = ((residual - mean).abs() * mask).sum(1, keepdim=True) / count
        approximation = approximation + (torch.sign(residual - mean) * deviation + mean) * mask
    return approximation * mask


def structural_search(S):
    """structural_searching on the saliency S. Returns the masks of small, large and salient weights."""
    ranked = torch.topk(S.abs().sum(0), min(50, S.shape[1])).indices
    lowest = math.inf
    for count in range(1, min(50, S.shape[1])):
        mask = torch.zeros_like(S, dtype=torch.bool)
        mask[:, ranked[:count]] = True
        cost = float(
            (S - residual_binarize(S, mask, 2) - residual_binarize(S, ~mask, 2)).pow(2).mean()
        )
        if cost < lowest:
            lowest, salient = cost, mask
    salient_part = residual_binarize(S, salient, 2)
    flat = (S * ~salient).abs().flatten().numpy()
    lowest = math.inf
    for border in numpy.quantile(flat, torch.linspace(0.10, 0.90, 81).numpy()):
        large = (S.abs() >= float(border)) & ~salient
        small = (S.abs() < float(border)) & ~salient
        tried = residual_binarize(S, small, 1) + residual_binarize(S, large, 1) + salient_part
        cost = float((S - tried).pow(2).mean())
        if cost < lowest:
            lowest, best = cost, (small, large, salient)
    return best


def billm_linear(W, H, damping, block_size, metric):
    """BRAGPTQ.fasterquant. Returns the weight as numbers and, per block, which columns are salient."""
    W, H = W.clone(), H.clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    Hc = upper_factor(H, damping)
    salient_columns = []
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        block = W[:, start:stop].clone()
        factor = torch.diag(Hc)[start:stop]
        S = block**2 / factor[None, :] ** 2 if metric == "hessian" else block
        small, large, salient = structural_search(S)
        rounded = (
            residual_binarize(block, small, 1)
            + residual_binarize(block, large, 1)
            + residual_binarize(block, salient, 2)
        )
        errors = (block - rounded) / factor[None, :]  # nothing is passed on inside the block
        W[:, start:stop] = rounded
        W[:, stop:] -= errors @ Hc[start:stop, stop:]
        salient_columns.append(salient[0])
    return W, torch.cat(salient_columns)


@torch.no_grad()
def billm(model, windows_NT, *, damping=0.01, block_size=128, metric="hessian"):
    """Returns by name (weight [O, I], salient columns [I])."""
    found = {}
    hidden, kwargs = first_inputs(model, windows_NT)
    for k, layer in enumerate(model.model.layers):
        modules = linears(layer)
        for name, seen in hessians_of(layer, list(modules), hidden, kwargs).items():
            if "experts" in name and seen.tokens < MIN_EXPERT_TOKENS:
                seen.H = torch.eye(len(seen.H))
            found[f"{k}.{name}"] = billm_linear(
                modules[name].weight, seen.H, damping, block_size, metric
            )
        for name, module in modules.items():
            module.weight.copy_(found[f"{k}.{name}"][0])
        hidden = [layer(x, **kwargs) for x in hidden]
    return found

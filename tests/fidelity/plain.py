"""The official drivers, transcribed plainly on transformers' own model: hooks, loops and all.

Written from descriptions of IST-DASLab/gptq, mit-han-lab/llm-awq, mit-han-lab/smoothquant and
Aaronhuang-778/BiLLM. Nothing here uses q3q, and nothing here is fast. Every driver quantizes the
model in place and returns its choices for each linear, by the linear's name. Layers are called
sample by sample (AWQ: all samples at once), linears are treated one by one, and each has its own
statistics.

Shapes: N windows, T tokens of one, O out features, I in features.
"""

import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import nn
from transformers import AutoModelForCausalLM

# The statistics of an expert with fewer tokens are not used (q3q's rule; the official code has
# none).
MIN_EXPERT_TOKENS = 128


@dataclass
class Rounded:
    """A rounded weight, scale * (codes - zero), each of them [O, I].

    value: the weight before rounding, in units of scale.
    zero_value: the zero point before rounding; None if it is not rounded.
    order: the order in which columns were rounded.
    lowest: the lowest weight of the group (AWQ).
    clipping: the search for limits, None if the linear is not clipped (AWQ).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    value: Any = None
    order: Any = None
    lowest: Any = None
    clipping: Any = None
    zero_value: Any = None

    @classmethod
    def like(cls, w_OI):
        codes, scale, zero, value = (torch.empty_like(w_OI) for _ in range(4))
        return cls(codes, scale, zero, value, torch.arange(w_OI.shape[1]))

    @property
    def weight(self):
        return self.scale * (self.codes - self.zero)

    def differs(self, other):
        """Compare codes, counted from the zero point: symmetric ones may have another origin."""
        return (self.codes - self.zero) != (other.codes - other.zero)

    @property
    def from_tie(self):
        """Return each value's distance from the midpoint between two codes, in units of scale."""
        return from_midpoint(self.value)

    def other_zero(self, other):
        """Return where another driver's zero point differs: from there on, all codes may."""
        same_origin = self.zero_value is not None
        return (self.zero != other.zero) & same_origin

    @property
    def zero_from_tie(self):
        """Return each zero point's distance from the midpoint between two codes."""
        return from_midpoint(self.zero_value)


def from_midpoint(number):
    return (number - number.floor() - 0.5).abs()


class Expert(nn.Module):
    def __init__(self, gate_OI, up_OI, down_OI):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(as_linear, (gate_OI, up_OI, down_OI))

    def forward(self, x_TI):
        return self.down_proj(nn.functional.silu(self.gate_proj(x_TI)) * self.up_proj(x_TI))


class ListOfExperts(nn.Module):
    """Qwen3-MoE's sparse block as transformers 4 had it: a module an expert, so that hooks work.

    Beside them Qwen3-Next has an expert for all tokens.
    """

    def __init__(self, fused):
        super().__init__()
        self.top_k = fused.gate.top_k
        self.renormalize = getattr(fused.gate, "norm_topk_prob", True)
        # Not a Linear: no driver may quantize it.
        self.router = nn.Parameter(fused.gate.weight.detach().clone())
        self.shared_expert = getattr(fused, "shared_expert", None)
        if self.shared_expert is not None:
            self.shared_gate = nn.Parameter(fused.shared_expert_gate.weight.detach().clone())
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
        if self.shared_expert is not None:
            out += torch.sigmoid(x_TH @ self.shared_gate.T) * self.shared_expert(x_TH)
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
        if hasattr(layer, "linear_attn"):  # layers are all called as the first one is
            layer.linear_attn.forward = without_mask(layer.linear_attn.forward)
    return model.requires_grad_(False)


def without_mask(forward):
    """Drop attention's mask: a recurrence needs one for padding only."""
    return lambda hidden_states, **others: forward(
        hidden_states, **{**others, "attention_mask": None}
    )


def linears(layer):
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


class Stop(Exception):  # noqa: N818
    pass


def first_inputs(model, windows_NT):
    """Return the first layer's inputs, [1, T, H] a window, and every layer's keyword arguments."""
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
def watching(modules, observe):
    """Call observe(name, inputs) whenever one of the modules runs."""
    handles = [
        module.register_forward_hook(lambda _, inputs, __, name=name: observe(name, inputs[0]))
        for name, module in modules.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def perplexity(model, windows_NT):
    """Compute eval_ours' formula, but with likelihoods in float32 and not 16 bits."""
    total = 0.0
    for window_T in windows_NT:
        logits = model(input_ids=window_T[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits.float(), window_T[1:])) * len(window_T)
    return math.exp(total / windows_NT.numel())


def find_params(x_OS, bits, symmetric, mse=False):
    """Return the scale and zero, both [O], of GPTQ's Quantizer for each row of x.

    And the zero before it is rounded, which a range that shrinks does not change.
    """
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
    exact_zero = middle if symmetric else -low / scale
    zero = torch.round(exact_zero)
    if mse:
        best = torch.full_like(scale, math.inf)
        for i in range(80):
            p = 1 - i / 100
            tried = (p * high - p * low) / maxq
            tried_zero = middle if symmetric else torch.round(-p * low / tried)
            codes = nearest(x_OS, tried, tried_zero, bits)
            error = tried[:, None] * (codes - tried_zero[:, None]) - x_OS
            cost = error.abs().pow(2.4).sum(1)
            better = cost < best
            best, scale = torch.where(better, cost, best), torch.where(better, tried, scale)
            zero = torch.where(better, tried_zero, zero)
    return scale, zero, exact_zero


def nearest(x_OS, scale_O, zero_O, bits):
    return torch.clamp(torch.round(x_OS / scale_O[:, None]) + zero_O[:, None], 0, 2**bits - 1)


def round_to_nearest(w_OI, bits, group_size, symmetric, mse=False):
    size = w_OI.shape[1] if group_size == -1 else group_size
    rounded = replace(Rounded.like(w_OI), zero_value=torch.empty_like(w_OI))
    for g in range(0, w_OI.shape[1], size):
        part = w_OI[:, g : g + size]
        scale, zero, exact_zero = find_params(part, bits, symmetric, mse)
        rounded.codes[:, g : g + size] = nearest(part, scale, zero, bits)
        rounded.scale[:, g : g + size] = scale[:, None]
        rounded.zero[:, g : g + size] = zero[:, None]
        rounded.value[:, g : g + size] = part / scale[:, None]
        rounded.zero_value[:, g : g + size] = exact_zero[:, None]
    return rounded if not symmetric else replace(rounded, zero_value=None)


@torch.no_grad()
def rtn(model, bits, group_size, symmetric=False, mse=False):
    results = {}
    for k, layer in enumerate(model.model.layers):
        for name, linear in linears(layer).items():
            rounded = round_to_nearest(linear.weight, bits, group_size, symmetric, mse)
            linear.weight.copy_(rounded.weight)
            results[f"{k}.{name}"] = rounded
    return results


class Hessian:
    """The running mean of 2 X^T X over calls (add_batch)."""

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
    """Run the layer over every sample, and return the Hessians of the named linears."""
    modules = {name: module for name, module in linears(layer).items() if name in names}
    hessians = {name: Hessian(module.in_features) for name, module in modules.items()}
    with watching(modules, lambda name, x: hessians[name].add(x)):
        for x in hidden:
            layer(x, **kwargs)
    return hessians


def sequential_groups(layer):
    """Return the names [q, k, v] or those of a delta rule's input, [o], [gate, up], [down].

    The latter are of all experts.
    """
    names, ends = (
        list(linears(layer)),
        (
            "q_proj k_proj v_proj "
            "in_proj_qkvz in_proj_ba in_proj_qkv in_proj_z in_proj_b in_proj_a",
            "o_proj out_proj",
            "gate_proj up_proj",
            "down_proj",
        ),
    )
    return [[name for name in names if name.endswith(tuple(end.split()))] for end in ends]


def upper_factor(H, damping):
    H = H.clone()
    H[range(len(H)), range(len(H))] += damping * torch.mean(torch.diag(H))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def order_of(H, act_order):
    """Return the order in which columns are rounded."""
    if not act_order:
        return torch.arange(len(H))
    diagonal = torch.where(torch.diag(H) > 0, torch.diag(H), 1.0)
    return torch.argsort(diagonal, descending=True, stable=True)


def orders_of(H, act_order):
    """Return the columns' possible orders: where two diagonals differ in the last bits, either."""
    order = order_of(H, act_order)
    if not act_order:
        return [order]
    live = torch.diag(H) > 0
    diagonal = torch.where(live, torch.diag(H), 1.0)
    high, low = diagonal[order][:-1], diagonal[order][1:]
    both_live = live[order][:-1] & live[order][1:]
    orders = [order]
    for i in torch.where(both_live & (high - low < 1e-5 * high))[0].tolist():
        for other in list(orders):
            swapped = other.clone()
            swapped[[i, i + 1]] = other[[i + 1, i]]
            orders.append(swapped)
    return orders


def gptq_linear(W, H, order, bits, group_size, symmetric, damping, block_size, static_groups, mse):
    """Round one linear, its columns in this order, as fasterquant does."""
    W, H = W.clone(), H.clone()
    rows, columns = W.shape
    if group_size == -1:
        scale, zero, exact_zero = find_params(W, bits, symmetric, mse)
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    if static_groups and group_size != -1:
        static = [
            find_params(W[:, g : g + group_size], bits, symmetric, mse)
            for g in range(0, columns, group_size)
        ]
    W, H = W[:, order], H[order][:, order]
    Hinv = upper_factor(H, damping)
    out, exact_zeros = Rounded.like(W), torch.empty_like(W)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = W[:, start:stop].clone(), torch.zeros(rows, stop - start)
        for i in range(start, stop):
            if group_size != -1:
                if static_groups:
                    scale, zero, exact_zero = static[int(order[i]) // group_size]
                elif i % group_size == 0:
                    group = W[:, i : i + group_size]
                    scale, zero, exact_zero = find_params(group, bits, symmetric, mse)
            w = block[:, i - start]
            codes = nearest(w[:, None], scale, zero, bits)[:, 0]
            out.codes[:, i], out.scale[:, i], out.zero[:, i] = codes, scale, zero
            out.value[:, i], exact_zeros[:, i] = w / scale, exact_zero
            error = (w - scale * (codes - zero)) / Hinv[i, i]
            block[:, i - start :] -= error[:, None] * Hinv[i, i:stop][None, :]
            errors[:, i - start] = error
        W[:, stop:] -= errors @ Hinv[start:stop, stop:]
    back = torch.argsort(order)
    of_columns = (out.codes, out.scale, out.zero, out.value, exact_zeros)
    codes, scale, zero, value, zero_value = (x[:, back] for x in of_columns)
    zero_value = None if symmetric else zero_value
    return Rounded(codes, scale, zero, value, order, zero_value=zero_value)


@torch.no_grad()
def gptq(
    model,
    windows_NT,
    bits,
    group_size,
    symmetric=False,
    *,
    damping=0.01,
    block_size=128,
    act_order=True,
    true_sequential=True,
    static_groups=False,
    mse=False,
    follow=None,
):
    """Quantize with GPTQ.

    Args:
        follow: another driver's choices by name. They go into the model in place of this driver's,
            so that every linear is solved on the inputs of the other driver's linear.
    """
    results = {}
    hidden, kwargs = first_inputs(model, windows_NT)
    for k, layer in enumerate(model.model.layers):
        modules = linears(layer)
        groups = sequential_groups(layer) if true_sequential else [list(modules)]
        for names in groups:
            for name, hessian in hessians_of(layer, names, hidden, kwargs).items():
                weight = modules[name].weight
                if "experts" in name and hessian.tokens < MIN_EXPERT_TOKENS:
                    rounded = round_to_nearest(weight, bits, group_size, symmetric, mse)
                else:
                    knobs = bits, group_size, symmetric, damping, block_size, static_groups, mse
                    if follow is None:
                        # Of wide linears there are too many possible orders to list.
                        order = order_of(hessian.H, act_order)
                        rounded = gptq_linear(weight, hessian.H, order, *knobs)
                    else:
                        orders = orders_of(hessian.H, act_order)
                        other = follow[f"{k}.{name}"]
                        rounded = min(
                            (gptq_linear(weight, hessian.H, order, *knobs) for order in orders),
                            key=lambda tried: int(tried.differs(other).sum()),
                        )
                results[f"{k}.{name}"] = rounded
            for name in names:
                modules[name].weight.copy_((follow or results)[f"{k}.{name}"].weight)
        hidden = [layer(x, **kwargs) for x in hidden]  # quantized outputs go on
    return results


def pseudo_quantize(w_OI, bits, group_size):
    """Round as pseudo_quantize_tensor with a zero point does: the range need not include zero."""
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
    """Search s = mean|x|^r by the output of `inspect` on unscaled inputs (_search_module_scale)."""
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


@dataclass
class Clipping:
    """A search for each row's limit of |w| in each group, and the costs that it compares.

    A range [-m, m] has its zero point at (2**bits - 1) / 2, halfway between two codes, and its
    outermost weights halfway between two codes: the last bit of m decides. Whichever way it
    decides, the cheapest range costs no more than any other range whose ties fall the dearer way.

    limit: the largest absolute value allowed, expanded to [O, I].
    w_OI: the linear's weight before clipping.
    x_TI: the linear's inputs.
    size: columns per group.
    highest_G: for each group, the cost [O] that no outcome of the search exceeds.
    """

    limit: torch.Tensor
    w_OI: torch.Tensor
    x_TI: torch.Tensor
    size: int
    highest_G: list[torch.Tensor]

    def costs_of(self, weight_OI):
        """Return a rounded weight's cost in each group, [O] each, in float64."""
        return [cost_of(weight_OI[:, g], self.w_OI[:, g], self.x_TI[:, g]) for g in self.groups()]

    def groups(self):
        starts = range(0, self.w_OI.shape[1], self.size)
        return [slice(start, start + self.size) for start in starts]


def cost_of(rounded_OS, w_OS, x_TS):
    return (x_TS.double() @ (rounded_OS.double() - w_OS.double()).T).pow(2).mean(0)


def search_clip(w_OI, x_TI, bits, group_size):
    """Search each row's limit of |w| in each group (auto_clip_layer)."""
    size = w_OI.shape[1] if group_size == -1 else group_size
    x_TI = x_TI[:: max(1, len(x_TI) // 512)]
    clipping = Clipping(torch.empty_like(w_OI), w_OI.clone(), x_TI, size, [])
    for g in clipping.groups():
        part, x = w_OI[:, g], x_TI[:, g]
        largest = part.abs().amax(1, keepdim=True)
        best, lowest = largest.clone(), torch.full_like(largest, 1e9)
        highest = torch.full([len(part)], math.inf, dtype=torch.float64)
        for i in range(10):
            limit = largest * (1 - i / 20)
            tried = pseudo_quantize(torch.clamp(part, -limit, limit), bits, -1)
            error = (x @ (tried.weight - part).T).pow(2).mean(0)[:, None]
            better = error < lowest
            lowest[better], best[better] = error[better], limit[better]
            dearer = torch.zeros_like(highest)
            for zero in (tried.zero, other_zero(tried)):
                for nudge in (1 - 1e-5, 1, 1 + 1e-5):
                    codes = ((tried.value * nudge).round() + zero).clamp(0, 2**bits - 1)
                    dearer = dearer.maximum(cost_of(tried.scale * (codes - zero), part, x))
            highest = highest.minimum(dearer)
        clipping.limit[:, g] = best
        clipping.highest_G.append(highest)
    return clipping


def other_zero(rounded):
    """Round the zero points that lie halfway between two whole numbers the other way."""
    exact = -rounded.lowest / rounded.scale
    tied = (exact - exact.floor() - 0.5).abs() < 1e-3
    return torch.where(tied, exact.floor() + exact.ceil() - rounded.zero, rounded.zero)


@torch.no_grad()
def awq(model, windows_NT, bits, group_size, *, scale=True, clip=True, grid=20):
    results = {}
    hidden, kwargs = first_inputs(model, windows_NT)
    x = torch.cat(hidden)
    for k, layer in enumerate(model.model.layers):
        modules = linears(layer)
        feats: dict[str, torch.Tensor] = {}
        with watching({**modules, "mlp": layer.mlp}, feats.__setitem__):
            x = layer(x, **kwargs)  # full-precision outputs go on
        if scale:
            groups = find_scales(layer, modules, feats, kwargs, bits, group_size, grid)
            apply_scales(layer, modules, feats, groups)
        for name, module in modules.items():
            if clip and not starved(name, feats) and "q_" not in name and "k_" not in name:
                inputs = feats[name].reshape(-1, module.in_features)
                clipping = search_clip(module.weight, inputs, bits, group_size)
                module.weight.copy_(torch.clamp(module.weight, -clipping.limit, clipping.limit))
            else:
                clipping = None
            rounded = pseudo_quantize(module.weight, bits, group_size)
            rounded.clipping = clipping
            module.weight.copy_(rounded.weight)
            results[f"{k}.{name}"] = rounded
    return results


def starved(name, feats):
    """Return True for a linear of an expert with too few tokens: neither scaled nor clipped."""
    return "experts" in name and (
        name not in feats or feats[name].numel() < MIN_EXPERT_TOKENS * feats[name].shape[-1]
    )


def find_scales(layer, modules, feats, kwargs, bits, group_size, grid):
    """Search every group before any is applied (auto_scale_block).

    Returns (producer, readers, scales) of each.
    """

    def search(inspect, names, x, kwargs):
        return search_scale(
            inspect, [modules[name] for name in names], x, kwargs, bits, group_size, grid
        )

    groups = []
    qkv = [f"self_attn.{c}_proj" for c in "qkv"]
    attention = {**kwargs, "past_key_values": None}
    scale = search(layer.self_attn, qkv, feats[qkv[0]], attention)
    groups.append((layer.input_layernorm, qkv, scale))
    v, o = modules["self_attn.v_proj"], modules["self_attn.o_proj"]
    if v.weight.shape == o.weight.shape:
        names = ["self_attn.o_proj"]
        groups.append((v, names, search(o, names, feats[names[0]], {})))
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


@torch.no_grad()
def smoothquant(model, windows_NT, bits, act_bits, *, alpha=0.5, smooth=True):
    """Run get_act_scales, smooth_lm and quantize_llama_like.

    The model then rounds its own activations.
    """
    results = {}
    if smooth:
        largest: dict[tuple[int, str], list[torch.Tensor]] = {}
        for k, layer in enumerate(model.model.layers):
            watched = {"attention": layer.self_attn.q_proj, "mlp": layer.mlp}

            def observe(name, x, k=k):
                peaks = x.abs().reshape(-1, x.shape[-1]).amax(0)
                largest.setdefault((k, name), []).append(peaks)

            layer.watch = watching(watched, observe)
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
                weight = torch.stack([w.abs().amax(0) for w in readers]).amax(0).clamp(min=1e-5)
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
            results[f"{k}.{name}"] = Rounded(
                codes, scale.expand_as(codes), zero, value, torch.arange(codes.shape[1])
            )
            module.weight.copy_(results[f"{k}.{name}"].weight)
            if act_bits is not None:
                module.register_forward_pre_hook(
                    lambda _, inputs: (per_token(inputs[0], act_bits),)
                )
    return results


def per_token(x, bits):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
    return torch.round(x / scale) * scale


def residual_binarize(x, mask, order, near_O=None):
    """Binarize each row by mean and mean absolute deviation over the mask, `order` times.

    Source: high_order_residual.

    Args:
        near_O: lowered in place to each row's smallest distance from a value to the mean that
            decides its sign, in deviations.
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    approximation = torch.zeros_like(x)
    for _ in range(order):
        residual = x - approximation
        mean = (residual * mask).sum(1, keepdim=True) / count
        deviation = ((residual - mean).abs() * mask).sum(1, keepdim=True) / count
        if near_O is not None:
            distance = (residual - mean).abs() / deviation.clamp(min=1e-12)
            near_O.copy_(near_O.minimum(distance.masked_fill(~mask, math.inf).amin(1)))
        approximation = approximation + (torch.sign(residual - mean) * deviation + mean) * mask
    return approximation * mask


def structural_search(S):
    """Divide weights by their saliency S (structural_searching).

    Returns the masks of small, large and salient weights, and each row's smallest distance from a
    weight to the border between small and large, relative to the border.
    """
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
            distance = (S.abs() / float(border) - 1).abs().masked_fill(salient, math.inf)
    return *best, distance.amin(1)


def billm_linear(W, H, damping, block_size, metric):
    """Binarize one linear as BRAGPTQ.fasterquant does.

    Returns the binarized weight, which columns are salient, and each row's smallest distance in
    each block from a decision that would fall the other way [O, blocks].
    """
    W, H = W.clone(), H.clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    Hc = upper_factor(H, damping)
    salient_columns, nearest_decisions = [], []
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        block = W[:, start:stop].clone()
        factor = torch.diag(Hc)[start:stop]
        S = block**2 / factor[None, :] ** 2 if metric == "hessian" else block
        small, large, salient, near_O = structural_search(S)
        rounded = (
            residual_binarize(block, small, 1, near_O)
            + residual_binarize(block, large, 1, near_O)
            + residual_binarize(block, salient, 2, near_O)
        )
        nearest_decisions.append(near_O)
        errors = (block - rounded) / factor[None, :]  # nothing is passed on inside the block
        W[:, start:stop] = rounded
        W[:, stop:] -= errors @ Hc[start:stop, stop:]
        salient_columns.append(salient[0])
    return W, torch.cat(salient_columns), torch.stack(nearest_decisions, 1)


@torch.no_grad()
def billm(model, windows_NT, *, damping=0.01, block_size=128, metric="hessian", follow=None):
    """Return the results of `billm_linear` by name.

    Args:
        follow: another driver's weights by name, as in `gptq`.
    """
    results = {}
    hidden, kwargs = first_inputs(model, windows_NT)
    for k, layer in enumerate(model.model.layers):
        modules = linears(layer)
        for name, hessian in hessians_of(layer, list(modules), hidden, kwargs).items():
            if "experts" in name and hessian.tokens < MIN_EXPERT_TOKENS:
                hessian.H = torch.eye(len(hessian.H))
            results[f"{k}.{name}"] = billm_linear(
                modules[name].weight, hessian.H, damping, block_size, metric
            )
        for name, module in modules.items():
            path = f"{k}.{name}"
            module.weight.copy_(results[path][0] if follow is None else follow[path])
        hidden = [layer(x, **kwargs) for x in hidden]
    return results

"""Run a loaded model on given inputs, with its linears' inputs as they are or rounded."""

from functools import partial
from typing import TYPE_CHECKING, Any

from .configs import INNER, rounding_of
from .sketches import projection

if TYPE_CHECKING:
    from torch import Tensor

Parts = dict[str, "Tensor"]


def in_float32(model: Any) -> None:
    """Widen each piece of the model while it runs, exactly; memory grows by one piece."""
    dtype = model.dtype

    def widen(module: Any, _: Any) -> None:
        module.float()

    def narrow(module: Any, _: Any, output: Any) -> Any:
        module.to(dtype)
        return output

    for piece in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        piece.register_forward_pre_hook(widen)
        piece.register_forward_hook(narrow)


def round_activations(model: Any, packed: dict[str, Any], factors: dict[str, float]) -> None:
    """Make the model round its linears' inputs, except of ignored linears.

    Experts, which transformers keeps in one module, also round each expert's input of down.

    Args:
        factors: that inputs' scales are stored times, by the linear's name on disk
    """
    import torch

    stored = {name.replace(INNER, "model.", 1): number for name, number in factors.items()}

    def read_by(linear: str, x: "Tensor") -> "Tensor":
        args = rounding_of(packed, linear)
        return x if args is None else rounded(x, args, stored.get(linear))

    def experts(
        name: str, module: Any, tokens: "Tensor", chosen: "Tensor", shares: "Tensor"
    ) -> "Tensor":
        linear, total = torch.nn.functional.linear, torch.zeros_like(tokens)
        for e in range(module.num_experts):
            token, rank = (chosen == e).nonzero(as_tuple=True)
            if not len(token):
                continue
            gate_rows, up_rows = module.gate_up_proj[e].chunk(2)
            gate = linear(read_by(f"{name}.{e}.gate_proj", tokens[token]), gate_rows)
            up = linear(read_by(f"{name}.{e}.up_proj", tokens[token]), up_rows)
            hidden = read_by(f"{name}.{e}.down_proj", module.act_fn(gate) * up)
            out = linear(hidden, module.down_proj[e])
            total.index_add_(0, token, out * shares[token, rank, None])
        return total

    def round_first(linear: str, _: Any, inputs: Any) -> Any:
        return (read_by(linear, inputs[0]), *inputs[1:])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if rounding_of(packed, name) is not None:
                module.register_forward_pre_hook(partial(round_first, name))
        elif name.endswith("mlp.experts"):
            module.forward = partial(experts, name, module)


def rounded(x: "Tensor", args: dict[str, Any], factor: float | None = None) -> "Tensor":
    """Return a linear's input as its config says that it is rounded.

    Whole numbers: each token to [-top, top] with the scale max |x| / top, as by vLLM's int8 kernel;
    compressed-tensors' own emulation divides by top + 1/2. Floats: as that emulation does it.

    Args:
        factor: that the scales of groups are stored times
    """
    import torch

    if args["type"] == "int":
        top = 2 ** (args["num_bits"] - 1) - 1
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / top
        return (x / scale).round().clamp(-top, top) * scale
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    settings, tokens = QuantizationArgs.model_validate(args), x.reshape(1, -1, x.shape[-1])
    below = None if factor is None else torch.tensor([factor])
    scale, zero = compute_dynamic_scales_and_zp(tokens, settings, None, below)
    return fake_quantize(tokens, scale, zero, settings, global_scale=below).view_as(x)


def run(model: Any, ids: "Tensor", states: "Tensor") -> Parts:
    """Run each block on its given input, `states` [L, B, T, H].

    Returns:
        The `projection` of each site's input before rounding (`blocks.3.o`; not of the input of
        each expert's down) and of what each block adds (`blocks.3`), and the `logits` [B, T, V].
    """
    import torch

    readings: dict[str, list[Tensor]] = {}
    row = 0

    def note_input(name: str, _: Any, inputs: Any) -> None:
        readings.setdefault(name, []).append(projection(inputs[0]))

    def replace_input(k: int, _: Any, inputs: Any) -> Any:
        return (states[k, row][None], *inputs[1:])

    def note_change(k: int, _: Any, inputs: Any, output: Any) -> None:
        out = output if torch.is_tensor(output) else output[0]
        readings.setdefault(f"blocks.{k}", []).append(projection(out - states[k, row][None]))

    hooks, logits = [], []
    for k, layer in enumerate(model.model.layers):
        sites = {"gate_up": layer.mlp}
        if hasattr(layer, "self_attn"):
            sites |= {"qkv": layer.self_attn.q_proj, "o": layer.self_attn.o_proj}
        else:  # a gated delta rule
            inner = layer.linear_attn
            first = inner.in_proj_qkv if hasattr(inner, "in_proj_qkv") else inner.in_proj_qkvz
            sites |= {"in": first, "out": inner.out_proj}
        if hasattr(layer.mlp, "down_proj"):
            sites["down"] = layer.mlp.down_proj
        if (shared := getattr(layer.mlp, "shared_expert", None)) is not None:
            sites |= {"shared_gate_up": shared.gate_proj, "shared_down": shared.down_proj}
        hooks.append(layer.register_forward_pre_hook(partial(replace_input, k)))
        hooks.append(layer.register_forward_hook(partial(note_change, k)))
        for site, module in sites.items():  # prepended: other hooks round the input
            note = partial(note_input, f"blocks.{k}.{site}")
            hooks.append(module.register_forward_pre_hook(note, prepend=True))
    for row in range(len(ids)):
        logits.append(model(ids[row][None], use_cache=False).logits[0].float())
    for hook in hooks:
        hook.remove()
    return {"logits": torch.stack(logits)} | {n: torch.cat(parts) for n, parts in readings.items()}


def logits_of(model: Any, ids: "Tensor") -> "Tensor":
    """Return logits [B, T, V] in float32, computed a row at a time."""
    import torch

    return torch.stack([model(row[None], use_cache=False).logits[0].float() for row in ids])

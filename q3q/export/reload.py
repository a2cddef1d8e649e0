"""Load an exported checkpoint as a stranger would, and report its content.

A script that cannot import q3q:

    python -I -S reload.py CHECKPOINT INPUTS.safetensors|weights OUT PACKAGES_DIR...

It loads the checkpoint with its format's public loader and writes OUT.json: the loader, the bits to
which activations are rounded, and a `sketch` of each weight by its name on disk. INPUTS holds token
ids [B, T] and, as `plain` and (if activations are rounded) `rounded`, the input [L, B, T, H] of
each block. The script runs the ids, and then each block on its given input, so that a difference
stays where it arises. OUT.safetensors gets the `logits` [B, T, V] and, for either kind of inputs,
the result of `run`. Where the public loader needs a GPU, the tensors are unpacked here, by code
written from the format's definition, and transformers runs the result. If GPTQModel is installed,
OUT also has its logits for its formats, as `public`; what it does not load is left out.

Where a public loader reads the checkpoint, OUT.json also says what that took: `use` has the peak
memory and the speed of a short generation, on the CPU and on a GPU if one is visible.

With `weights` in place of a file, the script runs nothing and needs memory for one weight at a
time: it unpacks each weight here and writes OUT.json only.

The forward runs in float32 whatever the weights' dtype, so that different logits mean different
weights. EXIT_SHORTAGE (memory or disk ran short) says nothing about the checkpoint.
"""

import errno
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parts = dict[str, "Tensor"]
WIDE_NUMBERS = 1 << 22  # entries of a matrix widened at a time to be sketched or unpacked
EXIT_SHORTAGE = 75  # the exit code if memory, disk or open files run short; a retry may succeed
SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENOSPC, errno.EDQUOT)
INNER = "model.language_model."  # where the text part of a model that sees images has `model.`
MESSAGE_LENGTH = 200  # characters of a loader's message
PROMPT, GENERATED, GENERATION_SECONDS = 8, 32, 30.0  # tokens, and when to stop before that
UNPACKER = "a plain unpacker"  # its description begins so; public loaders' do not


def sketch(weight: "Tensor") -> list[float]:
    """Return [u^T W v, |W|] in float64, for fixed random u and v: any change of a weight moves it.

    The difference of two sketches over the norm estimates the weights' relative difference.
    """
    rows = max(1, WIDE_NUMBERS // max(1, weight[0].numel()))
    return sketch_rows(weight.shape, weight.split(rows))


def sketch_rows(shape: Sequence[int], parts: Iterable["Tensor"]) -> list[float]:
    """Return the `sketch` of a weight that comes in parts along its first axis."""
    import torch

    vectors = [
        torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(7 + axis))
        for axis, size in enumerate(shape)
    ]
    total, square, start = 0.0, 0.0, 0
    for part in parts:
        value = wide = part.detach().cpu().double()
        for vector in reversed(vectors[1:]):
            value = value @ vector
        total += float(value @ vectors[0][start : start + len(part)])
        square += float(wide.square_().sum())
        start += len(part)
    return [total, square**0.5]


def load(folder: Path) -> tuple[Any, str]:
    """Return the model in evaluation mode, and its loader's description."""
    import transformers

    config = read_config(folder)
    packed = config.get("quantization_config")
    loader = f"transformers {transformers.__version__}"
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    load_public = partial(from_pretrained, folder, dtype="auto", local_files_only=True)
    if gguf_in(folder) is not None:
        loader = f"{UNPACKER} of `gguf` (gguf {version('gguf')}), run by {loader}"
        return load_unpacked(folder, config, {}).eval(), loader
    if packed is None:
        return load_public().eval(), loader
    method = packed["quant_method"]
    settings = settings_of(config, packed) if method == "compressed-tensors" else None
    if settings is None or not transformers_takes(**settings):
        loader = f"{UNPACKER} of `{method}`, run by {loader}"
        return load_unpacked(folder, config, packed).eval(), loader
    import compressed_tensors

    loader += f" with compressed-tensors {compressed_tensors.__version__}"
    if settings["symmetric"]:
        return load_public().eval(), loader
    # transformers' modules for packed weights have no room for packed zero points.
    unpack = transformers.CompressedTensorsConfig(dequantize=True)
    return load_public(quantization_config=unpack).eval(), f"{loader} (dequantize=True)"


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def settings_of(config: dict[str, Any], packed: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `transformers_takes` for a checkpoint of compressed-tensors."""
    groups = packed["config_groups"].values()
    return {
        "experts": has_experts(config),
        "settings": len(groups),
        "symmetric": all(group["weights"]["symmetric"] for group in groups),
        "rounded": any(group.get("input_activations") for group in groups),
    }


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the text part, which may be one of several."""
    return {**config, **config.get("text_config", {})}


def has_experts(config: dict[str, Any]) -> bool:
    text = text_of(config)
    return bool(text.get("num_experts") or text.get("num_local_experts"))


def transformers_takes(*, experts: bool, settings: int, symmetric: bool, rounded: bool) -> bool:
    """Return True if transformers reads such compressed-tensors weights correctly.

    Refusals of `q3q.export.formats` follow from it.

    Args:
        experts: the model has experts, which transformers fuses: it reads symmetric ones without
            rounded activations only.
        settings: number of distinct settings of linears. Asymmetric weights are unpacked while they
            load, all by one setting.
        symmetric: all settings are symmetric.
        rounded: some setting rounds activations.
    """
    return symmetric and not rounded if experts else symmetric or settings == 1


def numbers_on_disk(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (name, weight as numbers) one at a time; one file holds all tensors of a linear."""
    import torch
    from safetensors import safe_open

    packed, dtype = config.get("quantization_config") or {}, getattr(torch, config["dtype"])
    if (file := gguf_in(folder)) is not None:
        yield from numbers_in_gguf(file, config, dtype)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                base, _, last = name.rpartition(".")
                is_packed = any(f"{base}.{part}" in names for part in ("qweight", "weight_scale"))
                if last == "bias" or not is_packed:
                    yield name, file.get_tensor(name)
                elif last in ("qweight", "weight_packed", "weight"):
                    own = (key for key in names if key.rpartition(".")[0] == base)
                    parts = {key.rpartition(".")[2]: file.get_tensor(key) for key in own}
                    unpack = UNPACKERS[packed["quant_method"]]
                    yield base + ".weight", unpack(parts, packed).to(dtype)


def gguf_in(folder: Path) -> Path | None:
    return next(folder.glob("*.gguf"), None)


def numbers_in_gguf(
    path: Path, config: dict[str, Any], dtype: "torch.dtype"
) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (transformers' name, weight as numbers) of llama.cpp's file.

    Experts lie in one tensor. The rows of a Llama's q and k lie in pairs, dimension j beside
    dimension j + head_dim / 2, where transformers has halves.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    for tensor in GGUFReader(path).tensors:
        place, _, end = tensor.name.rpartition(".")
        block, _, part = place.removeprefix("blk.").partition(".")
        if place == "rope_freqs":
            continue
        name = GGUF_NAMES[part] if place.startswith("blk.") else GGUF_NAMES[place]
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        kind = name.rpartition(".")[2]
        if config["model_type"] == "llama" and kind in heads:
            pairs = numbers.unflatten(0, (heads[kind], -1, 2))
            numbers = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).flatten(0, 1)
        numbers = numbers.to(dtype)
        prefix = f"model.layers.{block}." if place.startswith("blk.") else ""
        if "{}" in name:
            for e, matrix in enumerate(numbers):
                yield f"{prefix}{name.format(e)}.{end}", matrix
        else:
            yield f"{prefix}{name}.{end}", numbers


def load_unpacked(folder: Path, config: dict[str, Any], packed: dict[str, Any]) -> Any:
    """Return a plain transformers model with the unpacked weights."""
    import torch
    import transformers

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    dtype = getattr(torch, config["dtype"])
    settings = transformers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    weights = dict(numbers_on_disk(folder, config))
    if "text_config" in config:
        weights = {name.replace(INNER, "model.", 1): tensor for name, tensor in weights.items()}
    other = model._keys_to_ignore_on_load_unexpected or ()  # of parts that this class leaves out
    for name in [name for name in weights if any(re.match(part, name) for part in other)]:
        del weights[name]
    if has_experts(config):
        fuse_experts(weights, text_of(config))
    if text_of(config).get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise SystemExit(f"the checkpoint lacks {missing[:3]} or has {unexpected[:3]} too many")
    # Rotary frequencies, which are no weights, were made on `meta` too.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def fuse_experts(weights: Parts, config: dict[str, Any]) -> None:
    """Stack the experts' matrices as transformers 5 has them, gate over up."""
    import torch

    count = config.get("num_experts") or config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        if prefix + "0.gate_proj.weight" not in weights:
            continue
        gate, up, down = (
            torch.stack([weights.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(count)])
            for name in ("gate", "up", "down")
        )
        weights[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights[prefix + "down_proj"] = down


def stream(words: "Tensor", bits: int, count: int) -> "Tensor":
    """Return the `count` codes in each row of 32-bit words, uint8.

    Bit k of the row is bit k % 32 of word k // 32; a code has `bits` bits, the lowest first.
    """
    import torch

    top = 2**bits - 1
    if 8 % bits == 0:  # no code straddles two bytes
        raw = words.contiguous().view(torch.uint8)
        parts = [(raw >> shift) & top for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :count]
    first_bit = torch.arange(count) * bits
    word, shift = first_bit // 32, first_bit % 32
    rows, codes = words.reshape(-1, words.shape[-1]), []
    for chunk in rows.split(max(1, WIDE_NUMBERS // count)):
        wide = torch.nn.functional.pad(chunk.long() & 0xFFFFFFFF, (0, 1))
        codes.append((((wide[:, word] | (wide[:, word + 1] << 32)) >> shift) & top).to(torch.uint8))
    return torch.cat(codes).reshape(*words.shape[:-1], count)


def from_gptq(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o]); v1 stores z - 1."""
    bits = packed["bits"]
    columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
    q_OI = stream(parts["qweight"].T, bits, columns)
    below = 1 if packed["checkpoint_format"] == "gptq" else 0
    z_GO = stream(parts["qzeros"], bits, rows).float() + below
    group_I = parts["g_idx"].long()
    weight_IO = q_OI.T.float()
    return weight_IO.sub_(z_GO[group_I]).mul_(parts["scales"].float()[group_I]).T.contiguous()


def from_awq(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight[o, i] = scales[g, o] * (q[i, o] - z[g, o]).

    A word's eight groups of four bits hold neighbours along o in the order 0, 2, 4, 6, 1, 3, 5, 7.
    """
    import torch

    rows, order = parts["scales"].shape[1], (0, 2, 4, 6, 1, 3, 5, 7)
    places = [order.index(number) for number in range(8)]

    def in_order(words: "Tensor") -> "Tensor":
        codes = stream(words, 4, rows).reshape(len(words), -1, 8)[:, :, places]
        return codes.reshape(len(words), rows).float()

    weight_IO, z_GO = in_order(parts["qweight"]), in_order(parts["qzeros"])
    group_I = torch.arange(len(weight_IO)) // (len(weight_IO) // len(z_GO))
    return weight_IO.sub_(z_GO[group_I]).mul_(parts["scales"].float()[group_I]).T.contiguous()


def from_compressed_tensors(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight = scale * (q - z), signed; packed with 2**(bits - 1) added, z down the rows."""
    import torch

    scale_OG = parts["weight_scale"].float()
    if "weight" in parts:
        weight_OI = parts["weight"].float()
        zero_OG = torch.zeros_like(scale_OG)
    else:
        rows, columns = parts["weight_shape"].tolist()
        widths = {group["weights"]["num_bits"] for group in packed["config_groups"].values()}
        bits = next(b for b in widths if -(-columns * b // 32) == parts["weight_packed"].shape[1])
        weight_OI = stream(parts["weight_packed"], bits, columns).float()
        zero_OG = torch.full_like(scale_OG, 2 ** (bits - 1))
        if "weight_zero_point" in parts:
            zero_OG = stream(parts["weight_zero_point"].T, bits, rows).T.float()
    groups_OGS = weight_OI.unflatten(1, (scale_OG.shape[1], -1))
    return groups_OGS.sub_(zero_OG[:, :, None]).mul_(scale_OG[:, :, None]).flatten(1)


# llama.cpp's names of tensors -> transformers'.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
UNPACKERS = {"gptq": from_gptq, "awq": from_awq, "compressed-tensors": from_compressed_tensors}


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


def rounded_inputs(packed: dict[str, Any], linear: str) -> bool:
    """Return True if the input of `linear`, named as on disk, is rounded."""

    def matches(target: str) -> bool:
        if target.startswith("re:"):
            return bool(re.match(target[3:], linear))
        return target in (linear, "Linear")

    if any(map(matches, packed["ignore"])):
        return False
    # A name or a pattern precedes a class, as in all readers.
    groups = sorted(packed["config_groups"].values(), key=lambda g: g["targets"] == ["Linear"])
    group = next(group for group in groups if any(map(matches, group["targets"])))
    return bool(group.get("input_activations"))


def round_activations(model: Any, bits: int, packed: dict[str, Any]) -> None:
    """Make the model round its linears' inputs, except of ignored linears.

    Each token is rounded to [-top, top] with the scale max |x| / top, as by vLLM's int8 kernel;
    compressed-tensors' own emulation divides by top + 1/2. Experts, which transformers keeps in one
    module, also round each expert's input of down.
    """
    import torch

    top = 2 ** (bits - 1) - 1

    def rounded(x: "Tensor") -> "Tensor":
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / top
        return (x / scale).round().clamp(-top, top) * scale

    def read_by(linear: str, x: "Tensor") -> "Tensor":
        return rounded(x) if rounded_inputs(packed, linear) else x

    def experts(
        name: str, module: Any, tokens: "Tensor", chosen: "Tensor", shares: "Tensor"
    ) -> "Tensor":
        linear, total = torch.nn.functional.linear, torch.zeros_like(tokens)
        for e in range(module.num_experts):
            token, rank = (chosen == e).nonzero(as_tuple=True)
            gate_rows, up_rows = module.gate_up_proj[e].chunk(2)
            gate = linear(read_by(f"{name}.{e}.gate_proj", tokens[token]), gate_rows)
            up = linear(read_by(f"{name}.{e}.up_proj", tokens[token]), up_rows)
            hidden = read_by(f"{name}.{e}.down_proj", module.act_fn(gate) * up)
            out = linear(hidden, module.down_proj[e])
            total.index_add_(0, token, out * shares[token, rank, None])
        return total

    def round_first(_: Any, inputs: Any) -> Any:
        return (rounded(inputs[0]), *inputs[1:])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and rounded_inputs(packed, name):
            module.register_forward_pre_hook(round_first)
        elif name.endswith("mlp.experts"):
            module.forward = partial(experts, name, module)


def projection(x: "Tensor") -> "Tensor":
    """Return each token's dot product with a fixed random vector (mean square: |token|^2)."""
    import torch

    generator = torch.Generator().manual_seed(11)
    direction = torch.randn(x.shape[-1], dtype=torch.float64, generator=generator)
    return x.detach().cpu().double().flatten(0, -2) @ direction


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


def load_by_gptqmodel(folder: Path, dtype: "torch.dtype") -> Any:
    """Load the model on GPTQModel's plain kernels, which run in 16 bits."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    method = read_config(folder)["quantization_config"]["quant_method"]
    backend = BACKEND.TORCH if method == "gptq" else BACKEND.AWQ_TORCH
    dtype = torch.float16 if dtype == torch.float32 else dtype
    return GPTQModel.load(str(folder), device="cpu", dtype=dtype, backend=backend).model


def weights_on_disk(model: Any, config: dict[str, Any]) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (name on disk, weight) for each parameter that a checkpoint stores as numbers."""
    for name, tensor in model.state_dict().items():
        inner = "text_config" in config and name.startswith("model.")
        full = name.replace("model.", INNER, 1) if inner else name
        if name.endswith((".weight", ".bias", ".A_log", ".dt_bias")):
            yield full, tensor
        elif name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj")):
            prefix, _, which = full.rpartition(".")
            for e, matrix in enumerate(tensor):
                if which == "down_proj":
                    yield f"{prefix}.{e}.down_proj.weight", matrix
                else:
                    gate, up = matrix.chunk(2)
                    yield f"{prefix}.{e}.gate_proj.weight", gate
                    yield f"{prefix}.{e}.up_proj.weight", up


def peak_resident_bytes() -> int | None:
    """Return the peak of this process's resident memory; None where the system does not say."""
    try:  # unlike getrusage, it does not count what the parent had before this program began
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else None


def generate(model: Any, ids: "Tensor", idle_bytes: int | None) -> dict[str, Any]:
    """Generate a few tokens greedily, and return what that took on the model's device."""
    import torch

    device = model.device
    prompt = ids[:1, :PROMPT].to(device)
    count = min(GENERATED, model.config.max_position_embeddings - prompt.shape[1])
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=1, **settings)  # what is unpacked, is unpacked now
    started = time.perf_counter()
    out = model.generate(
        prompt,
        max_new_tokens=count,
        min_new_tokens=count,
        max_time=GENERATION_SECONDS,
        **settings,
    )
    tokens = int(out.cpu().shape[1]) - prompt.shape[1]
    seconds = time.perf_counter() - started
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": 0 if gpu else torch.get_num_threads(),
        "idle_bytes": None if gpu else idle_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else peak_resident_bytes(),
        "prompt": prompt.shape[1],
        "tokens": tokens,
        "seconds": round(seconds, 4),
    }


def measured(call: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a measurement, or nothing where there is none: a proof does not depend on it."""
    try:
        return [call()]
    except Exception as error:  # of any kind: the loader's, CUDA's, memory
        reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
        print(f"not measured: {type(error).__name__}: {reason}", file=sys.stderr)
        return []


def findings(
    folder: Path, inputs: Parts | None, *, measure: bool = False
) -> tuple[dict[str, Any], Parts]:
    """Return the content of OUT.json and of OUT.safetensors; without `inputs`, of weights alone.

    Args:
        measure: generate with public loaders.
    """
    config = read_config(folder)
    packed = config.get("quantization_config") or {}
    groups = packed.get("config_groups", {}).values()
    rounded = (group["input_activations"] for group in groups if group.get("input_activations"))
    act_bits = next((settings["num_bits"] for settings in rounded), None)
    if inputs is None:
        sketches = {name: sketch(tensor) for name, tensor in numbers_on_disk(folder, config)}
        loader = f"{UNPACKER}, weight by weight"
        return {"loader": loader, "act_bits": act_bits, "sketches": sketches}, {}
    import torch

    ids, idle_bytes = inputs["ids"], peak_resident_bytes()
    model, loader = load(folder)
    public, use = not loader.startswith(UNPACKER), list[dict[str, Any]]()
    if measure and public:
        use = measured(partial(generate, model, ids, idle_bytes))
    model(ids[:1, :1])  # compressed-tensors unpacks when the model first runs
    sketches = {name: sketch(tensor) for name, tensor in weights_on_disk(model, config)}
    for module in model.modules():
        module.quantization_enabled = False  # else compressed-tensors rounds activations too
    dtype = model.dtype
    in_float32(model)
    tensors = {"logits": logits_of(model, ids)}
    tensors |= {f"plain/{name}": x for name, x in run(model, ids, inputs["plain"]).items()}
    if act_bits is not None and "rounded" in inputs:
        round_activations(model, act_bits, packed)
        tensors |= {f"rounded/{name}": x for name, x in run(model, ids, inputs["rounded"]).items()}
    del model
    gptqmodel_reads = packed.get("quant_method") in ("gptq", "awq")
    if gptqmodel_reads and importlib.util.find_spec("gptqmodel") is not None:
        try:
            second = load_by_gptqmodel(folder, dtype)
        except Exception as error:  # of any kind: the weights were all read above
            if is_shortage(error):
                raise
            reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
            loader += f" (GPTQModel does not load it: {reason})"
        else:
            tensors["public"] = logits_of(second, ids)
            loader += ", and by GPTQModel"
    if measure and public and torch.cuda.is_available():
        use += measured(lambda: generate(load(folder)[0].to("cuda"), ids, None))
    facts = {"loader": loader, "act_bits": act_bits, "sketches": sketches, "use": use}
    return facts, tensors


def main() -> None:
    folder, inputs, out, *packages = map(Path, sys.argv[1:])
    sys.modules["q3q"] = None  # type: ignore[assignment]  # from here on, importing it fails
    sys.path += map(str, packages)
    import torch
    from safetensors.torch import load_file, save_file

    with torch.inference_mode():
        given = None if inputs.name == "weights" else load_file(inputs)
        facts, tensors = findings(folder, given, measure=True)
    save_file(tensors, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def is_shortage(error: BaseException) -> bool:
    """Return True if the failure is the machine's, not the checkpoint's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGES):
        return True
    # safetensors' errors have the number in their text alone.
    number = re.search(r"\bos error (\d+)", str(error))
    if number is not None and int(number[1]) in SHORTAGES:
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not is_shortage(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_SHORTAGE)

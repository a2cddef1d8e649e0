"""Load an exported checkpoint as a stranger would, and say what is in it. A script that cannot import q3q.

    python -I -S reload.py CHECKPOINT WINDOWS.safetensors|weights OUT PACKAGES_DIR...

reads token ids [B, T] from WINDOWS, loads the checkpoint with its format's public loader, and writes OUT.safetensors
(logits [B, T, V]; `rounded` too, if the checkpoint says that activations are quantized) and OUT.json (who loaded it, to
how many bits activations are rounded, and a `sketch` of every weight by its name on disk). Where the
public loader does not run without a GPU, the tensors are unpacked here, written from the format's definition with no
care for speed, and transformers runs what comes out.

Given `weights` in place of a file with windows, it runs nothing and needs memory for one weight: every one is unpacked
here, and OUT.json alone is written.

The forward runs in float32 whatever the weights' dtype, so that a difference in logits is one in weights.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Parts = dict[str, "Tensor"]
SKETCHED_AT_ONCE = 1 << 22  # numbers that are wide at one time, of a matrix that is sketched or unpacked


def sketch(weight: "Tensor") -> list[float]:
    """One number that any change of any weight moves, and the norm: (u^T W v, |W|), u and v fixed and random, float64.

    The difference of two sketches over the norm estimates the relative difference of the weights.
    """
    return sketch_rows(weight.shape, weight.split(max(1, SKETCHED_AT_ONCE // max(1, weight[0].numel()))))


def sketch_rows(shape: Sequence[int], parts: Iterable["Tensor"]) -> list[float]:
    """`sketch` of a weight that comes in parts along its first axis."""
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


# ---------------------------------------------------------------------------------------------- loading


def load(folder: Path) -> tuple[Any, str]:
    """(model in evaluation mode, who loaded it)."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = config.get("quantization_config")
    who = f"transformers {transformers.__version__}"
    if packed is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    elif packed["quant_method"] == "compressed-tensors" and transformers_takes(config, packed):
        import compressed_tensors

        # Its modules for packed weights have no room for packed zero points: these are unpacked while they load.
        asymmetric = not all(group["weights"]["symmetric"] for group in packed["config_groups"].values())
        how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if asymmetric else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, **how)
        who += f" with compressed-tensors {compressed_tensors.__version__}{' (dequantize=True)' if how else ''}"
    else:
        model = load_unpacked(folder, config, packed)
        who = f"a plain unpacker of `{packed['quant_method']}`, run by {who}"
    return model.eval(), who


def transformers_takes(config: dict[str, Any], packed: dict[str, Any]) -> bool:
    """Asymmetric weights of one setting only; of a model with experts, which it fuses, symmetric packed ones only."""
    groups = packed["config_groups"].values()
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    if config["model_type"] == "qwen3":
        return symmetric or len(groups) == 1
    return symmetric and all(group["format"] == "pack-quantized" for group in groups)


def numbers_on_disk(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, "Tensor"]]:
    """(name, weight as numbers) of every weight in the files, one at a time; a layer's tensors are in one file."""
    import torch
    from safetensors import safe_open

    packed, dtype = config.get("quantization_config") or {}, getattr(torch, config["dtype"])
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                base, _, last = name.rpartition(".")
                if last == "weight" and base + ".weight_scale" not in names:
                    yield name, file.get_tensor(name)
                elif last in ("qweight", "weight_packed", "weight"):
                    own = (key for key in names if key.rpartition(".")[0] == base)
                    parts = {key.rpartition(".")[2]: file.get_tensor(key) for key in own}
                    yield base + ".weight", UNPACKERS[packed["quant_method"]](parts, packed).to(dtype)


def load_unpacked(folder: Path, config: dict[str, Any], packed: dict[str, Any]) -> Any:
    """A plain transformers model with the weights that the packed tensors stand for."""
    import torch
    import transformers

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    dtype = getattr(torch, config["dtype"])
    settings = transformers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    weights = dict(numbers_on_disk(folder, config))
    if config["model_type"] == "qwen3_moe":
        fuse_experts(weights, config)
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise SystemExit(f"the checkpoint lacks {missing[:3]} or has {unexpected[:3]} too many")
    # What is no weight (rotary frequencies) was made on `meta` too.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings)
    return model


def fuse_experts(weights: Parts, config: dict[str, Any]) -> None:
    """Each expert's matrices as transformers 5 has them: gate over up, all experts stacked."""
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
        weights[prefix + "gate_up_proj"], weights[prefix + "down_proj"] = torch.cat([gate, up], dim=1), down


# ---------------------------------------------------------------------------------------------- unpacking


def stream(words: "Tensor", bits: int, count: int) -> Any:
    """The codes in a row of 32-bit words: bit k of the row is bit k % 32 of word k // 32, a code is `bits` of them."""
    import numpy

    powers = (1 << numpy.arange(bits)).astype(numpy.int64)
    rows, codes = words.reshape(-1, words.shape[-1]), []
    for some in rows.split(max(1, SKETCHED_AT_ONCE // (count * bits))):
        raw = numpy.ascontiguousarray(some.numpy()).view(numpy.uint8)
        each = numpy.unpackbits(raw, axis=-1, bitorder="little")[..., : count * bits]
        codes.append((each.reshape(-1, count, bits) * powers).sum(-1))
    return numpy.concatenate(codes).reshape(*words.shape[:-1], count)


def from_gptq(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o]); stored is q, and z - 1 (v1) or z (v2)."""
    import torch

    bits = packed["bits"]
    columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
    q_OI = stream(parts["qweight"].T.contiguous(), bits, columns)
    z_GO = stream(parts["qzeros"], bits, rows)
    if packed["checkpoint_format"] == "gptq":
        z_GO = z_GO + 1
    group_I = parts["g_idx"].long()
    scale_IO, z_IO = parts["scales"].float()[group_I], torch.from_numpy(z_GO)[group_I]
    return (scale_IO * (torch.from_numpy(q_OI).T - z_IO)).T.contiguous()


def from_awq(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight[o, i] = scales[g, o] * (q[i, o] - z[g, o]). Of eight neighbours along o, the k-th four bits of a word
    hold number 0, 2, 4, 6, 1, 3, 5, 7.
    """
    import numpy
    import torch

    order, rows = [0, 2, 4, 6, 1, 3, 5, 7], parts["scales"].shape[1]

    def straight(words: "Tensor") -> "Tensor":
        mixed = stream(words, 4, rows).reshape(len(words), -1, 8)
        codes = numpy.empty_like(mixed)
        for place, number in enumerate(order):
            codes[:, :, number] = mixed[:, :, place]
        return torch.from_numpy(codes.reshape(len(words), rows))

    q_IO, z_GO = straight(parts["qweight"]), straight(parts["qzeros"])
    group_I = torch.arange(len(q_IO)) // (len(q_IO) // len(z_GO))
    return (parts["scales"].float()[group_I] * (q_IO - z_GO[group_I])).T.contiguous()


def from_compressed_tensors(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight = scale * (q - z), q and z signed; packed, they have 2**(bits - 1) added, z down the rows."""
    import torch

    scale_OG = parts["weight_scale"].float()
    if "weight" in parts:
        codes_OI = parts["weight"].long()
        zero_OG = torch.zeros_like(scale_OG)
    else:
        rows, columns = parts["weight_shape"].tolist()
        widths = {group["weights"]["num_bits"] for group in packed["config_groups"].values()}
        bits = next(b for b in widths if -(-columns * b // 32) == parts["weight_packed"].shape[1])
        codes_OI = torch.from_numpy(stream(parts["weight_packed"], bits, columns))
        zero_OG = torch.full_like(scale_OG, 2 ** (bits - 1))
        if "weight_zero_point" in parts:
            zero_OG = torch.from_numpy(stream(parts["weight_zero_point"].T.contiguous(), bits, rows)).T
    size = codes_OI.shape[1] // scale_OG.shape[1]
    spread = [number.repeat_interleave(size, dim=1) for number in (scale_OG, zero_OG)]
    return spread[0] * (codes_OI - spread[1])


UNPACKERS = {"gptq": from_gptq, "awq": from_awq, "compressed-tensors": from_compressed_tensors}


# ---------------------------------------------------------------------------------------------- running


def in_float32(model: Any) -> None:
    """Each piece of the model is widened when it runs and narrowed after, exactly: memory grows by one piece."""
    dtype = model.dtype

    def widen(module: Any, _: Any) -> None:
        module.float()

    def narrow(module: Any, _: Any, output: Any) -> Any:
        module.to(dtype)
        return output

    for piece in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        piece.register_forward_pre_hook(widen)
        piece.register_forward_hook(narrow)


def round_activations(model: Any, bits: int) -> None:
    """Per token to [-top, top], scale max |x| / top, as vLLM's int8 kernel does; compressed-tensors' own emulation
    divides by top + 1/2. Of experts, which transformers keeps in one module, each one's input of down too.
    """
    import torch

    top = 2 ** (bits - 1) - 1

    def rounded(x: "Tensor") -> "Tensor":
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / top
        return (x / scale).round().clamp(-top, top) * scale

    def experts(module: Any, tokens: "Tensor", chosen: "Tensor", shares: "Tensor") -> "Tensor":
        total = torch.zeros_like(tokens)
        for e in range(module.num_experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            gate, up = torch.nn.functional.linear(rounded(tokens[token]), module.gate_up_proj[e]).chunk(2, dim=-1)
            out = torch.nn.functional.linear(rounded(module.act_fn(gate) * up), module.down_proj[e])
            total.index_add_(0, token, out * shares[token, place, None])
        return total

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]), *inputs[1:]))
        elif name.endswith("mlp.experts"):
            module.forward = partial(experts, module)


def weights_on_disk(model: Any) -> Iterator[tuple[str, "Tensor"]]:
    """(name on disk, weight) of every parameter that a checkpoint holds as numbers."""
    for name, tensor in model.state_dict().items():
        if name.endswith(".weight"):
            yield name, tensor
        elif name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj")):
            prefix, _, which = name.rpartition(".")
            for e, matrix in enumerate(tensor):
                if which == "down_proj":
                    yield f"{prefix}.{e}.down_proj.weight", matrix
                else:
                    gate, up = matrix.chunk(2)
                    yield f"{prefix}.{e}.gate_proj.weight", gate
                    yield f"{prefix}.{e}.up_proj.weight", up


def main() -> None:
    folder, windows, out, *packages = map(Path, sys.argv[1:])
    sys.modules["q3q"] = None  # type: ignore[assignment]  # importing it fails from here on, wherever it is installed
    sys.path += map(str, packages)
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups = (config.get("quantization_config") or {}).get("config_groups", {}).values()
    act_bits = next(
        (group["input_activations"]["num_bits"] for group in groups if group.get("input_activations")), None
    )
    if windows.name == "weights":
        sketches = {name: sketch(tensor) for name, tensor in numbers_on_disk(folder, config)}
        facts = {"loader": "a plain unpacker, weight by weight", "act_bits": act_bits, "sketches": sketches}
        out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        return
    ids = load_file(windows)["ids"]
    with torch.inference_mode():
        model, who = load(folder)
        model(ids[:1, :1])  # compressed-tensors unpacks when the model first runs
        sketches = {name: sketch(tensor) for name, tensor in weights_on_disk(model)}
        for module in model.modules():
            module.quantization_enabled = False  # compressed-tensors' own rounding of activations: see below
        in_float32(model)
        found = {"logits": torch.stack([model(row[None], use_cache=False).logits[0].float() for row in ids])}
        if act_bits is not None:
            round_activations(model, act_bits)
            found["rounded"] = torch.stack([model(row[None], use_cache=False).logits[0].float() for row in ids])
    save_file(found, out.with_suffix(".safetensors"))
    facts = {"loader": who, "act_bits": act_bits, "sketches": sketches}
    out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()

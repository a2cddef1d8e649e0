"""Load an exported checkpoint as a stranger would, and say what is in it. A script that cannot import q3q.

    python -I -S reload.py CHECKPOINT GIVEN.safetensors|weights OUT PACKAGES_DIR...

loads the checkpoint with its format's public loader and writes OUT.json: who loaded it, to how many bits activations
are rounded, and a `sketch` of every weight by its name on disk. From GIVEN it reads token ids [B, T] and, as `plain`
and (if activations are rounded) `rounded`, the input [L, B, T, H] of every block. It runs the ids, and then each block
on the input that is given for it, whatever the block before made: a difference stays where it arises. OUT gets the
`logits` [B, T, V], and of either kind of run what `run` finds. Where the public loader does not run without a GPU, the
tensors are unpacked here, written from the format's definition, and transformers runs what comes out. If GPTQModel is
installed, its logits for its formats are there too, as `public`; what it does not load (it takes some sizes of groups
only) it is not asked.

Given `weights` in place of a file, it runs nothing and needs memory for one weight: every one is unpacked here, and
OUT.json alone says something.

The forward runs in float32 whatever the weights' dtype, so that a difference in logits is one in weights. Where memory
or disk are short it ends with SHORT, which says nothing of the checkpoint.
"""

import errno
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parts = dict[str, "Tensor"]
SKETCHED_AT_ONCE = (
    1 << 22
)  # numbers that are wide at one time, of a matrix that is sketched or unpacked
SHORT = 75  # exit code: of memory, disk or files; another time it may do
LACKING = (errno.ENOMEM, errno.EMFILE, errno.ENOSPC, errno.EDQUOT)
SAID = 200  # letters of what a loader says


def sketch(weight: "Tensor") -> list[float]:
    """One number that any change of any weight moves, and the norm: (u^T W v, |W|), u and v fixed and random, float64.

    The difference of two sketches over the norm estimates the relative difference of the weights.
    """
    return sketch_rows(
        weight.shape, weight.split(max(1, SKETCHED_AT_ONCE // max(1, weight[0].numel())))
    )


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
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True
        )
    elif packed["quant_method"] == "compressed-tensors" and transformers_takes(
        **settings_of(config, packed)
    ):
        import compressed_tensors

        # Its modules for packed weights have no room for packed zero points: these are unpacked while they load.
        symmetric = settings_of(config, packed)["symmetric"]
        how = (
            {}
            if symmetric
            else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, **how
        )
        who += f" with compressed-tensors {compressed_tensors.__version__}{' (dequantize=True)' if how else ''}"
    else:
        model = load_unpacked(folder, config, packed)
        who = f"a plain unpacker of `{packed['quant_method']}`, run by {who}"
    return model.eval(), who


def settings_of(config: dict[str, Any], packed: dict[str, Any]) -> dict[str, Any]:
    """What `transformers_takes` asks, of a checkpoint of compressed-tensors."""
    groups = packed["config_groups"].values()
    return {
        "experts": config["model_type"] != "qwen3",
        "settings": len(groups),
        "symmetric": all(group["weights"]["symmetric"] for group in groups),
        "rounded": any(group.get("input_activations") for group in groups),
    }


def transformers_takes(*, experts: bool, settings: int, symmetric: bool, rounded: bool) -> bool:
    """Whether transformers reads weights of compressed-tensors as they are meant. What formats refuse follows from it.

    experts: whether the model has any; it fuses them, and reads symmetric ones without rounded activations only.
    settings: how many differ between linears. Asymmetric weights are unpacked while they load, all by one setting.
    symmetric: all of them.
    """
    return symmetric and not rounded if experts else symmetric or settings == 1


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
                    yield (
                        base + ".weight",
                        UNPACKERS[packed["quant_method"]](parts, packed).to(dtype),
                    )


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
        weights[prefix + "gate_up_proj"], weights[prefix + "down_proj"] = (
            torch.cat([gate, up], dim=1),
            down,
        )


# ---------------------------------------------------------------------------------------------- unpacking


def stream(words: "Tensor", bits: int, count: int) -> "Tensor":
    """The codes in a row of 32-bit words, uint8: bit k of the row is bit k % 32 of word k // 32, a code is `bits` of
    them, the lowest first.
    """
    import torch

    top = 2**bits - 1
    if 8 % bits == 0:  # no code straddles two bytes
        raw = words.contiguous().view(torch.uint8)
        return torch.stack([(raw >> shift) & top for shift in range(0, 8, bits)], dim=-1).flatten(
            -2
        )[..., :count]
    place = torch.arange(count) * bits
    word, shift = place // 32, place % 32
    rows, codes = words.reshape(-1, words.shape[-1]), []
    for some in rows.split(max(1, SKETCHED_AT_ONCE // count)):
        wide = torch.nn.functional.pad(some.long() & 0xFFFFFFFF, (0, 1))
        codes.append((((wide[:, word] | (wide[:, word + 1] << 32)) >> shift) & top).to(torch.uint8))
    return torch.cat(codes).reshape(*words.shape[:-1], count)


def from_gptq(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o]); stored is q, and z - 1 (v1) or z (v2)."""
    bits = packed["bits"]
    columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
    q_OI = stream(parts["qweight"].T, bits, columns)
    z_GO = stream(parts["qzeros"], bits, rows).float() + (
        1 if packed["checkpoint_format"] == "gptq" else 0
    )
    group_I = parts["g_idx"].long()
    weight_IO = q_OI.T.float()
    return weight_IO.sub_(z_GO[group_I]).mul_(parts["scales"].float()[group_I]).T.contiguous()


def from_awq(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight[o, i] = scales[g, o] * (q[i, o] - z[g, o]). Of eight neighbours along o, the k-th four bits of a word
    hold number 0, 2, 4, 6, 1, 3, 5, 7.
    """
    import torch

    order, rows = [0, 2, 4, 6, 1, 3, 5, 7], parts["scales"].shape[1]

    def straight(words: "Tensor") -> "Tensor":
        mixed = stream(words, 4, rows).reshape(len(words), -1, 8)
        codes = torch.empty(mixed.shape)
        for place, number in enumerate(order):
            codes[:, :, number] = mixed[:, :, place]
        return codes.reshape(len(words), rows)

    weight_IO, z_GO = straight(parts["qweight"]), straight(parts["qzeros"])
    group_I = torch.arange(len(weight_IO)) // (len(weight_IO) // len(z_GO))
    return weight_IO.sub_(z_GO[group_I]).mul_(parts["scales"].float()[group_I]).T.contiguous()


def from_compressed_tensors(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight = scale * (q - z), q and z signed; packed, they have 2**(bits - 1) added, z down the rows."""
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


def rounded_inputs(packed: dict[str, Any], linear: str) -> bool:
    """Whether a linear's input is rounded. linear: its name on disk."""

    def means(target: str) -> bool:
        return (
            bool(re.match(target[3:], linear))
            if target.startswith("re:")
            else target in (linear, "Linear")
        )

    if any(means(target) for target in packed["ignore"]):
        return False
    # As its readers do: a name or a pattern goes before a class.
    groups = sorted(
        packed["config_groups"].values(), key=lambda group: group["targets"] == ["Linear"]
    )
    return next(
        bool(group.get("input_activations"))
        for group in groups
        if any(map(means, group["targets"]))
    )


def round_activations(model: Any, bits: int, packed: dict[str, Any]) -> None:
    """Per token to [-top, top], scale max |x| / top, as vLLM's int8 kernel does; compressed-tensors' own emulation
    divides by top + 1/2. Of experts, which transformers keeps in one module, each one's input of down too. Linears that
    are left out read their input as it is.
    """
    import torch

    top = 2 ** (bits - 1) - 1

    def rounded(x: "Tensor") -> "Tensor":
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / top
        return (x / scale).round().clamp(-top, top) * scale

    def experts(
        name: str, module: Any, tokens: "Tensor", chosen: "Tensor", shares: "Tensor"
    ) -> "Tensor":
        total = torch.zeros_like(tokens)
        for e in range(module.num_experts):
            seen, gate_up, down = (
                rounded
                if rounded_inputs(packed, f"{name}.{e}.{which}_proj")
                else torch.Tensor.clone
                for which in ("gate", "up", "down")
            )
            token, place = (chosen == e).nonzero(as_tuple=True)
            gate_rows, up_rows = module.gate_up_proj[e].chunk(2)
            gate = torch.nn.functional.linear(seen(tokens[token]), gate_rows)
            up = torch.nn.functional.linear(gate_up(tokens[token]), up_rows)
            out = torch.nn.functional.linear(down(module.act_fn(gate) * up), module.down_proj[e])
            total.index_add_(0, token, out * shares[token, place, None])
        return total

    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.Linear)
            and name.endswith("_proj")
            and rounded_inputs(packed, name)
        ):
            module.register_forward_pre_hook(
                lambda module, inputs: (rounded(inputs[0]), *inputs[1:])
            )
        elif name.endswith("mlp.experts"):
            module.forward = partial(experts, name, module)


def along(x: "Tensor") -> "Tensor":
    """One number a token: its vector along a fixed random direction, squared on average its norm squared."""
    import torch

    direction = torch.randn(
        x.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(11)
    )
    return x.detach().cpu().double().flatten(0, -2) @ direction


def run(model: Any, ids: "Tensor", states: "Tensor") -> Parts:
    """Every block on the input that is given for it, [L, B, T, H]: `along` of what its sites read, before it is rounded
    (`blocks.3.o`; not of what each expert's down reads), and of what it adds (`blocks.3`); and the logits [B, T, V]
    after the last one.
    """
    import torch

    found: dict[str, list[Tensor]] = {}
    row = 0

    def reads(name: str, _: Any, inputs: Any) -> None:
        found.setdefault(name, []).append(along(inputs[0]))

    def given(k: int, _: Any, inputs: Any) -> Any:
        return (states[k, row][None], *inputs[1:])

    def adds(k: int, _: Any, inputs: Any, output: Any) -> None:
        out = output if torch.is_tensor(output) else output[0]
        found.setdefault(f"blocks.{k}", []).append(along(out - states[k, row][None]))

    hooks, logits = [], []
    for k, layer in enumerate(model.model.layers):
        sites = {"qkv": layer.self_attn.q_proj, "o": layer.self_attn.o_proj, "gate_up": layer.mlp}
        sites |= {"down": layer.mlp.down_proj} if hasattr(layer.mlp, "down_proj") else {}
        hooks += [
            layer.register_forward_pre_hook(partial(given, k)),
            layer.register_forward_hook(partial(adds, k)),
        ]
        hooks += [
            # Before others, which round it.
            module.register_forward_pre_hook(partial(reads, f"blocks.{k}.{site}"), prepend=True)
            for site, module in sites.items()
        ]
    for row in range(len(ids)):
        logits.append(model(ids[row][None], use_cache=False).logits[0].float())
    for hook in hooks:
        hook.remove()
    return {
        "logits": torch.stack(logits),
        **{name: torch.cat(parts) for name, parts in found.items()},
    }


def logits_of(model: Any, ids: "Tensor") -> "Tensor":
    """[B, T, V], float32, a row at a time."""
    import torch

    return torch.stack([model(row[None], use_cache=False).logits[0].float() for row in ids])


def load_by_gptqmodel(folder: Path, dtype: "torch.dtype") -> Any:
    """The model on GPTQModel's plain kernels, which run in 16 bits."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    method = json.loads((folder / "config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]["quant_method"]
    backend = BACKEND.TORCH if method == "gptq" else BACKEND.AWQ_TORCH
    dtype = torch.float16 if dtype == torch.float32 else dtype
    return GPTQModel.load(str(folder), device="cpu", dtype=dtype, backend=backend).model


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


def findings(folder: Path, given: Parts | None) -> tuple[dict[str, Any], Parts]:
    """What goes into OUT.json and into OUT. given: None to look at the weights alone."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = config.get("quantization_config") or {}
    groups = packed.get("config_groups", {}).values()
    act_bits = next(
        (
            group["input_activations"]["num_bits"]
            for group in groups
            if group.get("input_activations")
        ),
        None,
    )
    if given is None:
        weights = {name: sketch(tensor) for name, tensor in numbers_on_disk(folder, config)}
        return {
            "loader": "a plain unpacker, weight by weight",
            "act_bits": act_bits,
            "sketches": weights,
        }, {}
    ids = given["ids"]
    model, who = load(folder)
    model(ids[:1, :1])  # compressed-tensors unpacks when the model first runs
    weights = {name: sketch(tensor) for name, tensor in weights_on_disk(model)}
    for module in model.modules():
        module.quantization_enabled = (
            False  # compressed-tensors' own rounding of activations: see above
        )
    dtype = model.dtype
    in_float32(model)
    found = {"logits": logits_of(model, ids)}
    found |= {f"plain/{name}": tensor for name, tensor in run(model, ids, given["plain"]).items()}
    if act_bits is not None and "rounded" in given:
        round_activations(model, act_bits, packed)
        found |= {
            f"rounded/{name}": tensor for name, tensor in run(model, ids, given["rounded"]).items()
        }
    del model
    if (
        packed.get("quant_method") in ("gptq", "awq")
        and importlib.util.find_spec("gptqmodel") is not None
    ):
        try:
            second = load_by_gptqmodel(folder, dtype)
        except Exception as error:  # whatever it raises, every weight was read already
            if is_short(error):
                raise
            who += f" (GPTQModel does not load it: {' '.join(str(error).split())[:SAID]})"
        else:
            found["public"] = logits_of(second, ids)
            who += ", and by GPTQModel"
    return {"loader": who, "act_bits": act_bits, "sketches": weights}, found


def main() -> None:
    folder, given, out, *packages = map(Path, sys.argv[1:])
    sys.modules["q3q"] = None  # type: ignore[assignment]  # importing it fails from here on, wherever it is installed
    sys.path += map(str, packages)
    import torch
    from safetensors.torch import load_file, save_file

    with torch.inference_mode():
        facts, found = findings(folder, None if given.name == "weights" else load_file(given))
    save_file(found, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def is_short(error: BaseException) -> bool:
    """Whether the machine, not the checkpoint, is why it failed."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in LACKING):
        return True
    said = re.search(
        r"\bos error (\d+)", str(error)
    )  # safetensors' errors have it in their words alone
    if said is not None and int(said[1]) in LACKING:
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not is_short(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(SHORT)

"""Unpack a linear's tensors by each format's definition, without its own library."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gguf_file import gguf_in, numbers_in_gguf

if TYPE_CHECKING:
    from torch import Tensor

Parts = dict[str, "Tensor"]
WIDE_NUMBERS = 1 << 22  # entries of a matrix widened at a time to be unpacked


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
    """weight = scale * (q - z), signed; packed with 2**(bits - 1) added, z down the rows.

    Floats have no z.
    """
    import torch

    codes = parts["weight" if "weight" in parts else "weight_packed"]
    if codes.dtype in (torch.float8_e4m3fn, torch.uint8):
        return from_floats(parts, packed)
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


def from_floats(parts: Parts, packed: dict[str, Any]) -> "Tensor":
    """weight = scale * level; a scale of NVFP4 is divided by the linear's factor.

    Of levels in few bits, the first is in the lowest bits. Scales in whole bytes are exponents of
    two, 127 added. The library returns FP4 and FP6 in bfloat16.
    """
    import torch

    scale_RG = parts["weight_scale"]
    if scale_RG.dtype == torch.uint8:
        scale_RG = torch.ldexp(torch.ones(scale_RG.shape), scale_RG.int() - 127)
    scale_RG = scale_RG.float()
    if "weight" in parts:
        level_OI = parts["weight"].float()
        if scale_RG.numel() == 1:
            return level_OI * scale_RG.reshape(())
        if len(scale_RG) < len(level_OI):  # a scale a block of rows and columns
            structures = [group["weights"].get("block_structure") for group in groups_in(packed)]
            height, width = next(filter(None, structures))
            scale_OG = scale_RG.repeat_interleave(height, 0)[: len(level_OI)]
            return level_OI * scale_OG.repeat_interleave(width, 1)[:, : level_OI.shape[1]]
        return level_OI.unflatten(1, (scale_RG.shape[1], -1)).mul(scale_RG[:, :, None]).flatten(1)
    codes, group = parts["weight_packed"], 32
    if "weight_global_scale" in parts:
        scale_RG, group = scale_RG / parts["weight_global_scale"].float(), 16
    columns = group * scale_RG.shape[1]
    bits = 8 * codes.shape[1] // columns
    byte = torch.nn.functional.pad(codes.int(), (0, 1))
    first = torch.arange(columns) * bits
    word = byte[:, first // 8] | byte[:, first // 8 + 1] << 8
    code = word >> first % 8 & 2**bits - 1
    half = 2 ** (bits - 1)  # 2 bits of exponent, the rest of mantissa
    steps = 2 ** (bits - 3)
    table = [
        m / steps * (1 if e == 0 else 2 ** (e - 1)) + (2 ** (e - 1) if e else 0)
        for e in range(4)
        for m in range(steps)
    ]
    level_OI = torch.tensor(table)[code & half - 1].copysign(0.5 - (code >= half).float())
    weight_OGS = level_OI.unflatten(1, (scale_RG.shape[1], -1)) * scale_RG[:, :, None]
    return weight_OGS.flatten(1).to(torch.bfloat16)


def groups_in(packed: dict[str, Any]) -> list[dict[str, Any]]:
    return list(packed["config_groups"].values())


UNPACKERS = {"gptq": from_gptq, "awq": from_awq, "compressed-tensors": from_compressed_tensors}


def input_factors(folder: Path) -> dict[str, float]:
    """Return the factors that inputs' scales are stored times, by their linears on disk."""
    from safetensors import safe_open

    factors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is no dict)
                linear, _, last = name.rpartition(".")
                if last == "input_global_scale":
                    factors[linear] = float(file.get_tensor(name))
    return factors


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
                if last in ("k_scale", "v_scale"):  # of a cache, which only servers keep in codes
                    continue
                if last == "bias" or not is_packed:
                    yield name, file.get_tensor(name)
                elif last in ("qweight", "weight_packed", "weight"):
                    own = (key for key in names if key.rpartition(".")[0] == base)
                    parts = {key.rpartition(".")[2]: file.get_tensor(key) for key in own}
                    unpack = UNPACKERS[packed["quant_method"]]
                    yield base + ".weight", unpack(parts, packed).to(dtype)

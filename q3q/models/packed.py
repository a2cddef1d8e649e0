"""Packed checkpoints' layouts of a linear (compressed-tensors, GPTQ and AWQ), and their configs.

A weight is scale * (code - zero), with the scale and zero of its column's group. Names, shapes,
bytes and configs need no torch, so a plan or a refusal costs milliseconds.

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from q3q.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
# Safetensors' names of dtypes.
WORDS, SCALES = ("I32",), ("F16", "BF16", "F32")
NOTHING = r"(?!)"  # a pattern that matches no name


@dataclass(frozen=True)
class Layout(ABC):
    """A linear's tensors on disk."""

    bits: int
    group_size: int  # -1 for the whole row
    symmetric: bool
    act_bits: int | None = None  # of the linear's input, per token

    marker: ClassVar[str]  # a tensor that only a packed linear has
    own_scales: ClassVar[bool] = False  # scales are stored in the model's dtype, not in float16

    def groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else columns // self.group_size

    @abstractmethod
    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[str, ...], Shape]]:
        """Return each tensor's dtypes (the one to write first) and shape, by its name's end."""

    @abstractmethod
    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the tensors; the scales keep scale_OG's dtype.

        Args:
            group_I: each column's group; None if groups are runs of neighbours.
        """

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return the dequantized weight [O, I], float32."""


@dataclass(frozen=True)
class PackedInts(Layout):
    """compressed-tensors' `pack-quantized`: codes packed along columns, zero points along rows."""

    marker: ClassVar[str] = "weight_packed"
    own_scales: ClassVar[bool] = True

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[str, ...], Shape]]:
        parts: dict[str, tuple[tuple[str, ...], Shape]] = {
            "weight_packed": (WORDS, (rows, _words(columns, self.bits))),
            "weight_scale": (SCALES, (rows, self.groups(columns))),
            "weight_shape": (("I64", "I32"), (2,)),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = (WORDS, (_words(rows, self.bits), self.groups(columns)))
        return parts

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        from q3q.numerics.packing import pack_bits

        _refuse_group_index(group_I)
        packed = {
            "weight_packed": pack_bits(codes_OI, self.bits),
            "weight_scale": scale_OG,
            "weight_shape": torch.tensor(codes_OI.shape),
        }
        if not self.symmetric:
            packed["weight_zero_point"] = pack_bits(zero_OG.T.to(torch.uint8), self.bits).T
        return packed

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from q3q.numerics.packing import unpack_bits

        codes_OI = unpack_bits(parts["weight_packed"], self.bits, columns)
        if self.symmetric:
            return _times(codes_OI, parts["weight_scale"], 2 ** (self.bits - 1))
        zero_GO = unpack_bits(parts["weight_zero_point"].T, self.bits, rows)
        return _times(codes_OI, parts["weight_scale"], zero_GO.T)


@dataclass(frozen=True)
class PlainInts(Layout):
    """compressed-tensors' `int-quantized`: signed bytes, symmetric."""

    marker: ClassVar[str] = "weight_scale"
    own_scales: ClassVar[bool] = True

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[str, ...], Shape]]:
        return {
            "weight": (("I8",), (rows, columns)),
            "weight_scale": (SCALES, (rows, self.groups(columns))),
        }

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        _refuse_group_index(group_I)
        middle = 2 ** (self.bits - 1)
        if not bool((zero_OG == middle).all()):
            raise ValueError("this layout has no place for zero points")
        signed_OI = codes_OI.to(torch.int16) - middle
        return {"weight": signed_OI.to(torch.int8), "weight_scale": scale_OG}

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return _times(parts["weight"], parts["weight_scale"], 0)


@dataclass(frozen=True)
class GptqWords(Layout):
    """AutoGPTQ's and GPTQModel's, transposed: codes along columns, zero points along rows."""

    # Subtracted from each zero point before it is stored: 1 in the first version (`gptq`), which
    # cannot store zero point 0, and 0 in the second (`gptq_v2`).
    below: int = 0

    marker: ClassVar[str] = "qweight"

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[str, ...], Shape]]:
        groups = self.groups(columns)
        return {
            "qweight": (WORDS, (_words(columns, self.bits), rows)),
            "qzeros": (WORDS, (groups, _words(rows, self.bits))),
            "scales": (SCALES, (groups, rows)),
            "g_idx": (WORDS, (columns,)),
        }

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        from q3q.numerics.packing import pack_bits

        columns = codes_OI.shape[1]
        if group_I is None:
            group_I = torch.arange(columns) // (columns // scale_OG.shape[1])
        zero_GO = (zero_OG.T.to(torch.int64) - self.below) & (2**self.bits - 1)
        return {
            "qweight": pack_bits(codes_OI, self.bits).T,
            "qzeros": pack_bits(zero_GO, self.bits),
            "scales": scale_OG.T,
            "g_idx": group_I.to(torch.int32),
        }

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from q3q.numerics.packing import unpack_bits

        codes_OI = unpack_bits(parts["qweight"].T, self.bits, columns)
        # A zero point stored below 0 reads as the highest code; adding wraps it round again.
        zero_GO = (unpack_bits(parts["qzeros"], self.bits, rows) + self.below) & (2**self.bits - 1)
        return _times(codes_OI, parts["scales"].T, zero_GO.T, parts["g_idx"])


@dataclass(frozen=True)
class AwqWords(Layout):
    """AutoAWQ's `gemm`: codes and zero points packed along the rows, eight at a time in ORDER."""

    marker: ClassVar[str] = "qweight"
    ORDER: ClassVar[tuple[int, ...]] = (0, 2, 4, 6, 1, 3, 5, 7)

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[str, ...], Shape]]:
        groups = self.groups(columns)
        return {
            "qweight": (WORDS, (columns, _words(rows, self.bits))),
            "qzeros": (WORDS, (groups, _words(rows, self.bits))),
            "scales": (SCALES, (groups, rows)),
        }

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        from q3q.numerics.packing import pack_bits

        _refuse_group_index(group_I)

        def interleaved(codes_xO: Tensor) -> Tensor:
            runs_xn8 = codes_xO.to(torch.uint8).unflatten(-1, (-1, len(self.ORDER)))
            return pack_bits(runs_xn8[..., list(self.ORDER)].flatten(-2), self.bits)

        return {
            "qweight": interleaved(codes_OI.T),
            "qzeros": interleaved(zero_OG.T),
            "scales": scale_OG.T,
        }

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from q3q.numerics.packing import unpack_bits

        places = [self.ORDER.index(k) for k in range(len(self.ORDER))]

        def straight(words_xW: Tensor) -> Tensor:
            runs_xn8 = unpack_bits(words_xW, self.bits, rows).unflatten(-1, (-1, len(places)))
            return runs_xn8[..., places].flatten(-2)

        return _times(straight(parts["qweight"]).T, parts["scales"].T, straight(parts["qzeros"]).T)


@dataclass(frozen=True)
class Packing:
    """A packed checkpoint's config: which linear has which layout."""

    method: str
    # Patterns of complete names with their layouts; the first that matches counts.
    rules: tuple[tuple[str, Layout | None], ...]

    def of(self, linear: str) -> Layout | None:
        """Return a linear's layout, None if it is unquantized.

        Args:
            linear: a name on disk, `model.layers.0.self_attn.q_proj`.
        """
        matching = (layout for pattern, layout in self.rules if re.fullmatch(pattern, linear))
        return next(matching, None)

    @property
    def act_bits(self) -> int | None:
        """Bits of every quantized linear's input."""
        return next((layout.act_bits for _, layout in self.rules if layout is not None), None)

    def rounds(self, linears: Iterable[str]) -> bool:
        """Return whether the input that these linears share is rounded, to `act_bits`.

        Raises:
            CheckpointError: it is rounded for some of them only.
        """
        first: dict[bool, str] = {}  # the first linear that is rounded, and the first that is not
        for name in linears:
            layout = self.of(name)
            first.setdefault(layout is not None and layout.act_bits is not None, name)
        if len(first) > 1:
            raise CheckpointError(
                f"{first[True]} reads rounded activations and {first[False]} the same ones "
                "unrounded: q3q cannot read this"
            )
        return next(iter(first))


def read_packing(config: Mapping[str, Any]) -> Packing:
    """Read a `quantization_config`.

    Raises:
        CheckpointError: its method, or its variant of the method, is not supported.
    """
    method = config.get("quant_method", "unknown method")
    readers: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
        "compressed-tensors": _read_compressed_tensors,
        "gptq": _read_gptq,
        "awq": _read_awq,
    }
    if method not in readers:
        raise CheckpointError(
            f"quantized already ({method}), which q3q cannot read: give the original model"
        )
    try:
        return readers[method](config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"quantized already ({method}), and its config is invalid: {error!r}"
        ) from error


def _read_compressed_tensors(config: Mapping[str, Any]) -> Packing:
    layouts = {"pack-quantized": PackedInts, "int-quantized": PlainInts}
    ignored: list[tuple[str, Layout | None]] = [(_any_of(config.get("ignore") or ()), None)]
    named: list[tuple[str, Layout | None]] = []
    classes: list[tuple[str, Layout | None]] = []
    if config.get("transform_config"):
        raise CheckpointError(
            "quantized already (compressed-tensors), with transforms of activations: "
            "q3q cannot read this"
        )
    for group in config["config_groups"].values():
        weights, inputs = group["weights"], group.get("input_activations")
        kind = layouts.get(group.get("format") or config["format"])
        supported = (
            weights["type"] == "int"
            and weights["strategy"] in ("group", "channel")
            and not weights.get("dynamic")
            # With another order a group's columns are no neighbours.
            and weights.get("actorder") in (None, "weight", "static")
        )
        if inputs is not None:
            supported &= (
                inputs["type"] == "int"
                and inputs["dynamic"] is True
                and inputs["strategy"] == "token"
            )
        if kind is None or not supported or (kind is PlainInts and not weights["symmetric"]):
            raise CheckpointError(
                f"quantized already (compressed-tensors), in a way ({group}) that q3q cannot read"
            )
        size = weights["group_size"] if weights["strategy"] == "group" else -1
        act_bits = inputs["num_bits"] if inputs else None
        layout = kind(weights["num_bits"], size, weights["symmetric"], act_bits)
        named.append((_any_of(name for name in group["targets"] if name != "Linear"), layout))
        classes += [(".*", layout)] if "Linear" in group["targets"] else []
    # A name or a pattern takes precedence over a class.
    packing = Packing("compressed-tensors", (*ignored, *named, *classes))
    if len({layout.act_bits for _, layout in packing.rules if layout is not None}) > 1:
        raise CheckpointError(
            "quantized already (compressed-tensors), with activations of several widths: "
            "q3q cannot read this"
        )
    return packing


def _any_of(names: Iterable[str]) -> str:
    """Return a pattern that matches these targets and nothing else."""
    # The library matches its own patterns at the start of a name, not to its end.
    patterns = [
        f"(?:{name[3:]}).*" if name.startswith("re:") else re.escape(name) for name in names
    ]
    return "|".join(patterns) or NOTHING


def _read_gptq(config: Mapping[str, Any]) -> Packing:
    version = config.get("checkpoint_format") or "gptq"
    own = config.get("dynamic") or {}  # rules for modules: those that begin with -: leave one out
    others = [rule for rule in own if not rule.startswith("-:")]
    if version not in ("gptq", "gptq_v2") or others or config.get("modules_in_block_to_quantize"):
        raise CheckpointError(
            f"quantized already (gptq), in a variant ({version}) that q3q cannot read"
        )
    below = 1 if version == "gptq" else 0
    layout = GptqWords(config["bits"], config["group_size"], bool(config["sym"]), below=below)
    left_out = "|".join(f"(?:{rule[2:]}).*" for rule in own) or NOTHING
    return Packing("gptq", ((left_out, None), (".*", layout)))


def _read_awq(config: Mapping[str, Any]) -> Packing:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = config.get("bits") or config["w_bit"]
    if version != "gemm" or bits != 4 or not config.get("zero_point", True):
        raise CheckpointError(
            f"quantized already (awq), in a variant ({version}, {bits} bits) that q3q cannot read"
        )
    layout = AwqWords(bits, config.get("group_size") or config["q_group_size"], False)
    parts = config.get("modules_to_not_convert") or ()  # substrings of names
    left_out = f".*(?:{_any_of(parts)}).*"
    return Packing("awq", ((left_out, None), (".*", layout)))


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _times(
    codes_OI: Tensor, scale_OG: Tensor, zero: Tensor | int, group_I: Tensor | None = None
) -> Tensor:
    """Return scale * (code - zero) in float32, where a 16-bit scale times a code is exact."""
    columns, groups = codes_OI.shape[1], scale_OG.shape[1]

    def per_column(number_OG: Tensor) -> Tensor:
        if group_I is None:
            return number_OG.float().repeat_interleave(columns // groups, dim=1)
        return number_OG.float()[:, group_I.long()]

    zero_OI = zero if isinstance(zero, int) else per_column(zero)
    return per_column(scale_OG) * (codes_OI.float() - zero_OI)


def _refuse_group_index(group_I: Tensor | None) -> None:
    if group_I is not None:
        raise ValueError("this layout has no place for a group index")

"""vLLM's own format; the `compressed-tensors` library makes and checks its config."""

import json
import re
from typing import ClassVar

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

from q3q.export.serving import holds_cache
from q3q.export.tensors import layouts
from q3q.export.writer import PackingExporter
from q3q.models.disk_names import names_on_disk
from q3q.models.packed import Layout
from q3q.models.packed_floats import FloatLayout
from q3q.number_formats import FLOATS, INT
from q3q.spec import Json


class CompressedTensorsExporter(PackingExporter):
    """Whole numbers of 2 to 8 bits, W8A8, FP8, MX formats and NVFP4.

    Each setting is a config group; unquantized linears, the head and the routers are ignored.
    """

    name: ClassVar[str] = "compressed_tensors"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

    def _cache(self) -> QuantizationArgs | None:
        """Return how servers store keys and values: as E4M3 numbers with one scale a layer."""
        if self.spec.kv is None or not holds_cache(self.spec.kv):
            return None
        return QuantizationArgs(
            num_bits=8, type="float", symmetric=True, dynamic=False, strategy="tensor"
        )

    def quantization_config(self) -> Json:
        facts = self.checkpoint.facts
        targets: dict[Layout, list[str]] = {}
        ignored = [facts.family.head.removesuffix(".weight")]
        ignored += [rf"re:.*{re.escape(name.removesuffix('.weight'))}$" for name in facts.routers()]
        parts = {prefix.strip(".").rpartition(".")[2] for prefix in facts.family.carried}
        ignored += [f"re:.*{part}.*" for part in sorted(parts)]
        linears = {
            name for k in range(facts.layers) for name in names_on_disk(facts, k, facts.linears(k))
        }
        for name, _, layout in layouts(self.spec, facts):
            module = _module(name.removesuffix(".weight"))
            if layout is not None:
                targets.setdefault(layout, []).append(module)
            elif name in linears:
                ignored.append(module)
        formats = {_format(layout) for layout in targets}
        if len(targets) == 1:
            targets = {layout: ["Linear"] for layout in targets}
        # Several settings are distinguished by names alone: vLLM looks for a class before it looks
        # for the parts of a joined q, k, v, so a group "Linear" would take them all.
        config = QuantizationConfig(
            config_groups={
                f"group_{k}": QuantizationScheme(targets=names, **_arguments(layout))
                for k, (layout, names) in enumerate(targets.items())
            },
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            kv_cache_scheme=self._cache(),
            quantization_status="compressed",
            ignore=ignored,
        )
        return json.loads(config.model_dump_json())


def _module(name: str) -> str:
    """Return a linear's name on disk as readers look for it.

    The text part of a model that sees images lies deeper in files than in some readers' memory.
    """
    inner = name.removeprefix("model.language_model.")
    return name if inner == name else rf"re:.*\b{re.escape(inner)}$"


def _format(layout: Layout) -> str:
    if isinstance(layout, FloatLayout):
        if layout.form.scale == "float":
            return "float-quantized"
        return (
            f"{layout.format}-quantized" if layout.bits == 8 else f"{layout.format}-pack-quantized"
        )
    return "pack-quantized" if layout.act_bits is None else "int-quantized"


def _arguments(layout: Layout) -> Json:
    weights = _whole(layout.bits, layout.group_size, symmetric=layout.symmetric)
    if isinstance(layout, FloatLayout):
        weights = _floats(layout.format, layout.group_size)
        if layout.group_rows == -1:
            weights = {**weights, "strategy": "tensor"}
        elif layout.group_rows > 1:
            block = [layout.group_rows, layout.group_size]
            weights = {**weights, "strategy": "block", "block_structure": block}
            weights.pop("group_size")
    arguments: Json = {
        "weights": QuantizationArgs(**weights, dynamic=False),
        "format": _format(layout),
    }
    if layout.act_bits is not None:
        inputs = _whole(layout.act_bits, layout.act_group_size)
        if layout.act_format != INT:
            inputs = _floats(layout.act_format, layout.act_group_size)
        if inputs["strategy"] == "channel":
            inputs["strategy"] = "token"
        inputs["dynamic"] = True
        if layout.act_scales == "factor":  # of the scales, the factor alone is stored
            inputs |= {"dynamic": "local", "observer": "static_minmax"}
        arguments["input_activations"] = QuantizationArgs(**inputs)
    return arguments


def _whole(bits: int, group_size: int, *, symmetric: bool = True) -> Json:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **_sharing(group_size)}


def _floats(name: str, group_size: int) -> Json:
    """Return the arguments of a format: its type, and what its scales are and are shared by."""
    form = FLOATS[name]
    args: Json = {"num_bits": form.bits, "type": "float", "symmetric": True}
    args |= _sharing(group_size)
    stored = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}.get(form.scale)
    if stored is not None:
        args |= {"scale_dtype": stored, "zp_dtype": stored}
    if form.scale == "e4m3":
        args["strategy"] = "tensor_group"
    return args


def _sharing(group_size: int) -> Json:
    if group_size == -1:
        return {"strategy": "channel"}
    return {"strategy": "group", "group_size": group_size}

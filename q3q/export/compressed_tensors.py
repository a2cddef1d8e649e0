"""vLLM's own format; the `compressed-tensors` library makes and checks its config."""

import json
import re
from typing import ClassVar

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

from q3q.export.tensors import layouts
from q3q.export.writer import PackingExporter
from q3q.models.disk_names import names_on_disk
from q3q.models.packed import Layout
from q3q.spec import Json


class CompressedTensorsExporter(PackingExporter):
    """Weight-only grids of 2 to 8 bits (`pack-quantized`), or W8A8 (`int-quantized`).

    Each setting is a config group; unquantized linears, the head and the routers are ignored.
    """

    name: ClassVar[str] = "compressed_tensors"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

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
        if len(targets) == 1:
            targets = {layout: ["Linear"] for layout in targets}
        # Several settings are distinguished by names alone: vLLM looks for a class before it looks
        # for the parts of a joined q, k, v, so a group "Linear" would take them all.
        config = QuantizationConfig(
            config_groups={
                f"group_{k}": QuantizationScheme(targets=names, **_arguments(layout))
                for k, (layout, names) in enumerate(targets.items())
            },
            format=_format(next(iter(targets))),
            quantization_status="compressed",
            ignore=ignored,
        )
        section: Json = json.loads(config.model_dump_json())
        return section


def _module(name: str) -> str:
    """Return a linear's name on disk as readers look for it.

    The text part of a model that sees images lies deeper in files than in some readers' memory.
    """
    inner = name.removeprefix("model.language_model.")
    return name if inner == name else rf"re:.*\b{re.escape(inner)}$"


def _format(layout: Layout) -> str:
    return "pack-quantized" if layout.act_bits is None else "int-quantized"


def _arguments(layout: Layout) -> Json:
    size: Json = {"strategy": "channel"}
    if layout.group_size != -1:
        size = {"strategy": "group", "group_size": layout.group_size}
    arguments: Json = {
        "weights": QuantizationArgs(
            num_bits=layout.bits, type="int", symmetric=layout.symmetric, dynamic=False, **size
        ),
        "format": _format(layout),
    }
    if layout.act_bits is not None:
        arguments["input_activations"] = QuantizationArgs(
            num_bits=layout.act_bits, type="int", symmetric=True, dynamic=True, strategy="token"
        )
    return arguments

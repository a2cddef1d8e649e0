"""The format of AutoGPTQ and GPTQModel, which vLLM, SGLang and transformers load as `gptq`."""

import json
import re
from collections.abc import Mapping
from typing import ClassVar

from q3q.export.tensors import layouts, plain_linears
from q3q.export.writer import PackingExporter
from q3q.spec import Json

# The names under which vLLM and SGLang run linears that share an input.
JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    **dict.fromkeys(("in_proj_a", "in_proj_b"), "in_proj_ba"),
}


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


class GptqExporter(PackingExporter):
    """Uniform grids of 2, 3, 4 or 8 bits, with each column's group index (`g_idx`).

    Symmetric weights are written in the format's first version (`gptq`), which every reader knows,
    asymmetric ones in its second (`gptq_v2`): the first stores zero points minus one, so not 0.
    """

    name: ClassVar[str] = "gptq"

    def quantization_config(self) -> Json:
        scheme = self.spec.scheme
        assert scheme is not None
        method = self.spec.method
        config: Json = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": self.reordered,
            "lm_head": False,
            "pack_dtype": "int32",
            "damp_percent": method.knobs.get("damping", 0.01),
            "true_sequential": bool(method.knobs.get("true_sequential", True)),
            "meta": {"quantizer": [f"q3q:{method.name}"]},
        }
        if plain := self._plain_patterns():
            config["dynamic"] = {f"-:{pattern}": {} for pattern in plain}
        return config

    def _plain_patterns(self) -> list[str]:
        """Return a pattern for each linear that `skip` leaves, or for each kind left everywhere.

        A reader leaves out the modules that match a rule `-:PATTERN`. Servers look for the name of
        a joined module, q_proj, k_proj and v_proj as qkv_proj.
        """
        if not self.spec.skip:
            return []
        quantized = {
            _kind(name.removesuffix(".weight"))
            for name, _, layout in layouts(self.spec, self.checkpoint.facts)
            if layout is not None
        }
        patterns = dict[str, None]()
        for name in plain_linears(self.spec, self.checkpoint.facts):
            module, kind = name.partition(".layers.")[2].rpartition(".")[::2]
            where = rf"layers\.{re.escape(module)}" if kind in quantized else ""
            for called in (kind, JOINED.get(kind)):
                if called is not None:
                    patterns[rf".*{where}\.{called}$"] = None
        return list(patterns)

    def other_files(self) -> Mapping[str, bytes]:
        return {"quantize_config.json": json.dumps(self.quantization_config(), indent=1).encode()}

"""The format of AutoGPTQ and GPTQModel, which vLLM, SGLang and transformers load as `gptq`."""

import json
from collections.abc import Mapping
from typing import ClassVar

from q3q.export.writer import PackingExporter
from q3q.spec import Json


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
        return {
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

    def other_files(self) -> Mapping[str, bytes]:
        return {"quantize_config.json": json.dumps(self.quantization_config(), indent=1).encode()}

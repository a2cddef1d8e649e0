"""The format of AutoAWQ (`gemm`), which vLLM, SGLang and transformers load as `awq`."""

from typing import ClassVar

from q3q.export.writer import PackingExporter
from q3q.spec import Json


class AwqExporter(PackingExporter):
    """Any uniform grid of 4 bits over neighbouring columns; symmetric ones too, their zero points written out."""

    name: ClassVar[str] = "awq"

    def quantization_config(self) -> Json:
        scheme, facts = self.spec.scheme, self.checkpoint.facts
        assert scheme is not None
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            # In full: readers look for these words anywhere in a name, and `mlp.gate` is in `mlp.gate_proj` too.
            "modules_to_not_convert": [
                f"model.layers.{k}.mlp.gate" for k in range(facts.layers) if facts.sparse(k)
            ]
            or None,
        }

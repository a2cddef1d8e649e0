"""The format of AutoAWQ (`gemm`), which vLLM, SGLang and transformers load as `awq`."""

from typing import ClassVar

from q3q.export.writer import PackingExporter
from q3q.spec import Json


class AwqExporter(PackingExporter):
    """Uniform 4-bit grids over neighbouring columns; symmetric ones get explicit zero points."""

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
            # Full names: readers match substrings, and `mlp.gate` is also in `mlp.gate_proj`.
            "modules_to_not_convert": [
                facts.on_disk(k, name.removesuffix(".weight"))
                for k in range(facts.layers)
                for site in facts.sites(k)
                for name in site.unquantized
            ]
            or None,
        }

"""The format of AutoAWQ (`gemm`), which vLLM, SGLang and transformers load as `awq`."""

from collections.abc import Iterator
from typing import ClassVar

from q3q.export.tensors import plain_linears
from q3q.export.writer import PackingExporter
from q3q.models.family import ModelFacts
from q3q.spec import Json, TrialSpec


def _unquantized(spec: TrialSpec, facts: ModelFacts) -> Iterator[str]:
    """Yield modules that stay plain numbers, by their names in files.

    Full names: readers match substrings, and `mlp.gate` is also in `mlp.gate_proj`. A reader of the
    text part alone knows its modules without the name of that part.
    """
    for full in plain_linears(spec, facts):
        yield full
        if ".language_model." in full:
            yield full.replace(".language_model.", ".", 1)
    for part in facts.family.carried if facts.carried_bytes else ():
        yield part.strip(".")


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
            "modules_to_not_convert": list(_unquantized(self.spec, facts)) or None,
        }

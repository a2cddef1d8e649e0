"""Plain numbers in the model's own dtype: an ordinary checkpoint that every loader takes."""

from typing import ClassVar

from torch import Tensor

from q3q.export.writer import Exporter
from q3q.models.packed import Layout
from q3q.numerics.weights import StoredWeight
from q3q.spec import Json


class HfExporter(Exporter):
    """Any method's weights, dequantized to the model's dtype as they were evaluated."""

    name: ClassVar[str] = "hf"

    def weight(self, layout: Layout | None, name: str, weight: StoredWeight) -> dict[str, Tensor]:
        return {name: weight.dequantize()[0].to(self.dtype)}

    def quantization_config(self) -> Json | None:
        return None

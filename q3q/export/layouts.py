"""The layout in which an export stores a linear of a scheme. Imports no torch."""

from q3q.export.reload.configs import Group
from q3q.models.packed import GptqWords, Layout, PackedInts, PlainInts
from q3q.models.packed_floats import FloatLayout, PackedFloats, PlainFloats
from q3q.number_formats import FLOATS, INT
from q3q.scheme import ActScales
from q3q.spec import Scheme


def compressed_layout(scheme: Scheme) -> Layout:
    bits, size = scheme.bits, scheme.group_size
    inputs = scheme.inputs
    scales: ActScales = "dynamic" if inputs is None else inputs.scales
    acts = (scheme.act_bits, scheme.act_format, scheme.act_group_size, scales)
    if scheme.format == INT:
        kind = PackedInts if scheme.act_bits is None else PlainInts
        return kind(bits, size, scheme.symmetric, *acts)
    floats: type[FloatLayout] = PlainFloats if bits == 8 else PackedFloats
    return floats(bits, size, True, *acts, format=scheme.format, group_rows=scheme.group_rows)


def group_of(layout: Layout) -> Group:
    """Return a layout as transformers sees it in the config."""
    form = FLOATS.get(layout.format) if isinstance(layout, FloatLayout) else None
    blocks = isinstance(layout, FloatLayout) and layout.group_rows > 1
    return Group(
        bits=layout.bits,
        floats=form is not None,
        symmetric=layout.symmetric,
        rounded=layout.act_bits is not None,
        scales="float" if form is None else form.scale,
        wide_groups=layout.group_size == -1 and not blocks,
    )


def gptq_layout(scheme: Scheme) -> Layout:
    # In the first version (below=1) a zero point of 0 wraps around, and readers disagree about it.
    # So only symmetric weights are written in it: their zero points are all the middle code.
    below = 1 if scheme.symmetric else 0
    return GptqWords(scheme.bits, scheme.group_size, scheme.symmetric, below=below)

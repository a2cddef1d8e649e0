"""compressed-tensors' configs: each group of linears has a format of its own."""

from collections.abc import Mapping
from typing import Any

from q3q.models.packed import Layout, PackedInts, PlainInts
from q3q.models.packed_floats import FloatLayout, PackedFloats, PlainFloats
from q3q.models.published.packing import Packing, any_of, cache_of, unreadable
from q3q.number_formats import FLOATS, INT

METHOD = "compressed-tensors"
INTEGERS: dict[str, type[Layout]] = {
    "pack-quantized": PackedInts,
    "int-quantized": PlainInts,
    "naive-quantized": PlainInts,
}
PLAIN = ("float-quantized", "naive-quantized", "mxfp8-quantized")
PACKED = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized")
# Formats by bits and columns of a group; fp8 has groups of its own, or none.
FORMATS: dict[tuple[int, int | None], str] = {(4, 16): "nvfp4", (4, 32): "mxfp4", (6, 32): "mxfp6"}
DYNAMIC = (True, "local")  # scales from the numbers themselves; `local` below a stored factor
Table = Mapping[str, Any]


def read_compressed_tensors(config: Table) -> Packing:
    """Read a config; a name or a pattern takes precedence over a class.

    Raises:
        CheckpointError: a group is of a kind that q3q cannot read.
    """
    if config.get("transform_config"):
        raise unreadable(METHOD, "with transforms of activations,")
    ignored = [(any_of(config.get("ignore") or ()), None)]
    named: list[tuple[str, Layout | None]] = []
    classes: list[tuple[str, Layout | None]] = []
    for group in config["config_groups"].values():
        layout = _layout(group, group.get("format") or config["format"])
        named.append((any_of(name for name in group["targets"] if name != "Linear"), layout))
        classes += [(".*", layout)] if "Linear" in group["targets"] else []
    kv = config.get("kv_cache_scheme")
    return Packing(
        METHOD, (*ignored, *named, *classes), kv=None if kv is None else cache_of(METHOD, kv)
    )


def _layout(group: Table, kind: str) -> Layout:
    """Return one group's layout.

    Raises:
        CheckpointError: q3q cannot read it.
    """
    problem = unreadable(METHOD, f"in a way ({dict(group)})")
    weights = group["weights"]
    # With another order a group's columns are no neighbours.
    ordered = weights.get("actorder") in (None, "weight", "static")
    if weights.get("dynamic") or not ordered or group.get("output_activations"):
        raise problem
    acts = _activations(group.get("input_activations"))
    if acts is None:
        raise problem
    bits, strategy = weights["num_bits"], weights["strategy"]
    rows, columns = {
        "tensor": (-1, -1),
        "channel": (1, -1),
        "group": (1, weights.get("group_size")),
        "tensor_group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or (None, None)),
    }.get(strategy, (None, None))
    symmetric = weights["symmetric"]
    if rows is None or columns is None:
        raise problem
    if weights["type"] == "int":
        layout = INTEGERS.get(kind)
        plain = layout is PlainInts
        if layout is None or rows != 1 or (plain and not symmetric):
            raise problem
        return layout(bits, columns, symmetric, **acts)
    name = _format(weights)
    if not symmetric or name is None:
        raise problem
    floats: type[FloatLayout] | None = None
    if kind in PLAIN and bits == 8:
        floats = PlainFloats
    elif kind in PACKED and kind.startswith(name):
        floats = PackedFloats
    if floats is None:
        raise problem
    return floats(bits, columns, True, **acts, format=name, group_rows=rows)


def _format(args: Table) -> str | None:
    """Return the number format of floats; None if q3q has none of this kind."""
    bits, size = args["num_bits"], args.get("group_size")
    if bits == 8:
        powers = str(args.get("scale_dtype") or "").endswith("uint8")
        return "mxfp8" if powers and size == 32 else "fp8_e4m3"
    return FORMATS.get((bits, size))


def _activations(args: Table | None) -> dict[str, Any] | None:  # noqa: PLR0911  one return a kind
    """Return the fields of a layout that say how inputs are rounded; None if q3q cannot."""
    if args is None:
        return {}
    bits, strategy, dynamic = args["num_bits"], args["strategy"], args.get("dynamic", False)
    size = args.get("group_size") if strategy in ("group", "tensor_group") else -1
    if not args.get("symmetric", True) or size is None:
        return None
    name = INT if args["type"] == "int" else _format(args)
    if name is None:
        return None
    fields = {"act_bits": bits, "act_format": name, "act_group_size": size}
    factor = name in FLOATS and FLOATS[name].scale == "e4m3"
    if strategy in ("token", "group") and dynamic is True and not factor:
        return fields
    if strategy == "tensor" and dynamic is False:
        return fields | {"act_scales": "stored"}
    if strategy == "tensor_group" and dynamic in DYNAMIC and factor:
        return fields | {"act_scales": "factor"}
    return None

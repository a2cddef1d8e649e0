"""The formats that a quantized model can be exported to, as data: what each can hold, and who loads it.

The refusal of what a format cannot hold and the table in docs/EXPORT.md both come from here. No torch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from q3q.errors import IncompatibleError
from q3q.export.reload import transformers_takes
from q3q.models.checkpoint import disk_shapes
from q3q.models.facts import ModelFacts
from q3q.models.packed import AwqWords, GptqWords, Layout, PackedInts, PlainInts
from q3q.spec import Scheme, TrialSpec

TESTED, UNTESTED = "tested", "untested"
GPTQMODEL = "tested by benchmarks/export.py"
ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1, "I32": 4, "I64": 8}
DTYPE_BYTES = {"float32": 4, "float64": 8}  # of a model's numbers; 2 of all others
SCALE_BYTES = 2  # in float16
# Linears that servers run as one matrix, which then has one setting.
JOINED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
# What vLLM's kernels take of packed weights, as its sources say: sizes of groups, and pairs of bits and symmetric.
# Zero points of 8 bits are for Hopper's kernel alone.
SERVED_GROUPS = (-1, 32, 64, 128)
SERVED_SYMMETRIC = ((4, True), (8, True))
SERVED_EITHER = ((4, True), (4, False))
SERVED_COMPRESSED = (*SERVED_EITHER, (8, True))
# Sizes of groups that GPTQModel's kernels for a CPU take, as its sources say.
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
GPTQMODEL_AWQ_GROUPS = (-1, 16, 32, 64, 128)
Pairs = tuple[tuple[int, bool], ...]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _in_words(pairs: Pairs) -> str:
    """Pairs of bits and symmetric: `4 bits, 8 bits symmetric`."""
    widths = sorted({bits for bits, _ in pairs})
    return ", ".join(
        f"{bits} bits" + ("" if (bits, False) in pairs else " symmetric") for bits in widths
    )


@dataclass(frozen=True)
class Format:
    """One format.

    bits, symmetry (for people: none takes only one kind), act_order (a group index of each column), mixed (settings
    that differ between linears, in a dense model): what it can hold. acts: (bits of weights, bits of dynamic per-token
    activations) that it can hold together, with one symmetric scale a row. words_per_row, words_per_column: these must
    fill whole 32-bit words. anything: plain numbers, which any method's weights are. layout: of one linear, None for
    plain numbers. implementation: `module:Class`. served, served_experts: pairs of bits and symmetric that vLLM takes,
    of a dense model and of one with experts, without rounded activations. loaders: who reads what of it, and whether we
    have seen it (`tested`) or have it from their sources (`untested`).
    """

    name: str
    what: str
    bits: tuple[int, ...]
    symmetry: str
    layout: Callable[[Scheme], Layout] | None
    implementation: str
    loaders: tuple[tuple[str, str, str], ...]
    act_order: bool = False
    mixed: bool = False
    acts: tuple[tuple[int, int], ...] = ()
    anything: bool = False
    words_per_row: bool = False
    words_per_column: bool = False
    served: Pairs = ()
    served_experts: Pairs = ()

    ALL_BITS: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)

    def problems(self, spec: TrialSpec, facts: ModelFacts) -> Iterator[str]:
        """Why this format cannot hold what the trial makes, each reason in a few words."""
        scheme, schemes = spec.scheme, schemes_of(spec, facts)
        assert scheme is not None
        if scheme.act_bits is not None and not all(map(self._holds_activations, schemes)):
            able = " or ".join(
                f"bits={w} act_bits={a} group_size=-1 symmetric=true" for w, a in self.acts
            )
            yield f"act_bits={scheme.act_bits} with these weights" + (
                f" (it takes {able})" if able else ""
            )
        if not self.anything:
            yield from self._problems_of_codes(spec, schemes, facts)

    def unserved(self, spec: TrialSpec, facts: ModelFacts) -> str | None:
        """What of the trial's export vLLM does not take, in a few words; None if it takes all."""
        if self.anything:
            return None
        pairs = self.served_experts if facts.experts else self.served
        for scheme in schemes_of(spec, facts):
            if scheme.act_bits is not None:  # what the format holds of these, vLLM takes
                continue
            if all(bits != scheme.bits for bits, _ in pairs):
                return f"bits={scheme.bits} (it takes {_in_words(pairs)})"
            if scheme.group_size not in SERVED_GROUPS:
                return f"group_size={scheme.group_size} (it takes {_listed(SERVED_GROUPS)})"
            if (scheme.bits, scheme.symmetric) not in pairs:
                if any(not symmetric for _, symmetric in pairs):
                    return f"symmetric=false and bits={scheme.bits} (it takes {_in_words(pairs)})"
                return "symmetric=false" + (" of experts" if pairs != self.served else "")
        return None

    def _problems_of_codes(
        self, spec: TrialSpec, schemes: Sequence[Scheme], facts: ModelFacts
    ) -> Iterator[str]:
        wrong = sorted({one.bits for one in schemes} - set(self.bits))
        if wrong == [1]:
            yield "binarized weights, for which there is no standard"
        elif wrong:
            yield f"bits={','.join(map(str, wrong))} (it takes {_listed(self.bits)})"
        elif not all(self._fills_words(scheme, facts) for scheme in schemes):
            yield "weights whose rows or columns do not fill whole 32-bit words"
        if spec.head_bits or spec.embedding_bits:
            yield "a quantized head or embedding"
        if not self.act_order and _reorders(spec, schemes):
            yield "act-order's groups of columns that lie apart (method.static_groups=true keeps neighbours together)"
        if (spec.overrides or spec.skip) and not (self.mixed and not facts.experts):
            yield "overrides or skip" + (
                " in a model with experts, which loaders fuse" if self.mixed else ""
            )
            return
        if torn := next(_torn_sites(spec, facts), None):
            yield f"settings that differ within a site ({torn}), which loaders run as one"
        if not _told_apart(schemes):
            yield "several settings when any is asymmetric (transformers then reads all linears by one of them)"

    def _fills_words(self, scheme: Scheme, facts: ModelFacts) -> bool:
        shapes = {
            shape[-2:]
            for k in range(facts.layers)
            for name, shape in facts.block_shapes(k).items()
            if "_proj" in name
        }
        return not any(
            (self.words_per_row and columns * scheme.bits % 32)
            or (self.words_per_column and rows * scheme.bits % 32)
            for rows, columns in shapes
        )

    def _holds_activations(self, scheme: Scheme) -> bool:
        return (
            (scheme.bits, scheme.act_bits) in self.acts
            and scheme.symmetric
            and scheme.group_size == -1
        )


def _compressed_layout(scheme: Scheme) -> Layout:
    kind = PackedInts if scheme.act_bits is None else PlainInts
    return kind(scheme.bits, scheme.group_size, scheme.symmetric, scheme.act_bits)


def _gptq_layout(scheme: Scheme) -> Layout:
    # In the first version a zero point of 0 wraps round, and its readers disagree about what comes back: it is written
    # for symmetric weights alone, whose zero points are all the middle code.
    return GptqWords(
        scheme.bits, scheme.group_size, scheme.symmetric, below=1 if scheme.symmetric else 0
    )


def _awq_layout(scheme: Scheme) -> Layout:
    return AwqWords(scheme.bits, scheme.group_size, False)


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            name="hf",
            what="numbers in the model's own dtype",
            bits=Format.ALL_BITS,
            symmetry="both",
            layout=None,
            implementation="q3q.export.hf:HfExporter",
            mixed=True,
            anything=True,
            loaders=(
                ("transformers", TESTED, "all"),
                ("vLLM, SGLang", UNTESTED, "all: an ordinary Qwen3"),
            ),
        ),
        Format(
            name="compressed_tensors",
            what="packed codes, or signed bytes with 8-bit activations",
            bits=(2, 3, 4, 5, 6, 7, 8),
            symmetry="both; with activations symmetric",
            layout=_compressed_layout,
            implementation="q3q.export.compressed_tensors:CompressedTensorsExporter",
            mixed=True,
            acts=((8, 8),),
            loaders=(
                (
                    "transformers + compressed-tensors",
                    TESTED,
                    "dense: all, asymmetric ones with `dequantize=True`; experts: symmetric, weights only",
                ),
                ("a plain unpacker of ours", TESTED, "all"),
                (
                    "vLLM, SGLang",
                    UNTESTED,
                    f"dense: {_in_words(SERVED_COMPRESSED)}; experts: {_in_words(SERVED_SYMMETRIC)}; 8 bits with "
                    "8-bit activations",
                ),
            ),
            served=SERVED_COMPRESSED,
            served_experts=SERVED_SYMMETRIC,
        ),
        Format(
            name="gptq",
            what="GPTQModel's and AutoGPTQ's words",
            bits=(2, 3, 4, 8),
            symmetry="both (asymmetric as `gptq_v2`)",
            layout=_gptq_layout,
            implementation="q3q.export.gptq:GptqExporter",
            act_order=True,
            words_per_row=True,
            words_per_column=True,
            loaders=(
                ("a plain unpacker of ours", TESTED, "all"),
                ("GPTQModel", GPTQMODEL, f"on CPU, `group_size` {_listed(GPTQMODEL_GROUPS)}"),
                (
                    "vLLM, SGLang",
                    UNTESTED,
                    f"{_in_words(SERVED_SYMMETRIC)}; asymmetric ones are refused or misread",
                ),
            ),
            served=SERVED_SYMMETRIC,
            served_experts=SERVED_SYMMETRIC,
        ),
        Format(
            name="awq",
            what="AutoAWQ's `gemm` words",
            bits=(4,),
            symmetry="both (symmetric zero points are written out)",
            layout=_awq_layout,
            implementation="q3q.export.awq:AwqExporter",
            words_per_column=True,
            loaders=(
                ("a plain unpacker of ours", TESTED, "all"),
                ("GPTQModel", GPTQMODEL, f"on CPU, `group_size` {_listed(GPTQMODEL_AWQ_GROUPS)}"),
                ("vLLM, SGLang", UNTESTED, _in_words(SERVED_EITHER)),
            ),
            served=SERVED_EITHER,
            served_experts=SERVED_EITHER,
        ),
    )
}


def schemes_of(spec: TrialSpec, facts: ModelFacts) -> list[Scheme]:
    """Every setting that some linear has, once."""
    schemes = spec.schemes
    assert schemes is not None
    linears = (
        f"blocks.{k}.{name.removesuffix('.weight')}"
        for k in range(facts.layers)
        for name in facts.block_shapes(k)
        if name.endswith("_proj.weight")
    )
    return list(dict.fromkeys(one for linear in linears if (one := schemes.of(linear)) is not None))


def _torn_sites(spec: TrialSpec, facts: ModelFacts) -> Iterator[str]:
    schemes = spec.schemes
    assert schemes is not None
    for k in range(facts.layers):
        for site, linears in JOINED.items():
            if len({schemes.of(f"blocks.{k}.{linear}") for linear in linears}) > 1:
                yield f"blocks.{k}.{site}"


def _told_apart(schemes: Sequence[Scheme]) -> bool:
    """Whether transformers reads each linear of a dense model by its own setting."""
    symmetric, rounded = (
        all(one.symmetric for one in schemes),
        any(one.act_bits is not None for one in schemes),
    )
    return transformers_takes(
        experts=False, settings=len(schemes), symmetric=symmetric, rounded=rounded
    )


def _reorders(spec: TrialSpec, schemes: Sequence[Scheme]) -> bool:
    """Whether columns that share a scale may lie apart: GPTQ's act-order, unless groups are fixed beforehand."""
    apart = spec.method.get("act_order", False) and not spec.method.get("static_groups", False)
    return apart and any(one.group_size != -1 for one in schemes)


def refuse_what_it_cannot_hold(name: str, spec: TrialSpec, facts: ModelFacts) -> None:
    """Raises IncompatibleError with every reason, and names the formats that can hold what the trial makes."""
    if spec.scheme is None:
        raise IncompatibleError(
            f"method={spec.method['name']} changes nothing, so export={name} has no use: "
            "the model is its own checkpoint"
        )
    reasons = list(FORMATS[name].problems(spec, facts))
    if not reasons:
        return
    able = [other.name for other in FORMATS.values() if not list(other.problems(spec, facts))]
    instead = f"these can: export={', '.join(able)}" if able else "no format can"
    raise IncompatibleError(f"export={name} cannot hold {'; nor '.join(reasons)}; {instead}")


def not_for_servers(name: str, spec: TrialSpec, facts: ModelFacts) -> str | None:
    """In a line, that vLLM does not serve the trial's export, and what it would; None if it does."""
    reason = FORMATS[name].unserved(spec, facts)
    if reason is None:
        return None
    able = [
        one.name
        for one in FORMATS.values()
        if not list(one.problems(spec, facts)) and not one.unserved(spec, facts)
    ]
    what = f"with {reason}" + (
        ", which is gptq_v2," if name == "gptq" and "symmetric=false" in reason else ""
    )
    return (
        f"export={name} {what} is refused by vLLM, or misread by old ones; to serve these settings: "
        f"export={' or '.join(able)}"
    )


def needs_unpacking(spec: TrialSpec, facts: ModelFacts) -> bool:
    """Whether transformers reads the trial's export, but only with `dequantize=True`."""
    symmetric = all(one.symmetric for one in schemes_of(spec, facts))
    return spec.export == "compressed_tensors" and not facts.experts and not symmetric


def stored_scales(name: str, dtype: str) -> str | None:
    """Types that scales are rounded to before anything is measured, in turn: the format's, and what it runs in.

    The GPTQ and AWQ formats store float16, and a bfloat16 model's loaders make bfloat16 of it.
    """
    if name == "hf":
        return None
    own = dtype if dtype in ("float16", "bfloat16") else "float16"
    return own if name == "compressed_tensors" or own == "float16" else f"{own} float16"


def layouts(
    spec: TrialSpec, facts: ModelFacts
) -> Iterator[tuple[str, tuple[int, ...], Layout | None]]:
    """Every tensor of the exported model by its name on disk: its shape as numbers, and its layout (None: as they are).

    Names end in `.weight`.
    """
    schemes = spec.schemes
    assert spec.export is not None
    assert schemes is not None
    make = FORMATS[spec.export].layout
    yield "model.embed_tokens.weight", (facts.vocab, facts.hidden), None
    for k in range(facts.layers):
        for name, shape in disk_shapes(facts, k).items():
            layout = None
            if make is not None and name.endswith("_proj.weight"):
                scheme = schemes.of(f"blocks.{k}.{without_expert(name).removesuffix('.weight')}")
                layout = None if scheme is None else make(scheme)
            yield f"model.layers.{k}.{name}", shape, layout
    yield "model.norm.weight", (facts.hidden,), None
    if not facts.tied:
        yield "lm_head.weight", (facts.vocab, facts.hidden), None


def without_expert(name: str) -> str:
    """`mlp.experts.3.up_proj.weight` as a block has it, `mlp.experts.up_proj.weight`."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def tensor_bytes(shape: tuple[int, ...], layout: Layout | None, dtype: str) -> int:
    """Bytes of one weight on disk, whatever tensors it takes."""
    own = DTYPE_BYTES.get(dtype, 2)
    if layout is None:
        return math.prod(shape) * own
    scale = own if layout.own_scales else SCALE_BYTES
    return sum(
        math.prod(part) * (scale if "F16" in types else ITEM_BYTES[types[0]])
        for types, part in layout.parts(*shape).values()
    )


def expected_bytes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Bytes of all tensors of the export, as the format's definition says."""
    dtype = spec.model["dtype"]
    return sum(tensor_bytes(shape, layout, dtype) for _, shape, layout in layouts(spec, facts))


def table() -> str:
    """The table of docs/EXPORT.md."""
    lines = [
        "| `export=` | what is stored | bits | symmetry | activations | act-order | mixed | experts | loaders |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in FORMATS.values():
        acts = ", ".join(f"W{w}A{a}, one scale a row" for w, a in one.acts) or "no"
        mixed = "yes" if one.anything else "dense models, symmetric" if one.mixed else "no"
        loaders = "; ".join(f"{who} ({seen}): {what}" for who, seen, what in one.loaders)
        cells = (
            f"`{one.name}`",
            one.what,
            "all, and BiLLM's" if one.anything else _listed(one.bits),
            one.symmetry,
            acts,
            _yes(one.act_order or one.anything),
            mixed,
            "yes, one set of tensors an expert",
            loaders,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _yes(able: bool) -> str:
    return "yes" if able else "no"

"""The export formats as data: what each can hold, and which programs load it. Imports no torch.

Both the refusal of what a format cannot hold and the table in docs/EXPORT.md come from here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from q3q.errors import IncompatibleError
from q3q.export.gguf_layout import TAKES, layout_of, model_problems, type_of
from q3q.export.layouts import compressed_layout, gptq_layout
from q3q.models.facts import ModelFacts
from q3q.models.packed import AwqWords, Layout
from q3q.number_formats import FLOATS, GGUF, INT
from q3q.spec import Scheme, TrialSpec

TESTED, UNTESTED = "tested", "untested"
GPTQMODEL = "tested by benchmarks/export.py"
# Packed whole numbers that vLLM's kernels take, by its sources: group sizes, and (bits, symmetric)
# pairs. Only Hopper's kernel takes zero points of 8 bits.
SERVED_GROUPS = (-1, 32, 64, 128)
SERVED_SYMMETRIC = ((4, True), (8, True))
SERVED_EITHER = ((4, True), (4, False))
SERVED_COMPRESSED = ((4, False), *((bits, True) for bits in range(2, 9)))
# Of these floats it takes the activations that the library's presets round beside them.
SERVED_FLOATS = ("fp8_e4m3", "mxfp8", "mxfp4", "nvfp4")
# Group sizes that GPTQModel's CPU kernels take, by its sources.
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
GPTQMODEL_AWQ_GROUPS = (-1, 16, 32, 64, 128)
Pairs = tuple[tuple[int, bool], ...]


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def in_words(pairs: Pairs) -> str:
    """Format (bits, symmetric) pairs: `4 bits, 8 bits symmetric`, `2 to 8 bits symmetric`."""
    widths = sorted({bits for bits, _ in pairs})
    either = [bits for bits in widths if (bits, False) in pairs]
    if len(widths) > 2 and widths == list(range(widths[0], widths[-1] + 1)):
        words = [f"{bits} bits" for bits in either]
        return ", ".join([*words, f"{widths[0]} to {widths[-1]} bits symmetric"])
    return ", ".join(f"{b} bits" + ("" if b in either else " symmetric") for b in widths)


@dataclass(frozen=True)
class Format:
    """One format: what it can hold, and which programs load what of it."""

    name: str
    content: str  # for people
    bits: tuple[int, ...]
    symmetry: str  # for people: every format takes both kinds
    layout: Callable[[Scheme], Layout] | None  # one linear's; None for plain numbers
    implementation: str  # `module:Class`
    # (program, tested by us or untested and by its sources alone, what it loads)
    loaders: tuple[tuple[str, str, str], ...]
    act_order: bool = False  # a group index for each column
    mixed: bool = False  # settings that differ between linears, in a dense model
    gaps: bool = False  # whole linears left in 16 bits, but no single experts
    # (weight bits, bits of dynamic per-token activations) held together, one symmetric scale a row
    acts: tuple[tuple[int, int], ...] = ()
    anything: bool = False  # plain numbers: any method's weights
    words_per_row: bool = False  # rows must fill whole 32-bit words
    words_per_column: bool = False  # columns must fill whole 32-bit words
    # Other formats of codes than int, and for each the activations held beside it: format, and
    # channels that share a scale.
    floats: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    # (bits, symmetric) that vLLM takes without rounded activations, of dense and of expert models
    served: Pairs = ()
    served_experts: Pairs = ()
    own_server: bool = False  # it is for a server of its own, not for vLLM

    ALL_BITS: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)

    def problems(
        self, spec: TrialSpec, facts: ModelFacts, *, whole_zeros: bool = True
    ) -> Iterator[str]:
        """Yield the reasons why this format cannot hold the trial's weights, a few words each.

        Args:
            whole_zeros: the method's zero points are codes; else only plain numbers can hold them.
        """
        schemes = schemes_of(spec, facts)
        yield from dict.fromkeys(filter(None, map(self._activation_problem, schemes)))
        if not self.anything:
            yield from self._code_problems(spec, schemes, facts)
            if (
                not whole_zeros
                and not self.own_server
                and not all(scheme.symmetric for scheme in schemes)
            ):
                yield f"{spec.method.name}'s zero points, which are not whole numbers"

    def _code_problems(
        self, spec: TrialSpec, schemes: Sequence[Scheme], facts: ModelFacts
    ) -> Iterator[str]:
        if floats := {scheme.format for scheme in schemes} - {INT, *self.floats}:
            able = ", ".join((INT, *self.floats))
            yield f"format={','.join(sorted(floats))} (it takes {able})"
            return
        if shared := {_sharing(scheme) for scheme in schemes if not _has_strategy(scheme)}:
            yield (
                f"{' and '.join(sorted(shared))} (it takes a scale for each row, group of columns, "
                "block or linear)"
            )
        whole = [scheme for scheme in schemes if scheme.format == INT]
        other_bits = sorted({scheme.bits for scheme in whole} - set(self.bits))
        if other_bits == [1]:
            yield "binarized weights, for which there is no standard"
        elif other_bits:
            yield f"bits={','.join(map(str, other_bits))} (it takes {listed(self.bits)})"
        elif not self._fills_words(spec, facts):
            yield "weights whose rows or columns do not fill whole 32-bit words"
        if spec.head_bits or spec.embedding_bits:
            yield "a quantized head or embedding"
        if not self.act_order and _reorders(spec, schemes):
            yield (
                "act-order's groups of columns that lie apart "
                "(method.static_groups=true keeps neighbours together)"
            )
        if self._mixes(spec, facts):
            where = " in a model with experts, which loaders fuse" if self.mixed else ""
            yield (
                f"overrides{where}" if self.gaps and spec.overrides else f"overrides or skip{where}"
            )
            return
        if site := _uneven_site(spec, facts):
            yield f"settings that differ within a site ({site}), which loaders run as one"
        if self.mixed and len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
            yield (
                "several settings when any is asymmetric "
                "(transformers then reads all linears by one of them)"
            )

    def _mixes(self, spec: TrialSpec, facts: ModelFacts) -> bool:
        """Return True if linears have settings of their own that the format has no place for."""
        of_experts = any(".mlp.experts." in name for name in spec.skip)
        if not self.mixed:
            return bool(spec.overrides) or (bool(spec.skip) and not self.gaps) or of_experts
        return bool(facts.experts and (spec.overrides or of_experts))

    def _fills_words(self, spec: TrialSpec, facts: ModelFacts) -> bool:
        schemes = spec.schemes
        assert schemes is not None
        packed = {
            (shapes[name][-2:], scheme.bits)
            for k in range(facts.layers)
            for shapes in [facts.block_shapes(k)]
            for name in facts.linears(k)
            if (scheme := schemes.of(f"blocks.{k}.{name.removesuffix('.weight')}")) is not None
        }
        return not any(
            (self.words_per_row and columns * bits % 32)
            or (self.words_per_column and rows * bits % 32)
            for (rows, columns), bits in packed
        )

    def _activation_problem(self, scheme: Scheme) -> str | None:
        """Return in a few words why the format has no place for a linear's rounded input."""
        if scheme.act_bits is None or self._holds_activations(scheme):
            return None
        act = FLOATS.get(scheme.act_format)
        if act is not None and act.scale == "e4m3" and not scheme.calibrates_inputs:
            return (
                f"act_format={act.name} with a factor per token (servers take it from calibration: "
                "act_scales=calibrated)"
            )
        if scheme.format != INT:
            acts = self.floats.get(scheme.format, ())
            able = " or ".join(activations(*act) for act in acts)
            hint = f" (it takes {able})" if able else ""
            own = activations(scheme.act_format, scheme.act_group_size, scheme.act_bits)
            return f"{own} with format={scheme.format}{hint}"
        if scheme.act_format != INT:
            return f"act_format={scheme.act_format}" + (" with format=int" if self.floats else "")
        if scheme.act_group_size != -1:
            return f"act_group_size={scheme.act_group_size} (it takes a scale per token)"
        able = " or ".join(
            f"bits={w} act_bits={a} group_size=-1 symmetric=true" for w, a in self.acts
        )
        hint = f" (it takes {able})" if able else ""
        return f"act_bits={scheme.act_bits} with these weights{hint}"

    def _holds_activations(self, scheme: Scheme) -> bool:
        if scheme.format != INT:
            own = scheme.act_format, scheme.act_group_size
            act = FLOATS.get(scheme.act_format)
            below = act is not None and act.scale == "e4m3"  # servers calibrate their factor
            return own in self.floats.get(scheme.format, ()) and below == scheme.calibrates_inputs
        one_scale = scheme.symmetric and scheme.group_size == -1
        per_token = scheme.act_format == INT and scheme.act_group_size == -1
        return one_scale and per_token and (scheme.bits, scheme.act_bits) in self.acts


def activations(form: str, size: int, bits: int | None = None) -> str:
    """Name rounded activations as they are asked for, without a format's own group size."""
    if form == INT:
        return f"act_bits={bits}" + ("" if size == -1 else f" act_group_size={size}")
    own = FLOATS[form].group_size is not None or size == -1
    factor = " act_scales=calibrated" if FLOATS[form].scale == "e4m3" else ""
    return f"act_format={form}" + ("" if own else f" act_group_size={size}") + factor


def _has_strategy(scheme: Scheme) -> bool:
    """Return True if compressed-tensors has a word for what shares a scale."""
    if scheme.group_rows == 1:
        return True
    return (scheme.group_rows == -1) == (scheme.group_size == -1)


def _sharing(scheme: Scheme) -> str:
    return f"group_rows={scheme.group_rows} with group_size={scheme.group_size}"


@dataclass(frozen=True)
class GgufFormat(Format):
    """GGUF: what its types hold, of the models that llama.cpp runs."""

    def _code_problems(
        self, spec: TrialSpec, schemes: Sequence[Scheme], facts: ModelFacts
    ) -> Iterator[str]:
        yield from model_problems(facts)
        for scheme in schemes:
            if type_of(scheme) is None:
                kind = "symmetric" if scheme.symmetric else "asymmetric"
                asked = f"format={scheme.format}"
                if scheme.format == INT:
                    asked = f"{kind} bits={scheme.bits} group_size={scheme.group_size}"
                yield f"{asked} (it takes {TAKES})"
        if spec.head_bits or spec.embedding_bits:
            yield "a quantized head or embedding"
        if _reorders(spec, [scheme for scheme in schemes if not scheme.own_groups]):
            yield (
                "act-order's groups of columns that lie apart "
                "(method.static_groups=true keeps neighbours together)"
            )


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            name="hf",
            content="numbers in the model's own dtype",
            bits=Format.ALL_BITS,
            symmetry="both",
            layout=None,
            implementation="q3q.export.hf:HfExporter",
            mixed=True,
            anything=True,
            loaders=(
                ("transformers", TESTED, "all"),
                ("vLLM, SGLang", UNTESTED, "all: an ordinary model"),
            ),
        ),
        Format(
            name="compressed_tensors",
            content="packed codes, or bytes: of FP8, and of 8 bits with 8-bit activations",
            bits=(2, 3, 4, 5, 6, 7, 8),
            symmetry="both; with activations symmetric",
            layout=compressed_layout,
            implementation="q3q.export.compressed_tensors:CompressedTensorsExporter",
            mixed=True,
            acts=((8, 8),),
            floats={
                "fp8_e4m3": (("fp8_e4m3", -1), ("fp8_e4m3", 128)),
                "mxfp8": (("mxfp8", 32),),
                "mxfp6": (("mxfp8", 32),),
                "mxfp4": (("mxfp4", 32), ("fp8_e4m3", 128)),
                "nvfp4": (("nvfp4", 16),),
            },
            loaders=(
                (
                    "transformers + compressed-tensors",
                    TESTED,
                    "dense: all, with `dequantize=True` those that are asymmetric and, unless the "
                    "model is bfloat16, MX and NVFP4; experts: int symmetric, weights only, and "
                    "`fp8_e4m3` with one scale per row or linear",
                ),
                ("q3q's own plain unpacker", TESTED, "all"),
                (
                    "vLLM, SGLang",
                    UNTESTED,
                    f"vLLM: dense: {in_words(SERVED_COMPRESSED)}; experts: "
                    f"{in_words(SERVED_SYMMETRIC)}; 8 bits with 8-bit activations; "
                    f"{', '.join(f'`{name}`' for name in SERVED_FLOATS)}. "
                    "SGLang: 4 and 8 bits, `fp8_e4m3`, `nvfp4` with activations",
                ),
            ),
            served=SERVED_COMPRESSED,
            served_experts=SERVED_SYMMETRIC,
        ),
        Format(
            name="gptq",
            content="GPTQModel's and AutoGPTQ's words",
            bits=(2, 3, 4, 8),
            symmetry="both (asymmetric as `gptq_v2`)",
            layout=gptq_layout,
            implementation="q3q.export.gptq:GptqExporter",
            act_order=True,
            gaps=True,
            words_per_row=True,
            words_per_column=True,
            loaders=(
                ("q3q's own plain unpacker", TESTED, "all"),
                ("GPTQModel", GPTQMODEL, f"on CPU, `group_size` {listed(GPTQMODEL_GROUPS)}"),
                (
                    "vLLM, SGLang",
                    UNTESTED,
                    f"{in_words(SERVED_SYMMETRIC)}; asymmetric ones are refused or misread",
                ),
            ),
            served=SERVED_SYMMETRIC,
            served_experts=SERVED_SYMMETRIC,
        ),
        Format(
            name="awq",
            content="AutoAWQ's `gemm` words",
            bits=(4,),
            symmetry="both (symmetric zero points are written out)",
            layout=lambda scheme: AwqWords(scheme.bits, scheme.group_size, False),
            implementation="q3q.export.awq:AwqExporter",
            gaps=True,
            words_per_column=True,
            loaders=(
                ("q3q's own plain unpacker", TESTED, "all"),
                ("GPTQModel", GPTQMODEL, f"on CPU, `group_size` {listed(GPTQMODEL_AWQ_GROUPS)}"),
                ("vLLM, SGLang", UNTESTED, in_words(SERVED_EITHER)),
            ),
            served=SERVED_EITHER,
            served_experts=SERVED_EITHER,
        ),
        GgufFormat(
            name="gguf",
            content="llama.cpp's blocks, in one file with the tokenizer",
            bits=(2, 3, 4, 5, 6, 8),
            symmetry="both (zero points become offsets of float16)",
            layout=layout_of,
            implementation="q3q.export.gguf:GgufExporter",
            mixed=True,
            own_server=True,
            loaders=(
                ("the `gguf` package, run by transformers", TESTED, "all"),
                ("llama.cpp", "tested where `make llama` has built it", "all, on CPU"),
            ),
        ),
    )
}


def schemes_of(spec: TrialSpec, facts: ModelFacts) -> list[Scheme]:
    """Return the distinct settings of the linears."""
    schemes = spec.schemes
    assert schemes is not None
    settings = (
        schemes.of(f"blocks.{k}.{name.removesuffix('.weight')}")
        for k in range(facts.layers)
        for name in facts.linears(k)
    )
    return list(dict.fromkeys(scheme for scheme in settings if scheme is not None))


def _uneven_site(spec: TrialSpec, facts: ModelFacts) -> str | None:
    """Return the first site whose linears, which servers run as one, have several settings."""
    schemes = spec.schemes
    assert schemes is not None
    for k in range(facts.layers):
        for site in facts.sites(k):
            # Servers run what may stay apart as a linear of its own.
            names = [n.removesuffix(".weight") for n in site.weights if n not in site.apart]
            if len({schemes.of(f"blocks.{k}.{name}") for name in names}) > 1:
                return f"blocks.{k}.{site.name}"
    return None


def _reorders(spec: TrialSpec, schemes: Sequence[Scheme]) -> bool:
    """Return True if columns that share a scale may lie apart: act-order without fixed groups."""
    knobs = spec.method.knobs
    apart = knobs.get("act_order", False) and not knobs.get("static_groups", False)
    return apart and any(
        scheme.group_size != -1 and not scheme.own_groups and scheme.group_rows == 1
        for scheme in schemes
    )


def refuse_unsupported(
    name: str, spec: TrialSpec, facts: ModelFacts, *, whole_zeros: bool = True
) -> None:
    """Raise IncompatibleError if the format cannot hold the trial's weights.

    The message gives every reason, and the formats that can.

    Args:
        whole_zeros: as of `Format.problems`.
    """
    if spec.scheme is None:
        raise IncompatibleError(
            f"method={spec.method.name} changes nothing, so export={name} has no effect: "
            "the model is its own checkpoint"
        )
    able = [
        form.name
        for form in FORMATS.values()
        if not list(form.problems(spec, facts, whole_zeros=whole_zeros))
    ]
    if name in able:
        return
    reasons = FORMATS[name].problems(spec, facts, whole_zeros=whole_zeros)
    instead = f"these can: export={', '.join(able)}" if able else "no format can"
    raise IncompatibleError(f"export={name} cannot hold {'; nor '.join(reasons)}; {instead}")


def format_of_choice(spec: TrialSpec) -> str | None:
    """Return the first format of packed codes that a trial's settings alone allow, else `hf`.

    None if no format holds its activations. The model's shapes may still forbid the format: whoever
    exports is told so.
    """
    scheme = spec.scheme
    if scheme is None:
        return None
    ends = spec.head_bits or spec.embedding_bits
    for form in (FORMATS[name] for name in ("compressed_tensors", "gptq", "hf")):
        acts = scheme.act_bits is None or form._holds_activations(scheme)
        codes = scheme.bits in form.bits
        if scheme.format != INT:
            codes = scheme.format in form.floats and _has_strategy(scheme)
        mixed = form.mixed or not (spec.overrides or spec.skip)
        # A budget mixes widths, and transformers reads asymmetric ones by one of them.
        mixed = mixed and (scheme.symmetric or spec.budget is None)
        ordered = form.act_order or not _reorders(spec, [scheme])
        if acts and (form.anything or (codes and not ends and mixed and ordered)):
            return form.name
    return None


def stored_scales(name: str, dtype: str, form: str = INT) -> str | None:
    """Return the types that scales are rounded to, in turn, before anything is measured.

    GGUF's own types have scales that are as they are stored.

    They are the type in which the model runs and the format's. The GPTQ and AWQ formats store
    float16, which a bfloat16 model's loaders convert to bfloat16.
    """
    if name == "hf":
        return None
    if name == "gguf":
        return GGUF if form == INT else None
    own = dtype if dtype in ("float16", "bfloat16") else "float16"
    return own if name == "compressed_tensors" or own == "float16" else f"{own} float16"

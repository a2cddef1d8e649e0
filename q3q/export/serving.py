"""What vLLM and transformers make of an export, in words for plans and model cards. Without torch.

docs/EXPORT.md says when their sources were last read.
"""

from q3q.export.formats import (
    FORMATS,
    SERVED_FLOATS,
    SERVED_GROUPS,
    Format,
    in_words,
    listed,
    schemes_of,
)
from q3q.export.layouts import group_of
from q3q.export.reload.configs import AS_IT_IS, UNPACKED, reading_of
from q3q.kv_scheme import FIXED, KvScheme
from q3q.models.facts import ModelFacts
from q3q.number_formats import INT
from q3q.spec import Scheme, TrialSpec


def unserved(form: Format, spec: TrialSpec, facts: ModelFacts) -> str | None:
    """Return in a few words which setting vLLM rejects; None if it takes the export."""
    if form.anything or form.own_server:
        return None
    reasons = (
        _unserved(form, scheme, facts) if scheme.format == INT else _unserved_float(scheme)
        for scheme in schemes_of(spec, facts)
    )
    return next((reason for reason in reasons if reason), None)


def _unserved(form: Format, scheme: Scheme, facts: ModelFacts) -> str | None:
    if scheme.act_bits is not None:  # vLLM takes all of these that the format can hold
        return None
    pairs = form.served_experts if facts.experts else form.served
    if all(bits != scheme.bits for bits, _ in pairs):
        return f"bits={scheme.bits} (it takes {in_words(pairs)})"
    if scheme.group_size not in SERVED_GROUPS:
        return f"group_size={scheme.group_size} (it takes {listed(SERVED_GROUPS)})"
    if (scheme.bits, scheme.symmetric) not in pairs:
        if any(not symmetric for _, symmetric in pairs):
            return f"symmetric=false and bits={scheme.bits} (it takes {in_words(pairs)})"
        return "symmetric=false" + (" of experts" if pairs != form.served else "")
    return None


def _unserved_float(scheme: Scheme) -> str | None:
    if scheme.format not in SERVED_FLOATS:
        return f"format={scheme.format} (it takes {', '.join(SERVED_FLOATS)})"
    if scheme.format == "mxfp8" and scheme.act_bits is None:
        return "format=mxfp8 and activations that are not rounded (it rounds them)"
    if scheme.format == "fp8_e4m3" and scheme.groups not in ("pc", "pt", "128x128"):
        return f"group_size={scheme.group_size} (of FP8 it takes rows, linears and 128 x 128)"
    return None


def serving_notice(name: str, spec: TrialSpec, facts: ModelFacts) -> str | None:
    """Return a line for an export that vLLM rejects, naming those it takes; None if it takes it."""
    reason = unserved(FORMATS[name], spec, facts)
    if reason is None:
        return None
    v2 = ", which is gptq_v2," if name == "gptq" and "symmetric=false" in reason else ""
    able = servable(spec, facts)
    instead = f"to serve these settings: export={' or '.join(able)}" if able else "nor is another"
    return (
        f"export={name} with {reason}{v2} is refused by vLLM, or misread by old versions; {instead}"
    )


def servable(spec: TrialSpec, facts: ModelFacts) -> list[str]:
    """Return the formats that can hold the trial's weights and that vLLM then takes."""
    return [
        form.name
        for form in FORMATS.values()
        if not form.own_server
        and not list(form.problems(spec, facts))
        and not unserved(form, spec, facts)
    ]


def loading_notice(spec: TrialSpec, facts: ModelFacts) -> str | None:
    """Return a line for an export that transformers loads only with extra arguments."""
    if needs_unpacking(spec, facts):
        whole = all(scheme.format == INT for scheme in schemes_of(spec, facts))
        what = "symmetric=false" if whole else f"these formats in {spec.model.dtype}"
        other = "with symmetric=true" if whole else "in bfloat16"
        return (
            f"export=compressed_tensors with {what} loads in transformers only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True), as its model card "
            f"shows; {other} it loads without"
        )
    if not read_by_transformers(spec, facts):
        return f"export={spec.export} {_unread(spec, facts)}; its model card says what does"
    return None


def kv_notice(name: str, spec: TrialSpec) -> str | None:
    """Return a line for a trial that rounds its cache, which files do not say; None for others."""
    if spec.kv is None or (name == "compressed_tensors" and holds_cache(spec.kv)):
        return None
    return (
        f"export={name} holds the weights, not how the cache is stored ({spec.kv.name}): that is "
        "chosen where the model is served; export=compressed_tensors says it of "
        "kv_format=fp8_e4m3 kv_scales=fixed"
    )


def holds_cache(kv: KvScheme) -> bool:
    """Return True if compressed-tensors' config says how this cache is stored."""
    return (kv.format, kv.scales, kv.window) == ("fp8_e4m3", FIXED, 0)


def read_by_transformers(spec: TrialSpec, facts: ModelFacts) -> bool:
    """Return True if transformers reads the trial's export, with the packages of its format."""
    return _reading(spec, facts) is not None


def needs_unpacking(spec: TrialSpec, facts: ModelFacts) -> bool:
    """Return True if transformers needs `dequantize=True` to read the trial's export."""
    return _reading(spec, facts) == UNPACKED


def why_unread(spec: TrialSpec, facts: ModelFacts) -> str:
    """Return a sentence on why transformers does not read the export."""
    if not facts.experts:
        return (
            f"transformers unpacks MX formats and NVFP4 to bfloat16, which {spec.model.dtype} "
            "models cannot mix with other settings."
        )
    if all(scheme.format == INT for scheme in schemes_of(spec, facts)):
        return (
            "transformers fuses experts, so it cannot read their asymmetric weights or rounded "
            "activations from `compressed_tensors`."
        )
    return (
        "transformers fuses experts, and of their floats it reads only FP8 with one scale per row "
        "or linear from `compressed_tensors`: MX formats and NVFP4 it may misread without an error."
    )


def _unread(spec: TrialSpec, facts: ModelFacts) -> str:
    if not facts.experts:
        return f"of several formats in {spec.model.dtype} does not load in transformers"
    if all(scheme.format == INT for scheme in schemes_of(spec, facts)):
        return (
            "of experts with symmetric=false or rounded activations does not load in transformers"
        )
    return "of experts in these formats does not load in transformers"


def _reading(spec: TrialSpec, facts: ModelFacts) -> str | None:
    if spec.export != "compressed_tensors":
        return AS_IT_IS
    make = FORMATS[spec.export].layout
    assert make is not None
    groups = [group_of(make(scheme)) for scheme in schemes_of(spec, facts)]
    return reading_of(groups, experts=bool(facts.experts), dtype=spec.model.dtype)

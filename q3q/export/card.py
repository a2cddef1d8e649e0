"""The model card of an exported checkpoint: what it is, how it was made, what was measured, whose licence it has."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from q3q.export.formats import FORMATS, needs_unpacking
from q3q.export.proof import Proof
from q3q.masking import masked
from q3q.models.facts import ModelFacts
from q3q.spec import Json, TrialSpec

_FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^license\w*:.*(?:\n[ \t-].*)*", re.MULTILINE)
# How transformers loads asymmetric packed weights: left alone, it has no room for their zero points, and refuses.
_UNPACKED = [
    "```python",
    "from transformers import AutoModelForCausalLM, CompressedTensorsConfig",
    "",
    "how = CompressedTensorsConfig(dequantize=True)",
    'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", quantization_config=how)',
    "```",
    "",
]


def model_card(
    spec: TrialSpec,
    facts: ModelFacts,
    proof: Proof,
    *,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    diverged: Collection[str],
    packages: Mapping[str, str],
    base: Path,
) -> str:
    """Markdown with the front matter that the Hub reads.

    diverged: metrics that are not finite. base: folder of the original model, whose licence lines are taken over.
    """
    scheme = spec.scheme
    assert scheme is not None
    assert spec.export is not None
    source = spec.model.get("source")
    front = licence_lines(base) or ["license: unknown"]
    front += [f"base_model: {source}", "base_model_relation: quantized"] if source else []
    rows = {
        name: f"{value:.6g} | {_interval(intervals.get(name))}" for name, value in metrics.items()
    }
    rows |= dict.fromkeys(diverged, "diverged: not a finite number |")
    measured = [
        f"| {name} | {row} |"
        for name, row in sorted(rows.items())
        if "/" in name and not name.startswith(("seconds/", "peak_bytes/", "gpu_peak_bytes/"))
    ]
    group = "whole rows" if scheme.group_size == -1 else f"groups of {scheme.group_size} columns"
    acts = f", activations of {scheme.act_bits} bits per token" if scheme.act_bits else ""
    departures = _departures(spec)
    compared = "the same weights, bit for bit"
    compared += (
        ", and the same logits" if proof.logit_error is not None else "; logits were not compared"
    )
    lines = [
        "---",
        *front,
        "tags: [quantized, q3q]",
        "---",
        "",
        f"# {spec.model['name']}, {spec.name}",
        "",
        f"{source or spec.model['name']} quantized by q3q: `{spec.method['name']}`, {scheme.bits} bits, {group}, "
        f"{'symmetric' if scheme.symmetric else 'asymmetric'}{acts}. Stored as `{spec.export}`: "
        f"{FORMATS[spec.export].what}. Embeddings, head, norms and routers stay in {spec.model['dtype']}"
        f"{'; what differs is said below' if departures else ''}.",
        "",
        "## How it was made",
        "",
        f"- method: `{json.dumps(spec.method)}`",
        *(f"- {key}: `{json.dumps(value)}`" for key, value in departures.items()),
        f"- calibration: `{json.dumps(spec.calibration)}`"
        if spec.calibration
        else "- calibration: none",
        f"- arithmetic: {spec.model['dtype']}; scales are stored in, and were rounded to, {scheme.scales or 'none'}",
        f"- trial `{spec.id}`, seed {spec.seed}, "
        + ", ".join(
            f"{name} {packages[name]}"
            for name in ("q3q", "torch", "transformers")
            if name in packages
        ),
        "",
        "```bash",
        masked(spec.places["command"]),
        "```",
        "",
        "## What was measured",
        "",
        "| metric | value | 95 % interval |",
        "|---|---|---|",
        *(measured or ["| none | | |"]),
        "",
        f"Reloaded by {proof.loader} in a process without q3q: {compared}.",
        "",
        *_serving(spec, facts),
    ]
    return "\n".join(lines)


def licence_lines(base: Path) -> list[str]:
    """`license...` of the original model card's front matter, each with the lines that go on with it; none if it has no
    card, or says nothing there."""
    try:
        front = _FRONT.match((base / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []
    found = _LICENCE.findall(front[1]) if front else []
    return [
        line for entry in found for line in entry.splitlines() if entry.partition(":")[2].strip()
    ]


def _departures(spec: TrialSpec) -> Json:
    """What is stored otherwise than the scheme says, as it was given."""
    given: Json = {
        "overrides": spec.rules.get("overrides", spec.overrides),
        "skip": spec.rules.get("skip", list(spec.skip)),
        "head_bits": spec.head_bits,
        "embedding_bits": spec.embedding_bits,
    }
    return {key: value for key, value in given.items() if value}


def _serving(spec: TrialSpec, facts: ModelFacts) -> list[str]:
    assert spec.export is not None
    kind = FORMATS[spec.export]
    if (reason := kind.unserved(spec, facts)) is not None:
        loaders = [f"- {who}: {what}" for who, _, what in kind.loaders if "vLLM" not in who]
        unpacked = _UNPACKED if needs_unpacking(spec, facts) else []
        told = f"vLLM does not take `{spec.export}` with {reason}. Who does:"
        return ["## Load it", "", told, "", *loaders, "", *unpacked]
    return [
        "## Serve it",
        "",
        "```bash",
        "pip install vllm",
        "vllm serve . # this folder",
        "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
        """-d '{"model": ".", "prompt": "Hello"}'""",
        "```",
        "",
    ]


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.6g} to {interval[1]:.6g}"

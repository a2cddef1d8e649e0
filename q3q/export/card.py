"""The model card of an exported checkpoint: its origin, making, measurements and licence."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from q3q.export.formats import FORMATS, needs_unpacking
from q3q.export.proof import Proof
from q3q.masking import masked
from q3q.models.facts import ModelFacts
from q3q.placement import Trial
from q3q.spec import Json, TrialSpec

_FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^license\w*:.*(?:\n[ \t-].*)*", re.MULTILINE)
# How transformers loads asymmetric packed weights; by default it refuses their zero points.
_UNPACKED = [
    "```python",
    "from transformers import AutoModelForCausalLM, CompressedTensorsConfig",
    "",
    "config = CompressedTensorsConfig(dequantize=True)",
    'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", quantization_config=config)',
    "```",
    "",
]


def model_card(
    trial: Trial,
    facts: ModelFacts,
    proof: Proof,
    *,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    diverged: Collection[str],
    packages: Mapping[str, str],
    base: Path,
) -> str:
    """Return Markdown with the front matter that the Hub reads.

    Args:
        metrics: finite metrics by name.
        intervals: their 95 % intervals.
        diverged: names of metrics that are not finite.
        base: folder of the original model, whose licence lines are copied.
    """
    spec, scheme = trial.spec, trial.spec.scheme
    assert scheme is not None
    assert spec.export is not None
    source = spec.model.source
    front = licence_lines(base) or ["license: unknown"]
    front += [f"base_model: {source}", "base_model_relation: quantized"] if source else []
    cells = {name: "{:.6g} to {:.6g}".format(*interval) for name, interval in intervals.items()}
    rows = {name: f"{value:.6g} | {cells.get(name, '')}" for name, value in metrics.items()}
    rows |= dict.fromkeys(diverged, "diverged: not a finite number |")
    measured = [
        f"| {name} | {row} |"
        for name, row in sorted(rows.items())
        if "/" in name and not name.startswith(("seconds/", "peak_bytes/", "gpu_peak_bytes/"))
    ]
    group = "whole rows" if scheme.group_size == -1 else f"groups of {scheme.group_size} columns"
    acts = f", activations of {scheme.act_bits} bits per token" if scheme.act_bits else ""
    departures = _departures(spec)
    same_logits = proof.logit_error is not None
    logits = ", and the same logits" if same_logits else "; logits were not compared"
    versions = (f"{p} {packages[p]}" for p in ("q3q", "torch", "transformers") if p in packages)
    lines = [
        "---",
        *front,
        "tags: [quantized, q3q]",
        "---",
        "",
        f"# {spec.model.name}, {spec.name}",
        "",
        f"{source or spec.model.name} quantized by q3q: `{spec.method.name}`, "
        f"{scheme.bits} bits, {group}, {'symmetric' if scheme.symmetric else 'asymmetric'}{acts}. "
        f"Stored as `{spec.export}`: {FORMATS[spec.export].content}. "
        f"Embeddings, head, norms and routers stay in {spec.model.dtype}"
        f"{'; exceptions are listed below' if departures else ''}.",
        "",
        "## How it was made",
        "",
        f"- method: `{json.dumps(spec.method.to_json())}`",
        *(f"- {key}: `{json.dumps(value)}`" for key, value in departures.items()),
        f"- calibration: `{json.dumps(spec.calibration.to_json())}`"
        if spec.calibration
        else "- calibration: none",
        f"- arithmetic: {spec.model.dtype}; "
        f"scales are stored in, and were rounded to, {scheme.scales or 'none'}",
        f"- trial `{spec.id}`, seed {spec.seed}, {', '.join(versions)}",
        "",
        "```bash",
        masked(str(trial.placement.command)),
        "```",
        "",
        "## What was measured",
        "",
        "| metric | value | 95 % interval |",
        "|---|---|---|",
        *(measured or ["| none | | |"]),
        "",
        f"Reloaded by {proof.loader} in a process without q3q: "
        f"the same weights, bit for bit{logits}.",
        "",
        *_serving(spec, facts),
    ]
    return "\n".join(lines)


def licence_lines(base: Path) -> list[str]:
    """Return the `license...` entries of the original card's front matter, but no empty ones."""
    try:
        front = _FRONT.match((base / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []
    entries = _LICENCE.findall(front[1]) if front else []
    filled = (entry for entry in entries if entry.partition(":")[2].strip())
    return [line for entry in filled for line in entry.splitlines()]


def _departures(spec: TrialSpec) -> Json:
    """Return the settings by which some weights differ from the scheme, as the user wrote them."""
    settings: Json = {
        "overrides": spec.rules.get("overrides", spec.overrides),
        "skip": spec.rules.get("skip", list(spec.skip)),
        "head_bits": spec.head_bits,
        "embedding_bits": spec.embedding_bits,
    }
    return {key: value for key, value in settings.items() if value}


def _serving(spec: TrialSpec, facts: ModelFacts) -> list[str]:
    assert spec.export is not None
    form = FORMATS[spec.export]
    if (reason := form.unserved(spec, facts)) is not None:
        loaders = [f"- {name}: {scope}" for name, _, scope in form.loaders if "vLLM" not in name]
        unpacked = _UNPACKED if needs_unpacking(spec, facts) else []
        intro = f"vLLM does not load `{spec.export}` with {reason}. These do:"
        return ["## Load it", "", intro, "", *loaders, "", *unpacked]
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

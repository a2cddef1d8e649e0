"""The model card of an exported checkpoint: what it is, how it was made, what was measured, whose licence it has."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from q3q.export.formats import FORMATS
from q3q.spec import TrialSpec

_FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)


def model_card(
    spec: TrialSpec,
    metrics: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    packages: Mapping[str, str],
    base: Path,
    loader: str,
) -> str:
    """Markdown with the front matter that the Hub reads.

    base: folder of the original model, whose licence lines are taken over. loader: who proved the checkpoint.
    """
    scheme = spec.scheme
    assert scheme is not None
    assert spec.export is not None
    source = spec.model.get("source")
    front = [*licence_lines(base), *([f"base_model: {source}", "base_model_relation: quantized"] if source else [])]
    measured = [
        f"| {name} | {value:.6g} | {_interval(intervals.get(name))} |"
        for name, value in sorted(metrics.items())
        if "/" in name and not name.startswith(("seconds/", "peak_bytes/", "gpu_peak_bytes/"))
    ]
    group = "whole rows" if scheme.group_size == -1 else f"groups of {scheme.group_size} columns"
    acts = f", activations of {scheme.act_bits} bits per token" if scheme.act_bits else ""
    lines = [
        "---",
        *(front or ["license: unknown"]),
        "tags: [quantized, q3q]",
        "---",
        "",
        f"# {spec.model['name']}, {spec.name}",
        "",
        f"{source or spec.model['name']} quantized by q3q: `{spec.method['name']}`, {scheme.bits} bits, {group}, "
        f"{'symmetric' if scheme.symmetric else 'asymmetric'}{acts}. Stored as `{spec.export}`: "
        f"{FORMATS[spec.export].what}. Embeddings, head, norms and routers stay in {spec.model['dtype']}"
        f"{' but for what the settings below say' if spec.head_bits or spec.embedding_bits else ''}.",
        "",
        "## How it was made",
        "",
        f"- method: `{json.dumps(spec.method)}`",
        f"- calibration: `{json.dumps(spec.calibration)}`" if spec.calibration else "- calibration: none",
        f"- arithmetic: {spec.model['dtype']}; scales are stored in, and were rounded to, {scheme.scales or 'none'}",
        f"- trial `{spec.id}`, seed {spec.seed}, "
        + ", ".join(f"{name} {packages[name]}" for name in ("q3q", "torch", "transformers") if name in packages),
        "",
        "```bash",
        spec.places.get("command") or f"# the spec is in spec.json; python launch.py export={spec.export} ...",
        "```",
        "",
        "## What was measured",
        "",
        "| metric | value | 95 % interval |",
        "|---|---|---|",
        *(measured or ["| none | | |"]),
        "",
        f"Reloaded by {loader} in a process without q3q: the same weights, bit for bit, and the same logits.",
        "",
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
    return "\n".join(lines)


def licence_lines(base: Path) -> list[str]:
    """`license...` lines of the original model card's front matter; none if it has no card."""
    try:
        front = _FRONT.match((base / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []
    return [line for line in front[1].splitlines() if re.match(r"license\w*:", line)] if front else []


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.6g} to {interval[1]:.6g}"

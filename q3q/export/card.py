"""The model card of an exported checkpoint: its origin, making, measurements, use and licence."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from q3q.export.formats import FORMATS
from q3q.export.instructions import load_lines, serve_lines
from q3q.export.measured import Measured
from q3q.export.proof import Proof
from q3q.export.reload.configs import UNPACKER
from q3q.export.serving import holds_cache
from q3q.masking import masked
from q3q.models.facts import ModelFacts
from q3q.number_formats import BLOCKS, GGUF, INT
from q3q.placement import Trial
from q3q.spec import Json, Scheme, TrialSpec

_FRONT = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENCE = re.compile(r"^license\w*:.*(?:\n[ \t-].*)*", re.MULTILINE)


def model_card(
    trial: Trial,
    facts: ModelFacts,
    proof: Proof,
    measured: Measured,
    *,
    packages: Mapping[str, str],
    base: Path,
) -> str:
    """Return Markdown with the front matter that the Hub reads.

    Args:
        base: folder of the original model, whose licence lines are copied.
    """
    spec, scheme = trial.spec, trial.spec.scheme
    assert scheme is not None
    assert spec.export is not None
    source = spec.model.source
    front = licence_lines(base) or ["license: unknown"]
    front += [f"base_model: {source}", "base_model_relation: quantized"] if source else []
    group = "whole rows" if scheme.group_size == -1 else f"groups of {scheme.group_size} columns"
    acts = f", activations of {scheme.act_bits} bits per token" if scheme.act_bits else ""
    if scheme.act_format != INT:
        size = scheme.act_group_size
        sharing = "per token" if size == -1 else f"in groups of {size}"
        acts = f", activations in `{scheme.act_format}` {sharing}"
        acts += " below a calibrated factor" if scheme.calibrates_inputs else ""
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    if scheme.format != INT:
        group, kind = scheme.groups, f"format `{scheme.format}`"
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
        f"{scheme.bits} bits, {group}, {kind}{acts}. "
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
        *_cache(spec),
        f"- arithmetic: {spec.model.dtype}; {_scales(spec, scheme)}",
        f"- trial `{spec.id}`, seed {spec.seed}, {', '.join(versions)}",
        "",
        "```bash",
        masked(str(trial.placement.command)),
        "```",
        "",
        "## What was measured",
        "",
        *measured.lines(),
        "",
        f"Reloaded by {proof.loader} in a process without q3q: "
        f"the same weights, bit for bit{logits}.",
        "",
        *_use_lines(proof),
        *load_lines(spec, facts),
        *serve_lines(spec, facts),
    ]
    return "\n".join(lines)


def _cache(spec: TrialSpec) -> list[str]:
    """Say with which cache the model was measured, and whether the files ask for it."""
    if spec.kv is None:
        return []
    asked = spec.export == "compressed_tensors" and holds_cache(spec.kv)
    which = "as config.json asks for it" if asked else "which these files do not ask for"
    return [f"- measured with a rounded cache, {which}: {spec.kv.about}"]


def _scales(spec: TrialSpec, scheme: Scheme) -> str:
    """Return what became of the scales."""
    if scheme.format in BLOCKS:
        return f"scales are those of `{scheme.format}`"
    if scheme.own_groups and spec.export == "compressed_tensors":
        return "scales are stored in, and were rounded to, those of the format"
    stored = "float16, and offsets too" if scheme.scales == GGUF else scheme.scales or "none"
    return f"scales are stored in, and were rounded to, {stored}"


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
    if spec.overrides and spec.scheme is not None and spec.scheme.format in BLOCKS:
        # A GGUF type's own: there may be hundreds, of which each would be a line of the card.
        others = Counter(change.get("format", INT) for change in spec.overrides.values())
        settings["overrides"] = {
            kind: f"{count} linears whose columns do not fill blocks of {spec.scheme.format}"
            for kind, count in others.items()
        }
    return {key: value for key, value in settings.items() if value}


def _use_lines(proof: Proof) -> list[str]:
    """Return the section on memory and speed, as measured in the process of the proof."""
    if proof.use is not None:
        remark = (
            "Measured once, on the machine that made the checkpoint; other runtimes may differ."
        )
        sentences = [*proof.use.sentences(), remark]
    else:
        reason = "the loader did not generate any text"
        if proof.logit_error is None:
            reason = "the process that proves the checkpoint read its weights one by one"
        elif proof.loader.startswith(UNPACKER):
            reason = "the process that proves the checkpoint used no public loader for its format"
        sentences = [f"Memory and speed were not measured: {reason}."]
    return ["## What it takes", "", *(f"- {sentence}" for sentence in sentences), ""]

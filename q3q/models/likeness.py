"""A published checkpoint beside the original that it was made of: weights, tokenizers, formats.

Shapes: E experts (1 for a matrix of no experts), N numbers of a matrix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from q3q.errors import CheckpointError, first_line
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.disk_names import (
    disk_shapes,
    is_fused,
    is_stacked,
    layout_of,
    names_on_disk,
    of_expert,
    without_expert,
)
from q3q.models.facts import ModelFacts
from q3q.models.published.packing import Packing
from q3q.number_formats import INT, short_name
from q3q.reporter import Steps, no_steps

# Below this correlation a matrix has nothing to do with the original's. On the demo models,
# rounding to 2 bits leaves 0.76 or more with a scale a row and 0.85 with one for 64 numbers, and
# signs alone 0.75; a random matrix has 0.02 at most, and another block's same matrix 0.08. The
# largest of 10,000 pairs of random matrices of 1,000 numbers was 0.12.
UNLIKE = 0.25
ROWS_AT_ONCE = 16384  # of the embedding or the head
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")  # of a GGUF file's tensors that are no codes
NAMED = 4  # things of one kind that a line names
LLAMA_CPP = (
    "llama.cpp rounds a linear layer's input to 8 bits where it multiplies codes directly, and "
    "here inputs are not rounded"
)
SEVERAL_SCALES = (
    "linear layers that read one input store several scales for it, of which the widest counts "
    "here, as in servers that run them as one"
)


@dataclass(frozen=True)
class Likeness:
    """How a checkpoint's weights differ from the original's.

    unlike: matrices that have nothing to do with the original's, with their correlations
    errors: |w - original| / |original| of each linear, by name
    """

    unlike: dict[str, float]
    errors: dict[str, float]

    @property
    def largest(self) -> tuple[str, float] | None:
        """The linear with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None

    @property
    def median_error(self) -> float | None:
        return median(self.errors.values()) if self.errors else None


def compare_weights(
    checkpoint: Checkpoint, original: Checkpoint, steps: Steps = no_steps
) -> Likeness:
    """Compare all matrices, one at a time, as they are in memory.

    Raises:
        CheckpointError: scales are no numbers, or zero.
    """
    facts, unlike, errors = checkpoint.facts, dict[str, float](), dict[str, float]()
    for end, name, theirs_name in _ends(checkpoint, original):
        sums = torch.zeros(3, 1, dtype=torch.float64)
        for first in range(0, facts.vocab, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, facts.vocab - first)
            rows = checkpoint.rows(name, first, count)
            sums += _sums(rows[None], original.rows(theirs_name, first, count)[None])
        _note(unlike, errors, end, sums, linear=False)
    for k in range(facts.layers):
        linears = facts.linears(k)
        for name, shape in facts.block_shapes(k).items():
            if len(shape) > 1:
                of_each = list[Tensor]()
                for e in range(shape[0] if is_stacked(name) else 1):
                    ours, theirs = (each.matrix(k, name, e) for each in (checkpoint, original))
                    of_each.append(_sums(ours[None], theirs[None]))
                    if name in linears:
                        _look_for_zeros(checkpoint, k, name, e, ours)
                own = f"blocks.{k}.{name.removesuffix('.weight')}"
                _note(unlike, errors, own, torch.cat(of_each, dim=1), linear=name in linears)
        steps(k + 1, facts.layers)
    return Likeness(unlike, errors)


def _look_for_zeros(checkpoint: Checkpoint, k: int, name: str, expert: int, weight: Tensor) -> None:
    """Doubt a linear of a GGUF file in which some blocks are zero.

    Raises:
        CheckpointError: most are.
    """
    if checkpoint.gguf is None:
        return
    full = checkpoint.facts.on_disk(k, of_expert(name, expert) if is_stacked(name) else name)
    stored = checkpoint.gguf.tensors[full]
    if stored.type in PLAIN_TYPES:
        return
    zeros, blocks = stored.zero_blocks(weight)
    line = f"{full}: {zeros} of {blocks} blocks of {stored.type} are zero"
    if 2 * zeros > blocks:
        raise CheckpointError(line)
    if zeros:
        checkpoint.doubts[line] = None


def _ends(checkpoint: Checkpoint, original: Checkpoint) -> Iterator[tuple[str, str, str]]:
    family = checkpoint.facts.family
    yield "embedding", family.embedding, original.facts.family.embedding
    if not checkpoint.facts.tied:
        theirs = original.facts.family
        yield "head", family.head, theirs.embedding if original.facts.tied else theirs.head


def _sums(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the sums of a * b, a * a and b * b of each expert, [3, E], float64."""
    a_EN, b_EN = (w.flatten(1).float() for w in (ours, theirs))
    pairs = ((a_EN, b_EN), (a_EN, a_EN), (b_EN, b_EN))
    return torch.stack([(x * y).sum(1, dtype=torch.float64) for x, y in pairs])


def _note(
    unlike: dict[str, float], errors: dict[str, float], name: str, sums: Tensor, *, linear: bool
) -> None:
    both_E, ours_E, theirs_E = sums
    correlation_E = both_E / (ours_E * theirs_E).sqrt().clamp(min=1e-300)
    worst = int(correlation_E.argmin())
    if float(correlation_E[worst]) < UNLIKE:
        of = f", expert {worst}" if len(correlation_E) > 1 else ""
        unlike[name + of] = float(correlation_E[worst])
    if linear:
        error_E = (ours_E - 2 * both_E + theirs_E).clamp(min=0) / theirs_E.clamp(min=1e-300)
        errors[name] = float(error_E.mean().sqrt())


def tokenizer_differences(checkpoint: Checkpoint, original: Any) -> list[str]:
    """Say in a few words each how a checkpoint's tokenizer differs from the original's.

    Args:
        original: the original's tokenizer.
    """
    if checkpoint.gguf is not None:
        if checkpoint.gguf.tokenizer is None:
            return ["none in the file"]
        return list(checkpoint.gguf.tokenizer.differences(original))
    try:
        own = load_tokenizer(checkpoint.folder)
    except CheckpointError as error:
        return [first_line(error)]
    ours, theirs = (_parts(tokenizer) for tokenizer in (own, original))
    found = [key for key in theirs if ours.get(key) != theirs[key]]
    differences = [f"another {', '.join(found)}"] if found else []
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(own, token) != getattr(original, token):
            differences.append(
                f"{token} {getattr(own, token)} instead of {getattr(original, token)}"
            )
    if (own.chat_template or "").strip() != (original.chat_template or "").strip():
        differences.append("another chat template" if own.chat_template else "no chat template")
    return differences


def _parts(tokenizer: Any) -> dict[str, Any]:
    """Return what decides on a fast tokenizer's ids."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ()]
    added = {token["id"]: token["content"] for token in whole.get("added_tokens") or ()}
    parts = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")}
    return {"vocabulary": model.get("vocab"), "merges": merges, "added tokens": added, **parts}


def unquantized_linears(checkpoint: Checkpoint) -> list[str]:
    """Return the linears that are stored as plain numbers in a checkpoint that has codes."""
    facts = checkpoint.facts
    names = []
    for k in range(facts.layers):
        linears = facts.linears(k)
        for name in disk_shapes(facts, k, is_fused(facts, k, checkpoint.bits_on_disk())):
            if without_expert(name) in linears and _is_plain(checkpoint, k, name):
                names.append(f"blocks.{k}.{name.removesuffix('.weight')}")
    return [] if facts.packing is None and checkpoint.gguf is None else names


def _is_plain(checkpoint: Checkpoint, k: int, name: str) -> bool:
    if checkpoint.gguf is None:
        return layout_of(checkpoint.facts, k, name) is None
    return checkpoint.gguf.tensors[checkpoint.facts.on_disk(k, name)].type in PLAIN_TYPES


def in_groups(linears: list[str]) -> str:
    """Name linears by what they are: `mlp.down_proj of blocks 0, 1 and 3 more`."""
    blocks: dict[str, list[str]] = {}
    for linear in linears:
        _, block, name = linear.split(".", 2)
        blocks.setdefault(without_expert(name), []).append(block)
    words = []
    for name, numbers in blocks.items():
        distinct = list(dict.fromkeys(numbers))
        more = f" and {len(distinct) - NAMED} more" if len(distinct) > NAMED else ""
        several = "s" if len(distinct) > 1 else ""
        words.append(f"{name} of block{several} {', '.join(distinct[:NAMED])}{more}")
    return "; ".join(words)


def format_in_words(checkpoint: Checkpoint) -> str:
    """Return how the linears are stored: `compressed-tensors, int4 g128, inputs int8`."""
    packing = checkpoint.facts.packing
    if packing is None:
        return f"GGUF, {checkpoint.gguf.quantized or 'plain numbers'}" if checkpoint.gguf else ""
    kinds = dict.fromkeys(_kinds(packing))
    cache = [f"cache {short_name(packing.kv.format)}"] if packing.kv else []
    return ", ".join([packing.method, *kinds, *cache])


def _kinds(packing: Packing) -> Iterator[str]:
    for layout in (layout for _, layout in packing.rules if layout is not None):
        form = getattr(layout, "format", INT)
        table = getattr(layout, "table", None)
        word = table or (f"int{layout.bits}" if form == INT else short_name(form))
        size = layout.group_size
        rows = getattr(layout, "group_rows", 1)
        groups = f" {rows}x{size}" if rows > 1 else "" if size == -1 else f" g{size}"
        acts = layout.inputs
        if acts is None:
            yield word + groups
        else:
            of = f"int{acts.bits}" if acts.format == INT else short_name(acts.format)
            fixed = " by stored scales" if acts.scales in ("stored", "factor") else ""
            yield f"{word}{groups} with inputs in {of}{fixed}"


def inexact(checkpoint: Checkpoint) -> list[str]:
    """Say what the checkpoint's own runtime computes otherwise than q3q does."""
    facts = checkpoint.facts
    lines = list(facts.packing.inexact) if facts.packing is not None else []
    if checkpoint.gguf is not None and checkpoint.gguf.quantized:
        lines.append(LLAMA_CPP)
    if _has_several_scales(facts):
        lines.append(SEVERAL_SCALES)
    return lines


def _has_several_scales(facts: ModelFacts) -> bool:
    for k in range(facts.layers):
        for site in facts.sites(k):
            names = (n.removesuffix(".weight") for n in names_on_disk(facts, k, site.weights))
            found = {facts.input_numbers[name] for name in names if name in facts.input_numbers}
            if len(found) > 1:
                return True
    return False


def note_of(
    checkpoint: Checkpoint, original: Checkpoint, tokenizer: Any, steps: Steps = no_steps
) -> dict[str, Any]:
    """Return the record's note on a judged checkpoint, plain JSON.

    Args:
        tokenizer: the original's.

    Raises:
        CheckpointError: scales are no numbers, or zero.
    """
    likeness = compare_weights(checkpoint, original, steps)
    plain = unquantized_linears(checkpoint)
    largest = likeness.largest
    return {
        "format": format_in_words(checkpoint),
        "plain_linears": in_groups(plain),
        "plain_count": len(plain),
        "unlike": likeness.unlike,
        "median_error": likeness.median_error,
        "largest_error": None if largest is None else list(largest),
        "tokenizer": tokenizer_differences(checkpoint, tokenizer),
        "inexact": inexact(checkpoint),
        "doubts": list(checkpoint.doubts),
    }

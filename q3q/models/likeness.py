"""A published checkpoint beside the original that it was made of: weights, tokenizers, formats.

Shapes: E experts (1 for a matrix of no experts), N numbers of a matrix or a vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from q3q.errors import CheckpointError, first_line
from q3q.formatting import significant
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
from q3q.numerics.linalg import all_finite
from q3q.reporter import Steps, no_steps

# Below this correlation a matrix has nothing to do with the original's. On the demo models,
# rounding to 2 bits leaves 0.76 or more with a scale a row and 0.85 with one for 64 numbers, and
# signs alone 0.75; a random matrix has 0.02 at most, and another block's same matrix 0.08. The
# largest of 10,000 pairs of random matrices of 1,000 numbers was 0.12.
UNLIKE = 0.25
# A matrix of zeros has this relative error, so rounding to fewer bits leaves less.
FAR = 1.0
# Vectors are not quantized: storing them in 16 bits leaves a relative error of 0.004 at most.
MOVED = 0.02
SCALED = (
    "methods that move factors between norms and matrices do this (AWQ, SmoothQuant, rotations), "
    "others do not"
)
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
    far: other matrices whose error exceeds `FAR`, with it (of experts the worst one's)
    moved: vectors (norms, biases) whose error exceeds `MOVED`, with it
    """

    unlike: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    far: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> tuple[str, float] | None:
        """The linear with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1]) if self.errors else None

    @property
    def median_error(self) -> float | None:
        return median(self.errors.values()) if self.errors else None

    def doubts(self) -> Iterator[str]:
        """Yield a line for each kind of numbers that rounding alone does not explain."""
        for errors, what in (
            (self.far, "not of the original's size"),
            (self.moved, "not the original's numbers"),
        ):
            if errors:
                worst = significant(max(errors.values()), 2)
                yield f"{in_groups(list(errors))}: {what} (relative error up to {worst}); {SCALED}"


def compare_weights(
    checkpoint: Checkpoint, original: Checkpoint, steps: Steps = no_steps
) -> Likeness:
    """Compare all tensors, one matrix at a time, as they are in memory.

    Raises:
        CheckpointError: numbers are not finite, or scales are zero.
    """
    facts, likeness = checkpoint.facts, Likeness()
    for end, name, theirs_name in _ends(checkpoint, original):
        sums = torch.zeros(3, 1, dtype=torch.float64)
        for first in range(0, facts.vocab, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, facts.vocab - first)
            rows = checkpoint.rows(name, first, count)
            sums += _sums(rows, original.rows(theirs_name, first, count), name)
        _note_matrix(likeness, end, sums, linear=False)
    for k in range(facts.layers):
        linears = facts.linears(k)
        for name, shape in facts.block_shapes(k).items():
            of_each = list[Tensor]()
            for e in range(shape[0] if is_stacked(name) else 1):
                ours, theirs = (each.matrix(k, name, e) for each in (checkpoint, original))
                full = facts.on_disk(k, of_expert(name, e) if is_stacked(name) else name)
                of_each.append(_sums(ours, theirs, full))
                if name in linears:
                    _look_for_zeros(checkpoint, full, ours)
            own, sums = f"blocks.{k}.{name.removesuffix('.weight')}", torch.cat(of_each, dim=1)
            if len(shape) > (2 if is_stacked(name) else 1):
                _note_matrix(likeness, own, sums, linear=name in linears)
            else:
                _note_vector(likeness, own, sums)
        steps(k + 1, facts.layers)
    norms = checkpoint.final_norm(), original.final_norm()
    _note_vector(likeness, "final norm", _sums(*norms, facts.family.final_norm))
    return likeness


def _look_for_zeros(checkpoint: Checkpoint, full: str, weight: Tensor) -> None:
    """Doubt a linear of a GGUF file in which some blocks are zero.

    Args:
        full: its name on disk.

    Raises:
        CheckpointError: most are.
    """
    if checkpoint.gguf is None:
        return
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


def _sums(ours: Tensor, theirs: Tensor, name: str) -> Tensor:
    """Return the sums of a * b, a * a and b * b of one tensor, [3, 1], float64.

    Raises:
        CheckpointError: a number of ours is not finite.
    """
    a_N, b_N = (w.flatten().float() for w in (ours, theirs))
    if not all_finite(a_N):
        raise CheckpointError(f"{name} holds numbers that are not finite: damaged")

    def sums(a_N: Tensor, b_N: Tensor) -> Tensor:
        pairs = ((a_N, b_N), (a_N, a_N), (b_N, b_N))
        return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in pairs])[:, None]

    result = sums(a_N, b_N)
    # Products of damaged numbers may exceed float32.
    return result if all_finite(result) else sums(a_N.double(), b_N.double())


def _errors(sums: Tensor) -> Tensor:
    """Return the squared relative error of each expert, [E]."""
    both_E, ours_E, theirs_E = sums
    return (ours_E - 2 * both_E + theirs_E).clamp(min=0) / theirs_E.clamp(min=1e-300)


def _note_matrix(likeness: Likeness, name: str, sums: Tensor, *, linear: bool) -> None:
    both_E, ours_E, theirs_E = sums
    correlation_E = both_E / (ours_E * theirs_E).sqrt().clamp(min=1e-300)
    worst = int(correlation_E.argmin())
    if float(correlation_E[worst]) < UNLIKE:
        of = f", expert {worst}" if len(correlation_E) > 1 else ""
        likeness.unlike[name + of] = float(correlation_E[worst])
    error_E = _errors(sums)
    if linear:
        likeness.errors[name] = float(error_E.mean().sqrt())
    far = float(error_E.masked_fill(correlation_E < UNLIKE, 0).max().sqrt())
    if far > FAR:
        likeness.far[name] = far


def _note_vector(likeness: Likeness, name: str, sums: Tensor) -> None:
    error = float(_errors(sums).max().sqrt())
    if error > MOVED:
        likeness.moved[name] = error


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
    changed = [key for key in theirs if ours.get(key) != theirs[key]]
    differences = [f"another {', '.join(changed)}"] if changed else []
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
    words = []
    for linear in linears:
        if not linear.startswith("blocks."):
            words.append(linear)  # the embedding, the head, the final norm
            continue
        _, block, name = linear.split(".", 2)
        blocks.setdefault(without_expert(name), []).append(block)
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
            numbers = {facts.input_numbers[name] for name in names if name in facts.input_numbers}
            if len(numbers) > 1:
                return True
    return False


def note_of(
    checkpoint: Checkpoint, original: Checkpoint, tokenizer: Any, steps: Steps = no_steps
) -> dict[str, Any]:
    """Return the record's note on a judged checkpoint, plain JSON.

    Args:
        tokenizer: the original's.

    Raises:
        CheckpointError: numbers are not finite, or scales are zero.
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
        "doubts": [*checkpoint.doubts, *likeness.doubts()],
    }

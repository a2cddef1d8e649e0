"""Quantize one site: its linears by scheme, its experts by chunks.

Shapes: E experts (1 in a dense block), O out features of all the site's weights, I in features.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from q3q.errors import NumericsError
from q3q.models import heap
from q3q.models.anatomy import Site
from q3q.models.block import Block
from q3q.models.footprint import CHUNK_BYTES
from q3q.numerics.linalg import all_finite
from q3q.numerics.weights import (
    StoredWeight,
    concatenate_experts,
    concatenate_rows,
    numbers,
    refuse_unsound,
    with_scales,
)
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.site_errors import SquaredErrors, site_error
from q3q.quantize.statistics import Gram, StoredInputs
from q3q.spec import Scheme, Schemes
from q3q.team import SOLO, Team

# Every deployed format stores scales in 16 bits, GPTQ's and AWQ's in float16.
LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass
class Solution:
    """The result of solving a chunk of a site's experts.

    codes, errors: by weight name
    notes: (name in the record, facts)
    tokens: number that each expert saw
    columns: of the experts' Hessians; None if the method keeps none
    """

    codes: dict[str, StoredWeight] = field(default_factory=dict)
    errors: dict[str, SquaredErrors] = field(default_factory=dict)
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    columns: int | None = None


class SiteQuantizer:
    """One site of a block while its weights become codes, one chunk of experts after the other.

    parts: the site's quantized linears, grouped by scheme; usually the whole site.
        The split is exact: the linears share the statistics, and given these, rows are independent.
    chunks: as many experts as `CHUNK_BYTES` allow, but at least two, because methods treat one
        expert as a dense block. A dense site is one chunk, and so are all experts for a method that
        cannot take them in chunks. For one that shifts scale between an expert's linears, all
        sites have the same chunks.
    overwritten: weights that the block alone holds, so that their numbers may be overwritten by
        those of their codes, chunk by chunk.
    """

    def __init__(
        self,
        block: Block,
        site: Site,
        schemes: Schemes,
        method: Method,
        result: QuantizedBlock,
    ) -> None:
        self.block, self.site, self.method, self.result = block, site, method, result
        self.parts = _parts(site, schemes, result.index)
        self.overwritten: frozenset[str] = frozenset()
        shapes = [block.weights[name].shape for name in site.weights]
        experts, columns = shapes[0][0] if len(shapes[0]) == 3 else 1, shapes[0][-1]
        count = 1
        if experts > 1 and method.chunks_experts:
            alike = block.sites if method.rebalances else (site,)
            fitting = min(_experts_at_once(block, each) for each in alike)
            count = max(1, min(-(-experts // fitting), experts // 2))
        self.chunks = [
            slice(i * experts // count, (i + 1) * experts // count) for i in range(count)
        ]
        self._record_name = f"blocks.{result.index}.{site.name}"
        self._work = float(columns * sum(shape.numel() for shape in shapes)) if self.parts else 0.0
        self._codes: dict[str, list[StoredWeight]] = {}
        self._rounded: dict[str, Tensor] = {}
        self._errors: dict[str, list[SquaredErrors]] = {}
        self._tokens: list[int] = []

    def cost(self, experts: slice) -> float:
        """Return a chunk's work relative to other sites': its weights times its columns."""
        return (experts.stop - experts.start) / self.chunks[-1].stop * self._work

    def solve(self, experts: slice, statistics: Any, team: Team = SOLO) -> Solution:
        """Return a chunk's codes; `finish` puts their numbers into the block.

        Args:
            team: the gang, all of whose ranks call this at the same time to divide the rows.
        """
        solution = Solution()
        if not self.parts:
            return solution
        if statistics is not None and len(statistics.tokens_E):
            solution.tokens = statistics.tokens_E.tolist()
            if isinstance(statistics, Gram):
                solution.columns = statistics.sum_EII.shape[-1]
        gram = statistics.gram if isinstance(statistics, StoredInputs) else statistics
        gram = gram if isinstance(gram, Gram) and len(gram.tokens_E) else None
        heap.return_holes()  # the walk's peak of memory is here
        for part, scheme in self.parts:
            self._solve_part(solution, part, scheme, experts, statistics, gram, team)
        return solution

    def add(self, experts: slice, solution: Solution, *, solved_here: bool) -> None:
        """Add the next chunk's solution, computed by this rank or another.

        Args:
            solved_here: the chunk's numbers are in place already.
        """
        self._note_tokens(experts, solution)
        for name, notes in solution.notes:
            self._note(name, notes)
        for name, code in solution.codes.items():
            if not solved_here:
                old = self.block.weights[name]
                self._put(name, experts, numbers(code, old.dtype, old.device))
            self._errors.setdefault(name, []).append(solution.errors[name])
            self._codes.setdefault(name, []).append(code.to("cpu"))

    def finish(self) -> None:
        """Move the site's codes and errors to the result, and let the block compute with them."""
        for name, codes in self._codes.items():
            self.result.quantized[name] = concatenate_experts(codes)
            self.result.errors.append(
                site_error(self.result.index, self.site.name, name, self._errors[name])
            )
            self.block.weights[name] = self._rounded[name]
        self._codes, self._rounded = {}, {}

    def _put(self, name: str, experts: slice, rounded_EOI: Tensor) -> None:
        old = self.block.weights[name]
        if name not in self._rounded:
            self._rounded[name] = (
                old
                if name in self.overwritten
                else torch.empty_like(old, memory_format=torch.contiguous_format)
            )
        new = self._rounded[name]
        (new if new.ndim == 3 else new[None])[experts] = rounded_EOI.to(old.dtype)

    def _solve_part(
        self,
        solution: Solution,
        part: Site,
        scheme: Scheme,
        experts: slice,
        statistics: Any,
        gram: Gram | None,
        team: Team,
    ) -> None:
        where = self._record_name
        if part != self.site:
            where += f" ({', '.join(name.removesuffix('.weight') for name in part.weights)})"
        weight_EOI, rows = stack_rows(self.block.weights, part, experts)
        if not all_finite(weight_EOI):
            raise NumericsError(f"{where}: the checkpoint's weights are not finite")
        index = self.result.index
        task = SiteTask(
            index,
            self.site.name,
            weight_EOI,
            rows,
            statistics,
            first_expert=experts.start,
            scores=self.site.scores,
        )
        try:
            returned = _divided_by_rows(self.method, task, scheme, team)
            refuse_unsound(returned, weight_EOI, scheme.bits, scheme.format)
            quantized = with_scales(returned, scheme.scales)
        except NumericsError as error:
            raise NumericsError(f"{where}: {error}") from error
        solution.notes.append((where, task.notes))
        for name, own_rows in rows.items():
            code = quantized.rows(own_rows.start, own_rows.stop)
            site = f"skip=[{self._record_name}]"
            check_scales(code, weight_EOI[:, own_rows], f"blocks.{index}.{name}", site)
            rounded_EOI = code.dequantize()
            self._put(name, experts, rounded_EOI)
            solution.codes[name] = code
            solution.errors[name] = SquaredErrors.of(weight_EOI[:, own_rows], rounded_EOI, gram)

    def _note(self, name: str, notes: Mapping[str, Any]) -> None:
        """Add a chunk's notes to the record's; lists and dicts of several chunks are joined."""
        if not notes:
            return
        recorded = self.result.notes.setdefault(name, {})
        for key, note in notes.items():
            if isinstance(note, list) and key in recorded:
                recorded[key] = recorded[key] + note
            elif isinstance(note, dict) and key in recorded:
                recorded[key] = {**recorded[key], **note}
            else:
                recorded[key] = note

    def _note_tokens(self, experts: slice, solution: Solution) -> None:
        """After the last chunk, note each expert's tokens (at one site a block), and the experts
        whose Hessian lacks full rank because they saw fewer tokens than it has columns.
        """
        if not solution.tokens:
            return
        self._tokens += solution.tokens
        tokens, columns = self._tokens, solution.columns
        if experts != self.chunks[-1]:
            return
        if len(tokens) > 1 and self.site.name == "gate_up":
            self._note(self._record_name, {"tokens_per_expert": tokens})
        if columns is None:
            return
        short = [count for count in tokens if count < columns]
        if short and len(tokens) == 1:
            # All blocks of a dense model see the same tokens, so the record has one note a site.
            name = f"{self.site.name}.fewer_tokens_than_columns"
            self.result.notes[name] = {"rank": short[0], "columns": columns}
        elif short:
            note = {"experts": len(short), "lowest_rank": min(short), "columns": columns}
            self._note(self._record_name, {"fewer_tokens_than_columns": note})


@dataclass
class Chunk:
    """A chunk of a site's experts, which is observed and then solved.

    owner: the rank that solves it
    shared: all ranks solve it instead, each some of its rows
    statistics: of all ranks' batches, on the ranks that solve it; None if the method observes
        nothing or the site is left out, or the chunk is solved
    """

    quantizer: SiteQuantizer
    experts: slice
    owner: int = 0
    shared: bool = False
    statistics: Any = None

    def solve(self, team: Team) -> Solution:
        statistics, self.statistics = self.statistics, None  # they are large
        return self.quantizer.solve(self.experts, statistics, team if self.shared else SOLO)


def solve_chunks(chunks: Sequence[Chunk], team: Team) -> None:
    """Solve each chunk on its owner, then add its solution to its site on every rank."""
    solutions = {
        c: chunk.solve(team)
        for c, chunk in enumerate(chunks)
        if chunk.shared or chunk.owner == team.rank
    }
    for c, chunk in enumerate(chunks):
        solved_here = c in solutions
        solution = solutions.pop(c, None)
        if not chunk.shared:
            solution = team.broadcast(solution, chunk.owner)
        assert solution is not None
        chunk.quantizer.add(chunk.experts, solution, solved_here=solved_here)


def check_scales(codes: StoredWeight, weight_EOI: Tensor, where: str, remedy: str) -> None:
    """Raise NumericsError if a scale does not fit into 16 bits.

    Nor may a zero point that is stored in 16 bits because it is no code.

    Args:
        where: names the linear, or the embedding or head.
        remedy: the setting that leaves it in 16 bits.
    """
    largest = codes.largest_scale()
    if not largest <= LARGEST_SCALE:  # also true of NaN
        outlier = float(weight_EOI.abs().amax())
        raise NumericsError(
            f"{where.removesuffix('.weight')}: its largest weight, {outlier:g}, needs a scale of "
            f"{largest:g}, and a scale is stored in 16 bits, {LARGEST_SCALE:g} at most; leave it "
            f"out ({remedy}), or fix the checkpoint"
        )


def stack_rows(
    weights: Mapping[str, Tensor], site: Site, experts: slice = slice(None)
) -> tuple[Tensor, dict[str, slice]]:
    """Return some experts' weights of a site as one [E, O, I] in float32, and each one's rows."""
    rows, start = {}, 0
    for name in site.weights:
        rows[name] = slice(start, start + weights[name].shape[-2])
        start = rows[name].stop
    parts = [
        weights[name] if weights[name].ndim == 3 else weights[name][None] for name in site.weights
    ]
    count, _, columns = parts[0][experts].shape
    stacked_EOI = parts[0].new_empty(count, start, columns, dtype=torch.float32)
    for part, own_rows in zip(parts, rows.values(), strict=True):
        stacked_EOI[:, own_rows] = part[experts]
    return stacked_EOI, rows


def _experts_at_once(block: Block, site: Site) -> int:
    """Return how many of a site's experts `CHUNK_BYTES` allow; all of a dense site, which is one.

    Their Hessians and their float32 weights count, whichever are larger.
    """
    shapes = [block.weights[name].shape for name in site.weights]
    if len(shapes[0]) < 3:
        return sys.maxsize
    rows, columns = sum(shape[-2] for shape in shapes), shapes[0][-1]
    return max(2, CHUNK_BYTES // (4 * columns * max(rows, columns)))


def _parts(site: Site, schemes: Schemes, index: int) -> list[tuple[Site, Scheme]]:
    names: dict[Scheme, list[str]] = {}
    for name in site.weights:
        scheme = schemes.of(f"blocks.{index}.{name.removesuffix('.weight')}")
        if scheme is not None:
            names.setdefault(scheme, []).append(name)
    return [(replace(site, weights=tuple(part)), scheme) for scheme, part in names.items()]


def _divided_by_rows(method: Method, task: SiteTask, scheme: Scheme, team: Team) -> StoredWeight:
    """Return the method's codes; if rows are independent, each rank solves some of them."""
    experts, rows, _ = task.weight_EOI.shape
    step = None if team.size == 1 or experts > 1 else method.row_step(task.weight_EOI.device)
    if step is None or rows <= step:
        return method.quantize(task, scheme)
    steps = -(-rows // step)
    cuts = [min(rows, step * (rank * steps // team.size)) for rank in range(team.size + 1)]
    own_rows = slice(cuts[team.rank], cuts[team.rank + 1])
    part = replace(
        task,
        weight_EOI=task.weight_EOI[:, own_rows],
        rows={"": slice(0, own_rows.stop - own_rows.start)},
        levels=task.levels_for(scheme).part(slice(None), own_rows),
    )
    codes = method.quantize(part, scheme) if own_rows.start < own_rows.stop else None
    return concatenate_rows([code for code in team.gather(codes) if code is not None])

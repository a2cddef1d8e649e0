"""Quantize one site: its weights stacked by rows, its experts in chunks, its errors measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from q3q.errors import NumericsError
from q3q.models import heap
from q3q.models.anatomy import Site
from q3q.models.qwen3 import Qwen3Block
from q3q.numerics.linalg import all_finite, quadratic_form_E
from q3q.numerics.weights import (
    StoredWeight,
    concatenate_experts,
    concatenate_rows,
    numbers,
    with_scales,
)
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.scales import check_scales
from q3q.quantize.statistics import Gram, Kept
from q3q.record import SiteError
from q3q.spec import Scheme, Schemes
from q3q.team import SOLO, Team

# A site's experts are treated in chunks of so many bytes, of their float32 weights or of their Hessians.
CHUNK_BYTES = 2**28


def parts_of(site: Site, schemes: Schemes, index: int) -> list[tuple[Site, Scheme]]:
    """The site's linears by scheme, those that are left out left out: usually one part, the whole site.

    Splitting is exact: they share the input and so its statistics, and rows are independent given those.
    """
    parts: dict[Scheme, list[str]] = {}
    for name in site.weights:
        scheme = schemes.of(f"blocks.{index}.{name.removesuffix('.weight')}")
        if scheme is not None:
            parts.setdefault(scheme, []).append(name)
    return [(replace(site, weights=tuple(names)), scheme) for scheme, names in parts.items()]


class SiteQuantizing:
    """One site of a block on its way from weights to codes, some experts after the other.

    chunks: of experts, each as many as `CHUNK_BYTES` allow; one for a dense block, and for a method that shifts scale
    between the experts' common tensors, which looks at all at once. A method is shown two experts at least, since a
    single one is what a dense block looks like.
    """

    def __init__(
        self,
        block: Qwen3Block,
        site: Site,
        parts: Sequence[tuple[Site, Scheme]],
        method: Method,
        result: QuantizedBlock,
    ) -> None:
        self.block, self.site, self.parts, self.method, self.result = (
            block,
            site,
            parts,
            method,
            result,
        )
        shapes = [block.weights[name].shape for name in site.weights]
        experts = shapes[0][0] if len(shapes[0]) == 3 else 1
        rows, columns = sum(shape[-2] for shape in shapes), shapes[0][-1]
        at_once = max(2, CHUNK_BYTES // (4 * columns * max(rows, columns)))
        whole = type(method).rebalance is not Method.rebalance
        count = 1 if whole or experts == 1 else max(1, min(-(-experts // at_once), experts // 2))
        self.chunks = [
            slice(i * experts // count, (i + 1) * experts // count) for i in range(count)
        ]
        self.where = f"blocks.{result.index}.{site.name}"
        self._weights = sum(shape.numel() for shape in shapes)
        self._codes: dict[str, list[StoredWeight]] = {}
        self._rounded: dict[str, Tensor] = {}
        self._squares: dict[str, list[Squares]] = {}
        self._tokens: list[int] = []

    def cost(self, experts: slice) -> float:
        """Of solving a chunk, compared with others of the block: each weight meets each column."""
        share = (experts.stop - experts.start) / self.chunks[-1].stop
        return (
            share * self._weights * self.block.weights[self.site.weights[0]].shape[-1]
            if self.parts
            else 0.0
        )

    def solve(self, experts: slice, statistics: Any, team: Team = SOLO) -> "Chunk":
        """Codes of a chunk of experts, given what was observed of it. team: whose ranks all do this, and divide it."""
        chunk = Chunk()
        if not self.parts:
            return chunk
        if statistics is not None and len(statistics.tokens_E):
            chunk.tokens = statistics.tokens_E.tolist()
            chunk.columns = statistics.sum_EII.shape[-1] if isinstance(statistics, Gram) else None
        gram = statistics.gram if isinstance(statistics, Kept) else statistics
        gram = gram if isinstance(gram, Gram) and len(gram.tokens_E) else None
        heap.return_holes()  # nowhere does a walk need more than here
        for part, scheme in self.parts:
            self._solve_part(chunk, part, scheme, experts, statistics, gram, team)
        return chunk

    def take(self, experts: slice, chunk: "Chunk", *, mine: bool) -> None:
        """The next chunk of experts is solved. mine: here, so that its numbers are in place already."""
        self._note_tokens(experts, chunk)
        for where, notes in chunk.notes:
            self._note(where, notes)
        for name, code in chunk.codes.items():
            if not mine:
                old = self.block.weights[name]
                self._put(name, experts, numbers(code, old.dtype, old.device))
            self._squares.setdefault(name, []).append(chunk.squares[name])
            self._codes.setdefault(name, []).append(code.to("cpu"))

    def finish(self) -> None:
        """The whole site is quantized: its codes and errors are on record, and the block computes with them."""
        for name, codes in self._codes.items():
            self.result.quantized[name] = concatenate_experts(codes)
            self.result.errors.append(
                _site_error(self.result.index, self.site, name, self._squares[name])
            )
            self.block.weights[name] = self._rounded[name]
        self._codes, self._rounded = {}, {}

    def _put(self, name: str, experts: slice, rounded_EOI: Tensor) -> None:
        old = self.block.weights[name]
        if name not in self._rounded:
            self._rounded[name] = torch.empty_like(old, memory_format=torch.contiguous_format)
        new = self._rounded[name]
        (new if new.ndim == 3 else new[None])[experts] = rounded_EOI.to(old.dtype)

    def _solve_part(
        self,
        chunk: "Chunk",
        part: Site,
        scheme: Scheme,
        experts: slice,
        statistics: Any,
        gram: Gram | None,
        team: Team,
    ) -> None:
        where = self.where
        if part != self.site:
            where += f" ({', '.join(name.removesuffix('.weight') for name in part.weights)})"
        weight_EOI, rows = stack_rows(self.block.weights, part, experts)
        if not all_finite(weight_EOI):
            raise NumericsError(f"{where}: the checkpoint's weights are not finite")
        task = SiteTask(
            self.result.index,
            self.site.name,
            weight_EOI,
            rows,
            statistics,
            first_expert=experts.start,
        )
        try:
            quantized = with_scales(by_rows(self.method, task, scheme, team), scheme.scales)
        except NumericsError as error:
            raise NumericsError(f"{where}: {error}") from error
        chunk.notes.append((where, task.notes))
        for name, some in rows.items():
            chunk.codes[name] = quantized.rows(some.start, some.stop)
            check_scales(
                chunk.codes[name], weight_EOI[:, some], f"blocks.{self.result.index}.{name}"
            )
            rounded_EOI = chunk.codes[name].dequantize()
            self._put(name, experts, rounded_EOI)
            chunk.squares[name] = Squares.of(weight_EOI[:, some], rounded_EOI, gram)

    def _note(self, where: str, notes: Mapping[str, Any]) -> None:
        """For the record; what several chunks say is put together."""
        known = self.result.notes.setdefault(where, {}) if notes else {}
        for key, note in notes.items():
            if isinstance(note, list) and key in known:
                known[key] = known[key] + note
            elif isinstance(note, dict) and key in known:
                known[key] = {**known[key], **note}
            else:
                known[key] = note

    def _note_tokens(self, experts: slice, chunk: "Chunk") -> None:
        """Each expert's tokens, once a block; and where a Hessian lacks the tokens to have full rank."""
        if not chunk.tokens:
            return
        self._tokens += chunk.tokens
        tokens, columns = self._tokens, chunk.columns
        if experts != self.chunks[-1]:
            return
        if len(tokens) > 1 and self.site.name == "gate_up":
            self._note(self.where, {"tokens_per_expert": tokens})
        if columns is None:
            return
        short = [count for count in tokens if count < columns]
        if short and len(tokens) == 1:
            # Every block of a dense model sees the same tokens: by this name the record has it once a site.
            name = f"{self.site.name}.fewer_tokens_than_columns"
            self.result.notes[name] = {"rank": short[0], "columns": columns}
        elif short:
            note = {"experts": len(short), "lowest_rank": min(short), "columns": columns}
            self._note(self.where, {"fewer_tokens_than_columns": note})


@dataclass
class Chunk:
    """What solving some experts of a site gave: codes and squares by weight name, notes by where. tokens: that each
    expert saw. columns: of their Hessians, if they have some."""

    codes: dict[str, StoredWeight] = field(default_factory=dict)
    squares: dict[str, "Squares"] = field(default_factory=dict)
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    columns: int | None = None


def by_rows(method: Method, task: SiteTask, scheme: Scheme, team: Team) -> StoredWeight:
    """The method's codes of a site that all ranks of the team look at: each solves a run of its rows, if they can be
    solved apart."""
    experts, rows, _ = task.weight_EOI.shape
    step = None if team.size == 1 or experts > 1 else method.row_step(task.weight_EOI.device)
    if step is None or rows <= step:
        return method.quantize(task, scheme)
    steps = -(-rows // step)
    cuts = [min(rows, step * (rank * steps // team.size)) for rank in range(team.size + 1)]
    mine = slice(cuts[team.rank], cuts[team.rank + 1])
    part = replace(
        task, weight_EOI=task.weight_EOI[:, mine], rows={"": slice(0, mine.stop - mine.start)}
    )
    codes = method.quantize(part, scheme) if mine.start < mine.stop else None
    return concatenate_rows([code for code in team.gather(codes) if code is not None])


def stack_rows(
    weights: Mapping[str, Tensor], site: Site, experts: slice = slice(None)
) -> tuple[Tensor, dict[str, slice]]:
    """The weights of a site's experts, or some of them, as one [E, O, I] in float32, and where each one's rows are."""
    rows, start = {}, 0
    for name in site.weights:
        rows[name] = slice(start, start + weights[name].shape[-2])
        start = rows[name].stop
    parts = [
        weights[name] if weights[name].ndim == 3 else weights[name][None] for name in site.weights
    ]
    count, _, columns = parts[0][experts].shape
    stacked_EOI = parts[0].new_empty(count, start, columns, dtype=torch.float32)
    for part, some in zip(parts, rows.values(), strict=True):
        stacked_EOI[:, some] = part[experts]
    return stacked_EOI, rows


@dataclass(frozen=True)
class Squares:
    """Of each expert's linear, float32 on the CPU: |W - Q|^2 and |W|^2, and, where a Gram matrix is known, the same of
    its outputs over the calibration tokens.
    """

    wrong_E: Tensor
    whole_E: Tensor
    outputs: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, weight_EOI: Tensor, rounded_EOI: Tensor, gram: Gram | None) -> "Squares":
        """rounded_EOI: overwritten."""
        wrong_EOI = torch.sub(weight_EOI, rounded_EOI, out=rounded_EOI)
        outputs = None
        if gram is not None:
            sum_EII = gram.sum_EII
            outputs = (
                quadratic_form_E(wrong_EOI, sum_EII).cpu(),
                quadratic_form_E(weight_EOI, sum_EII).cpu(),
            )
        wrong_E, whole_E = (
            torch.stack([vector_norm(part_OI).square() for part_OI in part_EOI]).cpu()
            for part_EOI in (wrong_EOI, weight_EOI)
        )
        return cls(wrong_E, whole_E, outputs)


def _site_error(index: int, site: Site, name: str, squares: Sequence[Squares]) -> SiteError:
    wrong_E = torch.cat([part.wrong_E for part in squares]).double()
    whole_E = torch.cat([part.whole_E for part in squares]).double()
    seen = [part.outputs for part in squares if part.outputs is not None]
    outputs = [torch.cat(part).double() for part in zip(*seen, strict=True)]
    of_each_E = _root_ratio(*(outputs or (wrong_E, whole_E)))
    return SiteError(
        block=index,
        site=site.name,
        linear=name.removesuffix(".weight"),
        weight_error=float(_root_ratio(wrong_E.sum(), whole_E.sum())),
        output_error=float(_root_ratio(*(part_E.sum() for part_E in outputs))) if outputs else None,
        experts=tuple(float(f"{error:.4g}") for error in of_each_E.tolist())
        if len(of_each_E) > 1
        else None,
    )


def _root_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """sqrt(part / whole); a whole of nothing has no error."""
    return torch.where(whole > 0, (part.clamp(min=0) / whole).sqrt(), 0.0)

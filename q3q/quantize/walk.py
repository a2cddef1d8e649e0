"""The walk: block by block, observe, rebalance, quantize, pass on.

In a gang all ranks walk in step. Each has the activations of its lanes of the calibration windows
(`calibrate.statistics`), whose statistics are added up in the order of lanes. A site's solve is divided where one
process divides it as well, so that no bit depends on the number of ranks: runs of experts, then whole sites, then rows
(`Method.row_step`).

Shapes: B windows, T tokens of one, H hidden; E, O, I as in `quantize.method`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm

from q3q.calibrate.statistics import Gram, Kept, Statistics, lane_of, lanes_of
from q3q.errors import ConfigError, IncompatibleError, IntegrityError, NumericsError
from q3q.models import heap
from q3q.models.anatomy import ScaleGroup, Site, SiteInput
from q3q.models.decoder import Decoder
from q3q.models.qwen3 import Qwen3Block, Rope, Stages, finish
from q3q.models.spool import Spool
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.linalg import all_finite, quadratic_form_E
from q3q.numerics.weights import (
    QuantizedWeight,
    StoredWeight,
    concatenate_experts,
    concatenate_rows,
    numbers,
    round_to_grid,
    with_scales,
)
from q3q.quantize.method import Method, ScaleTask, SiteTask
from q3q.record import SiteError
from q3q.spec import Scheme, Schemes
from q3q.team import SOLO, Team

# Calibration tokens that go through a block together: on a CPU so few that what lies between two sites stays in cache.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
# A site's experts are treated in chunks of so many bytes, of their float32 weights or of their Hessians.
CHUNK_BYTES = 2**28
# Of the memory for activations, the share that is for those between two blocks; the rest is for halted runs.
SPOOL_SHARE = 1 / 3
# Of that rest each of so many has a part, where a method keeps inputs: those of qkv, of gate and up, and of routed
# experts' down, and what is compared with a piece's outputs.
KEPT_AT_ONCE = 4
# Every deployed format stores scales in 16 bits, GPTQ's and AWQ's in float16.
LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass
class QuantizedBlock:
    """What quantizing one block gave: codes by weight name, exchanged weights that stay numbers (norms), and facts."""

    index: int
    quantized: dict[str, StoredWeight]
    changed: dict[str, Tensor]
    errors: list[SiteError]
    notes: dict[str, Any] = field(default_factory=dict)

    def weights_for(self, block: Qwen3Block) -> dict[str, Tensor]:
        """The block's exchanged weights as numbers in its own dtype and shapes."""
        norm = block.weights["input_layernorm.weight"]
        return self.numbers(norm.dtype, norm.device)

    def numbers(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """The exchanged weights as numbers, shaped as a block's: experts stacked, others plain matrices."""
        weights = {name: weight.to(device, dtype) for name, weight in self.changed.items()}
        for name, quantized in self.quantized.items():
            weight_EOI = numbers(quantized, dtype, device)
            weights[name] = weight_EOI if ".experts." in name else weight_EOI[0]
        return weights

    def parked(self) -> "QuantizedBlock":
        """The same in main memory, so that a whole model's codes do not fill a GPU."""
        quantized = {name: weight.to("cpu") for name, weight in self.quantized.items()}
        changed = {name: weight.cpu() for name, weight in self.changed.items()}
        return replace(self, quantized=quantized, changed=changed)


class BlockSink(Protocol):
    """Where quantized blocks go, and come from: when a killed trial goes on, and when a streamed model needs one."""

    def load(self, index: int) -> QuantizedBlock | None: ...

    def store(self, block: QuantizedBlock) -> None: ...


def quantize_model(
    model: Decoder,
    method: Method,
    scheme: Scheme | Schemes,
    windows_BT: Tensor | None,
    sink: BlockSink,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[QuantizedBlock]:
    """`quantized_blocks`, all of them: codes of a whole model. progress: told (blocks done, blocks in all)."""
    blocks = []
    for block in quantized_blocks(model, method, scheme, windows_BT, sink):
        blocks.append(block)
        progress(len(blocks), len(model.blocks))
    return blocks


def quantized_blocks(
    model: Decoder,
    method: Method,
    scheme: Scheme | Schemes,
    windows_BT: Tensor | None,
    sink: BlockSink,
) -> Iterator[QuantizedBlock]:
    """Quantize every block of `model` in place, first to last; blocks that the sink already holds are taken from it.

    Yields each when it is done, and keeps none. A streamed model's blocks are from then on made of what the sink holds.

    Args:
        scheme: of every linear, or of each (`Schemes`).
        windows_BT: calibration token ids, None for a method that observes nothing.

    Raises:
        IntegrityError: the sink does not give back a block that a streamed model needs.
    """
    schemes = scheme if isinstance(scheme, Schemes) else Schemes(scheme)
    team = model.team
    walk: Walk = team.together(
        _begin, model.number, method, schemes, windows_BT, model=model, sink=sink
    )
    with walk.share.hidden:
        for k in range(len(model.blocks)):
            result: QuantizedBlock = team.together(_go_on, model.number, k, walk=walk)
            yield result
            del result
    team.together(_end, model.number, walk=walk)


def _begin(
    team: Team,
    number: int,
    method: Method,
    schemes: Schemes,
    windows_BT: Tensor | None,
    model: Decoder | None = None,
    sink: BlockSink | None = None,
) -> "Walk":
    """On each rank. model: rank 0's; the others have theirs under its number."""
    walk = Walk(
        model or team.held[number],
        method,
        schemes,
        _share_of(model or team.held[number], windows_BT),
        sink,
    )
    if model is None:
        team.held[number].walk = walk
    return walk


def _go_on(team: Team, number: int, k: int, walk: "Walk | None" = None) -> QuantizedBlock | None:
    return (walk or team.held[number].walk).step(k)


def _end(team: Team, number: int, walk: "Walk | None" = None) -> None:
    (walk or team.held[number].walk).share.hidden.close()
    if walk is None:
        team.held[number].walk = None


@dataclass(frozen=True)
class Share:
    """What flows into a block on this rank, of what flows into it on all: the batches of its lanes.

    hidden: [B, T, H], batch by batch. first: of each batch, the place of its first window among all. windows: of all
    ranks together, 0 for a method that observes nothing. length: tokens of one. room: bytes that runs may hold which
    are halted inside a block, or a method of the inputs that it keeps, None for any; more changes no bit.
    """

    hidden: Spool
    first: Sequence[int] = ()
    windows: int = 0
    length: int = 0
    room: int | None = None
    team: Team = SOLO

    @classmethod
    def of_all(cls, hidden: Spool, room: int | None = None) -> "Share":
        """All batches, in their order."""
        counts = [len(x_BTH) for x_BTH in hidden]
        length = hidden[0].shape[1] if counts else 0
        return cls(hidden, [sum(counts[:b]) for b in range(len(counts))], sum(counts), length, room)

    def placed(self, inputs: SiteInput, b: int, windows: int) -> SiteInput:
        """What batch b brings, and where it belongs."""
        return replace(inputs, windows=windows, of_windows=self.windows, first_window=self.first[b])

    def spool(self) -> Spool:
        """For what a method keeps at a site that is as large as its inputs."""
        return Spool(self._each)

    @property
    def _each(self) -> int | None:
        return None if self.room is None else self.room // KEPT_AT_ONCE

    def _fresh(self, method: Method) -> Any:
        statistics = method.observe()
        if isinstance(statistics, Kept):
            statistics.bound(self._each)
        return statistics

    def observing(self, method: Method) -> Statistics | None:
        statistics: Statistics | None = self._fresh(method)
        if statistics is not None and self.team.size > 1:
            if not hasattr(statistics, "keep_lanes"):
                raise ConfigError(
                    f"{type(method).__name__}'s statistics cannot be taken by several ranks together: run it with "
                    "cluster.gpus_per_trial=1 and cluster.ranks_per_trial=1"
                )
            statistics.keep_lanes()
        return statistics

    def together(self, method: Method, seen: Any, owner: int | None = None) -> Any:
        """What all ranks saw, on the one that asked for it (None: on all); None where it is not."""
        if seen is None or self.team.size == 1:
            return seen

        def add(total: Any, later: Any) -> Any:
            total = self._fresh(method) if total is None else total
            total.absorb(later)
            return total

        return self.team.along(seen, add, owner)


@dataclass(frozen=True)
class Walk:
    """A model on its way from numbers to codes, on one rank. sink: rank 0's."""

    model: Decoder
    method: Method
    schemes: Schemes
    share: Share
    sink: BlockSink | None

    def step(self, k: int) -> QuantizedBlock | None:
        """The k-th block; on rank 0 its codes, which are stored by then."""
        model, method, share = self.model, self.method, self.share
        passes_on = share.windows > 0 and k < len(model.blocks) - 1
        result = None if self.sink is None else self.sink.load(k)
        source = partial(_exchanged, self.sink, k, model.norm_H)
        if share.team.broadcast(result is None):
            result, quantized = quantize_block(
                model.blocks[k], k, method, self.schemes, share, model.rope, passes_on=passes_on
            )
            result = result.parked()
            if self.sink is not None:
                self.sink.store(result)
            model.exchange(k, quantized, source)
        else:
            if passes_on and not method.passes_on_quantized:
                _pass_on(model.blocks[k], share.hidden, model.rope)
            model.exchange(k, None, source)
            if passes_on and method.passes_on_quantized:
                _pass_on(model.blocks[k], share.hidden, model.rope)
        return None if self.sink is None else result


def _share_of(model: Decoder, windows_BT: Tensor | None) -> Share:
    """What flows into the first block."""
    team = model.team
    if windows_BT is None:
        return Share(Spool(), team=team)
    rows = max(1, BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]) // windows_BT.shape[1])
    windows, lanes = len(windows_BT), lanes_of(team.rank, team.size)
    first = [start for start in range(0, windows, rows) if lane_of(start, windows) in lanes]
    batches = [windows_BT[start : start + rows] for start in first]
    size = (
        sum(map(len, batches))
        * windows_BT.shape[1]
        * model.facts.hidden
        * model.norm_H.element_size()
    )
    most = None if model.activations is None else int(model.activations * SPOOL_SHARE)
    hidden = Spool(most)
    for x_BTH in model.embedded(batches):
        hidden.append(x_BTH)
    room = (
        None if model.activations is None or most is None else model.activations - min(size, most)
    )
    return Share(hidden, first, windows, windows_BT.shape[1], room, team)


def _exchanged(sink: BlockSink | None, index: int, like: Tensor) -> dict[str, Tensor]:
    """The weights of a block that was quantized, as the sink has them."""
    block = None if sink is None else sink.load(index)
    if block is None:
        raise IntegrityError(
            f"block {index}, which was quantized and stored, is not there whole any more"
        )
    return block.numbers(like.dtype, like.device)


def _pass_on(block: Qwen3Block, hidden: Spool, rope: Rope) -> None:
    for b in range(len(hidden)):
        hidden[b] = block(hidden[b], rope)


def quantize_block(
    original: Qwen3Block,
    index: int,
    method: Method,
    schemes: Schemes,
    share: Share,
    rope: Rope,
    *,
    passes_on: bool = False,
) -> tuple[QuantizedBlock, Qwen3Block]:
    """One block. Returns the codes, and the block with the weights that they stand for.

    Args:
        original: not modified.
        share: what flows into it, nothing if the method observes nothing.
        passes_on: put the next block's inputs in the place of this one's.
    """
    block = original.with_weights({})
    result = QuantizedBlock(index, {}, {}, [])
    parts = {site: parts_of(site, schemes, index) for site in block.sites}
    targets = {name for some in parts.values() for part, _ in some for name in part.weights}
    before = {name: weight for name, weight in block.weights.items() if name not in targets}
    if method.sequential:
        del original
        # Each run halts before a site is read and goes on with the weights that were put there meanwhile.
        runs = Runs(block, share, rope)
        for site in block.sites:
            _one_after_the_other(
                SiteQuantizing(block, site, parts[site], method, result), runs, method, share
            )
        if passes_on:
            runs.finish()
        passes_on = False
    else:
        _from_original(original, block, method, parts, share, rope, result, passes_on=passes_on)
        del original
    # What was rescaled and is not quantized (norms, the router, a linear that is left out) stays as numbers.
    result.changed |= {
        name: block.weights[name] for name, old in before.items() if block.weights[name] is not old
    }
    if passes_on and method.passes_on_quantized:
        _pass_on(block, share.hidden, rope)
    return result, block


def _one_after_the_other(
    quantizing: "SiteQuantizing", runs: "Runs", method: Method, share: Share
) -> None:
    """A site that waits for those before it: its experts chunk by chunk, one on each rank, or its rows divided."""
    team, chunks = share.team, quantizing.chunks
    for start in range(0, len(chunks), team.size):
        some = list(enumerate(chunks[start : start + team.size]))
        seen = None
        for owner, experts in some:
            statistics = share.observing(method) if quantizing.parts else None
            for inputs in runs.at(quantizing.site):
                _show(statistics, quantizing.site, inputs, experts, quantizing.result.index)
            statistics = share.together(method, statistics, None if len(chunks) == 1 else owner)
            seen = statistics if team.rank == owner or len(chunks) == 1 else seen
            del statistics
        if len(chunks) == 1:
            quantizing.take(chunks[0], quantizing.solve(chunks[0], seen, team), mine=True)
            continue
        solved = {
            owner: quantizing.solve(experts, seen) for owner, experts in some if owner == team.rank
        }
        for owner, experts in some:
            quantizing.take(
                experts, team.broadcast(solved.get(owner), owner), mine=owner == team.rank
            )
    quantizing.finish()


def _from_original(
    original: Qwen3Block,
    block: Qwen3Block,
    method: Method,
    parts: Mapping[Site, Sequence[tuple[Site, Scheme]]],
    share: Share,
    rope: Rope,
    result: QuantizedBlock,
    *,
    passes_on: bool,
) -> None:
    """Quantize `block`, all of whose sites are observed with the original weights: batch by batch through them all.

    More chunks of experts than there are ranks are observed in a second pass. passes_on: put the original block's
    outputs in the place of its inputs, if they are what the method passes on.
    """
    team = share.team
    sites = {site: SiteQuantizing(block, site, parts[site], method, result) for site in block.sites}
    most = max(len(quantizing.chunks) for quantizing in sites.values())
    for start in range(0, most, team.size):
        units = [
            (site, experts)
            for site, quantizing in sites.items()
            for experts in quantizing.chunks[start : start + team.size]
        ]
        seen = [share.observing(method) if parts[site] else None for site, _ in units]
        goes_on = passes_on and not method.passes_on_quantized and start + team.size >= most
        for b, x_BTH in enumerate(share.hidden):
            run = original.stages(x_BTH, rope)
            for site in dict.fromkeys(site for site, _ in units):
                inputs = share.placed(_advance(run, site), b, len(x_BTH))
                for unit, statistics in zip(units, seen, strict=True):
                    if unit[0] == site:
                        _show(statistics, site, inputs, unit[1], result.index)
                del inputs
            if goes_on:
                share.hidden[b] = finish(run)
        shares = team.share([sites[site].cost(experts) for site, experts in units])
        owners = {u: rank for rank, mine in enumerate(shares) for u in mine}
        for u in range(len(units)):
            seen[u] = share.together(method, seen[u], owners[u])
        if start == 0:
            where = {site: u for u, (site, _) in reversed(list(enumerate(units)))}
            known = {site: (owners[u], seen[u]) for site, u in where.items()}
            _rebalance(block, method, parts, known, share, rope, index=result.index)
            del known
        solved = {
            u: sites[units[u][0]].solve(units[u][1], _taken(seen, u)) for u in shares[team.rank]
        }
        for u, (site, experts) in enumerate(units):
            sites[site].take(
                experts, team.broadcast(solved.pop(u, None), owners[u]), mine=owners[u] == team.rank
            )
    for quantizing in sites.values():
        quantizing.finish()


def _taken(seen: list[Any], u: int) -> Any:
    """Statistics are large: whoever is through with them lets go of them."""
    statistics, seen[u] = seen[u], None
    return statistics


def _rebalance(
    block: Qwen3Block,
    method: Method,
    parts: Mapping[Site, Sequence[tuple[Site, Scheme]]],
    seen: Mapping[Site, tuple[int, Any]],
    share: Share,
    rope: Rope,
    *,
    index: int,
) -> None:
    """Find each group's scale, all with the weights as they were, where the statistics are; then shift them.

    seen: of each site, the owner and, there, the statistics.
    """
    groups = [group for group in block.scale_groups if parts[group.site]]
    schemes = [_only_scheme(group.site, parts[group.site], method, index) for group in groups]
    found: list[list[Tensor]] = [[] for _ in groups]
    for group, scheme, scales in zip(groups, schemes, found, strict=True):
        owner, statistics = seen[group.site]
        if owner == share.team.rank:
            method.rebalance(
                _scale_task(block, group, statistics, rope, share, scales.append), scheme
            )
    for group, scales in zip(groups, found, strict=True):
        owner, statistics = seen[group.site]
        for scale_EI in share.team.broadcast(scales, owner):
            block.weights.update(migrate_scale(block.weights, group, scale_EI))
            if owner == share.team.rank:
                statistics.rescale(scale_EI)


class Runs:
    """A block's runs over all batches, halted at a site. As many as `room` holds; the others run anew when they are
    wanted, from the block's input up to the site, through whatever weights are there by then: to the same bits.
    """

    def __init__(self, block: Qwen3Block, share: Share, rope: Rope) -> None:
        self._block, self._share, self._hidden, self._rope = block, share, share.hidden, rope
        self._halted: list[_Halted] = []
        room, hidden = share.room, share.hidden
        for x_BTH in hidden:
            size = x_BTH.numel() // x_BTH.shape[-1] * block.widest * x_BTH.element_size()
            if room is not None and (room := room - size) < 0:
                break
            self._halted.append(_Halted(block.stages(x_BTH, rope)))

    def at(self, site: Site) -> Iterator[SiteInput]:
        """What each batch brings to the site. Sites are gone through in order; the same one may be asked for again."""
        for b in range(len(self._hidden)):
            if b < len(self._halted):
                halted = self._halted[b]
                halted.move(site)
                assert halted.inputs is not None
                inputs, count = halted.inputs, len(self._hidden[b])
            else:
                x_BTH = self._hidden[b]
                run, count = self._block.stages(x_BTH, self._rope), len(x_BTH)
                inputs = _advance(run, site)
            yield self._share.placed(inputs, b, count)

    def finish(self) -> None:
        """Put the block's outputs in the place of its inputs."""
        for b in range(len(self._hidden)):
            if b < len(self._halted):
                self._hidden[b] = self._halted[b].finish()
            else:
                self._hidden[b] = self._block(self._hidden[b], self._rope)


class _Halted:
    """One run, and what it brought to the site where it stands."""

    def __init__(self, run: Stages) -> None:
        self._run = run
        self._at: Site | None = None
        self.inputs: SiteInput | None = None

    def move(self, site: Site) -> None:
        if self._at != site:
            self.inputs = None  # or it would be kept while the run makes the next one
            self._at, self.inputs = site, _advance(self._run, site)

    def finish(self) -> Tensor:
        self.inputs = None
        return finish(self._run)


def _advance(run: Stages, site: Site) -> SiteInput:
    """Let a run go on until it halts at the site."""
    while True:
        reached, inputs = next(run)
        if reached == site:
            return inputs


def _show(
    statistics: Statistics | None, site: Site, inputs: SiteInput, experts: slice, index: int
) -> None:
    """Show some of a site's experts what one batch brings them. statistics: None if nobody looks."""
    some = inputs.experts if len(inputs.experts) == 1 else inputs.experts[experts]
    # Experts' inputs that are made on the way are checked where they are made.
    checked = some if isinstance(some, list) else []
    for tokens_TI in checked if inputs.whole_TI is None else [inputs.whole_TI]:
        if not all_finite(tokens_TI):
            raise NumericsError(
                f"blocks.{index}.{site.name}: calibration activations are not finite"
            )
    if statistics is not None:
        statistics.update(replace(inputs, experts=some, linears=len(site.weights)))


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


def _only_scheme(
    site: Site, parts: Sequence[tuple[Site, Scheme]], method: Method, index: int
) -> Scheme:
    part, scheme = parts[0]
    if part != site and type(method).rebalance is not Method.rebalance:
        raise IncompatibleError(
            f"blocks.{index}.{site.name}: one scale is shifted to all linears of a site, so they take one setting"
        )
    return scheme


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
            _check_scales(
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


def _check_scales(quantized: StoredWeight, weight_EOI: Tensor, where: str) -> None:
    largest = quantized.largest_scale()
    if not largest <= LARGEST_SCALE:  # also when it is not a number
        outlier = float(weight_EOI.abs().amax())
        raise NumericsError(
            f"{where.removesuffix('.weight')}: its largest weight, {outlier:g}, needs a scale of {largest:g}, "
            f"and a scale is stored in 16 bits, {LARGEST_SCALE:g} at most; skip this linear, or mend the checkpoint"
        )


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


def _scale_task(
    block: Qwen3Block,
    group: ScaleGroup,
    statistics: Any,
    rope: Rope,
    share: Share,
    apply: Callable[[Tensor], None],
) -> ScaleTask:
    attention = group.site.name == "qkv"

    def run(rows_RTI: Tensor, exchanged: Mapping[str, Tensor]) -> Tensor:
        piece = block.with_weights(exchanged)
        return finish(
            piece.attention_stages(rows_RTI, rope) if attention else piece.mlp_stages(rows_RTI)
        )

    windows = statistics.windows() if isinstance(statistics, Kept) else ()
    row = share.length if attention else 1
    return ScaleTask(group, block.weights, statistics, windows, row, run, share.spool, apply)


def migrate_scale(
    weights: Mapping[str, Tensor], group: ScaleGroup, scale_EI: Tensor
) -> dict[str, Tensor]:
    """The group's weights with `scale` taken from the producer's outputs and given to its readers' input columns.

    The block computes the same function: (x / s) (W s)^T = x W^T.

    Args:
        scale_EI: one scale per channel of the site's input; one row for all experts or, where the producer is an
            expert's own linear, a row an expert.
    """
    changed = {}
    for name in (*group.site.weights, *group.site.also):
        weight = weights[name]
        columns = scale_EI[:, None, :] if weight.ndim == 3 else scale_EI[0]
        changed[name] = (weight.float() * columns).to(weight.dtype)
    producer = weights[group.producer]
    produced_EO = scale_EI
    if group.repeat > 1:
        produced_EO = scale_EI.unflatten(1, (-1, group.repeat, group.head_dim))[:, :, 0].flatten(1)
    if producer.ndim == 1:
        divisor = produced_EO[0]
    else:
        divisor = produced_EO[:, :, None] if producer.ndim == 3 else produced_EO[0][:, None]
    changed[group.producer] = (producer.float() / divisor).to(producer.dtype)
    return changed


def quantize_ends(model: Decoder, schemes: Schemes) -> dict[str, StoredWeight]:
    """Round the embedding and the head to nearest in place, those that `schemes` wants so; codes by name.

    To nearest whatever the method: none of the papers treats them, an embedding is looked up and so has no inputs to
    weigh its errors by, and a head that is tied to it must be the same tensor. Tied, they are rounded once and filed
    under `embedding`.
    """
    wanted = {"embedding": schemes.embedding, "head": None if model.tied else schemes.head}
    codes: dict[str, StoredWeight] = {
        end: round_rows(model.rows(end), scheme, end)
        for end, scheme in wanted.items()
        if scheme is not None
    }
    if codes:
        model.exchange_ends(codes)
    return codes


def round_rows(parts: Iterable[Tensor], scheme: Scheme, where: str) -> QuantizedWeight:
    """A large matrix, given some rows after the other, rounded to nearest on GPTQ's min-max grid, as one expert
    [1, V, H]; on the CPU."""
    rounded = []
    for rows_RH in parts:
        wide_1RH = rows_RH.float()[None]
        if not all_finite(wide_1RH):
            raise NumericsError(f"{where}: the checkpoint's weights are not finite")
        grid = minmax_grid(
            into_groups(wide_1RH, scheme.group_size), scheme.bits, symmetric=scheme.symmetric
        )
        part = round_to_grid(
            wide_1RH, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric
        )
        _check_scales(part, wide_1RH, where)
        rounded.append(part.to("cpu"))
    return concatenate_rows(rounded)

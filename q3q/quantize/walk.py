"""The walk: block by block, observe, rebalance, quantize, pass on.

The ranks of a gang walk in step, each with the activations of its lanes of the calibration windows;
statistics are added up in the order of lanes (`quantize.lanes`). Ranks divide a solve only
where one process divides it too, so no bit depends on their number: by chunks of experts, then by
sites, then by rows (`Method.row_step`).

Shapes: B windows, T tokens of a window, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from q3q.models.anatomy import Site
from q3q.models.block import Block, Rope, finish
from q3q.models.decoder import Decoder
from q3q.models.footprint import CHUNK_BYTES, OBSERVED_BYTES
from q3q.numerics.linalg import FiniteCheck
from q3q.quantize.activations import (
    Activations,
    activations_of,
    pass_through,
    refuse_infinite,
    show_inputs,
)
from q3q.quantize.block import BlockSink, QuantizedBlock, stored_numbers
from q3q.quantize.method import Method
from q3q.quantize.peaks import SitePeaks, read_peaks
from q3q.quantize.runs import Runs, advance_to
from q3q.quantize.scales import Rebalancing
from q3q.quantize.sites import Chunk, SiteQuantizer, solve_chunks
from q3q.quantize.statistics import Statistics
from q3q.reporter import Steps, no_steps
from q3q.spec import Scheme, Schemes
from q3q.team import Team


def quantize_model(
    model: Decoder,
    method: Method,
    scheme: Scheme | Schemes,
    windows_BT: Tensor | None,
    sink: BlockSink,
    steps: Steps = no_steps,
) -> list[QuantizedBlock]:
    """Return all of `quantized_blocks`; steps receives the blocks done and in all.

    Tests and benchmarks do; a trial exports and drops each block as it comes.
    """
    blocks = []
    for block in quantized_blocks(model, method, scheme, windows_BT, sink):
        blocks.append(block.on_cpu())
        del block  # its codes would lie on a GPU while the next ones are found
        steps(len(blocks), len(model.blocks))
    return blocks


def quantized_blocks(
    model: Decoder,
    method: Method,
    scheme: Scheme | Schemes,
    windows_BT: Tensor | None,
    sink: BlockSink,
) -> Iterator[QuantizedBlock]:
    """Quantize the model in place; yield each block's result where the model is, and keep none.

    A block that the sink holds already is not computed again. A streamed model reads its quantized
    blocks from the sink from then on.

    Args:
        scheme: for every linear, or `Schemes` for each.
        windows_BT: token ids of the calibration windows; None for a method that observes nothing.
        sink: takes each result before it is yielded.

    Raises:
        IntegrityError: the sink does not return a block that a streamed model needs.
    """
    schemes = scheme if isinstance(scheme, Schemes) else Schemes(scheme)
    team = model.team
    walk: Walk = team.run_on_all(
        _start, model.number, method, schemes, windows_BT, model=model, sink=sink
    )
    with walk.activations.hidden:
        for k in range(len(model.blocks)):
            result: QuantizedBlock = team.run_on_all(_step, model.number, k, walk=walk)
            yield result
            del result
    team.run_on_all(_end, model.number, walk=walk)


# Each rank runs the next three functions. Rank 0 passes its own model and walk by keyword; the
# others find theirs by the model's number.


def _start(
    team: Team,
    number: int,
    method: Method,
    schemes: Schemes,
    windows_BT: Tensor | None,
    model: Decoder | None = None,
    sink: BlockSink | None = None,
) -> "Walk":
    own = model or team.models[number]
    walk = Walk(own, method, schemes, activations_of(own, windows_BT), sink)
    if model is None:
        team.models[number].walk = walk
    return walk


def _step(team: Team, number: int, k: int, walk: "Walk | None" = None) -> QuantizedBlock | None:
    return (walk or team.models[number].walk).step(k)


def _end(team: Team, number: int, walk: "Walk | None" = None) -> None:
    (walk or team.models[number].walk).activations.hidden.close()
    if walk is None:
        team.models[number].walk = None


@dataclass(frozen=True)
class Walk:
    """A model that is being quantized, on one rank.

    activations: the next block's inputs
    sink: None on all ranks but 0
    """

    model: Decoder
    method: Method
    schemes: Schemes
    activations: Activations
    sink: BlockSink | None

    def step(self, k: int) -> QuantizedBlock | None:
        """Quantize the k-th block, unless the sink holds it; return the stored result on rank 0."""
        model, method, activations = self.model, self.method, self.activations
        passes_on = activations.windows > 0 and k < len(model.blocks) - 1
        result = None if self.sink is None else self.sink.load(k)
        source = partial(stored_numbers, self.sink, k, model.norm_H)
        if activations.team.broadcast(result is None):
            result, block = quantize_block(
                model.blocks[k],
                k,
                method,
                self.schemes,
                activations,
                model.rope,
                passes_on=passes_on,
            )
            if self.sink is not None:
                self.sink.store(result)
            model.exchange(k, block, source)
        else:
            if passes_on and not method.passes_on_quantized:
                pass_through(model.blocks[k], activations.hidden, model.rope)
            model.exchange(k, None, source)
            if passes_on and method.passes_on_quantized:
                pass_through(model.blocks[k], activations.hidden, model.rope)
        return None if self.sink is None else result


def quantize_block(
    original: Block,
    index: int,
    method: Method,
    schemes: Schemes,
    activations: Activations,
    rope: Rope,
    *,
    passes_on: bool = False,
) -> tuple[QuantizedBlock, Block]:
    """Quantize one block; return the result, and the block with the new weights as numbers.

    Args:
        original: not modified.
        activations: the block's inputs; empty if the method observes nothing.
        passes_on: replace `activations` by the next block's inputs.
    """
    block = original.with_weights({})
    result = QuantizedBlock(index, {}, {}, [])
    sites = [SiteQuantizer(block, site, schemes, method, result) for site in block.sites]
    quantized = {name for site in sites for part, _ in site.parts for name in part.weights}
    others = {name: weight for name, weight in block.weights.items() if name not in quantized}
    peaks = SitePeaks(sites)
    if method.sequential:
        del original  # each of its weights is freed as soon as it is replaced in `block`
        runs = Runs(block, activations, rope)
        for site in sites:
            _quantize_next(site, runs, method, activations, peaks)
        if passes_on:
            runs.finish()
    else:
        _quantize_together(
            original,
            block,
            sites,
            method,
            activations,
            rope,
            passes_on_original=passes_on and not method.passes_on_quantized and not peaks,
        )
        if peaks:
            shown = block if method.passes_on_quantized else original
            read_peaks(block, activations, rope, peaks, passes_on=shown if passes_on else None)
        del original
        if passes_on and method.passes_on_quantized and not peaks:
            pass_through(block, activations.hidden, rope)
    result.peaks = peaks.numbers(index, activations.team)
    # Norms, a router, or a linear that is left out may have been rescaled: they stay numbers.
    result.changed |= {
        name: block.weights[name] for name, old in others.items() if block.weights[name] is not old
    }
    return result, block


def _quantize_next(
    site: SiteQuantizer, runs: Runs, method: Method, activations: Activations, peaks: SitePeaks
) -> None:
    """Quantize the next site for a sequential method: its inputs come through quantized sites.

    The ranks take one chunk of experts each; all ranks share a single chunk, by rows.
    """
    ranks = activations.team.size
    for start in range(0, len(site.chunks), ranks):
        chunks = [
            Chunk(site, experts, owner=rank, shared=len(site.chunks) == 1)
            for rank, experts in enumerate(site.chunks[start : start + ranks])
        ]
        for chunk in chunks:
            statistics = _observe_next(chunk, runs, method, activations, peaks)
            owner = None if chunk.shared else chunk.owner
            chunk.statistics = activations.add_up(method, statistics, owner)
            del statistics
        solve_chunks(chunks, activations.team)
    site.finish()


def _observe_next(
    chunk: Chunk, runs: Runs, method: Method, activations: Activations, peaks: SitePeaks
) -> Statistics | None:
    """Return this rank's statistics of a chunk's inputs at the site where all runs halt next."""
    site, check = chunk.quantizer.site, FiniteCheck()
    statistics = activations.new_statistics(method) if chunk.quantizer.parts else None
    for inputs in runs.inputs_of(site):
        show_inputs(statistics, site, inputs, chunk.experts, check)
        if chunk.experts.start == 0:  # the inputs of all chunks at this site are the same
            peaks.update(site, inputs)
    refuse_infinite(check, site, chunk.quantizer.result.index)
    return statistics


def _quantize_together(
    original: Block,
    block: Block,
    sites: Sequence[SiteQuantizer],
    method: Method,
    activations: Activations,
    rope: Rope,
    *,
    passes_on_original: bool,
) -> None:
    """Quantize the sites of `block`, all observed with the original block's weights.

    Each pass runs all batches through the original block and solves some chunks of each site's
    experts: at least one for each rank, and as many as `OBSERVED_BYTES` allow.
    """
    team, rebalancing = activations.team, Rebalancing(original, block, method, activations, rope)
    most_chunks = max(len(site.chunks) for site in sites)
    step = max(team.size, OBSERVED_BYTES // CHUNK_BYTES)
    for start in range(0, most_chunks, step):
        chunks = [
            Chunk(site, experts) for site in sites for experts in site.chunks[start : start + step]
        ]
        is_last = start + step >= most_chunks
        _observe(
            original, chunks, method, activations, rope, pass_on=passes_on_original and is_last
        )
        costs = [chunk.quantizer.cost(chunk.experts) for chunk in chunks]
        for rank, owned in enumerate(team.divide(costs)):
            for c in owned:
                chunks[c].owner = rank
        for chunk in chunks:
            chunk.statistics = activations.add_up(method, chunk.statistics, chunk.owner)
        rebalancing.shift(chunks)
        for site in sites:
            site.overwritten = rebalancing.changed
        solve_chunks(chunks, team)
    for site in sites:
        site.finish()


def _observe(
    original: Block,
    chunks: Sequence[Chunk],
    method: Method,
    activations: Activations,
    rope: Rope,
    *,
    pass_on: bool,
) -> None:
    """Give the chunks statistics of their inputs: each batch runs once through the whole block.

    Args:
        pass_on: replace the block's inputs by its outputs.
    """
    if method.observe() is None and not pass_on:
        return
    readers: dict[Site, list[Chunk]] = {}
    for chunk in chunks:
        readers.setdefault(chunk.quantizer.site, []).append(chunk)
        if chunk.quantizer.parts:
            chunk.statistics = activations.new_statistics(method, chunk.experts)
    checks = {site: FiniteCheck() for site in readers}
    for b, x_BTH in enumerate(activations.hidden):
        run = original.stages(x_BTH, rope)
        for site, site_chunks in readers.items():
            inputs = activations.number_windows(advance_to(run, site), b, len(x_BTH))
            for chunk in site_chunks:
                show_inputs(chunk.statistics, site, inputs, chunk.experts, checks[site])
            del inputs
        if pass_on:
            activations.hidden[b] = finish(run)
    for site, check in checks.items():
        refuse_infinite(check, site, readers[site][0].quantizer.result.index)

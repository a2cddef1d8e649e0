"""The walk: block by block, observe, rebalance, quantize, pass on.

In a gang all ranks walk in step. Each has the activations of its lanes of the calibration windows
(`calibrate.statistics`), whose statistics are added up in the order of lanes. A site's solve is divided where one
process divides it as well, so that no bit depends on the number of ranks: runs of experts, then whole sites, then rows
(`Method.row_step`).

Shapes: B windows, T tokens of one, H hidden; E, O, I as in `quantize.method`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from q3q.models.anatomy import Site
from q3q.models.decoder import Decoder
from q3q.models.qwen3 import Qwen3Block, Rope, finish
from q3q.quantize.activations import (
    Activations,
    Runs,
    activations_of,
    advance_runs,
    pass_through,
    show_inputs,
)
from q3q.quantize.block import BlockSink, QuantizedBlock
from q3q.quantize.method import Method
from q3q.quantize.scales import exchanging, rebalance_group
from q3q.quantize.sites import SiteQuantizing, parts_of
from q3q.spec import Scheme, Schemes
from q3q.team import Team


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
        activations_of(model or team.held[number], windows_BT),
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
class Walk:
    """A model on its way from numbers to codes, on one rank. sink: rank 0's."""

    model: Decoder
    method: Method
    schemes: Schemes
    share: Activations
    sink: BlockSink | None

    def step(self, k: int) -> QuantizedBlock | None:
        """The k-th block; on rank 0 its codes, which are stored by then."""
        model, method, share = self.model, self.method, self.share
        passes_on = share.windows > 0 and k < len(model.blocks) - 1
        result = None if self.sink is None else self.sink.load(k)
        source = partial(exchanging, self.sink, k, model.norm_H)
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
                pass_through(model.blocks[k], share.hidden, model.rope)
            model.exchange(k, None, source)
            if passes_on and method.passes_on_quantized:
                pass_through(model.blocks[k], share.hidden, model.rope)
        return None if self.sink is None else result


def quantize_block(
    original: Qwen3Block,
    index: int,
    method: Method,
    schemes: Schemes,
    share: Activations,
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
        pass_through(block, share.hidden, rope)
    return result, block


def _one_after_the_other(
    quantizing: "SiteQuantizing", runs: "Runs", method: Method, share: Activations
) -> None:
    """A site that waits for those before it: its experts chunk by chunk, one on each rank, or its rows divided."""
    team, chunks = share.team, quantizing.chunks
    for start in range(0, len(chunks), team.size):
        some = list(enumerate(chunks[start : start + team.size]))
        seen = None
        for owner, experts in some:
            statistics = share.observing(method) if quantizing.parts else None
            for inputs in runs.at(quantizing.site):
                show_inputs(statistics, quantizing.site, inputs, experts, quantizing.result.index)
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
    share: Activations,
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
                inputs = share.placed(advance_runs(run, site), b, len(x_BTH))
                for unit, statistics in zip(units, seen, strict=True):
                    if unit[0] == site:
                        show_inputs(statistics, site, inputs, unit[1], result.index)
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
            rebalance_group(block, method, parts, known, share, rope, index=result.index)
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

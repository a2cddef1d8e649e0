"""The walk: block by block, observe, rebalance, quantize, pass on.

Shapes: B windows, T tokens of one, H hidden; E, O, I as in `quantize.method`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from q3q.calibrate.statistics import Gram, Kept, Statistics
from q3q.errors import NumericsError
from q3q.models.anatomy import ScaleGroup, Site
from q3q.models.decoder import Decoder
from q3q.models.qwen3 import Qwen3Block, Rope, finish
from q3q.numerics.weights import QuantizedWeight
from q3q.quantize.method import Method, ScaleTask, SiteTask
from q3q.record import SiteError
from q3q.spec import Scheme

# Calibration tokens that go through a block together.
BATCH_TOKENS = 8192


@dataclass
class QuantizedBlock:
    """What quantizing one block gave: codes by weight name, exchanged weights that stay numbers (norms), and facts."""

    index: int
    quantized: dict[str, QuantizedWeight]
    changed: dict[str, Tensor]
    errors: list[SiteError]
    notes: dict[str, Any] = field(default_factory=dict)

    def weights_for(self, block: Qwen3Block) -> dict[str, Tensor]:
        """The block's exchanged weights as numbers in its own dtype and shapes."""
        weights = {name: weight.to(block.weights[name]) for name, weight in self.changed.items()}
        for name, quantized in self.quantized.items():
            old = block.weights[name]
            weights[name] = quantized.to(old.device).dequantize().view(old.shape).to(old.dtype)
        return weights

    def parked(self) -> "QuantizedBlock":
        """The same in main memory, so that a whole model's codes do not fill a GPU."""
        quantized = {name: weight.to("cpu") for name, weight in self.quantized.items()}
        changed = {name: weight.cpu() for name, weight in self.changed.items()}
        return replace(self, quantized=quantized, changed=changed)


class BlockSink(Protocol):
    """Where quantized blocks go, and come from when a killed trial goes on."""

    def load(self, index: int) -> QuantizedBlock | None: ...

    def store(self, block: QuantizedBlock) -> None: ...


def quantize_model(
    model: Decoder,
    method: Method,
    scheme: Scheme,
    windows_BT: Tensor | None,
    sink: BlockSink,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[QuantizedBlock]:
    """Quantize every block of `model` in place, first to last; blocks that the sink already holds are taken from it.

    Args:
        windows_BT: calibration token ids, None for a method that observes nothing.
        progress: told (blocks done, blocks in all).
    """
    rope = model.rope
    hidden: list[Tensor] = []
    if windows_BT is not None:
        rows = max(1, BATCH_TOKENS // windows_BT.shape[1])
        hidden = [model.embed(part) for part in windows_BT.split(rows)]
    results = []
    for k, block in enumerate(model.blocks):
        result = sink.load(k)
        original_outputs: list[Tensor] | None = None
        if result is None:
            result, original_outputs, quantized_outputs = quantize_block(block, k, method, scheme, hidden, rope)
            result = result.parked()
            sink.store(result)
        else:
            quantized_outputs = None
        quantized = block.with_weights(result.weights_for(block))
        last = k == len(model.blocks) - 1
        if hidden and not last:
            if method.passes_on_quantized:
                hidden = quantized_outputs or [quantized(x, rope) for x in hidden]
            else:
                hidden = original_outputs or [block(x, rope) for x in hidden]
        model.blocks[k] = quantized
        results.append(result)
        progress(k + 1, len(model.blocks))
    return results


def quantize_block(
    original: Qwen3Block, index: int, method: Method, scheme: Scheme, hidden: Sequence[Tensor], rope: Rope
) -> tuple[QuantizedBlock, list[Tensor] | None, list[Tensor] | None]:
    """One block. Returns it with the outputs that came along: of the original block, and of the quantized one.

    original: not modified. hidden: the block's inputs [B, T, H], batch by batch; empty if the method observes nothing.
    """
    block = original.with_weights({})
    result = QuantizedBlock(index, {}, {}, [])
    runs = [block.stages(x_BTH, rope) for x_BTH in hidden]
    original_outputs: list[Tensor] | None = None
    quantized_outputs: list[Tensor] | None = None
    if method.sequential:
        # Each run halts before a site is read and goes on with the weights that were put there meanwhile.
        for site in block.sites:
            statistics = _observe(method, site, runs, index)
            _quantize_site(block, site, statistics, method, scheme, result)
        quantized_outputs = [finish(run) for run in runs]
    else:
        seen = {site.name: _observe(method, site, runs, index) for site in block.sites}
        if runs:
            original_outputs = [finish(run) for run in runs]
        for group in block.scale_groups:
            method.rebalance(_scale_task(block, group, seen[group.site.name], rope, hidden, result), scheme)
        for site in block.sites:
            _quantize_site(block, site, seen.pop(site.name), method, scheme, result)
    return result, original_outputs, quantized_outputs


def _observe(method: Method, site: Site, runs: Sequence[Iterator[Any]], index: int) -> Statistics | None:
    statistics = method.observe()
    for run in runs:
        reached, inputs = next(run)
        assert reached == site
        for tokens_TI in inputs.experts:
            if not torch.isfinite(tokens_TI).all():
                raise NumericsError(f"blocks.{index}.{site.name}: calibration activations are not finite")
        if statistics is not None:
            statistics.update(inputs)
    return statistics


def _quantize_site(
    block: Qwen3Block, site: Site, statistics: Any, method: Method, scheme: Scheme, result: QuantizedBlock
) -> None:
    weight_EOI, rows = stack_rows(block.weights, site)
    where = f"blocks.{result.index}.{site.name}"
    if not torch.isfinite(weight_EOI).all():
        raise NumericsError(f"{where}: the checkpoint's weights are not finite")
    task = SiteTask(result.index, site.name, weight_EOI, rows, statistics)
    try:
        quantized = method.quantize(task, scheme)
    except NumericsError as error:
        raise NumericsError(f"{where}: {error}") from error
    if task.notes:
        result.notes[where] = task.notes
    gram = statistics.gram if isinstance(statistics, Kept) else statistics
    rounded_EOI = quantized.dequantize()
    for name, part in rows.items():
        result.quantized[name] = quantized.rows(part.start, part.stop)
        result.errors.append(_site_error(result.index, site, name, weight_EOI[:, part], rounded_EOI[:, part], gram))
        old = block.weights[name]
        block.weights[name] = rounded_EOI[:, part].reshape(old.shape).to(old.dtype)


def stack_rows(weights: Mapping[str, Tensor], site: Site) -> tuple[Tensor, dict[str, slice]]:
    """A site's weights as one [E, O, I] in float32, and where each one's rows are."""
    parts, rows, start = [], {}, 0
    for name in site.weights:
        weight = weights[name] if weights[name].ndim == 3 else weights[name][None]
        parts.append(weight.float())
        rows[name] = slice(start, start + weight.shape[1])
        start += weight.shape[1]
    return torch.cat(parts, dim=1), rows


def _site_error(
    index: int, site: Site, name: str, weight_EOI: Tensor, rounded_EOI: Tensor, gram: Gram | None
) -> SiteError:
    wrong_EOI = weight_EOI - rounded_EOI
    output_error = None
    if isinstance(gram, Gram):
        sum_EII = gram.sum_EII
        before = ((weight_EOI @ sum_EII) * weight_EOI).sum()
        after = ((wrong_EOI @ sum_EII) * wrong_EOI).sum()
        output_error = _root_ratio(after, before)
    linear = name.removesuffix(".weight")
    return SiteError(
        block=index,
        site=site.name,
        linear=linear,
        weight_error=_root_ratio(wrong_EOI.square().sum(), weight_EOI.square().sum()),
        output_error=output_error,
    )


def _root_ratio(part: Tensor, whole: Tensor) -> float:
    """sqrt(part / whole); a whole of nothing has no error."""
    return float((part.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


def _scale_task(
    block: Qwen3Block,
    group: ScaleGroup,
    statistics: Any,
    rope: Rope,
    hidden: Sequence[Tensor],
    result: QuantizedBlock,
) -> ScaleTask:
    shapes = [x_BTH.shape for x_BTH in hidden]

    def run(exchanged: Mapping[str, Tensor]) -> Iterator[Tensor]:
        piece = block.with_weights(exchanged)
        for batch, shape in zip(statistics.batches, shapes, strict=True):
            normed_BTH = batch.whole_TI.view(shape)
            if group.site.name == "qkv":
                yield finish(piece.attention_stages(normed_BTH, rope))
            else:
                yield finish(piece.mlp_stages(normed_BTH))

    def apply(scale_EI: Tensor) -> None:
        changed = migrate_scale(block.weights, group, scale_EI)
        block.weights.update(changed)
        # Weights that are quantized later come back as codes; what stays numbers must be kept as it is now.
        linears = {name for site in block.sites for name in site.weights}
        result.changed.update({name: weight for name, weight in changed.items() if name not in linears})
        statistics.rescale(scale_EI)

    return ScaleTask(group, block.weights, statistics, run, apply)


def migrate_scale(weights: Mapping[str, Tensor], group: ScaleGroup, scale_EI: Tensor) -> dict[str, Tensor]:
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

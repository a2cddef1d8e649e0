"""The walk: block by block, observe, rebalance, quantize, pass on.

Shapes: B windows, T tokens of one, H hidden; E, O, I as in `quantize.method`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm

from q3q.calibrate.statistics import Gram, Kept, Statistics
from q3q.errors import IncompatibleError, NumericsError
from q3q.models.anatomy import ScaleGroup, Site
from q3q.models.decoder import Decoder
from q3q.models.qwen3 import Qwen3Block, Rope, finish
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.linalg import quadratic_form_E
from q3q.numerics.weights import QuantizedWeight, StoredWeight, concatenate_rows, round_to_grid, with_scales
from q3q.quantize.method import Method, ScaleTask, SiteTask
from q3q.record import SiteError
from q3q.spec import Scheme, Schemes

# Calibration tokens that go through a block together: on a CPU so few that what lies between two sites stays in cache.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
# Rows of an embedding rounded at a time; bounds memory, changes nothing.
EMBEDDING_ROWS = 16384
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
    scheme: Scheme | Schemes,
    windows_BT: Tensor | None,
    sink: BlockSink,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[QuantizedBlock]:
    """Quantize every block of `model` in place, first to last; blocks that the sink already holds are taken from it.

    Args:
        scheme: of every linear, or of each (`Schemes`).
        windows_BT: calibration token ids, None for a method that observes nothing.
        progress: told (blocks done, blocks in all).
    """
    schemes = scheme if isinstance(scheme, Schemes) else Schemes(scheme)
    rope = model.rope
    hidden: list[Tensor] = []
    if windows_BT is not None:
        rows = max(1, BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]) // windows_BT.shape[1])
        hidden = [model.embed(part) for part in windows_BT.split(rows)]
    results = []
    for k, block in enumerate(model.blocks):
        result = sink.load(k)
        original_outputs: list[Tensor] | None = None
        if result is None:
            result, original_outputs, quantized_outputs = quantize_block(block, k, method, schemes, hidden, rope)
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
    original: Qwen3Block, index: int, method: Method, schemes: Schemes, hidden: Sequence[Tensor], rope: Rope
) -> tuple[QuantizedBlock, list[Tensor] | None, list[Tensor] | None]:
    """One block. Returns it with the outputs that came along: of the original block, and of the quantized one.

    original: not modified. hidden: the block's inputs [B, T, H], batch by batch; empty if the method observes nothing.
    """
    block = original.with_weights({})
    result = QuantizedBlock(index, {}, {}, [])
    runs, windows = [block.stages(x_BTH, rope) for x_BTH in hidden], [len(x_BTH) for x_BTH in hidden]
    original_outputs: list[Tensor] | None = None
    quantized_outputs: list[Tensor] | None = None
    if method.sequential:
        # Each run halts before a site is read and goes on with the weights that were put there meanwhile.
        for site in block.sites:
            parts = parts_of(site, schemes, index)
            statistics = _observe(method if parts else None, site, runs, index, windows)
            _quantize_site(block, site, parts, statistics, method, result)
        quantized_outputs = [finish(run) for run in runs]
    else:
        parts_by_site = {site: parts_of(site, schemes, index) for site in block.sites}
        seen = {
            site: _observe(method if parts else None, site, runs, index, windows)
            for site, parts in parts_by_site.items()
        }
        if runs:
            original_outputs = [finish(run) for run in runs]
        for group in block.scale_groups:
            if parts_by_site[group.site]:
                scheme = _only_scheme(group.site, parts_by_site[group.site], method, index)
                method.rebalance(_scale_task(block, group, seen[group.site], rope, hidden), scheme)
        for site, parts in parts_by_site.items():
            _quantize_site(block, site, parts, seen.pop(site), method, result)
    # What was rescaled and is not quantized (norms, the router, a linear that is left out) stays as numbers.
    result.changed |= {
        name: weight
        for name, weight in block.weights.items()
        if name not in result.quantized and weight is not original.weights[name]
    }
    return result, original_outputs, quantized_outputs


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


def _only_scheme(site: Site, parts: Sequence[tuple[Site, Scheme]], method: Method, index: int) -> Scheme:
    part, scheme = parts[0]
    if part != site and type(method).rebalance is not Method.rebalance:
        raise IncompatibleError(
            f"blocks.{index}.{site.name}: one scale is shifted to all linears of a site, so they take one setting"
        )
    return scheme


def _observe(
    method: Method | None, site: Site, runs: Sequence[Iterator[Any]], index: int, windows: Sequence[int]
) -> Statistics | None:
    """Move every run to the site. method: whose statistics to feed, None for a site that is left out.

    windows: how many each run holds.
    """
    statistics = None if method is None else method.observe()
    for run, count in zip(runs, windows, strict=True):
        reached, inputs = next(run)
        assert reached == site
        for tokens_TI in inputs.experts if inputs.whole_TI is None else [inputs.whole_TI]:
            if not torch.isfinite(tokens_TI).all():
                raise NumericsError(f"blocks.{index}.{site.name}: calibration activations are not finite")
        if statistics is not None:
            statistics.update(replace(inputs, windows=count, of_windows=sum(windows), linears=len(site.weights)))
    return statistics


def _quantize_site(
    block: Qwen3Block,
    site: Site,
    parts: Sequence[tuple[Site, Scheme]],
    statistics: Any,
    method: Method,
    result: QuantizedBlock,
) -> None:
    if parts:
        _note_tokens(site, statistics, result)
    for part, scheme in parts:
        where = f"blocks.{result.index}.{site.name}"
        if part != site:
            where += f" ({', '.join(name.removesuffix('.weight') for name in part.weights)})"
        _quantize_part(block, part, where, statistics, method, scheme, result)


def _note_tokens(site: Site, statistics: Any, result: QuantizedBlock) -> None:
    """For the record: each expert's tokens, once a block; and where a Hessian lacks the tokens to have full rank."""
    where = f"blocks.{result.index}.{site.name}"
    if statistics is None or not len(statistics.tokens_E):
        return
    tokens: list[int] = statistics.tokens_E.tolist()
    if len(tokens) > 1 and site.name == "gate_up":
        result.notes[where] = {"tokens_per_expert": tokens}
    if not isinstance(statistics, Gram):
        return
    columns = statistics.sum_EII.shape[-1]
    short = [count for count in tokens if count < columns]
    if short and len(tokens) == 1:
        # Every block of a dense model sees the same tokens: by this name the record has it once a site.
        result.notes[f"{site.name}.fewer_tokens_than_columns"] = {"rank": short[0], "columns": columns}
    elif short:
        note = {"experts": len(short), "lowest_rank": min(short), "columns": columns}
        result.notes[where] = {**result.notes.get(where, {}), "fewer_tokens_than_columns": note}


def _quantize_part(
    block: Qwen3Block,
    site: Site,
    where: str,
    statistics: Any,
    method: Method,
    scheme: Scheme,
    result: QuantizedBlock,
) -> None:
    weight_EOI, rows = stack_rows(block.weights, site)
    if not torch.isfinite(weight_EOI).all():
        raise NumericsError(f"{where}: the checkpoint's weights are not finite")
    task = SiteTask(result.index, site.name, weight_EOI, rows, statistics)
    try:
        quantized = with_scales(method.quantize(task, scheme), scheme.scales)
    except NumericsError as error:
        raise NumericsError(f"{where}: {error}") from error
    if task.notes:
        result.notes[where] = {**result.notes.get(where, {}), **task.notes}
    gram = statistics.gram if isinstance(statistics, Kept) else statistics
    for name, part in rows.items():
        result.quantized[name] = quantized.rows(part.start, part.stop)
        _check_scales(result.quantized[name], weight_EOI[:, part], f"blocks.{result.index}.{name}")
        rounded_EOI = result.quantized[name].dequantize()
        result.errors.append(_site_error(result.index, site, name, weight_EOI[:, part], rounded_EOI, gram))
        old = block.weights[name]
        block.weights[name] = rounded_EOI.reshape(old.shape).to(old.dtype)


def _check_scales(quantized: StoredWeight, weight_EOI: Tensor, where: str) -> None:
    largest = quantized.largest_scale()
    if not largest <= LARGEST_SCALE:  # also when it is not a number
        outlier = float(weight_EOI.abs().amax())
        raise NumericsError(
            f"{where.removesuffix('.weight')}: its largest weight, {outlier:g}, needs a scale of {largest:g}, "
            f"and a scale is stored in 16 bits, {LARGEST_SCALE:g} at most; skip this linear, or mend the checkpoint"
        )


def stack_rows(weights: Mapping[str, Tensor], site: Site) -> tuple[Tensor, dict[str, slice]]:
    """A site's weights as one [E, O, I] in float32, and where each one's rows are."""
    parts, rows, start = [], {}, 0
    for name in site.weights:
        weight = weights[name] if weights[name].ndim == 3 else weights[name][None]
        parts.append(weight)
        rows[name] = slice(start, start + weight.shape[1])
        start += weight.shape[1]
    return torch.cat(parts, dim=1).float(), rows


def _site_error(
    index: int, site: Site, name: str, weight_EOI: Tensor, rounded_EOI: Tensor, gram: Gram | None
) -> SiteError:
    wrong_EOI = weight_EOI - rounded_EOI
    output_error = None
    if isinstance(gram, Gram):
        before_E, after_E = (quadratic_form_E(rows_EOI, gram.sum_EII) for rows_EOI in (weight_EOI, wrong_EOI))
        output_error = _root_ratio(after_E.sum(), before_E.sum())
    return SiteError(
        block=index,
        site=site.name,
        linear=name.removesuffix(".weight"),
        weight_error=_root_ratio(vector_norm(wrong_EOI).square(), vector_norm(weight_EOI).square()),
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
) -> ScaleTask:
    attention = group.site.name == "qkv"

    def rows() -> Tensor:
        whole_TI: Tensor = statistics.whole_TI()
        return whole_TI.view(-1, hidden[0].shape[1] if attention else 1, whole_TI.shape[1])

    def run(rows_RTI: Tensor, exchanged: Mapping[str, Tensor]) -> Tensor:
        piece = block.with_weights(exchanged)
        return finish(piece.attention_stages(rows_RTI, rope) if attention else piece.mlp_stages(rows_RTI))

    def apply(scale_EI: Tensor) -> None:
        block.weights.update(migrate_scale(block.weights, group, scale_EI))
        statistics.rescale(scale_EI)

    return ScaleTask(group, block.weights, statistics, rows, run, apply)


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


def quantize_ends(model: Decoder, schemes: Schemes) -> dict[str, StoredWeight]:
    """Round the embedding and the head to nearest in place, those that `schemes` wants so; codes by name.

    To nearest whatever the method: none of the papers treats them, an embedding is looked up and so has no inputs to
    weigh its errors by, and a head that is tied to it must be the same tensor. Tied, they are rounded once and filed
    under `embedding`.
    """
    codes: dict[str, StoredWeight] = {}
    tied = model.head_VH is model.embedding_VH
    if schemes.embedding is not None:
        codes["embedding"] = round_rows(model.embedding_VH, schemes.embedding, "embedding")
        model.embedding_VH = codes["embedding"].dequantize()[0].to(model.embedding_VH.dtype)
        codes["embedding"] = codes["embedding"].to("cpu")
    if tied:
        model.head_VH = model.embedding_VH
    elif schemes.head is not None:
        codes["head"] = round_rows(model.head_VH, schemes.head, "head")
        model.head_VH = codes["head"].dequantize()[0].to(model.head_VH.dtype)
        codes["head"] = codes["head"].to("cpu")
    return codes


def round_rows(weight_VH: Tensor, scheme: Scheme, where: str) -> QuantizedWeight:
    """A large matrix rounded to nearest on GPTQ's min-max grid, as one expert [1, V, H]."""
    parts = []
    for rows_RH in weight_VH.split(EMBEDDING_ROWS):
        wide_1RH = rows_RH.float()[None]
        if not torch.isfinite(wide_1RH).all():
            raise NumericsError(f"{where}: the checkpoint's weights are not finite")
        grid = minmax_grid(into_groups(wide_1RH, scheme.group_size), scheme.bits, symmetric=scheme.symmetric)
        parts.append(round_to_grid(wide_1RH, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric))
        _check_scales(parts[-1], wide_1RH, where)
    return concatenate_rows(parts)

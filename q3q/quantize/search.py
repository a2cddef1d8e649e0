"""The choice among a method's variants: the one that changes the model's predictions least.

Shapes: B windows, T tokens of a window, P positions, H hidden, C some of P, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from q3q.errors import NumericsError
from q3q.models.adjust import set_activations
from q3q.models.decoder import Decoder
from q3q.numerics.divergence import kl_divergence
from q3q.quantize.block_store import BlockStore
from q3q.quantize.method import Method
from q3q.quantize.walk import quantized_blocks
from q3q.reporter import Reporter, Steps, no_steps
from q3q.spec import Json, Scheme, Schemes, TrialSpec


def search_variants(
    model: Decoder,
    variants: Mapping[str, Method],
    scheme: Scheme | Schemes,
    windows_BT: Tensor,
    set_activations: Callable[[Decoder, Mapping[str, float]], None],
    phase: Callable[[str], Steps] = lambda name: no_steps,
) -> Json:
    """Quantize a copy of the model with each variant; choose the least change of predictions.

    The same windows serve for calibration and for judging. Equal arguments choose equal variants.

    Args:
        model: not modified. Each variant takes the memory of a copy of the model's linears (none if
            it is streamed), and its codes' disk space.
        windows_BT: a few calibration windows.
        set_activations: makes a copy's blocks quantize their inputs as the final model's will; it
            takes `QuantizedBlock.full_peaks` of all blocks.
        phase: returns what receives the variants done and in all, while the named one is tried.

    Returns:
        chosen: the name of the variant with the lowest divergence, the first of equals.
        divergence: by variant, the mean over all positions of KL(model || variant) of the next
            token's distribution, in nats; None where it is not finite.
        windows: the number of windows.

    Raises:
        NumericsError: no variant has a finite divergence.
    """
    original_PH = _final_hidden(model, windows_BT)
    divergence: dict[str, float] = {}
    for done, (name, method) in enumerate(variants.items()):
        phase(name)(done, len(variants))
        copy = model.copy()
        # The folder stays while the copy is measured: a streamed one reads its blocks from there.
        with (
            TemporaryDirectory(prefix="q3q_search_") as folder,
            BlockStore(Path(folder)) as blocks,
        ):
            peaks: dict[str, float] = {}
            for block in quantized_blocks(copy, method, scheme, windows_BT, blocks):
                peaks |= block.full_peaks
                del block
            set_activations(copy, peaks)
            divergence[name] = mean_divergence(model, original_PH, _final_hidden(copy, windows_BT))
    finite = {name: value for name, value in divergence.items() if math.isfinite(value)}
    if not finite:
        raise NumericsError(f"none of {', '.join(variants)} leaves a model with finite predictions")
    return {
        "chosen": min(finite, key=finite.__getitem__),
        "divergence": {name: finite.get(name) for name in variants},
        "windows": len(windows_BT),
    }


def mean_divergence(model: Decoder, original_PH: Tensor, changed_PH: Tensor) -> float:
    """Return the mean of KL(original || changed) over positions, in nats, both through one head."""
    pairs = zip(model.logits(original_PH), model.logits(changed_PH), strict=True)
    total = sum(float(kl_divergence(ours, theirs).sum()) for (_, ours), (_, theirs) in pairs)
    return total / len(original_PH)


def _final_hidden(model: Decoder, windows_BT: Tensor) -> Tensor:
    return torch.cat([hidden_1TH[0] for hidden_1TH in model.states(windows_BT.split(1))])


def choose_variant(
    method: Method,
    model: Decoder,
    spec: TrialSpec,
    windows: Tensor | None,
    store: BlockStore,
    reporter: Reporter,
) -> Method:
    """Return the method, or the best of its variants; the choice is stored beside its blocks."""
    variants = method.variants()
    # Without windows all blocks are stored already, made by the variant that was chosen.
    if not variants or windows is None or spec.schemes is None:
        return method
    search = store.recall("search")
    if search is None:
        search = search_variants(
            model,
            variants,
            spec.schemes,
            windows[: method.search_windows],
            lambda copy, peaks: set_activations(copy, spec, peaks),
            partial(reporter.phase, "search"),
        )
        store.remember("search", search)
    return variants[search["chosen"]]

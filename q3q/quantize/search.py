"""Choosing among a method's variants by trying each: whichever keeps the model closest to itself wins.

Shapes: B windows, T tokens of one, P positions, H hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from q3q.errors import NumericsError
from q3q.models.adjust import set_activations
from q3q.models.decoder import Decoder
from q3q.numerics.divergence import kl_divergence
from q3q.quantize.blocks import BlockStore
from q3q.quantize.method import Method
from q3q.quantize.walk import quantized_blocks
from q3q.spec import Json, Scheme, Schemes, TrialSpec


def search_variants(
    model: Decoder,
    variants: Mapping[str, Method],
    scheme: Scheme | Schemes,
    windows_BT: Tensor,
    set_activations: Callable[[Decoder], None],
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Json:
    """Quantize a copy of the model with each variant and measure how far its predictions are from the model's own.

    The same windows serve for calibration and for judging. Deterministic: equal arguments choose the same variant.

    Args:
        model: not modified. While a variant is tried a copy of its linears exists beside it (none of a streamed model),
            and the codes of one on disk.
        windows_BT: a few calibration windows.
        set_activations: makes a copy's blocks quantize their inputs as they will be quantized in the end.
        progress: told (variant, variants done, variants in all).

    Returns:
        chosen: the name of the variant with the lowest divergence, the first of equals. divergence: the mean over all
        positions of KL(model || variant) of the next token's distribution, nats; None where it is not finite. windows:
        how many.

    Raises:
        NumericsError: no variant has a finite divergence.
    """
    original_PH = _final_hidden(model, windows_BT)
    found: dict[str, float] = {}
    for done, (name, method) in enumerate(variants.items()):
        progress(name, done, len(variants))
        copy = model.copy()
        with TemporaryDirectory(
            prefix="q3q_search_"
        ) as folder:  # a streamed copy reads its blocks from there again
            for _ in quantized_blocks(copy, method, scheme, windows_BT, BlockStore(Path(folder))):
                pass
            set_activations(copy)
            found[name] = mean_divergence(model, original_PH, _final_hidden(copy, windows_BT))
    finite = {name: value for name, value in found.items() if math.isfinite(value)}
    if not finite:
        raise NumericsError(f"none of {', '.join(found)} leaves a model with finite predictions")
    return {
        "chosen": min(finite, key=finite.__getitem__),
        "divergence": {name: finite.get(name) for name in found},
        "windows": len(windows_BT),
    }


def mean_divergence(model: Decoder, original_PH: Tensor, changed_PH: Tensor) -> float:
    """Mean over positions of KL(original || changed) of the next token's distribution, nats, both through one head."""
    pairs = zip(model.logits(original_PH), model.logits(changed_PH), strict=True)
    total = sum(
        float(kl_divergence(original_CV, changed_CV).sum())
        for (_, original_CV), (_, changed_CV) in pairs
    )
    return total / len(original_PH)


def _final_hidden(model: Decoder, windows_BT: Tensor) -> Tensor:
    return torch.cat([hidden_1TH[0] for hidden_1TH in model.states(windows_BT.split(1))])


def settle_variant(
    method: Method,
    model: Decoder,
    spec: TrialSpec,
    windows: Tensor | None,
    store: BlockStore,
    steps: Callable[..., Callable[[int, int], None]],
) -> Method:
    """The method, or of one that offers variants the best; what was found lies beside the blocks that it made."""
    variants = method.variants()
    if (
        not variants or windows is None or spec.schemes is None
    ):  # without windows all blocks are there, made by it
        return method
    found = store.recall("search")
    if found is None:
        found = search_variants(
            model,
            variants,
            spec.schemes,
            windows[: method.search_windows],
            lambda copy: set_activations(copy, spec),
            lambda name, done, total: steps("search", name)(done, total),
        )
        store.remember("search", found)
    return variants[found["chosen"]]

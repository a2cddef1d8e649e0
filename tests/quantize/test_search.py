"""The choice among variants: the divergence against plain loops, the best variant, and resumed
trials.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from q3q import quantized
from q3q import trial as trial_module
from q3q.config import resolve, schema
from q3q.config.model import DEMO_MODELS
from q3q.errors import NumericsError
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.streaming import StreamedDecoder
from q3q.quantize import search
from q3q.quantize.block_store import BlockStore
from q3q.quantize.methods.rtn import Rtn
from q3q.quantize.methods.settings import RtnSettings, SmoothQuantSettings
from q3q.quantize.methods.smoothquant import SmoothQuant
from q3q.quantize.search import mean_divergence, search_variants
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.methods import built
from tests.quantize.conftest import copy

SCHEME = Scheme(bits=8, group_size=-1, symmetric=True, act_bits=6)


class AtBits(Rtn):
    """Rounding to a fixed number of bits, whatever the scheme says."""

    def __init__(self, bits):
        super().__init__(RtnSettings())
        self.bits = bits

    def quantize(self, task, scheme):
        return super().quantize(task, Scheme(bits=self.bits, group_size=-1, symmetric=False))


def set_activations(model: Decoder, peaks: Mapping[str, float] | None = None) -> None:
    model.adjust(lambda k, block: setattr(block, "rounding", SCHEME.inputs))


@torch.inference_mode()
def test_the_divergence_is_the_plain_sum(decoder, windows):
    changed = decoder.hidden(windows[:2]) * 1.1
    original = decoder.hidden(windows[:2])
    expected = []
    for p_H, q_H in zip(original.flatten(0, 1), changed.flatten(0, 1), strict=True):
        p, q = ((decoder.head_VH.double() @ h.double()).softmax(0) for h in (p_H, q_H))
        expected.append(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)))
    result = mean_divergence(decoder, original.flatten(0, 1), changed.flatten(0, 1))
    assert result == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert mean_divergence(decoder, original[0], original[0]) == pytest.approx(0, abs=1e-6)


@torch.inference_mode()
def test_the_variant_that_keeps_the_model_closest_to_itself_is_chosen(decoder, windows):
    before = list(decoder.blocks)
    events = []
    result = search_variants(
        decoder,
        {f"bits={bits}": AtBits(bits) for bits in (2, 8, 4)},
        SCHEME,
        windows[:3],
        set_activations,
        lambda name: lambda done, total: events.append((name, done, total)),
    )
    assert result["chosen"] == "bits=8"
    assert (
        result["divergence"]["bits=8"]
        < result["divergence"]["bits=4"]
        < result["divergence"]["bits=2"]
    )
    assert result["windows"] == 3
    assert events == [("bits=2", 0, 3), ("bits=8", 1, 3), ("bits=4", 2, 3)]
    # The model is as it was, its activations too.
    assert all(a is b for a, b in zip(decoder.blocks, before, strict=True))
    assert all(block.rounding is None for block in decoder.blocks)


@torch.inference_mode()
def test_activations_are_quantized_as_they_will_be(decoder, windows, tmp_path):
    few, rounded = windows[:2], copy(decoder)
    quantize_model(rounded, AtBits(8), SCHEME, few, BlockStore(tmp_path))
    expected = []
    for act in (lambda model, peaks=None: None, set_activations):
        act(rounded)
        # Window by window, as the search goes: batches sum in other orders, and an activation at a
        # tie would round the other way.
        pair = [
            torch.cat([hidden_1TH[0] for hidden_1TH in model.states(few.split(1))])
            for model in (decoder, rounded)
        ]
        expected.append(mean_divergence(decoder, *pair))
        result = search_variants(decoder, {"8": AtBits(8)}, SCHEME, few, act)["divergence"]["8"]
        assert result == pytest.approx(expected[-1], rel=1e-4)
    assert expected[1] > 1.2 * expected[0]


@torch.inference_mode()
def test_a_streamed_model_finds_the_same(windows):
    result = []
    for model in (
        load_decoder(Checkpoint(DEMO_MODELS / "dense"), torch.float32),
        StreamedDecoder(Checkpoint(DEMO_MODELS / "dense"), torch.float32),
    ):
        variants = {f"bits={bits}": AtBits(bits) for bits in (8, 3)}
        result.append(search_variants(model, variants, SCHEME, windows[:2], set_activations))
    assert result[0] == result[1]


@torch.inference_mode()
def test_alpha_is_searched_and_the_choice_is_the_same_again(decoder, windows):
    for k, block in enumerate(decoder.blocks):
        gain = block.weights["input_layernorm.weight"].clone()
        gain[[3, 17]] *= 30
        decoder.blocks[k] = block.with_weights({"input_layernorm.weight": gain})
    settings = SmoothQuantSettings(search=True, alpha_grid=[0.0, 0.5, 1.0])
    variants = SmoothQuant(settings).variants()
    assert list(variants) == ["alpha=0", "alpha=0.5", "alpha=1"]
    alphas = [one.settings.alpha for one in variants.values() if isinstance(one, SmoothQuant)]
    assert alphas == [0.0, 0.5, 1.0]
    first, again = (
        search_variants(decoder, variants, SCHEME, windows[:4], set_activations) for _ in range(2)
    )
    assert first == again
    losses = first["divergence"]
    assert first["chosen"] == min(losses, key=losses.get)
    assert len(set(losses.values())) == 3
    assert built("smoothquant").variants() == {}


@torch.inference_mode()
def test_a_variant_that_diverges_loses_and_if_all_do_it_is_an_error(decoder, windows):
    decoder.head_VH = decoder.head_VH.clone()
    decoder.head_VH[0, 0] = math.inf  # no prediction is finite
    with pytest.raises(NumericsError, match="none of a, b leaves a model with finite predictions"):
        search_variants(
            decoder, {"a": AtBits(4), "b": AtBits(8)}, SCHEME, windows[:2], set_activations
        )


def test_a_choice_is_kept_with_the_blocks_and_goes_with_them(tmp_path):
    store = BlockStore(tmp_path / "working", finished=tmp_path / "kept")
    assert store.recall("search") is None
    store.remember("search", {"chosen": "alpha=0.5"})
    assert store.recall("search") == {"chosen": "alpha=0.5"}
    store.keep()
    assert not (tmp_path / "working").exists()
    assert BlockStore(tmp_path / "elsewhere", finished=tmp_path / "kept").recall("search") == {
        "chosen": "alpha=0.5"
    }


def test_a_trial_that_goes_on_keeps_its_choice_and_its_record_says_what_was_found(
    tmp_path, monkeypatch
):
    schema.register()
    GlobalHydra.instance().clear()
    overrides = [
        "method=smoothquant",
        "method.search=true",
        "method.alpha_grid=[0.2,0.6]",
        "method.search_windows=2",
    ]
    overrides += [
        "act_bits=4",
        "calibration.samples=4",
        "calibration.length=64",
        "evaluation=none",
        f"storage={tmp_path}",
    ]
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        trial = resolve.trial_from(compose("config", overrides))
    with monkeypatch.context() as patched:
        patched.setattr(
            quantized, "quantized_blocks", lambda *_: 1 / 0
        )  # dies between the search and its first block
        with pytest.raises(ZeroDivisionError):
            trial_module.run_trial(trial)
    monkeypatch.setattr(
        search, "search_variants", lambda *_: 1 / 0
    )  # what is found is not looked for again
    record = trial_module.run_trial(trial)
    assert record.completed
    result = record.notes["search"]
    assert set(result["divergence"]) == {"alpha=0.2", "alpha=0.6"}
    assert result["chosen"] == min(result["divergence"], key=result["divergence"].get)
    assert result["windows"] == 2

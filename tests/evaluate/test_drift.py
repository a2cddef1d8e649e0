"""Drift and perplexity from one pass, against plain float64 references."""

import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from q3q.errors import IntegrityError
from q3q.evaluate.baseline import BaselineIdentity, baseline_for
from q3q.evaluate.drift import PERCENTILES, Drift, PerplexityAndDrift, perplexity_and_drift
from q3q.evaluate.journal import Journal
from q3q.evaluate.perplexity import of_losses, perplexity, window_losses
from q3q.models import decoder as decoder_module
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder, load_decoder

DEMO = Path(decoder_module.__file__).parent / "demo" / "dense"


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(Checkpoint(DEMO), torch.float32)


def damaged(decoder, amount):
    """The same model with noise in its blocks' weights, relative to their size."""
    dice = torch.Generator().manual_seed(0)

    def noisy(weight):
        return weight + amount * weight.std() * torch.randn(weight.shape, generator=dice).to(weight)

    blocks = [
        block.with_weights({name: noisy(w) for name, w in block.weights.items() if w.dim() == 2})
        for block in decoder.blocks
    ]
    return replace(decoder, blocks=blocks)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(200, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def baseline(tmp_path, decoder, windows):
    return kept(tmp_path, decoder, windows, 4)


def kept(folder, model, windows, count):
    identity = BaselineIdentity.of({"digest": "d", "dtype": "float32"}, "t", windows, count, "cpu")
    return baseline_for(folder, identity, model, windows)


@torch.inference_mode()
def test_a_model_does_not_drift_from_itself(decoder, windows, baseline):
    found = perplexity_and_drift(decoder, windows, baseline, decoder.head_VH)
    assert (found.drift.kl, found.drift.kl_99, found.drift.agreement) == (0, 0, 1)
    assert (found.drift.kl_error, found.drift.agreement_error) == (0, 0)
    assert torch.equal(found.nll_N, baseline.nll_N)


@torch.inference_mode()
def test_equals_a_plain_float64_computation(decoder, windows, baseline, monkeypatch):
    monkeypatch.setattr(decoder_module, "HEAD_CHUNK", 7)
    quantized = damaged(decoder, 0.1)
    found = perplexity_and_drift(quantized, windows, baseline, decoder.head_VH)

    assert baseline.rows == (0, 1, 3, 4)
    rows = list(baseline.rows)
    theirs, ours = (
        (model.hidden(windows[rows])[:, :-1] @ model.head_VH.T).double().log_softmax(-1)
        for model in (decoder, quantized)
    )
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    same = (theirs.argmax(-1) == ours.argmax(-1)).double()
    assert 0.05 < kl.mean() < 5
    assert 0 < same.mean() < 1
    assert found.drift.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.drift.kl_99 == pytest.approx(float(numpy.quantile(kl.numpy(), 0.99)), rel=1e-5)
    assert found.drift.kl_percentiles == pytest.approx(
        numpy.percentile(kl.numpy(), PERCENTILES).tolist(), rel=1e-4
    )
    low, high = found.drift.kl_99_interval
    assert low < found.drift.kl_99 <= high
    assert found.drift.agreement == pytest.approx(float(same.mean()), rel=1e-12)
    assert found.drift.kl_error == pytest.approx(float(kl.mean(1).std() / 2), rel=1e-5)
    assert found.drift.agreement_error == pytest.approx(float(same.mean(1).std() / 2), rel=1e-9)
    assert (found.drift.windows, found.drift.positions) == (4, 4 * 15)


@torch.inference_mode()
def test_its_perplexity_is_that_of_perplexity(decoder, windows, baseline):
    quantized = damaged(decoder, 0.1)
    found, alone = (
        perplexity_and_drift(quantized, windows, baseline, decoder.head_VH),
        perplexity(quantized, windows),
    )
    both = of_losses(found.nll_N)
    assert both.value == pytest.approx(alone.value, rel=1e-6)
    assert both.interval == pytest.approx(alone.interval, rel=1e-5)
    assert found.nll_N.dtype == torch.float64


@torch.inference_mode()
def test_the_model_runs_once_and_only_chunks_of_logits_exist(
    decoder, windows, baseline, monkeypatch
):
    chunk, vocab = 8, decoder.facts.vocab
    monkeypatch.setattr(decoder_module, "HEAD_CHUNK", chunk)
    monkeypatch.setattr("q3q.evaluate.budget.SET_TOKENS", {"cpu": 32})
    ran, told, largest = [], [], 0

    class Spy(Decoder):
        def states(self, batches, attend=None, spool=None):
            for ids in batches:
                ran.extend(ids.tolist())
            return super().states(batches, attend, spool)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.shape[-1:] == (vocab,)
                    and tensor is not args[0]
                ):
                    largest = max(largest, tensor.numel())
            return result

    model = Spy(
        decoder.facts, decoder.embedding_VH, decoder.norm_H, decoder.head_VH, decoder.blocks
    )
    with Largest():
        perplexity_and_drift(
            model, windows, baseline, decoder.head_VH, lambda *step: told.append(step)
        )
    assert ran == windows.tolist()
    assert told == [(k, 6) for k in range(1, 7)]
    assert largest == chunk * vocab


@torch.inference_mode()
def test_more_damage_drifts_further(decoder, windows, baseline):
    found = [
        perplexity_and_drift(damaged(decoder, a), windows, baseline, decoder.head_VH).drift
        for a in (0.01, 0.1, 1)
    ]
    assert 0 < found[0].kl < found[1].kl < found[2].kl
    assert found[0].agreement > found[1].agreement > found[2].agreement
    assert all(drift.kl < drift.kl_99 for drift in found)


@torch.inference_mode()
def test_bfloat16_goes_through_its_own_head(tmp_path, windows):
    model = load_decoder(Checkpoint(DEMO), torch.bfloat16)
    entry = kept(tmp_path, model, windows, 6)
    assert perplexity_and_drift(model, windows, entry, model.head_VH).drift.kl == 0
    with pytest.raises(IntegrityError, match="is not the baseline's"):
        perplexity_and_drift(model, windows, entry, model.head_VH.float())


@torch.inference_mode()
def test_the_baseline_keeps_its_own_head(decoder, windows, baseline):
    """A quantized head is part of the drift, and the baseline's is not."""
    other = replace(decoder, head_VH=decoder.head_VH * 1.5)
    assert perplexity_and_drift(other, windows, baseline, decoder.head_VH).drift.kl > 0.01


@torch.inference_mode()
def test_a_single_window_has_no_standard_error(tmp_path, decoder, windows):
    entry = kept(tmp_path, decoder, windows[:1], 1)
    found = perplexity_and_drift(damaged(decoder, 0.1), windows[:1], entry, decoder.head_VH)
    assert math.isfinite(found.drift.kl)
    assert math.isnan(found.drift.kl_error)
    assert all(map(math.isnan, found.drift.kl_99_interval))
    assert math.isnan(of_losses(found.nll_N).standard_error)


@torch.inference_mode()
def test_a_model_that_diverged_is_measured_and_not_finite(decoder, windows, baseline):
    broken = replace(decoder, head_VH=decoder.head_VH * float("inf"))
    found = perplexity_and_drift(broken, windows, baseline, decoder.head_VH)
    assert not math.isfinite(found.drift.kl)
    assert not math.isfinite(found.drift.kl_99)
    assert not math.isfinite(of_losses(found.nll_N).value)


@torch.inference_mode()
def test_a_baseline_of_other_tokens_is_refused(decoder, windows, baseline):
    with pytest.raises(IntegrityError, match="another tokenizer"):
        perplexity_and_drift(decoder, windows.flip(0), baseline, decoder.head_VH)
    with pytest.raises(IntegrityError, match="is not the baseline's"):
        perplexity_and_drift(decoder, windows, baseline, decoder.head_VH[:-1])


def test_names_and_intervals_of_the_record():
    drift = Drift(0.1, 0.1, 0.9, (0.5, 1.2), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), 0.99, 0.02, 4, 60)
    found = drift.metrics("c4")
    assert found == {"kl/c4": 0.1, "kl_p99/c4": 0.9, "top1_agreement/c4": 0.99} | {
        f"kl_p{p}/c4": kl
        for kl, p in enumerate(("1", "10", "25", "50", "75", "90", "99.9"), start=1)
    }
    intervals = drift.intervals("c4")
    assert intervals["kl/c4"] == pytest.approx((0.0, 0.1 + 0.196), abs=1e-3)
    assert intervals["kl/c4"][0] == 0
    assert intervals["kl_p99/c4"] == (0.5, 1.2)
    assert intervals["top1_agreement/c4"] == pytest.approx((0.99 - 0.0392, 1.0), abs=1e-3)
    assert intervals["top1_agreement/c4"][1] == 1


@torch.inference_mode()
def test_a_killed_pass_goes_on_at_the_window_where_it_was(
    decoder, windows, baseline, tmp_path, monkeypatch
):
    monkeypatch.setattr("q3q.evaluate.budget.SET_TOKENS", {"cpu": 32})  # two windows a batch
    quantized = damaged(decoder, 0.1)
    whole = perplexity_and_drift(quantized, windows, baseline, decoder.head_VH)
    alone = window_losses(quantized, windows)
    for name, measure, expected in (
        (
            "drift",
            lambda *more: perplexity_and_drift(
                quantized, windows, baseline, decoder.head_VH, *more
            ),
            whole,
        ),
        ("perplexity", lambda *more: window_losses(quantized, windows, *more), alone),
    ):
        path = tmp_path / name
        told: list[int] = []

        def killed(done, total):
            if done >= 3:
                raise KeyboardInterrupt

        journal = Journal(path, "m")
        with pytest.raises(KeyboardInterrupt):
            measure(killed, journal)
        journal.close()
        path.write_bytes(path.read_bytes()[:-3])  # torn: its last window is not there
        journal = Journal(path, "m")
        before = len(journal.consecutive())
        assert before in (2, 3)
        found = measure(lambda done, total, told=told: told.append(done), journal)
        assert told[0] > before
        journal.close()
        if isinstance(expected, PerplexityAndDrift):
            assert isinstance(found, PerplexityAndDrift)
            assert torch.equal(found.nll_N, expected.nll_N)
            assert found.drift == expected.drift
        else:
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, expected)
        journal = Journal(path, "m")
        told.clear()
        measure(lambda done, total, told=told: told.append(done), journal)
        assert not told  # nothing is left to measure
        journal.close()

"""The divergence of two distributions: by hand, of nothing, and small ones of many tokens."""

import math

import pytest
import torch

import q3q.numerics.divergence as divergence_module
from q3q.numerics.divergence import kl_divergence


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(p, q).item() == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6
    )
    assert kl_divergence(q, p).item() == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6
    )


def test_divergence_of_a_distribution_from_itself_is_nothing():
    logits = 5 * torch.randn(20, 1000, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits, logits.clone()).tolist() == [0.0] * 20
    shifted = kl_divergence(logits, logits + 8)  # a shift of all logits changes no probability
    assert shifted.abs().max() < 1e-6


def test_small_divergences_of_a_large_vocabulary_are_exact(monkeypatch):
    dice = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(3, 151_936, generator=dice)
    q = p + 1e-3 * torch.randn(p.shape, generator=dice)
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    assert expected.min() > 1e-7
    assert expected.max() < 1e-6
    for strip in (1, 1 << 18, 1 << 30):
        monkeypatch.setattr(divergence_module, "STRIP_LOGITS", {"cpu": strip})
        assert torch.allclose(kl_divergence(p, q), expected, rtol=1e-6, atol=0)

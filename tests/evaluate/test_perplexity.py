"""Token perplexity is what the papers' loop computes."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from q3q.config.model import DEMO_MODELS
from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, encoder
from q3q.evaluate.perplexity import perplexity
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.inference_mode()
def test_equals_the_papers_loop_on_transformers(kind):
    folder = DEMO_MODELS / kind
    ids = encoder(load_tokenizer(folder))(load_text("demo", split="evaluation").joined)
    windows = consecutive_windows(ids, 256, 6)
    found = perplexity(load_decoder(Checkpoint(folder), torch.float32), windows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nlls = []
    for window in windows:
        logits = model(window[None]).logits[0, :-1]
        nlls.append(torch.nn.functional.cross_entropy(logits, window[1:]).double() * 256)
    expected = math.exp(sum(nlls) / (len(nlls) * 256))
    assert found.value == pytest.approx(expected, rel=1e-5)
    low, high = found.interval
    assert low < found.value < high
    spread = torch.tensor([float(n) / 256 for n in nlls]).std() / math.sqrt(6)
    assert math.log(high) - math.log(found.value) == pytest.approx(
        1.959964 * float(spread), rel=1e-3
    )


def test_a_model_of_nothing_but_infinities_diverges_without_a_crash():
    decoder = load_decoder(Checkpoint(DEMO_MODELS / "dense"), torch.float32)
    decoder.head_VH = decoder.head_VH * float("inf")
    assert not math.isfinite(perplexity(decoder, torch.zeros(2, 8, dtype=torch.int64)).value)

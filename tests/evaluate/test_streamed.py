"""A streamed model scores bit for bit what it scores in memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from q3q.config.model import DEMO_MODELS
from q3q.errors import ConfigError
from q3q.evaluate import budget as budget_module
from q3q.evaluate.baseline import BaselineIdentity, baseline_for
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.drift import perplexity_and_drift
from q3q.evaluate.harness.lm import HarnessLM
from q3q.evaluate.perplexity import window_losses
from q3q.evaluate.scoring import Request, score
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.models.streaming import StreamedDecoder


class Counted:
    """Blocks as a streamed model has them; asked: which, in order."""

    def __init__(self, blocks):
        self.blocks, self.asked = blocks, []

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, k):
        self.asked.append(k)
        return self.blocks[k]


@pytest.fixture(scope="module", params=["dense", "moe"])
def resident(request):
    """Two blocks of a demo model."""
    whole = load_decoder(Checkpoint(DEMO_MODELS / request.param), torch.float32)
    return replace(whole, blocks=list(whole.blocks)[:2])


@pytest.fixture
def streamed(resident):
    return replace(
        resident, blocks=Counted(resident.blocks), activations=100_000
    )  # some of them go to disk


def windows(count=7, length=24):
    return torch.randint(200, (count, length), generator=torch.Generator().manual_seed(0))


def fixed(tokens):
    return TokenBudget(tokens, most=tokens)


def requests():
    """Questions with answers, some of which begin alike."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(12):
        question = random.integers(0, 200, random.integers(5, 40)).astype(np.int32)
        for _ in range(3):
            answer = random.integers(0, 9, random.integers(1, 6)).astype(np.int32)
            found.append(Request(np.concatenate((question, answer[:-1])), answer, "t"))
    return found


def scores(model, budget):
    steps = list(score(model, requests(), budget))
    return dict(pair for ended, _ in steps for pair in ended), steps[-1][1]


def bytes_of(model, tokens):
    return tokens * model.facts.hidden * 4


@torch.inference_mode()
def test_a_text_goes_through_each_block_at_once(resident, streamed, monkeypatch):
    monkeypatch.setattr(budget_module, "SET_TOKENS", {"cpu": 2 * 24})  # two windows a batch
    expected, told = window_losses(resident, windows()), []
    assert torch.equal(
        window_losses(streamed, windows(), lambda *step: told.append(step)), expected
    )
    assert streamed.blocks.asked == [0, 1]
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]


@torch.inference_mode()
def test_a_text_too_large_for_the_disk_goes_in_pieces(resident, streamed, monkeypatch):
    monkeypatch.setattr(budget_module, "SET_TOKENS", {"cpu": 24})
    expected = window_losses(resident, windows())
    monkeypatch.setattr(budget_module, "PASS_BYTES", bytes_of(resident, 3 * 24))
    assert torch.equal(window_losses(streamed, windows(), lambda *step: None), expected)
    assert streamed.blocks.asked == [0, 1] * 3


@torch.inference_mode()
def test_a_tape_goes_through_each_block_at_once(resident, streamed):
    expected, effort = scores(resident, fixed(90))
    found, same = scores(streamed, fixed(90))
    assert found == expected
    assert same == effort
    assert streamed.blocks.asked == [0, 1]


@pytest.mark.parametrize("tokens", [1, 100, 250])
@torch.inference_mode()
def test_a_tape_goes_on_from_piece_to_piece(resident, streamed, tokens, monkeypatch):
    """Keys and values of what the next piece begins with are handed on, and nothing runs twice."""
    monkeypatch.setattr(budget_module, "PASS_BYTES", bytes_of(resident, tokens))
    expected, effort = scores(resident, fixed(30))
    found, same = scores(streamed, fixed(30))
    assert found == expected
    assert same == effort
    passes = len(streamed.blocks.asked) // 2
    assert streamed.blocks.asked == [0, 1] * passes
    assert effort.computed / (tokens + 30) < passes <= 1 + effort.computed / min(tokens, 10)


@torch.inference_mode()
def test_scores_come_as_pieces_end(streamed, monkeypatch):
    monkeypatch.setattr(budget_module, "PASS_BYTES", bytes_of(streamed, 100))
    begun = iter(score(streamed, requests(), fixed(30)))
    assert next(begun)[0]  # some scores are there
    assert streamed.blocks.asked == [0, 1]  # and only one piece was run


@torch.inference_mode()
def test_running_out_of_memory_halves_the_batches_of_a_pass(resident, streamed, monkeypatch):
    states = type(streamed).states

    def small(self, batches, attend=None):
        if any(ids_BT.numel() > 50 for ids_BT in batches):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return states(self, batches, attend)

    expected, _ = scores(resident, fixed(45))
    monkeypatch.setattr(type(streamed), "states", small)
    budget = fixed(180)
    found, effort = scores(streamed, budget)
    assert budget.tokens == 45
    assert found == expected
    assert effort.computed == effort.unique
    assert torch.equal(window_losses(streamed, windows()), window_losses(resident, windows()))


@torch.inference_mode()
def test_drift_is_measured_in_one_pass(resident, streamed, tmp_path):
    identity = BaselineIdentity.of({"digest": "d", "dtype": "float32"}, "t", windows(), 4, "cpu")
    entry = baseline_for(tmp_path / "streamed", identity, streamed, windows())
    assert streamed.blocks.asked == [0, 1]
    kept = baseline_for(tmp_path / "resident", identity, resident, windows())
    assert entry.checksums == kept.checksums
    found = perplexity_and_drift(streamed, windows(), kept, resident.head_VH)
    assert (found.drift.kl, found.drift.agreement) == (0, 1)
    assert streamed.blocks.asked == [0, 1] * 2


def test_text_is_not_generated(streamed):
    lm = HarnessLM(streamed, load_tokenizer(DEMO_MODELS / "dense"))
    story = Instance(
        request_type="generate_until", doc={}, arguments=("Ada", {"until": ["."]}), idx=0
    )
    story.task_name = "poems"
    with pytest.raises(
        ConfigError, match="poems generates text, and this model is read from disk block by block"
    ):
        lm.generate_until([story])
    assert streamed.blocks.asked == []


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.inference_mode()
def test_a_model_read_from_disk_scores_what_it_scores_in_memory(kind):
    folder = DEMO_MODELS / kind
    resident = load_decoder(Checkpoint(folder), torch.float32)
    streamed = StreamedDecoder(Checkpoint(folder), torch.float32, activations=50_000)
    assert torch.equal(window_losses(streamed, windows(3)), window_losses(resident, windows(3)))
    assert scores(streamed, fixed(200)) == scores(resident, fixed(200))

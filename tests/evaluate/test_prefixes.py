"""A tape holds each token of the prefix tree once, and running it in any batches computes what whole texts compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from q3q.config.model import DEMO_MODELS
from q3q.errors import IntegrityError
from q3q.evaluate import prefixes
from q3q.evaluate.budget import TokenBudget, out_of_memory
from q3q.evaluate.prefixes import Tape
from q3q.evaluate.scoring import Request, lay_out, run_tape, score
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def fixed(tokens):
    """A budget that stays as it is."""
    return TokenBudget(tokens, most=tokens)


@pytest.fixture(scope="module")
def decoder():
    """Two blocks of the demo model."""
    whole = load_decoder(Checkpoint(DEMO_MODELS / "dense"), torch.float32)
    return replace(whole, blocks=whole.blocks[:2])


def random_texts(seed, count=40, most=60):
    """Texts that begin alike in many ways: each goes on from a random cut of an earlier one."""
    random = np.random.default_rng(seed)
    texts = [random.integers(0, 4096, most).astype(np.int32)]
    for _ in range(count - 1):
        stem = texts[random.integers(len(texts))]
        texts.append(
            np.concatenate(
                (
                    stem[: random.integers(len(stem) + 1)],
                    random.integers(0, 9, random.integers(1, most)),
                )
            )
        )
    return [text.astype(np.int32) for text in texts]


def requests_of(texts):
    return [
        Request(text[:-1] if len(text) > 1 else text, text[1:][-7:] if len(text) > 1 else text, "t")
        for text in texts
    ]


def test_the_tape_holds_each_prefix_once():
    texts = random_texts(0)
    tape, readers = lay_out(requests_of(texts))
    tree = {tuple(text[: i + 1]) for text in tape.texts for i in range(len(text))}
    assert len(tape) == len(tree)
    for text, places in zip(tape.texts, tape.places(), strict=True):
        assert (tape.ids[places] == text).all()
    assert sorted(number for numbers in readers for number in numbers) == list(range(len(texts)))


@pytest.mark.parametrize("budget", [1, 7, 100, 5000])
@pytest.mark.parametrize(
    "worth", [1, 50, 10**9]
)  # everything shared is attended once, some of it, nothing
@torch.inference_mode()
def test_hidden_states_equal_those_of_whole_texts(decoder, budget, worth, monkeypatch):
    monkeypatch.setattr(prefixes, "WORTH_SHARING", worth)
    texts = random_texts(1, count=15 if budget > 1 else 5, most=40)
    tape, _ = lay_out(requests_of(texts))
    found, reached = [], 0
    for first, stop, hidden_TH in run_tape(decoder, tape, fixed(budget)):
        assert first == reached
        assert stop - first <= budget
        reached = stop
        found.append(hidden_TH)
    assert reached == len(tape)
    hidden_TH = torch.cat(found)
    for text, places in zip(tape.texts, tape.places(), strict=True):
        expected = decoder.hidden(torch.from_numpy(text.astype(np.int64))[None])[0]
        torch.testing.assert_close(
            hidden_TH[torch.from_numpy(places)], expected, rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize("budget", [7, 100, 5000])
@pytest.mark.parametrize("worth", [1, 50, 10**9])
@torch.inference_mode()
def test_ragged_looks_see_the_same(decoder, budget, worth, monkeypatch):
    """What FlashAttention computes on a GPU, by its plain twin."""
    monkeypatch.setattr(prefixes, "RAGGED_WORTH_SHARING", worth)
    texts = random_texts(1, count=15, most=40)
    tape, _ = lay_out(requests_of(texts), ragged=True)
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tape(decoder, tape, fixed(budget))])
    assert len(hidden_TH) == tape.attended == len(tape)
    assert tape.padded == 0
    for text, places in zip(tape.texts, tape.places(), strict=True):
        expected = decoder.hidden(torch.from_numpy(text.astype(np.int64))[None])[0]
        torch.testing.assert_close(
            hidden_TH[torch.from_numpy(places)], expected, rtol=2e-4, atol=2e-4
        )


def test_a_ragged_batch_is_one_look_and_one_for_each_stretch_worth_sharing(monkeypatch):
    monkeypatch.setattr(prefixes, "RAGGED_WORTH_SHARING", 100)
    stem = np.arange(60, dtype=np.int32)
    texts = [np.concatenate((stem, ids(100 + k, 7, 8))) for k in range(5)]
    tape = Tape(texts, ragged=True)
    batch = tape.next_batch(1000)
    [own], [shared] = batch.own, batch.shared
    assert own.query == slice(0, len(tape))
    assert own.query_ends_S.tolist() == [
        0,
        63,
        66,
        69,
        72,
        75,
    ]  # the first text is the stem's piece too
    assert own.key_ends_S.tolist() == [0, 63, 66, 69, 72, 75]
    assert (own.longest, own.causal) == ((63, 63), True)
    assert (shared.query, shared.key, shared.causal) == (slice(63, 75), slice(0, 60), False)


@torch.inference_mode()
def test_a_long_prefix_is_attended_without_large_masks(decoder, monkeypatch):
    monkeypatch.setattr(prefixes, "LOOK_SCORES", 2000)  # ancestors x queries of one piece are more
    text = np.random.default_rng(3).integers(0, 4096, 400).astype(np.int32)
    tape = Tape([text])
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tape(decoder, tape, fixed(90))])
    torch.testing.assert_close(
        hidden_TH,
        decoder.hidden(torch.from_numpy(text.astype(np.int64))[None])[0],
        rtol=2e-4,
        atol=2e-4,
    )


@torch.inference_mode()
def test_only_positions_that_are_read_go_through_the_head(decoder, monkeypatch):
    seen = []
    whole = type(decoder).log_likelihoods
    monkeypatch.setattr(
        type(decoder),
        "log_likelihoods",
        lambda self, hidden, *rest: seen.append(len(hidden)) or whole(self, hidden, *rest),
    )
    question = ids(*range(1, 50))
    four = [Request(question, ids(answer), "t") for answer in (5, 6, 7, 8)]
    found = dict(pair for ended, _ in score(decoder, four, fixed(1000)) for pair in ended)
    assert seen == [1]  # one position, four targets
    logits_V = decoder.head_VH @ decoder.hidden(torch.arange(1, 50)[None])[0, -1]
    for number, answer in enumerate((5, 6, 7, 8)):
        assert found[number].log_likelihood == pytest.approx(
            float(logits_V.log_softmax(0)[answer]), abs=1e-4
        )


@torch.inference_mode()
def test_effort_says_what_was_shared(decoder):
    requests = requests_of(random_texts(2))
    *_, (_, effort) = score(decoder, requests, fixed(300))
    assert (
        effort.computed
        == effort.unique
        < effort.asked
        == sum(len(request.inputs) for request in requests)
    )
    assert effort.attended - effort.padded == effort.unique


@torch.inference_mode()
def test_a_likelihood_that_is_not_finite_names_its_task(decoder):
    broken = replace(decoder, norm_H=decoder.norm_H * torch.nan)
    with pytest.raises(IntegrityError, match="arc_easy"):
        list(score(broken, [Request(ids(1, 2), ids(3), "arc_easy")], fixed(10)))


@torch.inference_mode()
def test_running_out_of_memory_halves_the_batches_and_changes_no_score(decoder, monkeypatch):
    requests = requests_of(random_texts(4))
    expected = dict(pair for ended, _ in score(decoder, requests, fixed(4096)) for pair in ended)
    states = type(decoder).states

    def small(self, batches, attend=None):
        if any(ids_BT.numel() > 100 for ids_BT in batches):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return states(self, batches, attend)

    monkeypatch.setattr(type(decoder), "states", small)
    budget = fixed(4096)
    found = dict(pair for ended, _ in score(decoder, requests, budget) for pair in ended)
    assert budget.tokens == 64
    for number, one in expected.items():
        assert found[number].log_likelihood == pytest.approx(one.log_likelihood, abs=1e-3)


def test_what_is_no_memory_error_is_raised():
    assert not out_of_memory(RuntimeError("shapes do not match"))

    def attempt(tokens):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        TokenBudget().run(attempt)


def test_a_budget_grows_while_that_is_faster(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("q3q.evaluate.budget.time.perf_counter", lambda: clock[0])
    budget = TokenBudget(start=128)

    def attempt(tokens):
        clock[0] += (
            1 + tokens / 100 if tokens <= 1024 else tokens / 10
        )  # beyond 1,024 tokens it gets slow
        return tokens, None

    for _ in range(40):
        budget.run(attempt)
    assert budget.tokens == 1024


def multiple_choice(random, questions, shared, asked, answers):
    """Requests of questions with four answers each. shared: tokens that all begin with; asked, answers: from, to."""
    begin = random.integers(0, 4096, shared)
    for _ in range(questions):
        question = random.integers(0, 4096, random.integers(*asked))
        for _ in range(4):
            answer = random.integers(0, 4096, random.integers(*answers))
            inputs = np.concatenate((begin, question, answer[:-1])).astype(np.int32)
            yield Request(inputs, answer.astype(np.int32), "t")


@pytest.mark.parametrize("budget", [512, 2048, 8192])
@pytest.mark.parametrize(
    "shape",
    [
        {"shared": 600, "asked": (20, 200), "answers": (1, 2)},  # 5-shot MMLU
        {"shared": 0, "asked": (20, 60), "answers": (5, 30)},  # HellaSwag
        {"shared": 0, "asked": (20, 60), "answers": (1, 6)},  # ARC: pieces of a few tokens
        {"shared": 0, "asked": (10, 30), "answers": (6, 13)},  # PIQA's shorter ones
    ],
)
def test_attention_pads_less_than_a_twentieth(shape, budget):
    tape, _ = lay_out(list(multiple_choice(np.random.default_rng(0), 150, **shape)))
    while not tape.done:
        tape.next_batch(budget)
        tape.advance()
    assert tape.attended - tape.padded == len(
        tape
    )  # nothing but the attention's query slots is ever padded
    assert tape.padded < 0.05 * tape.attended

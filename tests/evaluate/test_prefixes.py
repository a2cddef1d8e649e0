"""A packed tree holds each shared prefix once and computes what whole texts compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from q3q.config.model import DEMO_MODELS
from q3q.errors import IntegrityError
from q3q.evaluate import prefixes
from q3q.evaluate.budget import TokenBudget, out_of_memory
from q3q.evaluate.prefixes import PackedTree
from q3q.evaluate.scoring import Reads, Request, pack_requests, score
from q3q.evaluate.tree_pass import run_tree
from q3q.models.attention import VarlenSlice
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from tests.models.families import build


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def fixed(tokens):
    """A budget that stays as it is."""
    return TokenBudget(tokens, most=tokens)


@pytest.fixture(scope="module")
def decoder():
    """Two blocks of the demo model."""
    whole = load_decoder(Checkpoint(DEMO_MODELS / "dense"), torch.float32)
    return replace(whole, blocks=list(whole.blocks)[:2])


def random_texts(seed, count=40, most=60):
    """Return texts with many shared prefixes: each continues a random prefix of an earlier one."""
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


def test_the_tree_holds_each_prefix_once():
    texts = random_texts(0)
    tree, readers = pack_requests(requests_of(texts))
    prefixes_of_texts = {tuple(text[: i + 1]) for text in tree.texts for i in range(len(text))}
    assert len(tree) == len(prefixes_of_texts)
    for text, positions in zip(tree.texts, tree.positions(), strict=True):
        assert (tree.ids[positions] == text).all()
    assert sorted(number for numbers in readers for number in numbers) == list(range(len(texts)))


def test_reads_lie_at_the_ends_of_texts_also_where_their_branch_is_shorter():
    texts = [*random_texts(0), *(np.array([5, 6, 7, k], np.int32) for k in range(3))]
    requests = [*requests_of(texts), Request(texts[-1], texts[-1], "t")]
    tree, readers = pack_requests(requests)
    reads = Reads.of(tree, readers, requests)
    expected = sorted(
        (int(place), int(token), number)
        for positions, group in zip(tree.positions(), readers, strict=True)
        for number in group
        for place, token in zip(
            positions[-len(requests[number].targets) :], requests[number].targets, strict=True
        )
    )
    found = zip(reads.position, reads.target, reads.owner, strict=True)
    assert sorted((int(a), int(b), int(c)) for a, b, c in found) == expected
    assert (np.diff(reads.position) >= 0).all()
    short = np.diff(tree.begin) < [
        max(len(requests[k].targets) for k in group) for group in readers
    ]
    assert short.any()


@pytest.mark.parametrize("kind", ["qwen2", "llama3 rope", "moe"])
@torch.inference_mode()
def test_a_tree_computes_what_plain_rows_compute_for_other_families(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    model = load_decoder(Checkpoint(tmp_path), torch.float32)
    texts = [(text % 97).astype(np.int32) for text in random_texts(3, count=12, most=40)]
    tree, _ = pack_requests(requests_of(texts))
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(model, tree, fixed(50))])
    for text, positions in zip(tree.texts, tree.positions(), strict=True):
        expected = model.hidden(torch.from_numpy(text.astype(np.int64))[None])[0]
        torch.testing.assert_close(hidden_TH[positions], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 7, 100, 5000])
@pytest.mark.parametrize("worth", [1, 50, 10**9])  # all shared prefixes attended once, some, none
@torch.inference_mode()
def test_hidden_states_equal_those_of_whole_texts(decoder, budget, worth, monkeypatch):
    monkeypatch.setattr(prefixes, "WORTH_SHARING", worth)
    texts = random_texts(1, count=15 if budget > 1 else 5, most=40)
    tree, _ = pack_requests(requests_of(texts))
    found, reached = [], 0
    for first, stop, hidden_TH in run_tree(decoder, tree, fixed(budget)):
        assert first == reached
        assert stop - first <= budget
        reached = stop
        found.append(hidden_TH)
    assert reached == len(tree)
    hidden_TH = torch.cat(found)
    for text, positions in zip(tree.texts, tree.positions(), strict=True):
        expected = decoder.hidden(torch.from_numpy(text.astype(np.int64))[None])[0]
        torch.testing.assert_close(
            hidden_TH[torch.from_numpy(positions)], expected, rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize("budget", [7, 100, 5000])
@pytest.mark.parametrize("worth", [1, 50, 10**9])
@torch.inference_mode()
def test_varlen_slices_compute_the_same(decoder, budget, worth, monkeypatch):
    """What FlashAttention computes on a GPU, by its plain twin."""
    monkeypatch.setattr(prefixes, "VARLEN_WORTH_SHARING", worth)
    texts = random_texts(1, count=15, most=40)
    tree, _ = pack_requests(requests_of(texts), varlen=True)
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(decoder, tree, fixed(budget))])
    assert len(hidden_TH) == tree.attended == len(tree)
    assert tree.padded == 0
    for text, positions in zip(tree.texts, tree.positions(), strict=True):
        expected = decoder.hidden(torch.from_numpy(text.astype(np.int64))[None])[0]
        torch.testing.assert_close(
            hidden_TH[torch.from_numpy(positions)], expected, rtol=2e-4, atol=2e-4
        )


def test_a_varlen_batch_is_one_slice_and_one_for_each_stretch_worth_sharing(monkeypatch):
    monkeypatch.setattr(prefixes, "VARLEN_WORTH_SHARING", 100)
    stem = np.arange(60, dtype=np.int32)
    texts = [np.concatenate((stem, ids(100 + k, 7, 8))) for k in range(5)]
    tree = PackedTree(texts, varlen=True)
    batch = tree.next_batch(1000)
    [own], [shared] = batch.own, batch.shared
    assert isinstance(own, VarlenSlice)
    assert isinstance(shared, VarlenSlice)
    assert own.query == slice(0, len(tree))
    # The first text's span contains the stem.
    assert own.layout.query_ends_S.tolist() == [0, 63, 66, 69, 72, 75]
    assert own.layout.key_ends_S.tolist() == [0, 63, 66, 69, 72, 75]
    assert (own.layout.longest, own.layout.causal) == ((63, 63), True)
    assert (shared.query, shared.key, shared.layout.causal) == (slice(63, 75), slice(0, 60), False)


@torch.inference_mode()
def test_a_long_prefix_is_attended_without_large_masks(decoder, monkeypatch):
    monkeypatch.setattr(prefixes, "SLICE_SCORES", 2000)  # one span's ancestors x queries are more
    text = np.random.default_rng(3).integers(0, 4096, 400).astype(np.int32)
    tree = PackedTree([text])
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(decoder, tree, fixed(90))])
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

    def recording(self, hidden, *rest):
        seen.append(len(hidden))
        return whole(self, hidden, *rest)

    monkeypatch.setattr(type(decoder), "log_likelihoods", recording)
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
        # Slow beyond 1,024 tokens.
        clock[0] += 1 + tokens / 100 if tokens <= 1024 else tokens / 10
        return tokens, None

    for _ in range(40):
        budget.run(attempt)
    assert budget.tokens == 1024


def multiple_choice(random, questions, shared, asked, answers):
    """Yield requests of questions with four answers each.

    shared: tokens of the common prefix. asked, answers: ranges of lengths.
    """
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
        {"shared": 0, "asked": (20, 60), "answers": (1, 6)},  # ARC: spans of a few tokens
        {"shared": 0, "asked": (10, 30), "answers": (6, 13)},  # PIQA's shorter ones
    ],
)
def test_attention_pads_less_than_a_twentieth(shape, budget):
    tree, _ = pack_requests(list(multiple_choice(np.random.default_rng(0), 150, **shape)))
    while not tree.done:
        tree.next_batch(budget)
        tree.advance()
    assert tree.attended - tree.padded == len(tree)  # only attention's query slots are padded
    assert tree.padded < 0.05 * tree.attended

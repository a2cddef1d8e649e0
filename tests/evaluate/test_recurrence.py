"""A recurrence's state goes wherever evaluation goes: what texts share runs once, exactly."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from q3q.evaluate import budget as budget_module
from q3q.evaluate import generation, scoring
from q3q.evaluate.branches import CALL_TOKENS, Branches, alike
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.perplexity import window_losses
from q3q.evaluate.prefixes import PackedTree
from q3q.evaluate.scoring import Request, pack_requests, score
from q3q.evaluate.tree_pass import run_tree
from q3q.models import delta
from q3q.models.adjust import route
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.delta import GatedDelta
from q3q.models.families import registry
from q3q.models.footprint import (
    RECURRENT_BYTES,
    RECURRENT_COPIES,
    need,
    recurrent_bytes,
    recurrent_rows,
)
from q3q.models.streaming import StreamedDecoder
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.methods import built
from tests.models import decaying
from tests.models.decaying import DecayingSum, save_random
from tests.models.families import HYBRIDS, build
from tests.nowhere import Nowhere

TYPES = {"decaying": "Decaying", "decaying_moe": "DecayingMoe"}


@pytest.fixture(scope="module", autouse=True)
def families():
    for model_type, name in TYPES.items():
        registry.OWN[model_type] = f"{decaying.__name__}:{name}"
    yield
    for model_type in TYPES:
        del registry.OWN[model_type]


@pytest.fixture(scope="module")
def loaded(families, tmp_path_factory):
    """Return a function from a kind of model to a random checkpoint and its model."""

    @cache
    def load(kind):
        folder = tmp_path_factory.mktemp("model")
        if kind in TYPES:
            save_random(folder, kind)
        else:
            build(kind).save_pretrained(folder)
        checkpoint = Checkpoint(folder)
        return checkpoint, load_decoder(checkpoint, torch.float32)

    return load


@pytest.fixture
def pair(request, loaded):
    return loaded(getattr(request, "param", "decaying"))


@pytest.fixture
def checkpoint(pair):
    return pair[0]


@pytest.fixture
def model(pair):
    return pair[1]


REAL = ["qwen3.5", "qwen3.5 moe"]
EACH = pytest.mark.parametrize("pair", ["decaying", *REAL], indirect=True)


def fixed(tokens):
    return TokenBudget(tokens, most=tokens)


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def random_texts(seed, count=16, most=30):
    """Return texts that continue random beginnings of each other; some are beginnings."""
    random = np.random.default_rng(seed)
    texts = [random.integers(0, 97, most)]
    for _ in range(count - 1):
        stem = texts[random.integers(len(texts))]
        stem = stem[: random.integers(len(stem) + 1)]
        texts.append(np.append(stem, random.integers(0, 4, random.integers(1, most))))
    return [text.astype(np.int32) for text in [*texts, texts[0][:11], texts[0][:12]]]


def requests(seed=1):
    found = []
    for text in random_texts(seed):
        targets = min(3, len(text))
        found.append(Request(text, text[-targets:], "t"))
    return found


def plain(model, text):
    return model.hidden(torch.from_numpy(text.astype(np.int64))[None])[0]


def scores(model, asked, budget):
    return dict(pair for ended, _ in score(model, asked, budget) for pair in ended)


class Calls:
    """Records recurrences' calls: rows, their lengths, and whether they begin with a state."""

    def __init__(self, monkeypatch):
        self.rows = []
        for kind in (DecayingSum, GatedDelta):
            monkeypatch.setattr(kind, "__call__", self._recorded(kind.__call__))

    def _recorded(self, whole):
        def recorded(recurrence, inputs_BTX, state=None, lengths_B=None):
            count, tokens, _ = inputs_BTX.shape
            lengths = [tokens] * count if lengths_B is None else lengths_B.tolist()
            self.rows.append((tokens, lengths, state is not None))
            return whole(recurrence, inputs_BTX, state, lengths_B)

        return recorded

    @property
    def computed(self):
        return sum(sum(lengths) for _, lengths, _ in self.rows)

    @property
    def slots(self):
        return sum(tokens * len(lengths) for tokens, lengths, _ in self.rows)


def nearness(model):
    """Return how near results are, relative to the largest one.

    The delta rule's chunks begin where segments begin, and their rounding alone puts these random
    models of wide weights up to 5e-5 away from the rule token by token, whole rows too.
    """
    return 1e-5 if isinstance(model.facts.family, decaying.Decaying) else 1e-4


def assert_rows(model, tree, hidden_TH, near):
    """Assert that a tree's states are those of its texts as rows."""
    for text, positions in zip(tree.texts, tree.positions(), strict=True):
        expected = plain(model, text)
        assert (hidden_TH[positions] - expected).abs().max() < near * expected.abs().max()


def recurrences(model):
    return sum(map(bool, recurrent_bytes(model.facts)))


@pytest.mark.parametrize(
    ("pair", "budget", "states"),
    [
        *(
            ("decaying", *sizes)
            for sizes in [(1, 3), (7, 1), (7, 1000), (30, 3), (5000, 1), (5000, 1000)]
        ),
        *((kind, 30, 3) for kind in HYBRIDS),
    ],
    indirect=["pair"],
)
@torch.inference_mode()
def test_a_tree_computes_what_plain_rows_compute(model, budget, states, monkeypatch):
    calls = Calls(monkeypatch)
    texts = random_texts(0, count=6 if budget == 1 else 16)
    asked = [Request(text, text[:1], "t") for text in texts]
    tree, _ = pack_requests(asked, states=states)
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(model, tree, fixed(budget))])
    assert calls.computed == recurrences(model) * len(tree)  # each token once in each block
    assert max(len(lengths) for _, lengths, _ in calls.rows) <= states
    assert_rows(model, tree, hidden_TH, nearness(model))


@pytest.mark.parametrize("pair", ["qwen3.5", "qwen3-next"], indirect=True)
@torch.inference_mode()
def test_a_tree_with_the_delta_rule_token_by_token_is_rows_with_it(model, monkeypatch):
    """Without the rounding of chunks, the tree adds none."""
    monkeypatch.setattr(delta, "delta_rule", delta.delta_rule_plain)
    tree = PackedTree(sorted(random_texts(0), key=list), states=3)
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(model, tree, fixed(30))])
    assert_rows(model, tree, hidden_TH, 1e-5)


@EACH
@torch.inference_mode()
def test_scores_read_what_they_ask_for_whatever_the_batch(model):
    """The last block is a recurrence, and goes on with the tokens alone that are read."""
    asked = requests()
    expected = {}
    for number, request in enumerate(asked):
        hidden_PH = plain(model, request.inputs)[-len(request.targets) :]
        likelihood_P, _ = model.log_likelihoods(
            hidden_PH, torch.from_numpy(request.targets.astype(np.int64))
        )
        expected[number] = float(likelihood_P.double().sum())
    for budget in (5, 64, 4096):
        found = scores(model, asked, fixed(budget))
        assert found.keys() == expected.keys()
        for number, result in found.items():
            assert result.log_likelihood == pytest.approx(expected[number], rel=nearness(model))


@torch.inference_mode()
def test_a_quantized_hybrid_with_experts_is_walked_and_evaluated_alike(loaded):
    """Calibration shows every expert all tokens; a tree computes what rows compute."""
    _, moe = loaded("decaying_moe")
    quantized = replace(moe, blocks=[block.with_weights({}) for block in moe.blocks])
    quantized.adjust(partial(route, True))
    windows_NT = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    scheme = Scheme(bits=4, group_size=4, symmetric=False)
    blocks = quantize_model(quantized, built("gptq"), scheme, windows_NT, Nowhere())
    for k, block in enumerate(blocks):
        assert block.quantized.keys() == moe.facts.linears(k).keys()
        assert block.notes[f"blocks.{k}.gate_up"]["tokens_per_expert"] == [48] * 4
    tree, copied = (PackedTree(sorted(random_texts(0), key=list), states=5) for _ in range(2))
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(quantized, tree, fixed(40))])
    assert_rows(quantized, tree, hidden_TH, 1e-5)
    away = hidden_TH - torch.cat([hidden for _, _, hidden in run_tree(moe, copied, fixed(40))])
    assert 1e-3 < away.norm() / hidden_TH.norm() < 0.5


@pytest.mark.parametrize("edge", [0, -1, 1])
@torch.inference_mode()
def test_a_span_may_end_where_its_batch_ends(model, edge, monkeypatch):
    """And so may the beginning that the next batch's text goes on from."""
    stem = np.arange(40, 60)
    texts = [stem[:8], stem, *(np.append(stem[:n], [1, 2]) for n in (4, 8, 20))]
    tree = PackedTree([text.astype(np.int32) for text in sorted(texts, key=list)], states=9)
    calls = Calls(monkeypatch)
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(model, tree, fixed(8 + edge))])
    assert calls.computed == 2 * len(tree)
    assert_rows(model, tree, hidden_TH, 1e-5)


def test_a_state_is_kept_while_a_later_span_starts_from_it():
    """Of 0123, 01235, 0127, 03 and 5: the states behind 0123, 012 and 0, each until it is read."""
    texts = [ids(0, 1, 2, 3), ids(0, 1, 2, 3, 5), ids(0, 1, 2, 7), ids(0, 3), ids(5)]
    tree = PackedTree(texts, states=9)
    branches = Branches([len(text) for text in texts], tree.shared, 9)
    held = {
        (t, d): branches._held(t, d) for t, d in [(0, 2), (1, 4), (2, 3), (3, 1), (4, 0), (5, 0)]
    }
    assert held == {
        (0, 2): [1, 2],
        (1, 4): [1, 3, 4],
        (2, 3): [1, 3],
        (3, 1): [1],
        (4, 0): [],
        (5, 0): [],
    }
    # One batch: 0 | 12 | 3 | 5, then 7 from behind 012, 3 from behind 0, and 5 from nothing.
    flow = tree.next_batch(100).flow
    assert flow is not None
    [part] = flow.parts
    rows = [
        [(call.token_SW.tolist(), call.keep_K is not None) for call in level.calls]
        for level in part.levels
    ]
    assert rows == [
        [([[0], [7]], True)],
        [([[6, 6], [1, 2]], True)],
        [([[3], [5]], True)],
        [([[4]], False)],
    ]
    assert part.stay_P is None
    kept = [call.keep_K for level in part.levels[:3] for call in level.calls]
    assert [None if keep_K is None else keep_K.tolist() for keep_K in kept] == [[0], [1], [0]]


def test_many_short_rows_take_few_calls_and_padding_stays_small():
    random = np.random.default_rng(0)
    for lengths in (
        random.integers(1, 9, 500),
        random.integers(1, 200, 500),
        np.append(random.integers(1, 6, 300), [900, 950]),
        [3],
        [7] * 40,
    ):
        calls = alike(list(lengths))
        assert sorted(row for rows in calls for row in rows) == list(range(len(lengths)))
        slots = sum(len(rows) * max(lengths[row] for row in rows) for rows in calls)
        one, each = max(lengths) * len(lengths), len(set(lengths))
        price = slots + CALL_TOKENS * len(calls)
        assert price <= min(one + CALL_TOKENS, sum(lengths) + CALL_TOKENS * each)
        assert slots - sum(lengths) <= 0.1 * sum(lengths) + 2 * CALL_TOKENS * len(calls)
    assert len(alike([3] * 50 + [4] * 50 + [600])) == 2
    assert alike([]) == []


@torch.inference_mode()
def test_a_batch_of_questions_takes_few_calls(model, monkeypatch):
    """Fifty questions with four answers each behind one prompt: three levels."""
    calls, random = Calls(monkeypatch), np.random.default_rng(0)
    prompt, asked = random.integers(0, 97, 60), []
    for _ in range(50):
        question = random.integers(0, 97, random.integers(8, 12))
        for answer in range(4):
            end = [answer, *random.integers(0, 97, random.integers(0, 5))]
            asked.append(
                Request(np.concatenate((prompt, question, end)).astype(np.int32), ids(1), "t")
            )
    scores(model, asked, fixed(1 << 14))
    assert len(calls.rows) <= 2 * 12
    assert calls.slots < 1.5 * calls.computed


@pytest.mark.parametrize(
    ("pair", "tokens"),
    [("decaying", 1), ("decaying", 1 << 20), *((kind, 100) for kind in REAL)],
    indirect=["pair"],
)
@torch.inference_mode()
def test_streamed_as_in_memory_bit_for_bit(checkpoint, model, tokens, monkeypatch):
    """tokens: of a pass; the state goes from batch to batch in a block, and from pass to pass."""
    monkeypatch.setattr(budget_module, "PASS_BYTES", tokens * model.facts.hidden * 4)
    streamed = StreamedDecoder(checkpoint, torch.float32, activations=20_000)  # some go to disk
    assert scores(streamed, requests(), fixed(20)) == scores(model, requests(), fixed(20))


@EACH
@torch.inference_mode()
def test_windows_of_a_text_are_rows_and_texts_of_a_tree(checkpoint, model):
    windows_NT = torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(0))
    losses_N = window_losses(model, windows_NT)
    streamed = StreamedDecoder(checkpoint, torch.float32)
    assert torch.equal(window_losses(streamed, windows_NT), losses_N)
    asked = [Request(row[:-1], row[1:], "t") for row in windows_NT.numpy().astype(np.int32)]
    found = scores(model, asked, fixed(50))
    for number, loss in enumerate(losses_N.tolist()):
        likelihood = -found[number].log_likelihood / 23
        assert likelihood == pytest.approx(loss, rel=nearness(model) / 10)


@pytest.mark.parametrize(
    ("pair", "tokens", "cache"),
    [
        ("decaying", 7, 1),
        ("decaying", 7, 1 << 30),
        ("decaying", 1000, 20_000),
        *((kind, 40, 60_000) for kind in REAL),
    ],
    indirect=["pair"],
)
@torch.inference_mode()
def test_generated_tokens_are_those_of_recomputed_texts(model, tokens, cache, monkeypatch):
    """cache: bytes; of a row at a time, of a few, of all. Rows end at different times."""
    monkeypatch.setattr(generation, "cache_bytes", lambda *_: cache)
    distinct = {tuple(text.tolist()) for text in random_texts(5, count=9, most=12)}
    contexts = [ids(*context) for context in sorted(distinct)]

    def ended(found):
        return found[-1] % 5 == 0

    calls = Calls(monkeypatch)
    found = dict(generation.generate(model, contexts, 6, ended, fixed(tokens)))
    read = sum(sum(n) for tokens, n, begun in calls.rows if not (tokens == 1 and begun))
    assert read <= recurrences(model) * len(PackedTree(contexts))  # what they share, once
    assert len({len(text) for text in found.values()}) > 2
    for number, context in enumerate(contexts):
        text = context
        while True:
            logits_V = model.head_VH @ plain(model, text)[-1]
            text = np.append(text, int(logits_V.argmax())).astype(np.int32)
            generated = text[len(context) :].tolist()
            if len(generated) == 6 or ended(generated):
                break
        assert found[number] == generated


@torch.inference_mode()
def test_a_gangs_ranks_score_what_one_scores(model):
    """Each rank begins its share at the root; here they take turns."""
    asked = requests()

    def run_on_all(call, number, shares):
        return [list_of(scores(model, share, fixed(40))) for share in shares]

    def list_of(found):
        return list(found.items()), scoring.Effort()

    team = SimpleNamespace(size=3, leads=True, run_on_all=run_on_all)
    led = replace(model)
    led.team = team
    found, expected = scores(led, asked, fixed(40)), scores(model, asked, fixed(40))
    assert found.keys() == expected.keys()
    for number, result in found.items():
        assert result.log_likelihood == pytest.approx(expected[number].log_likelihood, rel=1e-5)
        assert result.greedy == expected[number].greedy


@pytest.mark.slow
def test_two_processes_that_share_a_model_score_what_one_scores(checkpoint, model, gang):
    folder, types, module = str(checkpoint.folder), dict(TYPES), decaying.__name__
    asked = requests()

    def lead(team):
        from pathlib import Path

        import torch

        from q3q.evaluate.budget import TokenBudget
        from q3q.evaluate.scoring import score
        from q3q.models.checkpoint import Checkpoint
        from q3q.models.families import registry
        from q3q.models.sharded import load_sharded

        registry.OWN |= {model_type: f"{module}:{name}" for model_type, name in types.items()}
        with torch.inference_mode():
            if team.rank:
                team.follow()
                return []
            sharded = load_sharded(Checkpoint(Path(folder)), torch.float32, team)
            steps = list(score(sharded, asked, TokenBudget(40, most=40)))
            team.dismiss()
        return [(n, one.log_likelihood) for ended, _ in steps for n, one in ended]

    found = dict(gang(2, lead)[0])
    expected = scores(model, asked, fixed(40))
    assert found.keys() == expected.keys()
    for number, likelihood in found.items():
        assert likelihood == pytest.approx(expected[number].log_likelihood, rel=1e-5)


def test_memory_is_planned_for_the_states_that_evaluation_takes(model):
    facts = replace(model.facts, intermediate=1 << 18)  # more than logits take
    assert recurrent_bytes(facts) == [240, 0, 240]
    assert recurrent_rows(facts, "cpu") == 1024

    class Wide(decaying.Decaying):
        def recurrent_width(self, facts, layer):
            return 1 << 19  # 2 MiB, as a block of several billion parameters carries

    class Without(decaying.Decaying):
        def recurrent_width(self, facts, layer):
            return 0

    wide, without = (replace(facts, family=kind()) for kind in (Wide, Without))
    assert (recurrent_rows(wide, "cpu"), recurrent_rows(wide, "cuda")) == (32, 128)
    assert recurrent_rows(without, "cpu") == 0
    for loader in ("resident", "streamed", "sharded"):
        for device in ("cpu", "cuda"):
            plan = partial(need, dtype="float32", method=None, loader=loader, device=device)
            assert plan(wide) - plan(without) == RECURRENT_COPIES * RECURRENT_BYTES[device]


@pytest.mark.parametrize("calls", [0, 1])
@torch.inference_mode()
def test_a_recurrence_that_a_family_does_not_count_is_refused_and_a_second_one_too(calls):
    """Its state would be lost between batches."""
    attention = PackedTree([ids(1, 2, 3)], states=calls).next_batch(10).attention()
    recurrence, inputs_BTX = DecayingSum(torch.zeros(20), torch.zeros(20, 3)), torch.randn(1, 3, 20)
    for _ in range(calls):
        assert attention.recur(recurrence, inputs_BTX).shape == (1, 3, 20)
    with pytest.raises(RuntimeError, match="recurrent_width does not count, or a second one"):
        attention.recur(recurrence, inputs_BTX)

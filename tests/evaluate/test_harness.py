"""Our language model behind lm-eval's interface scores what lm-eval's own HFLM scores."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from q3q.config import DEMO_MODELS
from q3q.evaluate.harness import HarnessLM, pack, run_tasks, share_prefixes
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder


@pytest.fixture(scope="module", params=["dense", "moe"])
def both(request):
    """The same demo model behind both interfaces, in float32."""
    folder = DEMO_MODELS / request.param
    tokenizer = load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_decoder(Checkpoint(folder), torch.float32)
    told = []
    hflm = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=8, max_length=2048)
    return HarnessLM(ours, tokenizer, lambda done, total: told.append((done, total))), hflm, told


def requests():
    story = "Ada has a red ball. Ben has a blue cup.\nQuestion: Who has the ball?\nAnswer:"
    pairs = [(story, f" {name}") for name in ("Ada", "Ben", "Cleo", "Dan")]
    pairs += [(story, " the kitchen"), (story, " the garden"), (story, " the kitchen")]  # shared inputs, and a repeat
    pairs += [("", "Ada has a ball."), ("", " x")]  # empty context
    pairs += [("def f(", "x):\n    return x"), ("naïve café — ", "déjà vu 😀"), ("trailing space ", "moves")]
    pairs += [("word " * 3000, "word"), ("a", " b" * 30)]  # context longer than the window: its left end goes
    return [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def test_scores_equal_hflms(both):
    ours, hflm, told = both
    mine, theirs = ours.loglikelihood(requests()), hflm.loglikelihood(requests(), disable_tqdm=True)
    for (score, greedy), (expected, expected_greedy) in zip(mine, theirs, strict=True):
        assert abs(score - expected) <= 1e-4 + 2e-6 * abs(expected)
        assert greedy == expected_greedy
    assert told[-1] == (len(mine), len(mine))


def test_requests_that_begin_another_ride_along():
    encoded = [
        (("", ""), [1, 2, 3], [4]),
        (("", ""), [1, 2, 3], [5]),  # the same input
        (("", ""), [1, 2], [3]),  # a prefix of it
        (("", ""), [1, 2, 3], [4, 6]),  # begins like the first, reads one more
        (("", ""), [7], [8]),
    ]
    runs = share_prefixes(encoded, max_length=100)
    assert sorted(run.ids for run in runs) == [[1, 2, 3, 4], [7]]
    riders = {number: (run.ids, first, continuation) for run in runs for number, first, continuation in run.riders}
    for number, (_, context, continuation) in enumerate(encoded):
        ids, first, asked = riders[number]
        assert asked == continuation
        assert ids[: first + 1] == context  # the position read is the context's last
        assert first == len(context) - 1


def test_batches_keep_to_the_budget_and_hardly_pad():
    runs = share_prefixes(
        [(("", ""), list(range(i, i + n)), [1]) for i, n in enumerate([5, 50, 7, 49, 48, 6] * 3)], 100
    )
    batches = pack(runs, 200)
    assert sum(map(len, batches)) == len(runs)
    for batch in batches:
        assert len(batch) * max(len(run.ids) for run in batch) <= 200


def test_a_task_through_simple_evaluate_equals_hflm(both):
    ours, hflm, _ = both
    found = run_tasks(ours.model, ours.tokenizer, ["stories_where"], limit=25, seed=0)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from q3q.evaluate.harness import OWN_TASKS

    theirs = simple_evaluate(
        model=hflm,
        tasks=["stories_where"],
        limit=25,
        task_manager=TaskManager(include_path=str(OWN_TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found.metrics["stories_where/acc"] == theirs["results"]["stories_where"]["acc,none"]
    low, high = found.intervals["stories_where/acc"]
    assert low <= found.metrics["stories_where/acc"] <= high

"""The mean of documents' contributions is the metric; where there are none, that is said."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from lm_eval import evaluate
from lm_eval.api import metrics
from lm_eval.api.registry import AGGREGATION_REGISTRY

from q3q.config.model import DEMO_MODELS
from q3q.data.questions import Library
from q3q.evaluate.batches import batches
from q3q.evaluate.contributions import RANGES, contributions, number_of, of_group
from q3q.evaluate.data_sets import resolve_data_sets
from q3q.evaluate.harness import run
from q3q.evaluate.samples import (
    comparisons,
    explained,
    measured,
    read_samples,
    write_samples,
)
from q3q.evaluate.suites import score_batch
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.record import Comparison
from q3q.reporter import no_steps
from tests.specs import evaluation_of

QUICK = {"bootstrap_iters": 10}
DICE = np.random.default_rng(0)
ANSWERS = [
    (int(gold), int(gold if sure else 1 - gold)) for gold, sure in DICE.random((40, 2)) < 0.6
]
LOSSES = DICE.normal(-3, 1, 40).tolist()
WEIGHTED = [(loss * n, n) for loss, n in zip(LOSSES, range(1, 41), strict=True)]
CHANCES = [(n % 3, DICE.dirichlet((1, 1, 1))) for n in range(40)]
WORDS = "the cat sat on a mat today".split()
TEXTS = [
    ([" ".join(WORDS[i * n % 7] for i in range(n + 2))], " ".join(WORDS[:4])) for n in range(9)
]
VALUES = {
    "mean": LOSSES,
    "nanmean": [*LOSSES, math.nan, math.nan],
    "perplexity": LOSSES,
    "weighted_perplexity": WEIGHTED,
    "bits_per_byte": WEIGHTED,
    "brier_score": CHANCES,
    "f1": ANSWERS,
    "matthews_corrcoef": ANSWERS,
}
OF_THE_WHOLE_SET = {
    "median": LOSSES,
    "bypass": [None] * 9,
    "bleu": TEXTS,
    "chrf": TEXTS,
    "chrf++": TEXTS,
    "ter": TEXTS,
}


@pytest.mark.parametrize("name", list(AGGREGATION_REGISTRY))
def test_contributions_give_lm_evals_own_number_or_there_are_none(name):
    aggregate = AGGREGATION_REGISTRY[name]
    if name in OF_THE_WHOLE_SET:
        aggregate(OF_THE_WHOLE_SET[name])
        with pytest.raises(ValueError, match=r"no document has a share|measures nothing"):
            contributions(aggregate, name, OF_THE_WHOLE_SET[name])
        return
    values = VALUES[name]  # KeyError: lm-eval has a new one
    found = contributions(aggregate, name, values)
    assert len(found.values) == len(values)
    assert found.number == pytest.approx(float(aggregate(values)), rel=1e-9)
    interval = found.interval()
    assert interval is not None
    low, high = interval
    assert low < found.number < high
    assert RANGES.get(name, (-math.inf, math.inf))[0] <= found.number


@pytest.mark.parametrize("name", ["nanmean", "weighted_perplexity", "f1", "matthews_corrcoef"])
def test_the_spread_of_contributions_is_that_of_the_number(name):
    """The interval is about as wide as the bootstrap's."""
    aggregate, values, dice = AGGREGATION_REGISTRY[name], VALUES[name], np.random.default_rng(1)
    found = contributions(aggregate, name, values)
    drawn = [
        float(aggregate([values[i] for i in dice.integers(len(values), size=len(values))]))
        for _ in range(400)
    ]
    spread = float(np.std(np.log(drawn) if found.logarithmic else drawn))
    assert np.std(found.values, ddof=1) / math.sqrt(len(values)) == pytest.approx(spread, rel=0.2)


def fails(items):
    raise RuntimeError


@pytest.mark.parametrize(
    ("aggregate", "values"),
    [
        (np.mean, LOSSES),
        (sum, LOSSES),
        (lambda items: 100 * statistics.fmean(items), LOSSES),
        (lambda items: math.exp(-statistics.fmean(items)), LOSSES),
        (
            lambda items: statistics.geometric_mean([-item for item in items]),
            [-1.0, -2.5, -7.0] * 4,
        ),
        (lambda items: np.mean([lls[gold] - min(lls) for gold, lls in items]), CHANCES),
    ],
)
def test_a_mean_is_found_in_a_tasks_own_function(aggregate, values):
    found = contributions(aggregate, None, values)
    assert found.number == pytest.approx(float(aggregate(values)))


@pytest.mark.parametrize(
    "aggregate",
    [
        max,
        min,
        statistics.median,
        statistics.stdev,
        lambda items: statistics.fmean(sorted(items)[2:-2]),
        lambda items: math.sqrt(statistics.fmean(item * item for item in items)),
        lambda items: items[0],
        fails,
    ],
)
def test_no_mean_is_seen_where_there_is_none(aggregate):
    with pytest.raises(ValueError, match="the task's own aggregation is of the whole set"):
        contributions(aggregate, None, LOSSES)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        (3, 3.0),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array([0.25]), 0.25),
        (np.array(0.25), 0.25),
        (None, None),
        ("0.5", None),
        ([0.5], None),
        ((1, np.array([0.1, 0.9])), None),
        (np.array([0.1, 0.9]), None),
    ],
)
def test_numbers_of_every_kind_are_numbers(value, number):
    assert number_of(value) == number


@pytest.mark.parametrize("by_size", [True, False])
def test_a_groups_contributions_are_those_of_the_mean_of_its_tasks(by_size):
    parts = [contributions(max, "perplexity", LOSSES[:10]), contributions(max, "mean", LOSSES[10:])]
    weights = [10.0, 30.0] if by_size else [1.0, 1.0]
    expected = np.average([part.number for part in parts], weights=weights)
    shared = of_group(list(zip(parts, weights, strict=True)))
    pooled = [value for part in shared for value in part.values]
    assert len(pooled) == 40
    assert np.mean(pooled) == pytest.approx(expected)


def test_an_old_files_log_likelihoods_are_turned_into_losses():
    scores = {f"s/{n}": value for n, value in enumerate(LOSSES)}
    assert explained(scores, statistics.fmean(LOSSES)) == {False: scores}
    losses = {sample: -value for sample, value in scores.items()}
    assert explained(scores, metrics.perplexity(LOSSES)) == {True: losses}
    assert explained(losses, metrics.perplexity(LOSSES)) == {True: losses}
    assert explained(scores, statistics.median(LOSSES)) == {}
    assert explained({"s": 800.0}, math.nan) == {True: {"s": 800.0}}
    assert explained({"s": math.inf}, math.nan).keys() == {False, True}


# A task's own functions; the metrics of `odd` have names and values of every shape.
CODE = """
import numpy as np

def odd(doc, results):
    right = results[0][0] > results[1][0]
    return {
        "a, b": np.bool_(right),
        "array": np.array([results[0][0]]),
        "float32": np.float32(results[0][0]),
        "text": float(right),
        "pair": (doc["g"], [likelihood for likelihood, _ in results]),
        "nothing": None,
        "x_stderr": results[1][0],
        "middle": results[0][0],
    }

def gap(items):
    return np.mean([values[gold] - np.mean(values) for gold, values in items])

def nothing(items):
    return 0.5
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{data}.jsonl
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
{extra}
metric_list:
"""
CHOICE = {"kind": "multiple_choice", "target": "g", "extra": "doc_to_choice: c"}
TASKS = {
    "m_choice": (
        "rows",
        CHOICE,
        ["acc", "brier_score", "f1", "mcc", "likelihood\\n    aggregation: !function code.gap"],
    ),
    "m_few": ("few", CHOICE, ["acc", "brier_score", "likelihood"]),
    "m_last_word": (
        "rows",
        {"kind": "loglikelihood", "target": '"{{c[g]}}"', "extra": ""},
        ["perplexity", "acc"],
    ),
    "m_odd": (
        "rows",
        {**CHOICE, "extra": "doc_to_choice: c\\nprocess_results: !function code.odd"},
        [
            *(
                f"{name}\\n    aggregation: mean\\n    higher_is_better: true"
                for name in ("a, b", "array", "float32", "text", "x_stderr")
            ),
            "pair\\n    aggregation: !function code.gap\\n    higher_is_better: true",
            "nothing\\n    aggregation: !function code.nothing\\n    higher_is_better: true",
            "middle\\n    aggregation: median\\n    higher_is_better: true",
        ],
    ),
}
GROUP = """
group: m_group
task: [m_choice, m_few]
aggregate_metric_list:
  - metric: acc
    weight_by_size: {acc}
  - metric: brier_score
    weight_by_size: {brier}
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Scores of the demo model, and of one whose logits are half as large."""
    with pytest.MonkeyPatch.context() as patch:
        # Resampling gives standard errors alone, and takes most of the time.
        patch.setattr(run, "evaluate", lambda *asked, **how: evaluate(*asked, **{**how, **QUICK}))
        yield scores_of(tmp_path_factory.mktemp("tasks"))


def scores_of(folder):
    rows = [
        {"q": f"The {a} saw a {b}.", "c": [" Then it rained.", " He ran home."], "g": i % 2}
        for i, (a, b) in enumerate(
            (a, b) for a in ("man", "dog", "king") for b in ("cat", "boat", "hill")
        )
    ]
    for name, count in (("rows", 9), ("few", 3)):
        text = "".join(json.dumps(row) + "\n" for row in rows[:count])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "code.py").write_text(CODE, encoding="utf-8")
    for name, (data, kind, names) in TASKS.items():
        head = TASK.format(name=name, folder=folder, data=data, **kind).replace("\\n", "\n")
        entries = "".join(f"  - metric: {quoted(entry)}\n" for entry in names)
        entries = entries.replace("\\n", "\n")
        (folder / f"{name}.yaml").write_text(head + entries, encoding="utf-8")
    groups = {"m_group": ("false", "false"), "m_by_size": ("true", "true"), "m_without": ("", "")}
    for name, (acc, brier) in groups.items():
        text = GROUP.format(acc=acc, brier=brier).replace("m_group", name)
        text = text if acc else text.partition("aggregate")[0]
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    path = DEMO_MODELS / "dense"
    model, tokenizer = load_decoder(Checkpoint(path), torch.float32), load_tokenizer(path)
    parts = []
    for factor in (1.0, 0.5):
        model.norm_H.mul_(factor)
        for group in ("m_group", "m_by_size", "m_without"):
            names = [group, *(["m_last_word", "m_odd"] if group == "m_group" else [])]
            evaluation = evaluation_of(tasks=names)
            library = Library(None, settle=True, include=folder)
            resolve_data_sets(names, library, include=folder)
            assert library.identities == {}  # all files lie in the folder
            for batch in batches(evaluation):
                parts.append(
                    score_batch(
                        model,
                        tokenizer,
                        evaluation,
                        batch,
                        Library(None, library.identities, include=folder),
                        include=folder,
                        seed=0,
                        journal=folder / "journal" / str(factor),
                        identity="demo",
                        steps=no_steps,
                    )
                )
    return parts[:3], parts[3:]


def value_of(row, metric):
    """Return a metric's value for a sample, as lm-eval had it (a tuple as a list)."""
    values = row.get("values") or {}
    return json.loads(values[metric]) if metric in values else row["scores"][metric]


def quoted(entry):
    name, newline, rest = entry.partition("\\n")
    return f'"{name}"{newline}{rest}'


def test_metrics_of_every_shape_are_counted_and_stored_and_read_back(scored, tmp_path):
    for parts in zip(*scored, strict=True):
        for part in parts:
            [results] = part.results.values()
            for owner, found in results["results"].items():
                for key, value in found.items():
                    name, _, chosen = key.rpartition(",")
                    if (
                        chosen == "none"
                        and (owner, name) != ("m_few", "likelihood")
                        and not (
                            name.endswith("_stderr")
                            and name.removesuffix("_stderr") + ",none" in found
                        )
                    ):
                        expected = value[0] if isinstance(value, list) else value
                        assert part.metrics[f"{owner}/{name}"] == pytest.approx(expected)
    part = scored[0][0]
    write_samples(tmp_path / "samples.parquet", part.samples)
    rows = read_samples(tmp_path / "samples.parquet")
    assert len(rows) == len(part.samples) == 9 + 3 + 9 + 9
    by_task = {row["task"]: row for row in rows if row["doc_id"] == 1}
    last, odd = by_task["m_last_word"], by_task["m_odd"]
    gold, chances = value_of(by_task["m_choice"], "brier_score")
    assert (gold, sum(chances), len(chances)) == (1, pytest.approx(1), 2)
    assert value_of(by_task["m_choice"], "f1")[0] == 1
    assert value_of(last, "perplexity") == last["log_likelihood"][0]
    assert value_of(odd, "pair") == [1, odd["log_likelihood"]]
    assert value_of(odd, "nothing") is None
    assert value_of(odd, "middle") == odd["log_likelihood"][0]
    assert value_of(odd, "float32") == pytest.approx(odd["log_likelihood"][0])
    assert value_of(odd, "a, b") == value_of(odd, "text")
    assert "middle" not in odd["scores"]


def test_differences_follow_from_the_numbers_and_only_metrics_that_exist_are_compared(scored):
    compared: dict[str, Comparison] = {}
    for ours, theirs in zip(scored[1], scored[0], strict=True):
        found = comparisons(
            measured(ours.samples, quick=False),
            measured(theirs.samples, quick=False),
            (ours.metrics, theirs.metrics),
        )
        for name, row in found.items():
            numbers = ours.metrics[name], theirs.metrics[name]
            expected = math.log(numbers[0] / numbers[1]) if row.ratio else numbers[0] - numbers[1]
            rounding = 1e-5 if name == "m_odd/float32" else 1e-9  # lm-eval sums these as they are
            assert row.difference == pytest.approx(expected, abs=rounding), name
            assert row.describes(*numbers)
            ends = [end for end in (row.low, row.difference, row.high) if end is not None]
            assert ends == sorted(ends)
        compared |= found
    assert {name for name, row in compared.items() if row.ratio} == {"m_last_word/perplexity"}
    assert compared.keys() == {
        *(f"m_choice/{name}" for name in ("acc", "brier_score", "f1", "mcc", "likelihood")),
        *(
            f"{task}/{name}"
            for task in ("m_few", "m_group", "m_by_size")
            for name in ("acc", "brier_score")
        ),
        "m_last_word/perplexity",
        "m_last_word/acc",
        *(f"m_odd/{name}" for name in ("a, b", "array", "float32", "text", "pair", "x_stderr")),
    }
    [results] = scored[0][0].results.values()
    without = results["not_by_document"]
    assert without.keys() == {"m_odd/middle", "m_odd/nothing", "m_few/likelihood"}
    assert without["m_few/likelihood"].startswith("it cannot be aggregated: TypeError: ")
    assert "m_few/likelihood" not in scored[0][0].metrics
    assert results["higher_is_better"]["m_last_word"] == {"perplexity": False, "acc": True}


def test_intervals_are_within_the_possible_range(scored):
    for part in (part for parts in scored for part in parts):
        for name, (low, high) in part.intervals.items():
            assert low <= part.metrics[name] <= high, name
            least, most = {"acc": (0, 1), "brier_score": (0, 2), "f1": (0, 1), "mcc": (-1, 1)}.get(
                name.partition("/")[2], (-math.inf, math.inf)
            )
            assert least <= low, name
            assert high <= most, name
    low, high = scored[0][0].intervals["m_last_word/perplexity"]
    assert 0 < low < high

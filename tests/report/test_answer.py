"""The answer at the top of a report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.placement import Placement
from q3q.record import COMPLETED, Comparison, TrialRecord
from q3q.report.answer import Loss, answers, loss
from q3q.report.pools import Pool, pools
from tests.specs import calibration_of, evaluation_of, make_spec, model_of, text_of

STORIES = "perplexity/stories"


def record(
    method: str,
    bits: int,
    perplexity: float,
    reach: float = 0.0,
    nats: tuple[float, float, float] | None = None,
    **changes: Any,
) -> TrialRecord:
    """Return a completed trial.

    Args:
        reach: of the perplexity's own interval.
        nats: the paired difference, between the ends of its interval.
        changes: of the spec.
    """
    spec = make_spec(method, bits, **changes)
    complete = TrialRecord(spec=spec, status=COMPLETED, metrics={STORIES: perplexity})
    if reach:
        complete = replace(complete, intervals={STORIES: (perplexity - reach, perplexity + reach)})
    if nats is None:
        return complete
    low, middle, high = nats
    paired: dict[str, Any] = {
        "p_value": 0.01,
        "n": 32,
        "test": "paired",
        "distinguishable": low > 0 or high < 0,
    }
    result = Comparison(metric=STORIES, difference=middle, low=low, high=high, **paired)
    return replace(complete, comparisons={STORIES: result})


def alone(trial: TrialRecord) -> Pool:
    return Pool("it", (trial,))


def measured(
    folder: Path, trial: TrialRecord, nll_N: Sequence[float], answers_N: Sequence[float] = ()
) -> TrialRecord:
    """Write a trial's samples: each window's loss, each answer to the tasks a and b."""
    result = replace(trial, placement=Placement(trials=folder))
    rows = window_rows(STORIES, "d", nll_N)
    for task in ("a", "b"):
        rows += [
            {
                "task": task,
                "doc_id": n,
                "doc_hash": "h",
                "filter": "none",
                "scores": {"acc": float(right)},
            }
            for n, right in enumerate(answers_N)
        ]
    result.trial.folder.mkdir(parents=True)
    write_samples(result.trial.folder / SAMPLES, rows)
    return result


def test_the_best_at_each_width_and_its_loss() -> None:
    records = [
        record("none", 16, 10.0),
        record("rtn", 2, 20.0),
        record("gptq", 2, 12.0),
        record("rtn", 4, 10.5),
    ]
    [table] = answers(records)
    assert table.title == "demo"
    assert table.rows == (
        ("2", "gptq", "12.00", "+20.0 %", "unknown: rtn"),
        ("4", "rtn", "10.50", "+5.0 %", "-"),
    )


def test_a_paired_comparison_gives_the_loss_its_interval() -> None:
    result = loss(alone(record("gptq", 2, 12.0, nats=(0.0953, 0.1823, 0.2624))), None, STORIES)
    assert result is not None
    assert (result.low, result.value, result.high) == pytest.approx((0.1, 0.2, 0.3), abs=1e-3)
    assert str(result) == "+20.0 % [+10.0, +30.0]"
    none = alone(record("gptq", 2, 10.0, nats=(-0.01, 0.0, 0.01)))
    assert "not distinguishable from none" in str(loss(none, None, STORIES))


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.00123, 0.00101, 0.00145, "+0.123 % [+0.101, +0.145]"),
        (-0.0003, None, None, "-0.030 %"),
        (0.2, 0.1, 0.3, "+20.0 % [+10.0, +30.0]"),
        (0.0, 0.0, 0.0, "+0.0 % [+0.0, +0.0]"),
        (46.0, 45.0, 47.0, "47 times [46, 48]"),
    ],
)
def test_a_loss_has_the_digits_that_its_interval_allows(
    value: float, low: float | None, high: float | None, text: str
) -> None:
    assert str(Loss(STORIES, value, low, high)) == text


def test_intervals_without_samples_tell_apart_or_leave_it_unknown() -> None:
    """Overlapping intervals show nothing: a paired test may still find a difference."""
    apart = [record("rtn", 2, 20.0, reach=1), record("gptq", 2, 12.0, reach=1)]
    alike = [record("rtn", 2, 12.5, reach=1), record("gptq", 2, 12.0, reach=1)]
    assert [answers(group)[0].rows[0][-1] for group in (apart, alike)] == ["-", "unknown: rtn"]


def test_paired_losses_tell_apart_what_the_metrics_own_intervals_cannot() -> None:
    pair = [
        record("rtn", 2, 12.5, reach=1, nats=(0.2, 0.22, 0.24)),
        record("gptq", 2, 12.0, reach=1, nats=(0.17, 0.18, 0.19)),
    ]
    assert answers(pair)[0].rows[0][-1] == "-"


def test_without_a_reference_a_loss_is_unknown_and_without_numbers_nothing_is_best() -> None:
    failed = TrialRecord.failed(record("gptq", 3, 1.0).trial, "died")
    [table] = answers([record("rtn", 2, 20.0), failed])
    assert table.rows == (("2", "rtn", "20.00", "unknown", "-"), ("3", "-", "failed", "-", "-"))


def test_two_methods_are_compared_window_by_window(tmp_path: Path) -> None:
    """The intervals overlap widely because windows differ in difficulty; pairs do not."""
    hard = [1.0, 2.0, 3.0, 4.0, 1.5, 2.5, 3.5, 4.5]
    worse = [nll + 0.01 + 0.001 * k for k, nll in enumerate(hard)]
    different = [nll + 0.01 * (-1) ** k for k, nll in enumerate(hard)]
    for name, nll_N, expected in (("worse", worse, "-"), ("other", different, "rtn")):
        pair = [
            measured(tmp_path / name, record("rtn", 2, 12.5, reach=5), nll_N),
            measured(tmp_path / name, record("gptq", 2, 12.0, reach=5), hard),
        ]
        assert answers(pair)[0].rows[0][-1] == expected


def test_the_mean_accuracys_loss_has_the_interval_of_its_pairs(tmp_path: Path) -> None:
    """Two tasks of 100 questions, of which 10 were lost: stratified differences."""
    evaluation = evaluation_of(tasks=["a", "b"])
    right, lost = [1.0] * 80 + [0.0] * 20, [0.0] * 10 + [1.0] * 70 + [0.0] * 20
    trials = []
    for method, answered_N, acc in (("none", right, 0.8), ("gptq", lost, 0.7)):
        trial = replace(
            record(method, 4, 1.0, evaluation=evaluation), metrics={"a/acc": acc, "b/acc": acc}
        )
        trials.append(measured(tmp_path, trial, [], answered_N))
    none, gptq = (Pool(trial.spec.method.name, (trial,)) for trial in trials)
    result = loss(gptq, none, "accuracy")
    assert result is not None
    assert result.value == pytest.approx(-0.1)
    assert result.low is not None
    assert result.high is not None
    # Each task's own standard error is sqrt(0.1 * 0.9 / 100) = 0.03; of the mean of two, 0.021.
    assert result.high - result.low == pytest.approx(2 * 1.96 * 0.021, rel=0.15)
    assert result.distinguishable
    [table] = answers(trials)
    assert table.columns[:4] == ("bits", "best method", "mean accuracy, %", "loss")
    assert table.rows[0][3].startswith("-10.0 points [-1")


def test_trials_that_were_evaluated_otherwise_are_not_compared() -> None:
    """A perplexity of the first two windows is lower, and says nothing of the others."""
    short, complete = evaluation_of(text_of("stories", limit=2)), evaluation_of("stories")
    tables = answers(
        [record("rtn", 2, 1.5, evaluation=short), record("gptq", 2, 12.0, evaluation=complete)]
    )
    assert {table.title: table.rows[0][1] for table in tables} == {
        "demo (limit=null)": "gptq",
        "demo (limit=2)": "rtn",
    }
    different = model_of("demo", dtype="bfloat16", digest="another")
    titles = {
        table.title
        for table in answers([record("rtn", 2, 2.0), record("rtn", 2, 1.0, model=different)])
    }
    assert titles == {"demo (dtype=bfloat16)", "demo (dtype=float32)"}


CALIBRATED: dict[str, Any] = {"calibration": calibration_of("demo")}


def test_a_lucky_seed_is_not_the_best_method() -> None:
    """AWQ would win by its best seed, and does not by its mean."""
    trials = [
        record("gptq", 2, value, seed=seed, **CALIBRATED)
        for seed, value in enumerate((12.0, 12.1, 12.2))
    ]
    trials += [
        record("awq", 2, value, seed=seed, **CALIBRATED)
        for seed, value in enumerate((11.0, 15.0, 16.0))
    ]
    [table] = answers(trials)
    assert table.rows[0][1:3] == ("gptq", "12.10 ± 0.1 (3 seeds)")
    assert table.rows[0][-1] == "awq"  # the spread over seeds explains the difference
    assert [pool.spread(STORIES) for pool in pools(trials)] == pytest.approx(
        [2.6458, 0.1], abs=1e-4
    )


def test_seeds_tell_apart_what_spreads_less_than_it_differs(tmp_path: Path) -> None:
    trials = [
        record("gptq", 2, value, seed=seed, **CALIBRATED)
        for seed, value in enumerate((12.0, 12.1, 12.2))
    ]
    trials += [
        record("awq", 2, value, seed=seed, **CALIBRATED)
        for seed, value in enumerate((15.0, 15.1, 15.2))
    ]
    assert answers(trials)[0].rows[0][-1] == "unknown: awq"  # for want of samples
    with_samples = [
        measured(
            tmp_path, trial, [trial.metrics[STORIES] / 10 + 0.01 * window for window in range(8)]
        )
        for trial in trials
    ]
    assert answers(with_samples)[0].rows[0][-1] == "-"


def test_texts_that_disagree_about_the_best_say_so() -> None:
    evaluation = evaluation_of("stories", "library")
    trials = [
        replace(
            record(method, 2, stories, evaluation=evaluation),
            metrics={STORIES: stories, "perplexity/library": library},
        )
        for method, stories, library in (
            ("none", 1.0, 10.0),
            ("gptq", 2.0, 40.0),
            ("awq", 3.0, 20.0),
        )
    ]
    [table] = answers(trials)
    assert table.columns[1] == "best method by perplexity, stories"
    assert table.rows[0][1:] == (
        *("gptq", "2.000", "+100.0 %", "40.00", "+300.0 %", "unknown: awq"),
        "perplexity, library: awq (unknown whether by chance)",
    )


def test_code_of_another_version_is_marked() -> None:
    trials = [
        replace(record("gptq", bits, 12.0), environment={"git_commit": commit})
        for bits, commit in ((2, "a"), (3, "a"), (4, "b"))
    ]
    [table] = answers(trials)
    assert [row[1] for row in table.rows] == ["gptq", "gptq", "gptq *"]
    assert "a different version of the code" in table.note

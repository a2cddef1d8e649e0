"""The answer at the top of a report."""

from dataclasses import replace
from typing import Any

import pytest

from q3q.record import COMPLETED, Comparison, TrialRecord
from q3q.report.answer import answers, loss
from q3q.spec import Scheme, TrialSpec

STORIES = "perplexity/stories"


def record(
    method: str, bits: int, perplexity: float, reach: float = 0.0, nats: tuple[float, float, float] | None = None
) -> TrialRecord:
    """reach: of the perplexity's own interval. nats: paired difference and its interval."""
    spec = TrialSpec(
        model={"name": "demo", "digest": "d", "dtype": "float32"},
        method={"name": method, "version": 1},
        scheme=None if method == "none" else Scheme(bits=bits, group_size=128, symmetric=False),
        calibration=None,
        evaluation={"texts": [{"name": "stories", "window": 512}], "tasks": [], "task_limit": None},
        seed=0,
    )
    whole = TrialRecord(spec=spec, status=COMPLETED, metrics={STORIES: perplexity})
    if reach:
        whole = replace(whole, intervals={STORIES: (perplexity - reach, perplexity + reach)})
    if nats is None:
        return whole
    low, middle, high = nats
    paired: dict[str, Any] = {"p_value": 0.01, "n": 32, "test": "paired", "distinguishable": low > 0 or high < 0}
    found = Comparison(metric=STORIES, difference=middle, low=low, high=high, **paired)
    return replace(whole, comparisons={STORIES: found})


def test_the_best_at_each_width_and_its_loss() -> None:
    records = [record("none", 16, 10.0), record("rtn", 2, 20.0), record("gptq", 2, 12.0), record("rtn", 4, 10.5)]
    [table] = answers(records)
    assert table.title == "demo"
    assert table.rows == (("2", "gptq", "12.00", "+20.0 %", "-"), ("4", "rtn", "10.50", "+5.0 %", "-"))


def test_a_paired_comparison_gives_the_loss_its_interval() -> None:
    found = loss(record("gptq", 2, 12.0, nats=(0.0953, 0.1823, 0.2624)), None, STORIES)
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.2, 0.3), abs=1e-3)
    assert str(found) == "+20.0 % [+10.0, +30.0]"
    assert "not distinguishable from none" in str(loss(record("gptq", 2, 10.0, nats=(-0.01, 0.0, 0.01)), None, STORIES))


def test_what_intervals_cannot_tell_apart_is_named() -> None:
    apart = [record("rtn", 2, 20.0, reach=1), record("gptq", 2, 12.0, reach=1)]
    alike = [record("rtn", 2, 12.5, reach=1), record("gptq", 2, 12.0, reach=1)]
    assert [answers(some)[0].rows[0][-1] for some in (apart, alike)] == ["-", "rtn"]


def test_paired_losses_tell_apart_what_the_metrics_own_intervals_cannot() -> None:
    pair = [
        record("rtn", 2, 12.5, reach=1, nats=(0.2, 0.22, 0.24)),
        record("gptq", 2, 12.0, reach=1, nats=(0.17, 0.18, 0.19)),
    ]
    assert answers(pair)[0].rows[0][-1] == "-"


def test_without_a_reference_a_loss_is_unknown_and_without_numbers_nothing_is_best() -> None:
    failed = TrialRecord.failed(record("gptq", 3, 1.0).spec, "died")
    [table] = answers([record("rtn", 2, 20.0), failed])
    assert table.rows == (("2", "rtn", "20.00", "unknown", "-"), ("3", "none", "failed", "-", "-"))

"""Records are compared on their own numbers; those that older versions compared wrongly, again."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from q3q.evaluate.samples import SAMPLES, write_samples
from q3q.placement import Placement
from q3q.record import COMPLETED, Comparison, TrialRecord
from q3q.sweep.comparing import compared, is_current
from tests.specs import evaluation_of, make_spec

LIKELIHOODS = {"none": [-1.0, -2.0, -3.0, -2.5] * 3, "rtn": [-1.5, -2.7, -3.1, -4.4] * 3}


def record(folder: Path, method: str) -> TrialRecord:
    """Return a record of a group `g` of one task `t`, as older versions wrote it."""
    values = LIKELIHOODS[method]
    spec = make_spec(method, evaluation=evaluation_of(tasks=["t"]))
    rows = [
        {
            "task": "t",
            "groups": ["g"],
            "doc_id": n,
            "doc_hash": "h",
            "filter": "none",
            "scores": {"perplexity": value, "acc": float(value > -3), "middle": value},
        }
        for n, value in enumerate(values)
    ]
    found = TrialRecord(
        spec=spec,
        placement=Placement(trials=folder),
        status=COMPLETED,
        metrics={
            "t/perplexity": math.exp(-sum(values) / len(values)),
            "t/acc": sum(value > -3 for value in values) / len(values),
            "t/middle": sorted(values)[len(values) // 2],
        },
        results={"t": {"higher_is_better": {"t": {"perplexity": False, "acc": True}}}},
    )
    found.trial.folder.mkdir(parents=True)
    return replace(found, files={SAMPLES: write_samples(found.trial.folder / SAMPLES, rows)})


def wrong(name: str, difference: float) -> Comparison:
    return Comparison(
        metric=name,
        difference=difference,
        low=None,
        high=None,
        distinguishable=True,
        p_value=0.01,
        n=12,
        test="a mean's",
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[TrialRecord, TrialRecord]:
    return record(tmp_path, "rtn"), record(tmp_path, "none")


def test_an_old_records_perplexity_gets_the_right_sign(
    pair: tuple[TrialRecord, TrialRecord],
) -> None:
    rtn, none = pair
    names = ("t/perplexity", "t/acc")
    right = math.log(rtn.metrics[names[0]] / none.metrics[names[0]])
    found = compared(rtn, none)
    assert found.comparisons.keys() == set(names)  # neither the group's, nor the median
    perplexity, acc = (found.comparisons[name] for name in names)
    assert right > 0
    assert perplexity.difference == pytest.approx(right)
    assert (perplexity.ratio, perplexity.higher_is_better) == (True, False)
    assert (acc.ratio, acc.higher_is_better) == (False, True)
    assert acc.difference == pytest.approx(rtn.metrics["t/acc"] - none.metrics["t/acc"])
    assert is_current(found, none)
    restored = TrialRecord.from_json(found.to_json())
    assert restored.comparisons == found.comparisons


@pytest.mark.parametrize("name", ["t/perplexity", "g/acc", "t/middle", "t/gone"])
def test_a_difference_that_is_not_that_of_the_numbers_is_not_current(
    pair: tuple[TrialRecord, TrialRecord], name: str
) -> None:
    rtn, none = pair
    mean = sum(LIKELIHOODS["rtn"]) / 12 - sum(LIKELIHOODS["none"]) / 12
    old = replace(rtn, comparisons={name: wrong(name, mean)})
    assert not is_current(old, none)
    assert is_current(old, None)  # nothing to compare it with
    assert not is_current(rtn, none)


def test_a_metric_that_diverged_on_one_side_is_told_apart(
    pair: tuple[TrialRecord, TrialRecord],
) -> None:
    rtn, none = pair
    rows = [
        {"task": "perplexity/x", "doc_hash": "h", "filter": "none", "doc_id": n} for n in range(8)
    ]
    digests = []
    for side, last in ((rtn, math.inf), (none, 2.0)):
        losses = [2.0] * 7 + [last]
        scored = [{**row, "scores": {"nll": loss}} for row, loss in zip(rows, losses, strict=True)]
        digests.append(write_samples(side.trial.folder / SAMPLES, scored))
    rtn = replace(rtn, diverged=("perplexity/x",), files={SAMPLES: digests[0]})
    none = replace(none, metrics={"perplexity/x": math.exp(2.0)}, files={SAMPLES: digests[1]})
    [found] = compared(rtn, none).comparisons.values()
    assert (found.difference, found.distinguishable, found.ratio) == (None, True, True)

"""The answer at the top of a report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.bit_budget import BitBudget
from q3q.evaluate.metrics import reads_calibrated_kind
from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.placement import Placement
from q3q.record import COMPLETED, Comparison, TrialRecord
from q3q.report.answer import NO_WINNER, ONLY_CALIBRATED, answers, sentences
from q3q.report.changes import Change, change
from q3q.report.opening import in_markdown
from q3q.report.pairs import p_by_seeds
from q3q.report.pools import Pool, pools
from q3q.report.tables import Table
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


def tables(records: list[TrialRecord]) -> list[Table]:
    return [answer.table() for answer in answers(records)]


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


def test_the_best_at_each_width_and_its_change() -> None:
    records = [
        record("none", 16, 10.0),
        record("rtn", 2, 20.0),
        record("gptq", 2, 12.0),
        record("rtn", 4, 10.5),
    ]
    [table] = tables(records)
    assert table.title == "demo"
    assert table.rows == (
        ("2", "gptq", "12.00", "+20.0 %, worse (not tested)", "not tested: rtn"),
        ("4", "rtn", "10.50", "+5.0 %, worse (not tested)", "-"),
    )
    assert sentences(answers(records)) == [
        "2 bits: gptq has the lowest perplexity of stories (calibrated on), 12.00, +20.0 % from "
        "the unquantized model. Not tested against it: rtn.",
        "4 bits: only rtn was measured; its perplexity of stories (calibrated on) is 10.50, +5.0 % "
        "from the unquantized model.",
        ONLY_CALIBRATED,
    ]


def test_a_paired_comparison_gives_the_change_its_interval() -> None:
    result = change(alone(record("gptq", 2, 12.0, nats=(0.0953, 0.1823, 0.2624))), None, STORIES)
    assert result is not None
    assert (result.low, result.value, result.high) == pytest.approx((0.1, 0.2, 0.3), abs=1e-3)
    assert str(result) == "+20.0 % [+10.0, +30.0], worse"
    none = alone(record("gptq", 2, 10.0, nats=(-0.01, 0.0, 0.01)))
    assert str(change(none, None, STORIES)).endswith(", no significant difference")


@pytest.mark.parametrize(
    ("metric", "value", "low", "high", "text"),
    [
        (STORIES, 0.00123, 0.00101, 0.00145, "+0.123 % [+0.101, +0.145], worse"),
        (STORIES, -0.0003, -0.0004, -0.0002, "-0.030 % [-0.040, -0.020], better"),
        (STORIES, 0.2, 0.1, 0.3, "+20.0 % [+10.0, +30.0], worse"),
        (STORIES, 0.0, 0.0, 0.0, "0.0 % [0.0, 0.0], no change"),
        (STORIES, 5.91, 5.8, 6.03, "+591 % [+580, +603], worse"),
        (STORIES, 46.0, 45.0, 47.0, "+4,600 % [+4,500, +4,700], worse"),
        (STORIES, -0.5, -0.6, -0.4, "-50.0 % [-60.0, -40.0], better"),
        ("accuracy", -0.001, -0.002, -0.0004, "-0.10 points [-0.20, -0.04], worse"),
        ("accuracy", 0.02, 0.01, 0.03, "+2.0 points [+1.0, +3.0], better"),
        ("who/acc", -0.25, -0.5, -0.1, "-25.0 points [-50.0, -10.0], worse"),
    ],
)
def test_a_change_keeps_its_sign_and_unit_and_is_said_as_better_or_worse(
    metric: str, value: float, low: float, high: float, text: str
) -> None:
    assert str(Change(metric, value, low, high, distinguishable=True)) == text


def test_intervals_without_samples_tell_apart_or_leave_it_unknown() -> None:
    """Overlapping intervals show nothing: a paired test may still find a difference."""
    apart = [record("rtn", 2, 20.0, reach=1), record("gptq", 2, 12.0, reach=1)]
    alike = [record("rtn", 2, 12.5, reach=1), record("gptq", 2, 12.0, reach=1)]
    assert [tables(group)[0].rows[0][-1] for group in (apart, alike)] == [
        "-",
        "not tested: rtn",
    ]


def test_paired_changes_tell_apart_what_the_metrics_own_intervals_cannot() -> None:
    pair = [
        record("rtn", 2, 12.5, reach=1, nats=(0.2, 0.22, 0.24)),
        record("gptq", 2, 12.0, reach=1, nats=(0.17, 0.18, 0.19)),
    ]
    assert tables(pair)[0].rows[0][-1] == "-"


def test_without_a_reference_a_change_is_unknown_and_without_numbers_nothing_is_best() -> None:
    failed = TrialRecord.failed(record("gptq", 3, 1.0).trial, "died")
    [table] = tables([record("rtn", 2, 20.0), failed])
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
        assert tables(pair)[0].rows[0][-1] == expected


def test_the_mean_accuracys_change_has_the_interval_of_its_pairs(tmp_path: Path) -> None:
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
    result = change(gptq, none, "accuracy")
    assert result is not None
    assert result.value == pytest.approx(-0.1)
    assert result.low is not None
    assert result.high is not None
    # Each task's own standard error is sqrt(0.1 * 0.9 / 100) = 0.03; of the mean of two, 0.021.
    assert result.high - result.low == pytest.approx(2 * 1.96 * 0.021, rel=0.15)
    assert result.distinguishable
    [table] = tables(trials)
    assert table.columns[:4] == ("bits", "best method", "mean accuracy, %", "change")
    assert table.rows[0][3].startswith("-10.0 points [-1")
    assert table.rows[0][3].endswith("], worse")


def test_trials_that_were_evaluated_otherwise_are_not_compared() -> None:
    """A perplexity of the first two windows is lower, and says nothing of the others."""
    short, complete = evaluation_of(text_of("stories", limit=2)), evaluation_of("stories")
    found = tables(
        [record("rtn", 2, 1.5, evaluation=short), record("gptq", 2, 12.0, evaluation=complete)]
    )
    assert {table.title: table.rows[0][1] for table in found} == {
        "demo (stories: all windows of 512 tokens)": "gptq",
        "demo (stories: 2 windows of 512 tokens)": "rtn",
    }
    different = model_of("demo", dtype="bfloat16", digest="another")
    titles = {
        table.title
        for table in tables([record("rtn", 2, 2.0), record("rtn", 2, 1.0, model=different)])
    }
    assert titles == {"demo (bfloat16)", "demo (float32)"}


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
    [table] = tables(trials)
    assert table.rows[0][1:3] == ("gptq", "12.10 ± 0.10 (3 seeds)")
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
    assert tables(trials)[0].rows[0][-1] == "not tested: awq"  # for want of samples
    with_samples = [
        measured(
            tmp_path, trial, [trial.metrics[STORIES] / 10 + 0.01 * window for window in range(8)]
        )
        for trial in trials
    ]
    assert tables(with_samples)[0].rows[0][-1] == "-"


LIBRARY = "perplexity/library"
BOTH = evaluation_of("stories", "library")


def of_two_texts(method: str, stories: float, library: float, **changes: Any) -> TrialRecord:
    """Return a trial at 2 bits; the demo's calibration text is of the stories' kind."""
    trial = record(method, 2, stories, evaluation=BOTH, **changes)
    return replace(trial, metrics={STORIES: stories, LIBRARY: library})


def paired(folder: Path, trial: TrialRecord, nll: dict[str, list[float]]) -> TrialRecord:
    """Write the losses of each text's windows."""
    result = replace(trial, placement=Placement(trials=folder))
    result.trial.folder.mkdir(parents=True)
    rows = [row for metric, nll_N in nll.items() for row in window_rows(metric, "d", nll_N)]
    write_samples(result.trial.folder / SAMPLES, rows)
    return result


def test_the_text_that_was_not_calibrated_on_ranks_and_a_disagreement_leaves_no_winner() -> None:
    """GPTQ fits the stories that it was calibrated on, and loses the library."""
    trials = [
        of_two_texts("none", 1.0, 10.0),
        of_two_texts("gptq", 2.0, 40.0),
        of_two_texts("awq", 3.0, 20.0),
    ]
    [table] = tables(trials)
    assert table.columns[1:5] == (
        "best method by perplexity, library",
        *("perplexity, library (not calibrated on)", "change"),
        "perplexity, stories (calibrated on)",
    )
    assert table.rows[0][1:] == (
        *("awq (no clear winner)", "20.00", "+100 %, worse (not tested)"),
        *("3.000", "+200 %, worse (not tested)", "not tested: gptq"),
        "gptq by perplexity, stories (not tested)",
    )
    [sentence] = sentences(answers(trials))
    assert sentence == (
        "2 bits: no clear winner. awq has the lowest perplexity of library (not calibrated on), "
        "+100 % from the unquantized model; gptq has the lowest perplexity of stories (calibrated "
        "on), +100 %."
    )
    first, second = in_markdown(answers(trials)).splitlines()
    assert first.startswith("- Take awq at 2 bits: its perplexity of library changes by +100 %")
    assert second == (
        "- At 2 bits there is no clear winner: awq has the lowest perplexity of library (+100 %), "
        "gptq the lowest perplexity of stories (not tested)."
    )


def test_a_disagreement_within_chance_leaves_a_winner(tmp_path: Path) -> None:
    """On stories GPTQ is better by less than its windows spread: AWQ is best without a doubt."""
    hard = [1.0, 2.0, 3.0, 4.0, 1.5, 2.5, 3.5, 4.5]
    apart = [nll + 0.1 + 0.001 * k for k, nll in enumerate(hard)]
    alike = [nll + 0.01 * (-1) ** k + 0.001 for k, nll in enumerate(hard)]
    trials = [
        paired(tmp_path, of_two_texts("awq", 3.0, 20.0), {STORIES: alike, LIBRARY: hard}),
        paired(tmp_path, of_two_texts("gptq", 2.9, 22.0), {STORIES: hard, LIBRARY: apart}),
    ]
    [table] = tables(trials)
    assert table.rows[0][1] == "awq"
    assert table.rows[0][-2:] == ("-", "none")
    assert NO_WINNER not in sentences(answers(trials))[0]


def test_the_order_of_the_texts_does_not_choose_the_winner() -> None:
    turned = evaluation_of("library", "stories")
    names = set()
    for evaluation in (BOTH, turned):
        trials = [
            replace(trial, spec=replace(trial.spec, evaluation=evaluation))
            for trial in (of_two_texts("gptq", 2.0, 40.0), of_two_texts("awq", 2.1, 20.0))
        ]
        names.add(answers(trials)[0].metrics)
    assert names == {(LIBRARY, STORIES)}


@pytest.mark.parametrize(
    ("texts", "calibrated", "first"),
    [
        (("wikitext2", "c4"), "c4", "perplexity/wikitext2"),
        (("wikitext2", "c4"), "wikitext2", "perplexity/c4"),
        (("c4", "wikitext2"), "pile", "perplexity/c4"),  # neither was calibrated on
        (("stories", "library"), "demo", LIBRARY),
        (("stories",), "demo", STORIES),  # there is no other
    ],
)
def test_what_was_calibrated_on_comes_last(
    texts: tuple[str, ...], calibrated: str, first: str
) -> None:
    evaluation = evaluation_of(*texts)
    trials = [
        replace(
            record(method, 2, 2.0, evaluation=evaluation, calibration=calibration_of(calibrated)),
            metrics={f"perplexity/{text}": value + number for number, text in enumerate(texts)},
        )
        for method, value in (("gptq", 2.0), ("awq", 3.0))
    ]
    [answer] = answers(trials)
    assert answer.metrics[0] == first
    assert (ONLY_CALIBRATED in answer.sentences()) == (texts == ("stories",))


def test_a_file_is_known_to_be_calibrated_on_by_its_content() -> None:
    evaluation = evaluation_of(
        text_of("mine", source="file", digest="d1"), text_of("yours", source="file", digest="d2")
    )
    calibration = calibration_of("file", digest="d1")
    trial = record("gptq", 2, 2.0, evaluation=evaluation, calibration=calibration)
    [answer] = answers([replace(trial, metrics={"perplexity/mine": 2.0, "perplexity/yours": 3.0})])
    assert answer.metrics == ("perplexity/yours", "perplexity/mine")
    assert answer.marks["perplexity/mine"] == "calibrated on"


def test_a_text_that_a_budget_was_allotted_by_counts_as_calibrated_on() -> None:
    """RTN reads no text, but its widths were chosen by the stories."""
    budget = BitBudget(
        bits=3.8, unit="site", widths=(2, 4, 8), measure="kl", source="demo", digest="d",
        samples=8, length=64, draw="random",
    )  # fmt: skip
    trials = [
        replace(
            record("rtn", bits, 2.0, evaluation=evaluation_of("stories", "library"), budget=own),
            metrics={STORIES: 2.0 + bits, LIBRARY: 9.0 + bits},
        )
        for bits, own in ((3, None), (4, budget))
    ]
    marks = [answers(some)[0].marks for some in (trials[:1], trials[1:])]
    assert marks == [{}, {LIBRARY: "not calibrated on", STORIES: "calibrated on"}]
    assert answers(trials)[0].metrics == (LIBRARY, STORIES)
    mine = text_of("mine", source="file", digest="d")
    assert reads_calibrated_kind(mine, trials[1].spec)
    assert not reads_calibrated_kind(replace(mine, digest="e"), trials[1].spec)
    # The seed draws a budget's windows too, so one seed says nothing of the next.
    drawn = Pool("gptq", tuple(record("gptq", 4, 6 + seed / 9, seed=seed) for seed in range(3)))
    found = [p_by_seeds(alone(trial), drawn, STORIES) is None for trial in trials]
    assert found == [False, True]


def test_code_of_another_version_is_marked() -> None:
    trials = [
        replace(record("gptq", bits, 12.0), environment={"git_commit": commit})
        for bits, commit in ((2, "a"), (3, "a"), (4, "b"))
    ]
    [table] = tables(trials)
    assert [row[1] for row in table.rows] == ["gptq", "gptq", "gptq *"]
    assert "a different version of the code" in table.note

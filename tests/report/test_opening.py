"""The opening: the same few sentences everywhere, and they follow the corrected tests."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy
import pytest

from q3q.bit_budget import BitBudget
from q3q.evaluate.compare import compare
from q3q.evaluate.power import smallest_difference
from q3q.evaluate.replicates import TEST
from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.kv_scheme import KvScheme
from q3q.placement import Placement
from q3q.record import CACHE, COMPLETED, Comparison, TrialRecord
from q3q.report.about import About
from q3q.report.answer import Answer, answers
from q3q.report.budgets import by_width
from q3q.report.changes import change, p_of
from q3q.report.divergences import noise_floors
from q3q.report.families import Family, pair
from q3q.report.opening import export_hint, in_markdown, opening
from q3q.report.pools import Pool
from q3q.report.write import write_report
from q3q.sweep.questions import shown_by_questions
from tests.specs import calibration_of, evaluation_of, make_spec

STORIES = "perplexity/stories"
DOCS = Path(__file__).parents[2] / "docs"
WINDOWS = 40
HARD_N = 2 + numpy.sin(numpy.arange(WINDOWS))  # windows differ far more than methods do


def trial(
    folder: Path,
    method: str,
    bits: int,
    nll_N: Sequence[float] | numpy.ndarray,
    right_N: Sequence[float] | Mapping[str, Sequence[float]] = (),
    seed: int = 0,
) -> TrialRecord:
    """Return a trial of these losses and answers, or each task's, its samples on disk."""
    asked = right_N if isinstance(right_N, Mapping) else {"who": right_N} if len(right_N) else {}
    evaluation = evaluation_of("stories", tasks=list(asked))
    spec = make_spec(
        method, bits, evaluation=evaluation, seed=seed, calibration=calibration_of("pile")
    )
    metrics = {STORIES: math.exp(float(numpy.mean(nll_N))), "model_bytes": 1e6 * bits}
    rows = window_rows(STORIES, "d", [float(nll) for nll in nll_N])
    for task, answers_N in asked.items():
        metrics[f"{task}/acc"] = float(numpy.mean(answers_N))
        rows += [
            {"task": task, "doc_id": n, "doc_hash": "h", "filter": "none", "scores": {"acc": x}}
            for n, x in enumerate(map(float, answers_N))
        ]
    placed = Placement(trials=folder)
    result = TrialRecord(spec=spec, placement=placed, status=COMPLETED, metrics=metrics)
    result.trial.folder.mkdir(parents=True)
    write_samples(result.trial.folder / SAMPLES, rows)
    return result


def noise(seed: int, size: float = 0.002) -> numpy.ndarray:
    drawn_N = numpy.random.default_rng(seed).normal(0, size, WINDOWS)
    return drawn_N - drawn_N.mean()


def study(folder: Path) -> list[TrialRecord]:
    """Two methods that are alike at 4 bits, at 3 bits one that is better, and 8 bits as good."""
    return [
        trial(folder, "none", 16, HARD_N),
        trial(folder, "rtn", 8, HARD_N + 0.0100 + noise(1)),
        trial(folder, "rtn", 4, HARD_N + 0.0102 + noise(2)),
        trial(folder, "gptq", 4, HARD_N + 0.0101 + noise(3)),
        trial(folder, "rtn", 3, HARD_N + 0.20 + noise(4)),
        trial(folder, "gptq", 3, HARD_N + 0.05 + noise(5)),
    ]


def only(records: Sequence[TrialRecord], margin: float | None = None) -> Answer:
    [answer] = answers(records, margin)
    return answer


def test_the_answer_is_said_in_three_to_six_sentences(tmp_path: Path) -> None:
    lines = opening([only(study(tmp_path))])
    interval = lines[0][lines[0].index("[") : lines[0].index("]") + 1]
    assert lines == [
        "Take gptq at 4 bits (4.00 MB of 16.0 MB): its perplexity of stories changes by +1.015 % "
        f"{interval} from the unquantized model; rtn at 8 bits has a better number, but chance "
        "explains that.",
        "At 8 bits only rtn was measured (+1.0 % of perplexity of stories).",
        "At 4 bits gptq and rtn cannot be told apart (+1.0 % of perplexity of stories).",
        "At 3 bits gptq is best (+5.1 % of perplexity of stories), rtn loses more (+22.1 %).",
        "“Best” and “cannot be told apart” hold for all 10 comparisons together (5 % level, Holm's "
        "correction).",
    ]
    assert 3 <= len(lines) <= 6


def test_methods_that_tie_with_the_best_alone_are_not_said_to_tie_with_each_other(
    tmp_path: Path,
) -> None:
    """Awq varies by window, so nothing differs from it; rtn and gptq differ from each other."""
    records = [
        trial(tmp_path, "none", 16, HARD_N),
        trial(tmp_path, "awq", 4, HARD_N + 0.010 + noise(1, 0.02)),
        trial(tmp_path, "gptq", 4, HARD_N + 0.011 + noise(2, 1e-5)),
        trial(tmp_path, "rtn", 4, HARD_N + 0.013 + noise(3, 1e-5)),
    ]
    assert opening([only(records)])[1] == (
        "At 4 bits awq has the best number (+1.0 % of perplexity of stories), rtn and gptq cannot "
        "be told apart from it (+1.1 to +1.3 %)."
    )


def test_no_clear_winner_is_called_the_best(tmp_path: Path) -> None:
    """Awq ties with gptq on stories; rtn loses more there, and answers far better."""
    right, wrong = [1.0] * 40, [0.0] * 20 + [1.0] * 20
    records = [
        trial(tmp_path, "none", 16, HARD_N, right),
        trial(tmp_path, "gptq", 4, HARD_N + 0.0101 + noise(1), wrong),
        trial(tmp_path, "awq", 4, HARD_N + 0.0102 + noise(2), wrong),
        trial(tmp_path, "rtn", 4, HARD_N + 0.0500 + noise(3), right),
    ]
    answer = only(records)
    [verdict] = answer.verdicts
    assert (verdict.equal, verdict.clear) == (("awq",), False)
    said = (
        "At 4 bits there is no clear winner: gptq has the lowest perplexity of stories (+1.0 %), "
        "rtn the highest accuracy on who"
    )
    assert opening([answer])[1] == f"{said}."
    [rival] = verdict.rivals
    unknown = replace(verdict, rivals=(replace(rival, tested=None),))
    assert opening([replace(answer, verdicts=(unknown,))])[1] == f"{said} (not tested)."


def test_the_page_the_terminal_and_the_note_open_with_the_same_words(tmp_path: Path) -> None:
    records = study(tmp_path / "trials")
    lines = opening([only(records)])
    report = write_report(records, tmp_path / "report", About(name="it", command="launch"))
    page = report.files["report.html"].decode()
    body = page[page.index("<body>") :]
    shown = re.findall(r"<li>(.*?)</li>", body[: body.index("<details")])
    assert [text.replace("&#39;", "'") for text in shown] == lines
    assert body.index(shown[0]) < body.index("<svg") < body.index("<table") < body.index("<details")
    last = " ".join(report.text.split())
    assert " ".join(lines) in last
    assert last.partition("To export gptq at 4 bits: ")[2].startswith("python launch.py model=")
    assert report.answer.startswith(f"- {lines[0][:40]}")
    assert report.answer == in_markdown([only(records)])
    assert "demo-answer.png" in report.files["results.md"].decode()
    # The picture says which point is which.
    assert all(f">{words}</text>" in page for words in ("recommended, 4 bits", "3 bits", "8 bits"))


def test_each_size_has_its_best_choice_its_ties_and_its_command(tmp_path: Path) -> None:
    rows = [
        (choice.budget / 1e6, choice.best.name, choice.ties)
        for choice in only(study(tmp_path)).budgets
    ]
    assert rows == [
        (3.0, "gptq, 3 bits", "nothing"),
        (4.0, "gptq, 4 bits", "rtn at 4 bits"),
        (8.0, "rtn, 8 bits", "rtn and gptq at 4 bits")
        if rows[2][2].startswith("rtn")
        else (8.0, "rtn, 8 bits", "gptq and rtn at 4 bits"),
    ]
    commands = [choice.command for choice in only(study(tmp_path / "b")).budgets]
    assert ["export=gptq" in command for command in commands] == [True, True, False]
    assert "export=compressed_tensors" in commands[2]


def test_the_recommended_choice_has_a_row_and_a_command_where_another_is_better(
    tmp_path: Path,
) -> None:
    """Awq has the better number and less size than rtn, but an interval wider than the margin."""
    records = [
        trial(tmp_path, "none", 16, HARD_N),
        trial(tmp_path, "awq", 3, HARD_N + 0.01 + noise(1, 0.3)),
        trial(tmp_path, "rtn", 4, HARD_N + 0.03 + noise(2)),
    ]
    answer = only(records, 5.0)
    assert answer.chosen is not None
    assert answer.chosen.name == "rtn, 4 bits"
    rows = [(choice.budget / 1e6, choice.best.name) for choice in answer.budgets]
    assert rows == [(3.0, "awq, 3 bits"), (4.0, "rtn, 4 bits")]
    assert "| rtn, 4 bits (recommended) |" in in_markdown([answer])
    assert export_hint([answer]).startswith("To export rtn at 4 bits: python launch.py")
    for record in records:  # sizes are unknown
        del record.metrics["model_bytes"]
    unsized = only(records, 5.0)
    assert unsized.budgets == []
    assert export_hint([unsized]) == export_hint([answer])


def test_with_a_context_a_smaller_cache_is_a_smaller_choice(tmp_path: Path) -> None:
    whole = trial(tmp_path, "none", 16, HARD_N)
    plain = trial(tmp_path, "rtn", 4, HARD_N + 0.0100 + noise(1))
    given = trial(tmp_path, "rtn", 4, HARD_N + 0.0101 + noise(2), seed=1)
    rounded = replace(given, spec=replace(given.spec, seed=0, kv=KvScheme(bits=8)))
    given.trial.folder.rename(rounded.trial.folder)
    for record in (whole, plain, rounded):
        record.notes[CACHE] = {"numbers": 2048, "head_dim": 64}
    weights, memory = (
        answers([whole, plain, rounded], context=tokens)[0] for tokens in (None, 10_000)
    )
    assert [answer.chosen and answer.chosen.spec.kv for answer in (weights, memory)] == [
        None,
        KvScheme(bits=8),
    ]
    assert "(4.00 MB of 16.0 MB)" in opening([weights])[0]
    # 20,480,000 numbers of 8 bits, with 32 bits for each 64 of them; or of 16.
    said = "(25.8 MB of 57.0 MB, each with the cache of 10,000 tokens)"
    assert said in opening([memory])[0]
    assert "| model and cache up to |" in in_markdown([memory])
    report = write_report(
        [whole, plain, rounded], tmp_path / "r", About(name="it", command="", context=10_000)
    )
    assert said in report.files["report.html"].decode()
    assert "weights and cache of 10,000 tokens, MB" in report.files["report.html"].decode()


def test_a_budget_is_not_named_by_a_width_that_it_does_not_have(tmp_path: Path) -> None:
    none, uniform, mixed, *_ = study(tmp_path)
    how: dict[str, Any] = {"unit": "site", "widths": (4, 8), "measure": "kl", "draw": "random"}
    budget = BitBudget(bits=7.5, source="pile", digest="d", samples=8, length=64, **how)
    allotted = replace(uniform, spec=replace(uniform.spec, budget=budget))
    uniform.trial.folder.rename(allotted.trial.folder)
    [alone] = opening([only([none, allotted])])
    assert alone.startswith("rtn budget:7.5 (8.00 MB of 16.0 MB): ")
    both = [none, allotted, trial(tmp_path / "b", "gptq", 8, HARD_N + 0.0101 + noise(3)), mixed]
    answer = only(both)
    assert by_width(answer.tried) == "rtn at 4 bits, rtn budget:7.5, gptq at 8 bits"
    lines = opening([answer])
    assert lines[1].startswith("At up to 8 bits rtn budget:7.5 and gptq cannot be told apart")
    assert lines[2].startswith("At 4 bits only rtn was measured")


def test_among_many_methods_luck_is_not_the_best(tmp_path: Path) -> None:
    """Of five methods that are all alike, one differs from others with p < 0.05 each time."""
    names = ("rtn", "awq", "smoothquant", "billm", "gptq")
    records = [
        trial(tmp_path, name, 4, HARD_N + noise(k, 0.01) + (0.005 if name == "gptq" else 0))
        for k, name in enumerate(names)
    ]
    answer = only(records)
    family = answer.tests.pairs[STORIES]
    alone = [p for p in family.p_values.values() if p is not None]
    assert family.size == 10
    assert min(alone) < 0.05 < min(family.corrected.values())
    [verdict] = answer.verdicts
    assert len(verdict.equal) == 4


def test_a_family_of_one_is_not_corrected_and_an_empty_one_says_nothing() -> None:
    key = frozenset(("a", "b"))
    assert Family("one", {key: 0.04}, {}).same(key) is False
    empty = Family("none", {key: None}, {})
    assert (empty.same(key), empty.size, empty.table().rows) == (None, 0, ())


def test_only_the_bootstraps_smallest_p_value_gives_way_to_its_interval() -> None:
    """The bootstrap cannot say less than 2 in 10,001; a t-test of few seeds means what it says."""
    of_seeds = Comparison(
        metric=STORIES, difference=1.0, low=0.96, high=1.04, distinguishable=True,
        p_value=1e-4, n=40, test=TEST,
    )  # fmt: skip
    answered = replace(of_seeds, test="McNemar with continuity correction; interval Newcombe's")
    assert [p_of(found) for found in (of_seeds, answered)] == [1e-4, 1e-4]
    sides = ({str(n): value + float(n % 7) for n in range(40)} for value in (10.0, 0.0))
    losses = compare(STORIES, *sides, ratio=True)
    losses = replace(losses, low=9.9, high=10.1)
    assert losses.p_value == 2 / 10_001
    assert p_of(losses) == pytest.approx(0.0, abs=1e-12)


def test_with_a_margin_the_smallest_that_is_shown_to_stay_within_it_is_recommended(
    tmp_path: Path,
) -> None:
    records = study(tmp_path)
    assert only(records, 10.0).chosen.name == "gptq, 3 bits"  # type: ignore[union-attr]
    lines = opening([only(records, 10.0)])
    assert "it is among the smallest that are shown to stay within 10 % of the unq" in lines[0]
    narrow = only(records, 0.5)
    assert narrow.within is None
    assert narrow.chosen.name == "gptq, 4 bits"  # type: ignore[union-attr]
    assert "None is shown to stay within 0.5 % of the unquantized model" in opening([narrow])[0]
    [table] = narrow.certainty.tables("demo")
    assert {row[-1] for row in table.rows} == {"not shown"}


def test_an_equal_number_is_not_called_better(tmp_path: Path) -> None:
    records = [trial(tmp_path, name, bits, HARD_N) for name, bits in (("rtn", 8), ("gptq", 4))]
    assert opening([only(records)])[0].endswith(
        "; rtn at 8 bits has the same number, and is larger."
    )


def test_a_margin_without_paired_samples_is_said_not_to_be_tested(tmp_path: Path) -> None:
    records = study(tmp_path)
    for record in records:
        (record.trial.folder / SAMPLES).unlink()
    answer = only(records, 1.0)
    assert "cannot be tested without paired samples" in opening([answer])[0]
    assert len(answer.certainty.unpaired(STORIES)) == 5


def test_flips_are_counted_and_say_what_could_have_been_seen(tmp_path: Path) -> None:
    before = [1.0] * 300 + [0.0] * 100
    after = [0.0] * 20 + [1.0] * 280 + [1.0] * 15 + [0.0] * 85
    records = [
        trial(tmp_path, "none", 16, HARD_N, before),
        trial(tmp_path, "rtn", 4, HARD_N + 0.01 + noise(1), after),
    ]
    answer = only(records)
    [table] = [table for table in answer.certainty.tables("demo") if "flipped" in table.title]
    smallest = smallest_difference(400, 35 / 400)
    assert smallest is not None
    assert table.title == "demo: answers that flipped, of 400 questions"
    [row] = table.rows
    assert row[:4] == ("rtn, 4 bits", "20", "6.7 %", "15")
    assert row[4].startswith("8.8 % [")
    assert row[5] == f"{100 * smallest:.1f} points"
    said = next(line for line in opening([answer]) if "questions" in line)
    assert said == (
        "No choice loses accuracy on who by more than chance; 400 questions could have shown a "
        f"loss of {100 * smallest:.1f} points."
    )


def test_seeds_that_ask_the_same_questions_again_do_not_narrow_the_flips_interval(
    tmp_path: Path,
) -> None:
    before, after = [1.0] * 40, [0.0] * 4 + [1.0] * 36
    none = trial(tmp_path, "none", 16, HARD_N, before)
    seeds = [
        trial(tmp_path, "gptq", 4, HARD_N + noise(seed), after, seed=seed) for seed in range(3)
    ]
    cells = []
    for some in (seeds[:1], seeds):
        [table] = [t for t in only([none, *some]).certainty.tables("it") if "flipped" in t.title]
        cells.append(table.rows[0][4])
    assert cells[0] == cells[1] == "10.0 % [4.0, 23.1]"


def test_the_smallest_loss_is_of_the_mean_over_tasks_and_of_its_whole_family(
    tmp_path: Path,
) -> None:
    """Ten of 40 answers flip and ten of 1000: the small task decides what the mean can show."""
    right = {"who": [1.0] * 40, "where": [1.0] * 1000}
    flipped = {"who": [0.0] * 10 + [1.0] * 30, "where": [0.0] * 10 + [1.0] * 990}
    trials = [
        trial(tmp_path, "none", 16, HARD_N, right),
        trial(tmp_path, "rtn", 4, HARD_N + noise(1), flipped),
        trial(tmp_path, "gptq", 4, HARD_N + noise(2), flipped),
    ]
    answer = only(trials)
    loss = answer.certainty.smallest_loss(answer.tried[0])
    assert loss is not None
    level, power = (NormalDist().inv_cdf(share) for share in (1 - 0.05 / 2 / 2, 0.8))
    none = (0.25 / 40 + 0.01 / 1000) / 4  # the variance of the mean if nothing changes
    some = none - loss**2 * (1 / 40 + 1 / 1000) / 4
    assert loss == pytest.approx(level * math.sqrt(none) + power * math.sqrt(some))


def test_a_gain_is_no_loss_and_only_what_was_tested_is_said_not_to_lose(tmp_path: Path) -> None:
    """Rtn answers more, awq as many as before; of gptq no samples are left."""
    before = [1.0] * 20 + [0.0] * 20
    records = [
        trial(tmp_path, "none", 16, HARD_N, before),
        trial(tmp_path, "rtn", 4, HARD_N + noise(1), [1.0] * 40),
        trial(tmp_path, "awq", 4, HARD_N + noise(2), before),
        trial(tmp_path, "gptq", 4, HARD_N + noise(3), [0.0] * 40),
    ]

    def said() -> str:
        [line] = [line for line in opening([only(records)]) if "accuracy on who by" in line]
        return line.partition(";")[0]

    assert said() == "Only gptq at 4 bits loses accuracy on who by more than chance"
    (records[3].trial.folder / SAMPLES).unlink()
    assert said() == (
        "None of the tested choices loses accuracy on who by more than chance (not tested: gptq at "
        "4 bits)"
    )
    answer = only(records[:2])
    gain = answer.tests.changes["who/acc"]["rtn, 4 bits"]
    assert gain.distinguishable
    untested = replace(gain, distinguishable=None)
    changes = {**answer.tests.changes, "who/acc": {"rtn, 4 bits": untested}}
    unknown = replace(answer, tests=replace(answer.tests, changes=changes))
    assert "Whether any choice loses accuracy on who could not be tested." in opening([unknown])


def test_a_mean_over_seeds_has_an_interval_of_both_sources(tmp_path: Path) -> None:
    """Three draws that differ by far more than their windows: the interval spans the draws."""
    none = trial(tmp_path, "none", 16, HARD_N)
    draws = [
        trial(tmp_path, "gptq", 3, HARD_N + 0.05 + shift + noise(seed), seed=seed)
        for seed, shift in enumerate((-0.025, 0.0, 0.025))
    ]
    one, several = (Pool("gptq", tuple(some)) for some in (draws[1:2], draws))
    reference = Pool("unquantized", (none,))
    narrow, wide = (change(pool, reference, STORIES) for pool in (one, several))
    assert narrow is not None
    assert wide is not None
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)  # type: ignore[operator]
    # Student's t of two degrees of freedom, 4.30, times 0.025 / sqrt(3), in nats.
    assert math.log1p(wide.high) - math.log1p(wide.low) == pytest.approx(  # type: ignore[arg-type]
        2 * 4.303 * 0.025 / math.sqrt(3), rel=0.05
    )
    assert wide.distinguishable is False


def test_several_models_get_a_sentence_each(tmp_path: Path) -> None:
    records = study(tmp_path)
    others = [
        replace(r, spec=replace(r.spec, model=replace(r.spec.model, name="other", digest="o")))
        for r in study(tmp_path / "other")
    ]
    for record, old in zip(others, study(tmp_path / "again"), strict=True):
        record.trial.folder.mkdir(parents=True)
        (old.trial.folder / SAMPLES).rename(record.trial.folder / SAMPLES)
    lines = opening(answers([*records, *others]))
    assert [line.partition(":")[0] for line in lines[:4]] == ["demo", "demo", "other", "other"]
    assert len(lines) <= 6


def test_many_widths_and_remarks_share_six_sentences(tmp_path: Path) -> None:
    """The text is of the kind that was calibrated on, and there are questions."""
    answered = [1.0] * 30 + [0.0] * 10
    records = [trial(tmp_path, "none", 16, HARD_N, answered)]
    records += [
        trial(tmp_path, method, bits, HARD_N + 0.1 / bits + noise(bits + len(method)), answered)
        for method in ("rtn", "gptq")
        for bits in (2, 3, 4, 5, 8)
    ]
    lines = opening([only(records)])
    assert len(lines) <= 6
    assert sum("bits" in line and line.startswith("At ") for line in lines) == 3
    assert all(f"t {bits} bits" in " ".join(lines) for bits in (2, 3, 4, 5, 8))
    fitted = replace(only(records), marks={STORIES: "calibrated on"})
    assert len(opening([fitted])) == 6


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    failed = TrialRecord.failed(study(tmp_path)[1].trial, "died")
    assert opening([only([failed])]) == ["Nothing was measured (failed)."]
    assert opening([]) == []


def test_the_noise_of_a_kl_is_named_where_it_was_measured(tmp_path: Path) -> None:
    record = study(tmp_path)[0]
    assert noise_floors([record]) == []
    floored = replace(record, metrics={**record.metrics, "kl_floor/stories": 0.00012})
    [line] = noise_floors([record, floored])
    assert line.startswith("A KL of stories below 1.2e-04 is noise for demo: ")
    # There is nothing to test, and the floor is named all the same.
    report = write_report([floored], tmp_path / "report", About(name="it", command="launch"))
    assert line in report.files["report.html"].decode()
    assert line in report.files["results.md"].decode()


def test_each_model_and_each_quick_look_has_its_own_noise(tmp_path: Path) -> None:
    record = trial(tmp_path, "none", 16, HARD_N)
    other = replace(record.spec, model=replace(record.spec.model, name="other"))
    records = [
        replace(record, metrics={"kl_floor/stories": 1e-4, "kl_floor_quick/stories": 2e-4}),
        replace(record, metrics={"kl_floor/stories": 3e-4}, spec=other),
    ]
    assert [line.partition(": ")[0] for line in noise_floors(records)] == [
        "A KL of stories below 1.0e-04 is noise for demo",
        "A KL of stories (a quick look) below 2.0e-04 is noise for demo",
        "A KL of stories below 3.0e-04 is noise for other",
    ]


def test_a_plan_says_what_its_questions_can_show() -> None:
    tasks = evaluation_of("stories", tasks=["stories_who", "stories_where"], task_limit=200)
    specs = [make_spec("rtn", bits, evaluation=tasks) for bits in (3, 4)]
    [line] = shown_by_questions([*specs, replace(specs[0], seed=1), make_spec("none", 16)])
    assert line == (
        "400 questions of 2 tasks: a difference of 4.4 points in the mean accuracy is found in "
        "80 % of studies that test it alone, and one of 4.9 points where the report corrects for "
        "all 2 changes from the unquantized model, if two trials answer 10 % differently "
        "(docs/STATISTICS.md)."
    )
    assert smallest_difference(400, 0.1, level=0.05 / 2) == pytest.approx(0.0485, abs=5e-4)
    [single] = shown_by_questions(specs[:1])
    assert "corrects" not in single
    few = evaluation_of(tasks=["stories_who"], task_limit=10)
    assert shown_by_questions([make_spec("rtn", 4, evaluation=few)])[0].startswith(
        "10 questions: too few to find any difference"
    )
    assert shown_by_questions([make_spec("none", 16, evaluation=tasks)]) == []
    assert shown_by_questions([make_spec("rtn", 4, evaluation=evaluation_of("stories"))]) == []


def test_the_page_on_statistics_has_the_numbers_that_the_code_computes() -> None:
    text = (DOCS / "STATISTICS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for questions, *cells in rows:
        for cell, discordance in zip(cells, (0.05, 0.1, 0.2), strict=True):
            found = smallest_difference(int(questions.replace(",", "")), discordance)
            assert cell == ("none" if found is None else f"{100 * found:.1f} points")


def test_the_names_of_a_pair_are_those_of_its_pools(tmp_path: Path) -> None:
    first, second = (Pool(r.spec.method.name, (r,)) for r in study(tmp_path)[2:4])
    assert pair(first, second) == pair(second, first) == {"rtn, 4 bits", "gptq, 4 bits"}

"""The published numbers, and when ours reproduce them."""

from dataclasses import replace
from typing import Any

import pytest

from q3q.placement import Trial
from q3q.quantize.methods.settings import GptqSettings
from q3q.record import COMPLETED, TrialRecord
from q3q.report.about import About
from q3q.report.paper import (
    DIFFERENT,
    NEAR,
    REPRODUCED,
    cell_of,
    compare_with_paper,
    departures,
    misnamed,
    paper_table,
    share_reproduced,
    study_model,
    verdict,
)
from q3q.report.published import published
from q3q.report.write import one_format
from q3q.spec import TaskRef
from tests.specs import (
    calibration_of,
    changed,
    evaluation_of,
    hub_model_of,
    make_spec,
    method_of,
    model_of,
    text_of,
)


def spec(
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 128,
    act_bits: int | None = None,
    **changes: Any,
) -> Any:
    default = {"model": hub_model_of("qwen3_8b_base"), "evaluation": ASKED}
    if method in ("gptq", "awq"):
        default["calibration"] = C4
    scheme: dict[str, Any] = {"group_size": group_size, "act_bits": act_bits}
    return make_spec(method, bits, **scheme, **{**default, **changes})


def record(perplexity: float, acc: float | None = None, **changes: Any) -> TrialRecord:
    metrics = {"perplexity/wikitext2": perplexity} | ({} if acc is None else {"piqa/acc": acc})
    return TrialRecord(spec=spec(**changes), status=COMPLETED, metrics=metrics)


def sized(trial: TrialRecord, parameters: int | None) -> TrialRecord:
    """Return a record of a model of so many parameters, stored in 16 bits; None: unknown."""
    sizes = {"model_bytes": 2.0 * (parameters or 0), "bits_per_weight_model": 16.0}
    return replace(trial, metrics=trial.metrics | (sizes if parameters else {}))


def test_the_table_is_the_papers() -> None:
    """2,500 printed numbers less the 250 means over tasks, each in one trial's cell."""
    rows = published()
    assert len(rows) == 2250
    assert len({(row.model, row.method, row.bits, row.act_bits, row.group) for row in rows}) == 239
    assert (
        len(
            {(row.model, row.method, row.bits, row.act_bits, row.group, row.source) for row in rows}
        )
        == 250
    )


@pytest.mark.parametrize(
    ("changes", "cell"),
    [
        ({}, ("Qwen3-8B-Base", "GPTQ", 4, 16, "128")),
        ({"method": "none"}, ("Qwen3-8B-Base", "FP16", 16, 16, "")),
        ({"method": "rtn", "group_size": -1}, ("Qwen3-8B-Base", "RTN", 4, 16, "per-channel")),
        (
            {"method": "smoothquant", "group_size": -1, "act_bits": 8},
            ("Qwen3-8B-Base", "SmoothQuant", 4, 8, "per-channel"),
        ),
        ({"method": "billm", "bits": 1}, ("Qwen3-8B-Base", "BiLLM", 1, 16, "128")),
        (
            {"model": model_of("Qwen3-0.6B")},
            ("Qwen3-0.6B", "GPTQ", 4, 16, "128"),
        ),
        (
            {"model": hub_model_of("mine", source="Qwen/Qwen3-32B")},
            ("Qwen3-32B", "GPTQ", 4, 16, "128"),
        ),
        ({"model": hub_model_of("qwen3_4b", source="Qwen/Qwen3-8B")}, None),
        ({"model": hub_model_of("qwen3_8b", source="Qwen/Qwen3-8B-AWQ")}, None),
        ({"model": hub_model_of("Qwen3-8B", source="ada/Qwen3-8B")}, None),
        ({"model": hub_model_of("x", source="Qwen/Qwen3-4B-Instruct-2507")}, None),
        ({"group_size": 64}, None),
        ({"model": model_of("demo")}, None),
        ({"head_bits": 8}, None),
    ],
)
def test_a_trial_finds_its_cell(changes: dict[str, Any], cell: Any) -> None:
    assert cell_of(spec(**changes)) == cell


def test_a_method_of_another_package_is_none_of_the_study_whatever_its_title(monkeypatch):
    monkeypatch.setattr("q3q.report.measures.settings_class", lambda name: GptqSettings)
    ours = spec()
    assert cell_of(ours) is not None
    assert cell_of(replace(ours, method=replace(ours.method, name="gptq_of_mine"))) is None


@pytest.mark.parametrize(
    ("name", "source", "shown"),
    [
        ("mine", "Qwen/Qwen3-32B", "Qwen3-32B"),
        ("qwen3_8b", "ada/Qwen3-8B", "ada/Qwen3-8B"),
        ("qwen3_4b", "ada/Tuned", "Tuned"),
        ("tuned", "ada/Qwen3-8B", "tuned"),
        ("Qwen3-8B", None, "Qwen3-8B"),
    ],
)
def test_another_model_is_not_called_by_the_name_of_one_of_the_studys(
    name: str, source: str | None, shown: str
) -> None:
    model = model_of(name) if source is None else hub_model_of(name, source=source)
    assert study_model(spec(model=model)) == shown


def test_a_checkpoint_that_was_quantized_already_is_not_the_unquantized_model() -> None:
    folder = sized(record(7.0, method="none", model=model_of("Qwen3-8B-Base")), 8_190_735_360)
    assert compare_with_paper([folder])
    assert not compare_with_paper([replace(folder, notes={"stored": {"quantized": "gptq"}})])


@pytest.mark.parametrize(
    ("parameters", "held"),
    [(5_760_000, "5,760,000 parameters"), (None, "unknown size"), (8_190_735_360, None)],
)
def test_a_folder_is_the_model_of_its_name_only_if_it_has_its_size(
    parameters: int | None, held: str | None
) -> None:
    folder = sized(record(7.0, method="none", model=model_of("Qwen3-8B")), parameters)
    assert bool(compare_with_paper([folder])) == (held is None)
    said = misnamed([folder, record(7.0)])
    assert said is None if held is None else str(said).endswith(f": Qwen3-8B ({held}).")
    report = one_format([folder], About(name="mine", command=""), "md").decode()
    assert ("is called like a released model" in report) == (held is not None)


@pytest.mark.parametrize(
    ("metric", "ours", "theirs", "expected"),
    [
        ("perplexity/c4", 10.19, 10.0, REPRODUCED),
        ("perplexity/c4", 10.24, 10.0, REPRODUCED),  # 2 %, and half a digit
        ("perplexity/c4", 10.4, 10.0, NEAR),
        ("perplexity/c4", 10.7, 10.0, DIFFERENT),
        ("perplexity/c4", 5e4, 2e7, REPRODUCED),
        ("perplexity/c4", float("nan"), float("nan"), REPRODUCED),
        ("perplexity/c4", 30.0, 2e7, DIFFERENT),
        ("perplexity/c4", float("nan"), 30.0, DIFFERENT),
        (
            "perplexity/c4",
            995.0,
            1005.0,
            REPRODUCED,
        ),  # one on either side of what counts as collapsed
        ("perplexity/c4", 1005.0, 995.0, REPRODUCED),
        ("perplexity/c4", 960.0, 1005.0, NEAR),
        ("perplexity/c4", 900.0, 3000.0, DIFFERENT),
        ("piqa/acc", float("nan"), 70.0, DIFFERENT),
        ("piqa/acc", 0.715, 70.0, REPRODUCED),
        ("piqa/acc", 0.73, 70.0, NEAR),
        ("piqa/acc", 0.75, 70.0, DIFFERENT),
    ],
)
def test_the_verdict_keeps_to_its_tolerance(
    metric: str, ours: float, theirs: float, expected: str
) -> None:
    assert verdict(metric, ours, theirs) == expected


def test_an_accuracy_whose_interval_holds_the_published_value_is_reproduced() -> None:
    assert verdict("piqa/acc", 0.75, 70.0, (0.69, 0.81)) == REPRODUCED


def test_cells_are_shown_beside_ours_and_counted() -> None:
    """8B-Base, GPTQ, 4 bits, groups of 128: 7.22; unquantized: 6.99, printed in Tables 1 and 3."""
    compared = compare_with_paper([record(7.23), record(8.5, method="none")])
    assert [(row.published.value, row.verdict) for row in compared] == [
        (6.99, DIFFERENT),
        (6.99, DIFFERENT),
        (7.22, REPRODUCED),
    ]
    assert {row.published.source for row in compared} == {"Table 1", "Table 3"}
    assert share_reproduced(compared).startswith(
        "1 of 3 cells reproduced (33 %), 0 close, 2 different"
    )
    row = paper_table(compared).rows[2]
    assert row[:7] == (
        "Qwen3-8B-Base gptq w4 g128",
        "wikitext2",
        "Table 3",
        "7.220",
        "7.230",
        "+0.1 %",
        "reproduced",
    )


def test_a_trial_by_another_protocol_is_shown_and_not_counted() -> None:
    short = evaluation_of(text_of("wikitext2", window=512, limit=8))
    compared = compare_with_paper([record(7.23, evaluation=short)])
    assert compared[0].departs == ("window=512", "limit=8")
    assert (
        "None of the study's 2250 cells was run by its protocol. 1 comparisons depart"
        in share_reproduced(compared)
    )
    assert "the 250 means over six tasks are not compared" in share_reproduced(compared)


C4 = calibration_of("c4", samples=128, length=2048)
ASKED = evaluation_of(text_of("wikitext2", window=2048), tasks=["piqa"])


@pytest.mark.parametrize(
    ("changes", "departs"),
    [
        ({}, ()),
        ({"seed": 3}, ()),
        ({"calibration": changed(C4, length=512)}, ("calibration.length=512",)),
        ({"calibration": changed(C4, draw="documents")}, ("calibration.draw=documents",)),
        ({"calibration": changed(C4, samples=64)}, ("calibration.samples=64",)),
        ({"calibration": changed(C4, samples=256)}, ("calibration.samples=256",)),
        ({"calibration": changed(C4, source="pile")}, ("calibration=pile",)),
        (
            {"model": hub_model_of("qwen3_8b_base", dtype="float32")},
            ("dtype=float32",),
        ),
        ({"evaluation": changed(ASKED, chat="thinking")}, ("chat=thinking",)),
        ({"evaluation": changed(ASKED, task_limit=9)}, ("task_limit=9",)),
        ({"evaluation": changed(ASKED, tasks=(TaskRef(name="piqa", limit=9),))}, ("limits=9",)),
        ({"evaluation": changed(ASKED, tasks=(TaskRef(name="piqa", shots=5),))}, ("shots=5",)),
    ],
)
def test_what_departs_from_the_papers_protocol_is_named(
    changes: dict[str, Any], departs: tuple[str, ...]
) -> None:
    assert departures(spec(**changes), "piqa/acc") == departs


def test_knobs_and_mmlus_examples_belong_to_the_protocol() -> None:
    other = replace(spec(), method=method_of("gptq", damping=0.05))
    assert departures(other, "piqa/acc") == ("method.damping=0.05",)
    five = spec(evaluation=changed(ASKED, tasks=(TaskRef(name="mmlu", shots=5),)))
    assert departures(five, "mmlu/acc") == ()
    assert departures(
        spec(evaluation=changed(ASKED, tasks=(TaskRef(name="mmlu"),))), "mmlu/acc"
    ) == ("shots=null",)
    studied = spec(evaluation=changed(ASKED, tasks=(TaskRef(name="mmlu_paper"),)))
    assert departures(studied, "mmlu_paper/acc") == ()


def test_awqs_exchanged_blocks_are_told() -> None:
    """8B-Base, AWQ, 3 bits: 22.6 is printed for groups of 128, 11.4 per channel."""
    [compared] = compare_with_paper([record(11.4, method="awq", bits=3)])
    assert compared.verdict == DIFFERENT
    assert any("probably exchanged" in note for note in compared.notes)
    assert "Our number is the one printed for the other group size." in compared.notes


def test_a_failed_trial_is_no_evidence() -> None:
    assert compare_with_paper([TrialRecord.failed(Trial(spec()), "died")]) == []
    assert "None of the study's" in share_reproduced([])

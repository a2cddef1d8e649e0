"""The published numbers, and what it takes for one of ours to reproduce them."""

from dataclasses import replace
from typing import Any

import pytest

from q3q.record import COMPLETED, TrialRecord
from q3q.report.paper import (
    DIFFERENT,
    NEAR,
    REPRODUCED,
    cell_of,
    compare_with_paper,
    departures,
    paper_table,
    published,
    share_reproduced,
    verdict,
)
from q3q.spec import Scheme, TrialSpec


def spec(
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 128,
    act_bits: int | None = None,
    **changes: Any,
) -> Any:
    whole: dict[str, Any] = {
        "model": {
            "name": "qwen3_8b_base",
            "source": "Qwen/Qwen3-8B-Base",
            "revision": "r",
            "dtype": "bfloat16",
        },
        "calibration": {
            "source": "c4",
            "digest": "d",
            "samples": 128,
            "length": 2048,
            "draw": "random",
        },
        "evaluation": {
            "texts": [{"name": "wikitext2", "window": 2048, "limit": None}],
            "tasks": ["piqa"],
            "task_limit": None,
        },
        "seed": 0,
    }
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=False, act_bits=act_bits)
    return TrialSpec(
        **{**whole, **changes},
        method={"name": method, "version": 1},
        scheme=None if method == "none" else scheme,
    )


def record(perplexity: float, acc: float | None = None, **changes: Any) -> TrialRecord:
    metrics = {"perplexity/wikitext2": perplexity} | ({} if acc is None else {"piqa/acc": acc})
    return TrialRecord(spec=spec(**changes), status=COMPLETED, metrics=metrics)


def test_the_table_is_the_papers() -> None:
    """2,500 printed numbers less the 250 means over tasks, each in a cell that one trial of ours can fill."""
    rows = published()
    assert len(rows) == 2250
    assert len({(it.model, it.method, it.bits, it.act_bits, it.group) for it in rows}) == 239
    assert (
        len({(it.model, it.method, it.bits, it.act_bits, it.group, it.source) for it in rows})
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
            {"model": {"name": "Qwen3-0.6B", "digest": "d", "dtype": "float32"}},
            ("Qwen3-0.6B", "GPTQ", 4, 16, "128"),
        ),
        (
            {"model": {"name": "mine", "source": "Qwen/Qwen3-32B", "revision": "r"}},
            ("Qwen3-32B", "GPTQ", 4, 16, "128"),
        ),
        ({"group_size": 64}, None),
        ({"model": {"name": "demo", "digest": "d"}}, None),
        ({"head_bits": 8}, None),
    ],
)
def test_a_trial_finds_its_cell(changes: dict[str, Any], cell: Any) -> None:
    assert cell_of(spec(**changes)) == cell


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
    found = compare_with_paper([record(7.23), record(8.5, method="none")])
    assert [(it.published.value, it.verdict) for it in found] == [
        (6.99, DIFFERENT),
        (6.99, DIFFERENT),
        (7.22, REPRODUCED),
    ]
    assert {it.published.source for it in found} == {"Table 1", "Table 3"}
    assert share_reproduced(found).startswith(
        "1 of 3 cells reproduced (33 %), 0 close, 2 different"
    )
    row = paper_table(found).rows[2]
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
    short = {
        "texts": [{"name": "wikitext2", "window": 512, "limit": 8}],
        "tasks": [],
        "task_limit": None,
    }
    found = compare_with_paper([record(7.23, evaluation=short)])
    assert found[0].departs == ("window=512", "limit=8")
    assert (
        "None of the study's 2250 cells was run by its protocol. 1 comparisons depart"
        in share_reproduced(found)
    )
    assert "the 250 means over six tasks are not compared" in share_reproduced(found)


C4 = {"source": "c4", "digest": "d", "samples": 128, "length": 2048, "draw": "random"}
ASKED = {
    "texts": [{"name": "wikitext2", "window": 2048, "limit": None}],
    "tasks": ["piqa"],
    "task_limit": None,
}


@pytest.mark.parametrize(
    ("changes", "departs"),
    [
        ({}, ()),
        ({"seed": 3}, ()),
        ({"calibration": C4 | {"length": 512}}, ("calibration.length=512",)),
        ({"calibration": C4 | {"draw": "documents"}}, ("calibration.draw=documents",)),
        ({"calibration": C4 | {"samples": 64}}, ("calibration.samples=64",)),
        ({"calibration": C4 | {"samples": 256}}, ("calibration.samples=256",)),
        ({"calibration": C4 | {"source": "pile"}}, ("calibration=pile",)),
        (
            {"model": {"name": "qwen3_8b_base", "digest": "d", "dtype": "float32"}},
            ("dtype=float32",),
        ),
        ({"evaluation": ASKED | {"chat": "thinking"}}, ("chat=thinking",)),
        ({"evaluation": ASKED | {"task_limit": 9}}, ("task_limit=9",)),
        ({"evaluation": ASKED | {"limits": {"piqa": 9}}}, ("limits=9",)),
        ({"evaluation": ASKED | {"shots": {"piqa": 5}}}, ("shots=5",)),
    ],
)
def test_what_departs_from_the_papers_protocol_is_named(
    changes: dict[str, Any], departs: tuple[str, ...]
) -> None:
    assert departures(spec(**changes), "piqa/acc") == departs


def test_knobs_and_mmlus_examples_belong_to_the_protocol() -> None:
    knobs = {"name": "gptq", "version": 1, "damping": 0.05}
    assert departures(replace(spec(), method=knobs), "piqa/acc") == ("method.damping=0.05",)
    five = spec(evaluation=ASKED | {"tasks": ["mmlu"], "shots": {"mmlu": 5}})
    assert departures(five, "mmlu/acc") == ()
    assert departures(spec(evaluation=ASKED | {"tasks": ["mmlu"]}), "mmlu/acc") == ("shots=null",)
    assert departures(spec(evaluation=ASKED | {"tasks": ["mmlu_paper"]}), "mmlu_paper/acc") == ()


def test_awqs_exchanged_blocks_are_told() -> None:
    """8B-Base, AWQ, 3 bits: 22.6 is printed for groups of 128, 11.4 per channel."""
    [found] = compare_with_paper([record(11.4, method="awq", bits=3)])
    assert found.verdict == DIFFERENT
    assert any("probably exchanged" in note for note in found.notes)
    assert "Ours is the number printed for the other group size." in found.notes


def test_a_failed_trial_is_no_evidence() -> None:
    assert compare_with_paper([TrialRecord.failed(spec(), "died")]) == []
    assert "None of the study's" in share_reproduced([])

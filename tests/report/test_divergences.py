"""Tables of KLs: what is noise, and what widths by sensitivity change at equal bytes."""

from dataclasses import replace

from q3q.bit_budget import BitBudget
from q3q.record import COMPLETED, TrialRecord
from q3q.report.divergences import (
    NOISE,
    SAME_WIDTHS,
    divergence_tables,
    equal_bytes_tables,
    noise_floors,
)
from tests.specs import evaluation_of, make_spec

EVALUATION = evaluation_of("stories", "library", drift="auto")
BUDGET = BitBudget(
    uniform=3,
    unit="site",
    widths=(2, 3, 4),
    measure="kl",
    source="demo",
    digest="d",
    samples=2,
    length=64,
    draw="random",
)
WIDER = {"blocks.0.mlp.down_proj": {"bits": 4}}


def record(kls, perplexity=2.0, bits=3, **changes):
    spec = make_spec("rtn", bits, evaluation=EVALUATION, **changes)
    metrics = {f"kl/{text}": kl for text, kl in zip(("stories", "library"), kls, strict=True)}
    return TrialRecord(
        spec=spec,
        status=COMPLETED,
        metrics={**metrics, "perplexity/stories": perplexity, "perplexity/library": perplexity},
        intervals={name: (value / 2, value * 2) for name, value in metrics.items()},
    )


def floor(kl):
    spec = make_spec("none", evaluation=EVALUATION)
    other = replace(spec, reference=spec.model, model=replace(spec.model, dtype="bfloat16"))
    return TrialRecord(spec=other, status=COMPLETED, metrics={"kl_floor/stories": kl})


def test_a_row_is_a_choice_and_what_is_not_above_the_floor_is_marked():
    records = [record((0.1, 0.4)), record((0.001, 0.002), bits=8)]
    [table] = divergence_tables([*records, floor(0.001)])
    assert table.columns == ("choice", "KL on stories", "KL on library")
    assert table.rows == (
        ("rtn, 3 bits", "0.1000 [0.05000, 0.2000]", "0.4000 [0.2000, 0.8000]"),
        (
            "rtn, 8 bits",
            f"0.001000 [5.00e-04, 0.002000] ({NOISE})",
            "0.002000 [0.001000, 0.004000]",
        ),
    )
    [line] = noise_floors([*records, floor(0.001)])
    assert line.startswith("A KL of stories below 0.0010 is noise for ")
    [plain] = divergence_tables(records)
    assert NOISE not in str(plain)
    assert divergence_tables([replace(records[0], metrics={"perplexity/stories": 2.0})]) == []


def test_a_budget_stands_beside_the_one_width_that_takes_as_many_bytes():
    uniform = record((0.1, 0.4), perplexity=2.0)
    budget = record((0.05, 0.2), perplexity=1.9, budget=BUDGET, overrides=WIDER)
    others = [
        record((0.1, 0.4), bits=4),
        record((0.1, 0.4), budget=replace(BUDGET, uniform=None, bits=3.5), overrides=WIDER, bits=4),
    ]
    [table] = equal_bytes_tables([uniform, budget, *others])
    [row] = table.rows
    assert row[0] == "rtn, 3 bits"
    assert row[1:3] == ("0.1000 [0.05000, 0.2000]", "0.05000 [0.02500, 0.1000]")
    # Without the windows' numbers the perplexities are compared as they are, and not tested.
    assert row[5].startswith("-5.0 %")
    assert "one width" in table.columns[1]
    assert equal_bytes_tables([uniform, *others]) == []


def test_a_budget_that_gives_all_linears_one_width_says_so():
    uniform, budget = record((0.1, 0.4)), record((0.1, 0.4), budget=BUDGET)
    [table] = equal_bytes_tables([uniform, budget])
    assert table.rows[0][-1] == SAME_WIDTHS

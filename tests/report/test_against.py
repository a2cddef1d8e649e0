"""Published numbers of one's own: which trial a row is about, the verdicts, and bad columns."""

from collections import Counter
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from q3q.bit_budget import BitBudget
from q3q.errors import ReportError
from q3q.record import COMPLETED, TrialRecord
from q3q.report.about import About
from q3q.report.against import compare, published_set, read_cells
from q3q.report.write import one_format
from q3q.spec import Scheme
from tests.composed import CONF, compose
from tests.specs import evaluation_of, hub_model_of, make_spec, method_of
from tests.test_studies import jobs, rows_of

HEAD = "model,method,bits,group_size,symmetric,method.mse,metric,value,source\n"
WIKITEXT = "perplexity/wikitext2"


def record(bits=4, value=10.3, mse=False, model=None, **metrics):
    spec = make_spec(
        method_of("gptq", mse=mse),
        bits,
        symmetric=True,
        model=model or hub_model_of("qwen3_8b", source="Qwen/Qwen3-8B"),
        evaluation=evaluation_of("wikitext2"),
    )
    return TrialRecord(
        spec=spec,
        status=COMPLETED,
        metrics={WIKITEXT: value, **metrics},
        intervals={"arc_easy/acc_norm": (0.70, 0.74)},
    )


def compared(tmp_path, rows, *records, head=HEAD):
    path = tmp_path / "mine.csv"
    path.write_text(head + rows, encoding="utf-8")
    return compare(records, published_set(str(path)))


def test_a_row_is_about_the_trials_that_have_all_its_settings(tmp_path):
    row = "Qwen3-8B,gptq,4,128,True,false,perplexity/wikitext2,10.29,page 1\n"
    ours = record()
    found = compared(tmp_path, row, ours, record(bits=3), record(mse=True))
    assert [item.record.spec.id for item in found.compared] == [ours.spec.id]
    assert found.compared[0].verdict == "reproduced"
    assert found.sentence().startswith("1 of 1 cells reproduced (100 %), 0 close, 0 different")
    everyone = compared(
        tmp_path, "Qwen3-8B,,,,,,perplexity/wikitext2,10.29,\n", ours, record(mse=True)
    )
    assert len(everyone.compared) == 2


def test_a_row_with_bits_is_about_one_width_unless_it_asks_for_mixed_ones(tmp_path):
    """A trial's `bits` are its base width alone, where it has a budget or overrides."""
    uniform = record()
    widths = {"blocks.0.self_attn.v_proj": {"bits": 8}}
    rules = {"overrides": {"*.v": {"bits": 8}}}
    groups = {"blocks.0.self_attn.v_proj": {"group_size": 32}}
    budget = BitBudget(
        bits=4.25, unit="site", widths=(3, 4), measure="kl", source="demo", digest="d",
        samples=1, length=32, draw="random",
    )  # fmt: skip
    overridden, grouped, planned, allotted = (
        replace(uniform, spec=replace(uniform.spec, **changes))
        for changes in (
            {"overrides": widths, "rules": rules},
            {"overrides": groups},
            {"budget": budget},
            {"budget": replace(budget, unit="block"), "overrides": widths},
        )
    )
    every = (uniform, overridden, grouped, planned, allotted)
    head = "model,bits,budget.bits,overrides,metric,value\n"

    def matched(row):
        found = compared(tmp_path, f"Qwen3-8B,{row},{WIKITEXT},10.29\n", *every, head=head)
        return [id(item.record) for item in found.compared]

    assert set(matched("4,,")) == {id(uniform), id(grouped)}
    assert set(matched(",,")) == set(map(id, every))
    assert set(matched("4,4.25,")) == set(matched(",4.25,")) == {id(planned), id(allotted)}
    assert matched('4,,"{""*.v"": {""bits"": 8}}"') == [id(overridden)]


@pytest.mark.parametrize(
    ("ours", "theirs", "judged"),
    [(10.3, "10.29", "reproduced"), (10.7, "10.29", "close"), (12.0, "10.29", "different")],
)
def test_verdicts_are_those_of_the_paper(tmp_path, ours, theirs, judged):
    row = f"Qwen3-8B,gptq,4,,,,perplexity/wikitext2,{theirs},\n"
    [item] = compared(tmp_path, row, record(value=ours)).compared
    assert item.verdict == judged


def test_a_share_is_a_fraction_and_reproduced_within_our_interval(tmp_path):
    row = "Qwen3-8B,gptq,4,,,,arc_easy/acc_norm,0.703,\n"
    trial = record(**{"arc_easy/acc_norm": 0.72})
    found = compared(tmp_path, row, trial)
    assert [item.verdict for item in found.compared] == ["reproduced"]
    _, _, published, ours, difference, *_ = found.table().rows[0]
    assert (published, ours) == ("70.3", "72.0")
    assert difference.endswith(" points")
    row = "Qwen3-8B,gptq,4,,,,arc_easy/acc_norm,0.60,\n"
    assert [item.verdict for item in compared(tmp_path, row, trial).compared] == ["different"]


@pytest.mark.parametrize(
    ("metric", "ours", "theirs", "judged"),
    [
        ("model_bytes", 4.0e9, "8.0e9", "different"),  # no perplexity: nothing has collapsed
        ("model_bytes", 4.01e9, "4.0e9", "reproduced"),
        ("kl/wikitext2", 0.04, "0", "reproduced"),  # half a unit of the last digit
        ("kl/wikitext2", 0.04, "0.00", "different"),
        ("task/score", 5.0, "-5.0", "different"),
        ("task/score", -5.2, "-5.0", "close"),
        ("task/score", -5.04, "-5.0", "reproduced"),
        ("perplexity_quick/wikitext2", 4.0e9, "8.0e9", "reproduced"),
    ],
)
def test_a_number_that_is_no_perplexity_has_no_collapse(tmp_path, metric, ours, theirs, judged):
    row = f"Qwen3-8B,gptq,4,,,,{metric},{theirs},\n"
    found = compared(tmp_path, row, record(**{metric: ours}))
    assert [item.verdict for item in found.compared] == [judged]
    assert len(found.table().rows) == 1


def test_another_organizations_model_is_another(tmp_path):
    row = "Qwen/Qwen3-8B,gptq,4,,,,perplexity/wikitext2,10.29,\n"
    theirs = hub_model_of("Qwen3-8B", source="someone/Qwen3-8B")
    found = compared(tmp_path, row, record(model=theirs))
    assert not found.compared
    assert "None of the 1 cell of mine was run" in found.sentence()


@pytest.mark.parametrize(
    ("head", "rows", "said"),
    [
        ("model,bits,value\n", "a,4,1\n", "lacks the column metric"),
        ("model,metric,value,bit\n", "a,b,1,4\n", "column 'bit' is not a setting of a trial"),
        ("model,metric,value,bits,bits\n", "a,b,1,4,4\n", "column 'bits' is given more than once"),
        ("model,metric,value\n", "a,b,high\n", "line 2: the value 'high' is not a number"),
        ("model,metric,value\n", "a,,1\n", "line 2: it names no metric"),
        ("model,metric,value\n", "a,b,1,2\n", "more cells than there are columns"),
        ("model,metric,value\n", "", "has no rows"),
    ],
)
def test_a_bad_table_is_refused_in_a_line(tmp_path, head, rows, said):
    path = tmp_path / "bad.csv"
    path.write_text(head + rows, encoding="utf-8")
    with pytest.raises(ReportError) as refusal:
        read_cells(path)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_set_that_is_none_is_refused():
    with pytest.raises(ReportError, match="neither one of paper, onecomp, nor a CSV file"):
        published_set("nowhere")


def test_each_of_onecomps_cells_is_one_trial_of_its_study():
    published = published_set("onecomp")
    assert len(published.cells) == 90
    study = compose("config", ["+study=onecomp"]).evaluation
    measured = {f"{task}/acc_norm" for task in study.tasks} | {WIKITEXT, "winogrande/acc"}
    assert {cell.metric for cell in published.cells} <= measured
    records = [planned(job, measured) for job in jobs(rows_of("onecomp"))]
    assert len({record.spec.id for record in records}) == 18
    compared = compare(records, published).compared
    trials_of = Counter(id(item.cell) for item in compared)
    assert [trials_of[id(cell)] for cell in published.cells] == [1] * 90
    cells_of = Counter(item.record.spec.id for item in compared)
    assert cells_of == {record.spec.id: 5 for record in records}


def planned(job, metrics):
    """Return the record of one of a study's jobs, as if it had run."""
    page = OmegaConf.load(CONF / "model" / f"{job['model']}.yaml")
    method, scheme = method_of("none"), None
    if job["method"] == "gptq":
        bits, size = int(job["bits"]), int(job["group_size"])
        scheme = Scheme(bits=bits, group_size=size, symmetric=job["symmetric"] == "True")
        knobs = {key: job[f"method.{key}"] == "True" for key in ("mse", "act_order")}
        method = method_of("gptq", scheme, **knobs)
    spec = make_spec(
        method,
        scheme=scheme,
        model=hub_model_of(job["model"], source=page.source),
        evaluation=evaluation_of("wikitext2"),
    )
    return TrialRecord(spec=spec, status=COMPLETED, metrics=dict.fromkeys(metrics, 0.5))


@pytest.mark.parametrize("kind", ["html", "md", "csv"])
def test_the_report_shows_the_comparison(tmp_path, kind):
    path = tmp_path / "mine.csv"
    path.write_text(HEAD + "Qwen3-8B,gptq,4,,,,perplexity/wikitext2,10.29,page 1\n", "utf-8")
    about = About(name="a", command="b", against=published_set(str(path)))
    assert "Against mine" in one_format([record()], about, kind).decode() or kind == "csv"
    assert "10.29" in one_format([record()], about, kind).decode()

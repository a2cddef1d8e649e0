"""A plan counts what trials need only once for one of them, and for none if it is there already."""

from dataclasses import replace

import pytest

from q3q.bit_budget import BitBudget
from q3q.data.prepared import FOLDER, Shelf
from q3q.data.traces import part_identity
from q3q.evaluate.identities import prepared_identities
from q3q.quantize.budget.sensitivities import SENSING, Sensitivities, file_of, identity_of
from q3q.quantize.budget.units import units_of
from q3q.spec import TRACES, WRITTEN
from q3q.sweep import run
from q3q.sweep.costs import CostModel, Rate, Todo
from q3q.sweep.made import QUESTION_BYTES, Made
from q3q.sweep.plan import Planned, describe, plan, simulated
from q3q.sweep.run import Host, run_study
from q3q.sweep.settings import StudySettings
from q3q.sweep.writing import steps_of_writing
from tests.specs import STUDY_TASKS, calibration_of, evaluation_of, respecified
from tests.sweep.test_plan import NODE, facts, planned_for, trial

SHAPE = facts("qwen3_8b")
EPYC = Rate("EPYC", False, 2.0)


def budgeted(bits, measure="kl", **changes):
    """Return a trial with a budget of bits; `changes`: to `test_plan.trial`."""
    budget = BitBudget(
        bits=bits,
        unit="site",
        widths=(2, 4, 8),
        measure=measure,
        source="demo",
        digest="0",
        samples=16,
        length=512,
        draw="random",
    )
    return respecified(trial(keep="auto", **changes), budget=budget)


def leave_blocks(one, count):
    one.kept_blocks_folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (one.kept_blocks_folder / f"block_{k:03d}.json").touch()


def test_a_quantization_that_lies_there_takes_no_time_in_the_simulated_sweep(tmp_path):
    one = trial(keep="auto").moved(tmp_path)
    whole = simulated(planned_for([one], [NODE]), [NODE]).seconds
    [plain] = planned_for([one], [NODE])
    assert plain.phases["quantize"] > 0
    leave_blocks(one, SHAPE.layers // 2)
    [half] = planned_for([one], [NODE])
    assert half.phases["quantize"] == pytest.approx(plain.phases["quantize"] / 2)
    leave_blocks(one, SHAPE.layers)
    [cached] = planned_for([one], [NODE])
    assert cached.phases["quantize"] == 0
    after = simulated([cached], [NODE]).seconds
    # What was prepared beside the quantization has less time for that now.
    assert after < whole - 0.5 * plain.phases["quantize"]
    # They are deleted before they could be used.
    [again] = planned_for([one], [NODE], fresh=True)
    assert again.phases == plain.phases


@pytest.mark.parametrize(("keep", "makers"), [("auto", 1), ("blocks", 1), ("none", 2)])
def test_of_trials_that_differ_in_their_evaluation_alone_the_longest_makes_the_blocks(
    tmp_path, keep, makers
):
    short = trial(keep=keep).moved(tmp_path)
    long = respecified(short, evaluation=evaluation_of("stories", tasks=STUDY_TASKS))
    planned = planned_for([short, long], [NODE])
    assert [one.trial.id for one in planned] == [long.id, short.id]
    assert [one.phases["quantize"] > 0 for one in planned] == [True, makers == 2]


def test_input_is_prepared_once_and_its_disk_counted_once(tmp_path):
    one, other = (trial(tasks=("piqa",), bits=bits).moved(tmp_path) for bits in (3, 4))
    made = Made()
    todo, size = made.add(one, SHAPE)
    assert todo == Todo(blocks=1.0, draws=True, questions=1838)
    windows = 4 * 128 * 2048 + 4 * 2048 * 2 * 10  # calibration's; the text's are fewer
    assert QUESTION_BYTES * 1838 < size < QUESTION_BYTES * 1838 + windows
    assert made.add(other, SHAPE) == (Todo(blocks=1.0, draws=False, questions=0), 0)
    assert Made().add(other, SHAPE) == (todo, size)
    shelf = Shelf(tmp_path / FOLDER, "a tokenizer")
    for identity in prepared_identities(one.spec):
        shelf.keep(identity, {})
    assert Made().add(other, SHAPE) == (Todo(blocks=1.0, draws=False, questions=0), 0)


def test_a_trial_that_finds_its_blocks_draws_no_windows(tmp_path):
    one = trial(keep="auto").moved(tmp_path)
    leave_blocks(one, SHAPE.layers)
    made = Made()
    todo, _ = made.add(one, SHAPE)
    assert todo == Todo(blocks=0.0, draws=False, questions=0)
    # So the next trial with the same ones, but other blocks, does.
    todo, size = made.add(trial(bits=3).moved(tmp_path), SHAPE)
    assert todo == Todo(blocks=1.0, draws=True, questions=0)
    assert size == 4 * 128 * 2048


def test_on_a_gpu_prompts_are_made_while_the_model_is_quantized():
    """On cores, where trials take all of them, they take their own time."""
    spec = trial(tasks=STUDY_TASKS).spec
    costs, todo = CostModel(), Todo(questions=48_000)

    def more(where):
        first, later = (
            costs.predict(spec, SHAPE, where, loader="resident", todo=one) for one in (todo, Todo())
        )
        return first.phases["evaluate"] - later.phases["evaluate"]

    assert more(EPYC) == pytest.approx(48_000 * costs.prompt)
    assert more(Rate("H100", True, 1.0)) < more(EPYC) / 2
    slow = replace(costs, prompt=1.0)
    waits = slow.predict(spec, SHAPE, Rate("H100", True, 1.0), loader="resident", todo=todo)
    assert sum(waits.phases.values()) > 48_000


@pytest.mark.parametrize("fresh", [False, True])
def test_a_study_that_runs_everything_again_plans_so(monkeypatch, tmp_path, fresh):
    one, plans = trial(keep="auto").moved(tmp_path), list[list[Planned]]()
    leave_blocks(one, SHAPE.layers)

    def noted(*given, **more):
        plans.append(plan(*given, **more))
        return []

    class Asked(Host):
        def machines(self, request):
            return [NODE], request

        def run(self, planned, study):
            raise AssertionError("only a plan was asked for")

    monkeypatch.setattr(run, "plan", noted)
    monkeypatch.setattr(run, "_show_plan", lambda *_: None)
    settings = StudySettings(
        storage=str(tmp_path), tracking_uri="sqlite:///none.db", fresh=fresh, plan_only=True
    )
    assert run_study([one], {one.id: SHAPE}, settings, "the command", Asked()) is None
    [[planned]] = plans
    assert (planned.phases["quantize"] > 0) == fresh


def test_sensitivities_are_measured_once_for_all_budgets_and_what_lies_there_takes_no_time(
    tmp_path,
):
    one, other = (budgeted(bits).moved(tmp_path) for bits in (3.5, 4.5))
    planned = planned_for([one, other], [NODE])
    seconds = [entry.phases[SENSING] for entry in planned]
    assert seconds[0] > 0 == seconds[1]
    words = describe(planned, machines=[NODE], where="here", storage=tmp_path)
    assert "to measure budgets' sensitivities" in words
    [quick] = planned_for([budgeted(3.5, measure="block_error").moved(tmp_path)], [NODE])
    assert 0 < quick.phases[SENSING] < seconds[0]  # no later block runs
    units = units_of(one.spec, SHAPE)
    identity = identity_of(one.spec, units)
    half = Sensitivities(file_of(tmp_path, identity), identity)
    for unit in units[: len(units) // 2]:
        half.rows[unit.name] = [0.1, 0.01, 0.0]
    half.add(units[0].name, [0.1, 0.01, 0.0])
    [rest] = planned_for([other], [NODE])
    assert rest.phases[SENSING] == pytest.approx(seconds[0] / 2)
    assert SENSING not in planned_for([trial()], [NODE])[0].phases
    assert one.spec.budget is not None
    held = replace(one.spec.budget, bits=None, bytes=10**10, context=32768, cache=4_831_838_208)
    planned = planned_for([respecified(one, budget=held)], [NODE])
    words = describe(planned, machines=[NODE], where="here", storage=tmp_path)
    assert "the cache of a text of 32,768 tokens (4.83184 GB) take at most 10 GB." in words


def test_traces_are_written_once_for_all_trials_and_what_lies_there_takes_no_time(tmp_path):
    """Their windows are written token by token, which other windows are not."""
    text = calibration_of("c4", samples=40, length=256)
    written = replace(text, source=TRACES, draw=WRITTEN, temperature=1.0)

    def on(calibration, bits=4):
        return respecified(trial(bits=bits, keep="none"), calibration=calibration).moved(tmp_path)

    def spent(*trials):
        return [entry.phases["calibrate"] for entry in planned_for(trials, [NODE])]

    one, other = on(written), on(written, bits=3)
    [whole], costs = spent(one), CostModel()
    steps = steps_of_writing(one.spec, SHAPE)
    assert steps == 2 * 255  # 28 windows at once, whose cache takes 1 GB, then 12
    assert spent(on(replace(text, source="demo"))) == [0.0]
    assert whole == pytest.approx(
        steps * SHAPE.layers * costs.issue
    )  # one GPU waits for its orders
    assert sorted(spent(one, other)) == [0.0, whole]
    seconds, waiting = costs.writing(one.spec, SHAPE, EPYC)
    assert waiting == 0
    assert seconds > 40 * 256 * 2 * SHAPE.linear_parameters / (EPYC.units * costs.core_flops)
    Shelf(tmp_path / TRACES, "a tokenizer").keep(part_identity(one.spec, written, range(28)), {})
    assert spent(one) == [pytest.approx(whole * 12 / 40)]

"""A trial's windows and requests are prepared beside it, while it loads and quantizes."""

import os
import sys
import time
from dataclasses import replace

import pytest

from q3q import ahead
from q3q.bit_budget import BitBudget
from q3q.config.model import DEMO_MODELS
from q3q.data.prepared import FOLDER, Shelf
from q3q.data.questions import Library
from q3q.data.texts import load_text
from q3q.evaluate import mmlu_paper
from q3q.evaluate.catalogue import STUDY_MMLU
from q3q.evaluate.data_sets import resolve_data_sets
from q3q.evaluate.identities import prepared_identities
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.placement import Trial
from q3q.spec import TrialSpec
from q3q.storage.claim import Claim, runs
from q3q.trial import run_trial
from tests.specs import calibration_of, evaluation_of, make_trial, model_of, text_of

DEMO = DEMO_MODELS / "dense"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def spec(study_data) -> TrialSpec:
    """A trial that calibrates on one text, measures another, and is asked questions."""
    text = load_text("demo", split="evaluation").digest
    library = Library(study_data, settle=True)
    resolve_data_sets([STUDY_MMLU], library, shots={STUDY_MMLU: 0}, limits={STUDY_MMLU: 1})
    evaluation = evaluation_of(
        text_of("stories", 64, 2, digest=text), tasks=[STUDY_MMLU], task_limit=1, drift=None
    )
    trial = make_trial(
        "gptq",
        model=model_of("demo", digest=Checkpoint(DEMO).digest()),
        calibration=calibration_of(digest=load_text("demo", split="calibration").digest, samples=2),
        evaluation=replace(evaluation, data=library.identities),
    )
    return trial.spec


@pytest.fixture
def trial(spec, tmp_path, study_data) -> Trial:
    return Trial(spec, make_trial(storage=tmp_path).placement).placed(model=DEMO, data=study_data)


@pytest.fixture
def shelf(trial, tokenizer) -> Shelf:
    found = Shelf.of(trial, tokenizer)
    assert found is not None
    return found


def test_all_that_a_trial_reads_is_made_but_what_another_makes_now(trial, shelf):
    wanted = ahead.missing(trial.spec, shelf)
    assert wanted == prepared_identities(trial.spec)
    assert len(wanted) == 3
    assert ahead.missing(trial.spec, shelf, quantizes=False) == wanted[1:]
    with shelf.turn(wanted[1], lambda: pytest.fail("nobody has it")):
        ahead.prepare(trial, DEMO, wanted)
    assert ahead.missing(trial.spec, shelf) == [wanted[1]]
    ahead.prepare(trial, DEMO, wanted)
    assert ahead.missing(trial.spec, shelf) == []
    assert len(ahead.missing(trial.spec, replace(shelf, tokenizer="another"))) == 3


def test_windows_of_a_budgets_text_are_made_beside_those_of_calibration(trial, shelf):
    assert trial.spec.calibration is not None
    budget = BitBudget(
        bits=3.5,
        unit="site",
        widths=(2, 4),
        measure="kl",
        source="demo",
        digest=trial.spec.calibration.digest,
        samples=2,
        length=16,
        draw="random",
    )
    budgeted = replace(trial, spec=replace(trial.spec, budget=budget))
    wanted = ahead.missing(budgeted.spec, shelf)
    assert len(wanted) == 4
    assert ahead.missing(budgeted.spec, shelf, quantizes=False) == wanted[2:]
    ahead.prepare(budgeted, DEMO, wanted[:2])
    assert ahead.missing(budgeted.spec, shelf) == wanted[2:]


@pytest.mark.parametrize(
    ("cores", "device", "begins"), [(8, "cuda", True), (1, "cuda", False), (8, "cpu", False)]
)
def test_it_begins_where_a_core_is_idle_and_input_is_missing(
    trial, shelf, monkeypatch, cores, device, begins
):
    started: list[str] = []
    monkeypatch.setattr(ahead, "_start", started.append)
    monkeypatch.setattr(ahead, "cores", lambda: cores)

    def begin(shelf=shelf):
        with ahead.preparing(trial, DEMO, shelf, device, quantizes=True):
            pass
        return len(started)

    assert begin() == begins
    assert begin(None) == begins  # a tokenizer that cannot be identified
    claim = Claim(shelf.folder, ahead._claim_name(ahead.missing(trial.spec, shelf)))
    assert claim.take() is None
    assert begin() == begins  # another trial's process is at it
    claim.release()
    assert begin() == 2 * begins
    monkeypatch.setattr(ahead, "missing", lambda *_, **__: [])
    assert begin() == 2 * begins


@pytest.mark.parametrize(
    "code", ["import sys, time; open(sys.argv[1], 'w').close(); time.sleep(600)", "1 / 0", None]
)
def test_it_ends_with_the_trial_and_its_failure_is_none_of_the_trials(
    trial, shelf, tmp_path, monkeypatch, code
):
    """A process that works on, one that dies at once, and one that cannot be started."""
    begun = tmp_path / "begun"
    command = [tmp_path / "nowhere"] if code is None else [sys.executable, "-c", code, str(begun)]
    monkeypatch.setattr(ahead, "COMMAND", command)
    monkeypatch.setattr(ahead, "pays", lambda device: True)
    processes, start = [], ahead._start

    def started(order):
        processes.append(start(order))
        return processes[-1]

    monkeypatch.setattr(ahead, "_start", started)

    def failing():
        with ahead.preparing(trial, DEMO, shelf, "cpu", quantizes=True):
            deadline = time.monotonic() + 60
            while code and "sleep" in code and not begun.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise KeyError("the trial's own")

    with pytest.raises(KeyError, match="the trial's own"):
        failing()
    assert all(process is None or not runs(process.pid) for process in processes)


def test_it_ends_when_its_trial_is_killed(monkeypatch):
    """A killed process says nothing, but its end of the pipe closes."""
    ended: list[int] = []
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "_exit", ended.append)
    with open(reading, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        os.close(writing)
        ahead._end_with_the_trial()
    assert ended == [1]


@pytest.mark.slow
def test_files_are_there_before_the_evaluation_begins(trial, shelf, monkeypatch):
    """The walk's first step waits for them here, so they are made while the trial quantizes."""
    monkeypatch.setattr(ahead, "pays", lambda device: True)
    monkeypatch.setattr(mmlu_paper, "prompt", lambda *_: pytest.fail("a prompt is made here"))
    events = []

    def report(event):
        if event.phase not in events:
            events.append(event.phase)
        deadline = time.monotonic() + 300
        while event.phase == "quantize" and (left := ahead.missing(trial.spec, shelf)):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        if event.phase == "quantize" and "prepared" not in events:
            events.append("prepared")

    record = run_trial(trial, report)
    assert record.completed
    assert events.index("quantize") < events.index("prepared") < events.index("evaluate")
    assert not [*(trial.placement.storage / FOLDER).glob("*.partial")]

"""A study of three small trials in this process, without MLflow's server, Ray or plots."""

import json
from pathlib import Path

import pytest

from q3q.config import model, resolve
from q3q.models.hub import facts_of_trial
from q3q.placement import Trial
from q3q.report import write
from q3q.storage import claim
from q3q.sweep import in_process
from q3q.sweep.in_process import InProcess
from q3q.sweep.run import run_study
from q3q.sweep.settings import StudySettings
from q3q.track import mlflow
from tests.chaos.faults import SMALL, numbers
from tests.composed import compose
from tests.trackers import MemoryTracker

TRIALS = {"none": "method=none", "rtn4": "method=rtn bits=4", "rtn3": "method=rtn bits=3"}
ASKED = [
    "keep=blocks",
    "evaluation.drift=true",
    "evaluation.drift_windows=2",
    "evaluation.baseline=true",
    "evaluation.limit=6",
]


class QuietTracker(MemoryTracker):
    """A tracker in memory, made as MLflow's is."""

    uri = "sqlite:///none"

    def __init__(self, *_: object) -> None:
        super().__init__()

    def held(self, _: object) -> None:
        """Hold nothing from an earlier process."""


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds and has tests of its own; keep to one thread."""
    patch.setattr(mlflow, "MlflowTracker", QuietTracker)
    # OpenMP's threads do not survive a fork.
    patch.setattr(in_process, "keep_to", lambda *_: None)
    patch.setattr(write, "study_plots", lambda *_: [])
    patch.setattr(write, "perplexity_against_bits", lambda records: b"a plot")
    patch.setattr(write, "site_error_heatmap", lambda record: b"a plot")
    # A claim whose holder cannot be asked is waited for, as it may be on another machine.
    patch.setattr(claim.FolderClaimStore, "silence", 0.2)
    patch.setattr(claim.FolderClaimStore, "poll", 0.05)


def trials_of(tiny: Path, storage: Path) -> tuple[dict[str, Trial], StudySettings]:
    """Compose the study anew, as each start of the command does."""
    model._local_model.cache_clear()  # so that the memo of digests is read
    settings = {one.partition("=")[0]: one for one in (*SMALL, *ASKED)}
    always = [*settings.values(), f"model.path={tiny}", f"storage={storage}"]
    configs = {name: compose("config", [*always, *words.split()]) for name, words in TRIALS.items()}
    trials = {name: resolve.trial_from(config) for name, config in configs.items()}
    return trials, StudySettings.of(configs["rtn4"])


def run(tiny: Path, storage: Path) -> dict[str, dict]:
    """Run the study; return what each trial's record says that no fault may change."""
    trials, settings = trials_of(tiny, storage)
    facts = {trial.id: found for trial in trials.values() if (found := facts_of_trial(trial))}
    records = run_study(list(trials.values()), facts, settings, "the command", InProcess())
    assert records is not None
    return {name: facts_of(trial) for name, trial in trials.items()}


def facts_of(trial: Trial) -> dict:
    """Return what a trial's record on disk says that no fault may change."""
    record = json.loads((trial.folder / "record.json").read_text(encoding="utf-8"))
    notes = {key: value for key, value in record["notes"].items() if key != "blocks_from_disk"}
    return numbers(record) | {"comparisons": record["comparisons"], "notes": notes}

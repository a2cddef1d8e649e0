"""What the golden tests ask of q3q, in one place: when a name moves, this file alone follows."""

import json
import shlex
from pathlib import Path

from q3q.attempt import finished_record
from q3q.config.command import command_of
from q3q.config.schema import with_plain_keys
from q3q.models import demo
from q3q.placement import Trial
from q3q.record import Sweep, TrialRecord, load_trial
from q3q.report.__main__ import main as report
from q3q.storage.files import sealed, unsealed
from q3q.storage.identity import storage_id
from q3q.track.__main__ import main as track
from q3q.trial import attempt_trial
from q3q.trials.stored import find_trials, listed
from tests.composed import composed_trial

__all__ = [
    "MODELS",
    "Sweep",
    "Trial",
    "TrialRecord",
    "attempt_trial",
    "command_of",
    "find_trials",
    "finished_record",
    "listed",
    "load_trial",
    "report",
    "saved_again",
    "storage_id",
    "text_of",
    "track",
    "trial_of",
]

MODELS = Path(demo.__file__).parent


def trial_of(command: str) -> Trial:
    """Return the trial that the words after `python launch.py` mean."""
    return composed_trial(*(with_plain_keys(word) for word in shlex.split(command)))


def text_of(trial: Trial) -> str:
    """Return what a trial writes to spec.json."""
    return json.dumps(trial.to_json(), indent=1)


def saved_again(path: Path) -> bytes:
    """Return a record's file as saving would write it again, in the folder that it came from."""
    return sealed(TrialRecord.from_json(unsealed(path.read_bytes())).to_json(), finite=True)

"""Resume trials in this process, each as part of the sweep that it belongs to."""

import os
import shlex
from collections.abc import Sequence

from q3q.config.command import command_of
from q3q.errors import ConfigError, SweepFailedError
from q3q.models.facts import ModelFacts
from q3q.models.hub import facts_of_trial
from q3q.placement import Trial
from q3q.record import Sweep
from q3q.storage.stores import is_url
from q3q.sweep.in_process import InProcess
from q3q.sweep.run import run_study
from q3q.sweep.settings import StudySettings
from q3q.sweep.study import study_id
from q3q.trials.stored import StoredTrial


def resume_trials(which: Sequence[StoredTrial], storage: str) -> None:
    """Run trials one after the other, each from where it stopped.

    Their sweeps' reports and trackers receive the new records, as if the sweeps had gone on.

    Raises:
        ConfigError: a trial cannot be resumed.
        SweepFailedError: a resumed trial failed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when lm-eval is imported
    sweeps: dict[str, tuple[Sweep, set[str]]] = {}
    for entry in which:
        if entry.trial is None:
            raise ConfigError(f"{entry.id}: {entry.waits}")
        if entry.state == "completed":
            print(f"{entry.id} {entry.name}: is done already")
            continue
        sweep = entry.sweep or _sweep_of_its_own(entry.trial)
        sweeps.setdefault(sweep.id, (sweep, set()))[1].add(entry.id)
    if not which:
        print("Nothing to resume.")
    failures = []
    for sweep, ids in sweeps.values():
        trials = [alone(trial) if trial.id in ids else trial for trial in sweep.trials]
        if is_url(storage):  # the file of another machine's sweep lies in another folder there
            trials = [trial.placed(store=storage.rstrip("/")) for trial in trials]
        settings = StudySettings.of_sweep(sweep, storage)
        try:
            host = InProcess(all_cores="-m" not in shlex.split(sweep.command))
            run_study(trials, _facts(trials, ids), settings, sweep.command, host, ids)
        except SweepFailedError as error:
            failures.append(str(error))
    if failures:
        raise SweepFailedError("; ".join(failures))


def alone(trial: Trial) -> Trial:
    """Return the trial as one process runs it: without the allocation that another had."""
    gang = trial.placement.loader == "sharded"
    return trial.placed(grant=None, **({"loader": None} if gang else {}))


def _sweep_of_its_own(trial: Trial) -> Sweep:
    """Return a sweep for a trial that is in none that can be read."""
    return Sweep(
        id=study_id([trial]),
        name=trial.spec.method.name,
        command=command_of(trial),
        config="",
        trials=(trial,),
    )


def _facts(trials: Sequence[Trial], ids: set[str]) -> dict[str, ModelFacts]:
    facts: dict[str, ModelFacts] = {}
    for trial in trials:
        if trial.id not in ids:
            continue
        model = facts_of_trial(trial)
        if model is None:
            raise ConfigError(
                f"{trial.id} ({trial.spec.label}): its model is not here, in "
                f"{trial.placement.model or trial.spec.model.source}"
            )
        facts[trial.id] = model
    return facts

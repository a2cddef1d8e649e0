"""A Hydra Sweeper for studies: overrides become jobs, jobs become trial specs, each spec runs once.

Every job is composed once and validated before anything starts. Equal jobs run once, each with its JobReturn; pairs of
values that make no sense together are left out and counted; what is done already is not run again.
"""

import itertools
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from q3q.config import facts_of, spec_from, tracking_uri
from q3q.errors import ConfigError, IncompatibleError, Q3QError, SweepFailedError
from q3q.record import Progress, TrialRecord, forget_progress
from q3q.spec import TrialSpec
from q3q.sweep.cluster import Cluster, Outcome, Resources, Started, Task, WorkerDiedError
from q3q.sweep.launcher import Job, JobPolicy, RayLauncher, failed_return
from q3q.sweep.plan import describe, gpus_here, memory_of, plan
from q3q.sweep.study import Study, finished_record

if TYPE_CHECKING:
    from q3q.sweep.progress import Display

SWEEP_SETTINGS = ("cluster", "track", "storage", "name", "plan", "fresh", "keep")
# Workers show nothing themselves, and must not all start as many threads as there are cores.
WORKER_ENV = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class StudySweeperConf:
    """params: sweep values by key, for saved studies; the command line wins."""

    _target_: str = "hydra_plugins.q3q.StudySweeper"
    params: dict[str, str] | None = None


class StudySweeper(Sweeper):
    """See the module's first lines."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[list[JobReturn]]:
        """Run the study.

        Raises:
            ConfigError: an invalid value; nothing has started. SweepFailedError: it ended, and some trials failed.
        """
        assert self.config is not None
        jobs = list(self._jobs(arguments))
        trials, left_out = resolve(jobs)
        if left_out:
            print(left_out)
        settings = jobs[0].config
        refuse_many_settings(jobs)
        finished = {} if settings.fresh else _finished(trials)
        cluster = settings.cluster
        gpus = _gpus_per_trial(cluster)
        ordered = plan(
            [mine.spec for mine in trials.values()],
            finished,
            {key: facts_of(mine.jobs[0].config) for key, mine in trials.items()},
            cpus=cluster.cpus_per_trial,
            gpus=gpus,
        )
        if settings.plan:
            where = cluster.address or "this machine"
            at_once = trials_at_once(cluster, gpus)
            print(describe(ordered, at_once=at_once, where=where, storage=Path(settings.storage)))
            return []
        specs = [mine.spec for mine in trials.values()]
        command = "python launch.py -m " + shlex.join(arguments)
        queue = [trials[one.spec.id] for one in ordered if not one.done]
        with ExitStack() as stack:
            ready, launch = self._launcher(stack, settings) if queue else (None, None)
            study = stack.enter_context(running_study(settings, specs, command, finished, ready))
            if launch:
                launch(queue, study)
            records = study.records
        by_number = {job.number: (job, records.get(mine.spec.id)) for mine in trials.values() for job in mine.jobs}
        return [[_job_return(job, record) for _, (job, record) in sorted(by_number.items())]]

    def _jobs(self, arguments: Sequence[str]) -> Iterator[Job]:
        """Every combination of the overrides' values, composed."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        given = parser.parse_overrides(list(arguments))
        refuse_contradictions(given)
        named = {override.get_key_element() for override in given}
        saved = parser.parse_overrides([f"{key}={value}" for key, value in self.params.items()])
        combined = [override for override in saved if override.get_key_element() not in named] + given
        for number, overrides in enumerate(itertools.product(*map(_choices, combined))):
            config = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            yield Job(number=number, overrides=tuple(overrides), config=config)

    def _launcher(
        self, stack: ExitStack, settings: DictConfig
    ) -> tuple[Callable[[], object], Callable[[Sequence["Trial"], "RunningStudy"], None]]:
        """What waits for a cluster, which starts in the background and lives as long as `stack`; what runs trials."""
        launcher = self.launcher
        assert launcher is not None
        if isinstance(launcher, RayLauncher):
            address = settings.cluster.address
            cluster = stack.enter_context(Cluster(address=address, env=WORKER_ENV) if address else launcher.cluster())
            cluster.env |= WORKER_ENV
            return cluster.total, lambda trials, study: _run_on_ray(launcher, cluster, trials, study, settings.cluster)

        def launch(trials: Sequence[Trial], study: RunningStudy) -> None:
            # Another launcher was asked for: it composes and runs Hydra's way, and the task function returns records.
            for done in launcher.launch([list(mine.jobs[0].overrides) for mine in trials], initial_job_idx=0):
                study.finished(done.return_value)

        return lambda: None, launch


def _run_on_ray(
    launcher: RayLauncher, cluster: Cluster, trials: Sequence["Trial"], study: "RunningStudy", settings: DictConfig
) -> None:
    has = cluster.total()
    gpus = settings.gpus_per_trial if settings.gpus_per_trial is not None else float(has.gpus >= 1)
    study.display.note(f"Ray has {has}; each trial takes {settings.cpus_per_trial:g} CPUs and {gpus:g} GPUs")
    needs = {
        mine.jobs[0].number: Resources(
            cpus=settings.cpus_per_trial, gpus=gpus, memory=memory_of(facts_of(mine.jobs[0].config), mine.spec)
        )
        for mine in trials
    }
    policy = TrialPolicy({mine.jobs[0].number: mine.spec for mine in trials}, needs, study)
    with study.heeding_interrupts():
        launcher.run([mine.jobs[0] for mine in trials], policy, cluster=cluster)


@dataclass
class Trial:
    """One trial, and all the jobs that mean it."""

    spec: TrialSpec
    jobs: list[Job]


def refuse_contradictions(overrides: Sequence[Override]) -> None:
    """Two overrides of one key: whichever won, somebody would be surprised."""
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element().lstrip("+")
        if key in seen and seen[key] != override.input_line:
            raise ConfigError(f"{seen[key]} and {override.input_line} contradict each other: give {key} once")
        seen[key] = str(override.input_line)


def refuse_many_settings(jobs: Sequence[Job]) -> None:
    """What belongs to the sweep and not to a trial must be the same for all its jobs."""
    for key in SWEEP_SETTINGS:
        values = {str(OmegaConf.select(job.config, key)) for job in jobs}
        if len(values) > 1:
            raise ConfigError(f"{key} is the whole sweep's, give it one value: {', '.join(sorted(values))}")


def resolve(jobs: Sequence[Job]) -> tuple[dict[str, Trial], str]:
    """Jobs as trials by id, in the jobs' order, and a line that counts what was left out (or nothing).

    Raises:
        ConfigError: any job has an invalid value, or no job is left.
    """
    trials: dict[str, Trial] = {}
    incompatible: dict[str, int] = {}
    for job in jobs:
        try:
            spec = spec_from(job.config)
        except IncompatibleError as error:
            incompatible[str(error)] = incompatible.get(str(error), 0) + 1
            continue
        trials.setdefault(spec.id, Trial(spec, [])).jobs.append(job)
    reasons = "; ".join(incompatible)
    if not trials:
        raise IncompatibleError(reasons or "the sweep has no jobs")
    count = sum(incompatible.values())
    return trials, f"{count} of {len(jobs)} combinations left out: {reasons}" if count else ""


class TrialPolicy(JobPolicy):
    """q3q's say in how its jobs run: only specs, records and progress cross a process border."""

    def __init__(self, specs: dict[int, TrialSpec], needs: dict[int, Resources], study: "RunningStudy") -> None:
        self.specs = specs
        self.needs = needs
        self.study = study

    def task(self, job: Job, plain: Task) -> Task:
        spec = self.specs[job.number]
        return Task(key=spec.id, call=partial(work, spec.to_json()), resources=self.needs[job.number], retries=1)

    def on_event(self, job: Job, event: Any) -> None:
        spec = self.specs[job.number]
        if isinstance(event, Started):
            self.study.display.started(spec.id, f"{spec.name} · {spec.model['name']}")
        elif isinstance(event, Progress):
            self.study.display.event(event)

    def on_tick(self) -> None:
        if self.study.interrupted:
            raise KeyboardInterrupt

    def on_retry(self, job: Job, error: WorkerDiedError) -> None:
        self.study.display.retried(self.specs[job.number].id, str(error))

    def on_outcome(self, job: Job, outcome: Outcome) -> JobReturn:
        spec = self.specs[job.number]
        if outcome.error is None:
            record = TrialRecord.from_json(outcome.value)
        else:
            record = TrialRecord.failed(spec, f"{outcome.error} ({outcome.attempts} attempts)")
        record.save()  # again, if the worker could: its disk may not be ours
        self.study.finished(record, outcome.seconds)
        return _job_return(job, record)


def work(spec: dict[str, Any], report: Callable[[Any], None]) -> dict[str, Any]:
    """What a worker does: one trial. Imported there, so that the driver needs no torch."""
    from q3q.trial import attempt_trial

    return attempt_trial(TrialSpec.from_json(spec), report).to_json()


class RunningStudy:
    """A study and what the person at the terminal sees of it."""

    def __init__(self, study: Study, display: "Display") -> None:
        self.study = study
        self.display = display
        self.interrupted = False

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Let the first Ctrl-C wait, for a second at most, until `on_tick` is asked.

        Python drops a KeyboardInterrupt that happens to land in a callback of the garbage collector. The next one
        lands where it lands.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def notice(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, notice)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @property
    def records(self) -> dict[str, TrialRecord]:
        return self.study.records

    def finished(self, record: TrialRecord, seconds: float = 0.0) -> None:
        self.study.take(record)
        self.display.finished(record, seconds)


@contextmanager
def running_study(
    settings: DictConfig,
    specs: Sequence[TrialSpec],
    command: str,
    finished: dict[str, TrialRecord],
    ready: Callable[[], object] | None = None,
) -> Iterator[RunningStudy]:
    """Track and show what runs inside; at the end, however it ends, write and print the report.

    Raises:
        TrackingError: the tracker cannot be used; nothing has started. SweepFailedError: some trials failed.
    """
    from q3q.sweep.progress import Display
    from q3q.track.mlflow import MlflowTracker

    tracker = MlflowTracker(tracking_uri(settings), f"{settings.storage}/artifacts", settings.track.experiment)
    tracker.check()
    if ready is not None:
        ready()  # a cluster that does not answer must not leave an open run behind
    if settings.fresh:
        for spec in specs:
            forget_progress(spec)
    shown = OmegaConf.masked_copy(settings, [str(key) for key in settings if key != "hydra"])
    name = settings.name or "+".join(dict.fromkeys(str(spec.method["name"]) for spec in specs))
    with Display(total=len(specs) - len(finished)) as display:
        study = Study(
            name=name,
            command=command,
            config=OmegaConf.to_yaml(shown),
            specs=specs,
            storage=Path(settings.storage),
            tracker=tracker,
            note=display.note,
            records=dict(finished),
        )
        study.open()
        if finished:
            display.skipped([f"{record.spec.name} · {record.spec.model['name']}" for record in finished.values()])
        interrupted = False
        running = RunningStudy(study, display)
        try:
            yield running
        except KeyboardInterrupt:
            interrupted = True
        except BaseException:
            study.close()  # what is finished is reported, however this ends
            raise
        report = study.close()
    print(report.text)
    print(f"\nReport and plots: {report.folder}\nMLflow: make ui, or: mlflow ui --backend-store-uri {tracker.uri}")
    if interrupted:
        print(f"Interrupted: {len(study.records)} of {len(specs)} trials are recorded; the same command goes on.")
        raise KeyboardInterrupt
    failed = [record for record in study.records.values() if not record.completed]
    if failed:
        for record in failed:
            print(f"FAILED {record.spec.name} · {record.spec.model['name']}: {record.reason}", file=sys.stderr)
        raise SweepFailedError(f"{len(failed)} of {len(specs)} trials failed; the same command tries them again")


def trials_at_once(cluster: DictConfig, gpus: float) -> int:
    """How many trials this machine runs side by side, by its cores and GPUs."""
    import os

    by_cores = int((os.cpu_count() or 1) // max(cluster.cpus_per_trial, 1e-9))
    by_gpus = int(gpus_here() // gpus) if gpus else by_cores
    return max(1, min(by_cores, by_gpus))


def _choices(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return (
            [f"{key}={override.get_value_element_as_str()}"] if not override.is_delete() else [str(override.input_line)]
        )
    if not override.is_discrete_sweep():
        raise HydraException(f"{override.input_line}: give a list of values to sweep over, not an interval")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _finished(trials: dict[str, Trial]) -> dict[str, TrialRecord]:
    found = {key: finished_record(mine.spec) for key, mine in trials.items()}
    return {key: record for key, record in found.items() if record is not None}


def _gpus_per_trial(cluster: DictConfig) -> float:
    if cluster.gpus_per_trial is not None:
        return float(cluster.gpus_per_trial)
    return 1.0 if gpus_here() else 0.0


def _job_return(job: Job, record: TrialRecord | None) -> JobReturn:
    """Hydra's view of a job's trial: its record, or the reason why there is none."""
    if record is not None and record.completed:
        return replace(failed_return(job, Q3QError()), status=JobStatus.COMPLETED, _return_value=record)
    return failed_return(job, Q3QError(record.reason if record else "not run"))

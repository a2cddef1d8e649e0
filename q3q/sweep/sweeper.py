"""A Hydra Sweeper for studies: overrides become jobs, jobs become trial specs, each spec runs once.

Every job is composed once and validated before anything starts. Equal jobs run once, each with its JobReturn; pairs of
values that make no sense together are left out and counted; what is done already is not run again.
"""

import itertools
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from q3q.export.destination import forget_export, refuse_shared
from q3q.masking import masked
from q3q.record import Progress, TrialRecord, forget_progress
from q3q.spec import TrialSpec
from q3q.sweep.cluster import Cluster, Outcome, Resources, Started, Task, WorkerDiedError
from q3q.sweep.launcher import Job, JobPolicy, RayLauncher, failed_return
from q3q.sweep.plan import describe, gpus_here, memory_of, plan
from q3q.sweep.study import Study, finished_record

if TYPE_CHECKING:
    from q3q.sweep.progress import Display

NOTHING_QUANTIZED = {
    **dict.fromkeys(("bits", "group_size", "symmetric", "act_bits", "head_bits", "embedding_bits"), "null"),
    "overrides": "{}",
    "skip": "[]",
}
SWEEP_SETTINGS = ("cluster", "track", "storage", "name", "question", "expectation", "plan", "fresh", "keep")
# Workers show nothing themselves, and must not all start as many threads as there are cores.
WORKER_ENV = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class StudySweeperConf:
    """For saved studies. params: sweep values by key, of all rows. rows: each sweeps some keys of its own; together
    they are the study. Its values can be narrowed on the command line, not replaced (`narrowed`)."""

    _target_: str = "hydra_plugins.q3q.StudySweeper"
    params: dict[str, str] | None = None
    rows: list[dict[str, str]] | None = None


class StudySweeper(Sweeper):
    """See the module's first lines."""

    def __init__(self, params: dict[str, str] | None = None, rows: list[dict[str, str]] | None = None) -> None:
        self.params = params or {}
        self.rows = rows or [{}]
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
        asked = set(trials)
        trials |= self._baselines(trials, first_number=len(jobs))
        if added := [mine.spec for key, mine in trials.items() if key not in asked]:
            models = ", ".join(str(spec.model["name"]) for spec in added)
            print(f"method=none of {models} is added, to compare with; evaluation.baseline=false leaves it out")
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
            predicted = {one.spec.id: one.seconds for one in ordered if not one.done}
            study = stack.enter_context(running_study(settings, specs, command, finished, ready, predicted))
            if launch:
                launch(queue, study)
            records = study.records
        by_number = {job.number: (job, records.get(key)) for key in asked for job in trials[key].jobs}
        return [[_job_return(job, record) for _, (job, record) in sorted(by_number.items())]]

    def _jobs(self, arguments: Sequence[str]) -> Iterator[Job]:
        """Every combination of the overrides' values, composed."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        given = parser.parse_overrides(list(arguments))
        refuse_contradictions(given)
        rows = [
            parser.parse_overrides([f"{key}={value}" for key, value in {**self.params, **row}.items()])
            for row in self.rows
        ]
        study = OmegaConf.select(self.config, "hydra.runtime.choices.study")
        combined = narrowed(str(study), rows, given) if study else [replaced(row, given) for row in rows]
        jobs = itertools.chain.from_iterable(itertools.product(*map(_choices, row)) for row in combined)
        for number, overrides in enumerate(jobs):
            config = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            yield Job(number=number, overrides=tuple(overrides), config=config)

    def _baselines(self, trials: dict[str, "Trial"], first_number: int) -> dict[str, "Trial"]:
        """The trials of the unquantized model that these are compared with, as far as they are not among them."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader, added = self.hydra_context.config_loader, dict[str, Trial]()
        for mine in trials.values():
            baseline = mine.spec.places.get("baseline")
            if baseline is None or baseline in trials or baseline in added:
                continue
            overrides = unquantized(mine.jobs[0].overrides)
            config = loader.load_sweep_config(self.config, overrides)
            spec = spec_from(config)
            if spec.id != baseline:
                raise ConfigError(
                    f"the baseline of {mine.spec.name} cannot be made from this command ({' '.join(overrides)}): "
                    "run method=none by itself, and this with evaluation.baseline=false"
                )
            number = first_number + len(added)
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            added[baseline] = Trial(spec, [Job(number=number, overrides=tuple(overrides), config=config)])
        return added

    def _launcher(
        self, stack: ExitStack, settings: DictConfig
    ) -> tuple[Callable[[], object], Callable[[Sequence["Trial"], "RunningStudy"], None]]:
        """What waits for a cluster, which starts in the background and lives as long as `stack`; what runs trials."""
        launcher = self.launcher
        assert launcher is not None
        if isinstance(launcher, RayLauncher):
            address = settings.cluster.address
            joined = Cluster(address=address, env=WORKER_ENV, patience=settings.cluster.patience) if address else None
            cluster = stack.enter_context(joined or launcher.cluster())
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


def unquantized(overrides: Sequence[str]) -> list[str]:
    """The same job's overrides, but for the unquantized model."""
    keys = ("method", "calibration", "export", *NOTHING_QUANTIZED)
    kept = [one for one in overrides if one.lstrip("+~").partition("=")[0].partition(".")[0] not in keys]
    return [*kept, "method=none", "export=none", *(f"{key}={value}" for key, value in NOTHING_QUANTIZED.items())]


def refuse_contradictions(overrides: Sequence[Override]) -> None:
    """Two overrides of one key: whichever won, somebody would be surprised."""
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element().lstrip("+")
        if key in seen and seen[key] != override.input_line:
            raise ConfigError(f"{seen[key]} and {override.input_line} contradict each other: give {key} once")
        seen[key] = str(override.input_line)


def replaced(row: Sequence[Override], given: Sequence[Override]) -> list[Override]:
    """A row with the command line's values in the place of its own."""
    named = {override.get_key_element() for override in given}
    return [override for override in row if override.get_key_element() not in named] + list(given)


def narrowed(study: str, rows: Sequence[Sequence[Override]], given: Sequence[Override]) -> list[list[Override]]:
    """The rows of a saved study that the command line leaves, with the values that it leaves.

    A study is a question: one of its own values given on the command line asks for that part of it, anything else would
    change what every row means under the study's name. With a name of its own (name=...) it is another study, and the
    command line wins.

    Raises:
        ConfigError: an override would change every row, or leaves none.
    """
    keys = {override.get_key_element().lstrip("+").partition("@")[0] for override in given}
    if "name" in keys:
        return [replaced(row, given) for row in rows]
    swept = {key: values for row in rows for key, values in _values(row).items()}
    for row in rows:
        for key, values in _values(row).items():
            swept[key] = list(dict.fromkeys([*swept[key], *values]))
    left = list(map(list, rows))
    others = []
    for override in given:
        key = override.get_key_element().lstrip("+")
        if key not in swept:
            if key != "study" and key.partition(".")[0] not in (*SWEEP_SETTINGS, "hydra", "data"):
                raise ConfigError(_changes_all(study, override, swept))
            others.append(override)
            continue
        wanted = _values([override])[key]
        strange = [value for value in wanted if value not in swept[key]]
        if strange:
            raise ConfigError(_changes_all(study, override, swept))
        left = [kept for row in left if (kept := _kept(row, key, wanted))]
    if not left:
        raise ConfigError(f"study={study} has no row with all of {' '.join(str(one.input_line) for one in given)}")
    return [row + others for row in left]


def _kept(row: list[Override], key: str, wanted: Sequence[str]) -> list[Override] | None:
    """A row with those of its values that are wanted, None if it has none of them."""
    own = _values(row).get(key)
    left = [value for value in own or [] if value in wanted]
    if not left:
        return None
    [narrow] = OverridesParser.create().parse_overrides([f"{key}={','.join(left)}"])
    return [narrow if one.get_key_element() == key else one for one in row]


def _values(row: Sequence[Override]) -> dict[str, list[str]]:
    return {one.get_key_element().lstrip("+"): [choice.partition("=")[2] for choice in _choices(one)] for one in row}


def _changes_all(study: str, override: Override, swept: Mapping[str, Sequence[str]]) -> str:
    key = override.get_key_element().lstrip("+")
    may = f"the study has {key}={','.join(swept[key])}" if key in swept else f"it can be narrowed by {', '.join(swept)}"
    return (
        f"{override.input_line} would change every row of study={study}: {may}. "
        "Give it a name of its own (name=...) to ask another question with it"
    )


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
    refuse_shared(trial.spec for trial in trials.values())
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
            self.study.heard(spec, event)

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

    def heard(self, spec: TrialSpec, event: Progress) -> None:
        self.display.event(event)
        self.study.progressed(spec, event)

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
    predicted: Mapping[str, float] | None = None,
) -> Iterator[RunningStudy]:
    """Track and show what runs inside; at the end, however it ends, write and print the report.

    Raises:
        TrackingError: the tracker cannot be used; nothing has started. SweepFailedError: some trials failed.
    """
    from q3q.sweep.bulletin import Publisher
    from q3q.sweep.progress import Display
    from q3q.track.mlflow import MlflowTracker

    experiment = settings.track.experiment or settings.name or "q3q"
    artifacts = f"{settings.storage}/artifacts"
    tracker = MlflowTracker(tracking_uri(settings), artifacts, experiment, settings.track.register)
    tracker.check()
    if ready is not None:
        ready()  # a cluster that does not answer must not leave an open run behind
    if settings.fresh:
        for spec in specs:
            forget_progress(spec)
            forget_export(spec)
    shown = OmegaConf.masked_copy(settings, [str(key) for key in settings if key != "hydra"])
    methods = list(dict.fromkeys(str(spec.method["name"]) for spec in specs))
    name = settings.name or "+".join([method for method in methods if method != "none"] or methods)
    command, storage = masked(command), Path(settings.storage)
    publisher = Publisher(storage, name, command)
    with Display(total=len(specs) - len(finished), publisher=publisher) as display:
        study = Study(
            name=name,
            command=command,
            config=masked(OmegaConf.to_yaml(shown)),
            specs=specs,
            storage=storage,
            tracker=tracker,
            note=display.note,
            records=dict(finished),
            question=settings.question or "",
            expectation=settings.expectation or "",
            predicted=predicted or {},
            experiment=experiment,
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
    print(f"\nReport and plots: {report.folder}")
    print(f"MLflow: make ui, or: mlflow ui --backend-store-uri {masked(tracker.uri)}")
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

"""A Hydra Sweeper for studies: overrides become jobs, jobs become trial specs, each spec runs once.

Every job is composed once and validated before anything starts. Equal jobs run once, each with its JobReturn; pairs of
values that make no sense together are left out and counted; what is done already is not run again.
"""

import itertools
import shlex
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
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

from q3q.attempt import afresh, finished_record
from q3q.config import facts_of, spec_from, tracking_uri
from q3q.environment import now
from q3q.errors import ConfigError, IncompatibleError, Q3QError, SweepFailedError
from q3q.export.destination import check_room, refuse_shared
from q3q.masking import masked
from q3q.mirror import DRIVER_SECONDS, Courier, delivering, folder_of, is_url, mirror_at, refreshed
from q3q.models.checkpoint import ModelFacts
from q3q.models.footprint import in_gb
from q3q.record import Progress, TrialRecord, kept_blocks_folder
from q3q.spec import Json, TrialSpec
from q3q.sweep.cluster import (
    Cluster,
    Outcome,
    OutOfMemoryError,
    Resources,
    Started,
    Task,
    WorkerDiedError,
    ran_out_of_memory,
)
from q3q.sweep.costs import CostModel
from q3q.sweep.launcher import Job, JobPolicy, RayLauncher
from q3q.sweep.plan import (
    Machine,
    Planned,
    Share,
    Wishes,
    describe,
    expected,
    machine_here,
    model_key,
    plan,
    sized,
    wishes_of,
)
from q3q.sweep.progress import counted
from q3q.sweep.study import Study, facts_of_spec, recent_records, sole_driver
from q3q.team import Seat

if TYPE_CHECKING:
    from q3q.sweep.progress import Display
    from q3q.track.mlflow import MlflowTracker

NOTHING_QUANTIZED = {
    **dict.fromkeys(
        ("bits", "group_size", "symmetric", "act_bits", "head_bits", "embedding_bits"), "null"
    ),
    "overrides": "{}",
    "skip": "[]",
}
# Where and how a trial is held changes none of its numbers; nor does whether the unquantized model is added.
PLACES = ("data", "memory", "loader")
SWEEP_SETTINGS = (
    "cluster",
    "track",
    "storage",
    "name",
    "question",
    "expectation",
    "plan",
    "fresh",
    "keep",
)
# Workers show nothing themselves, and must not all start as many threads as there are cores.
WORKER_ENV = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class StudySweeperConf:
    """For saved studies. params: sweep values by key, of all rows. rows: each sweeps some keys of its own; together
    they are the study. Its values can be narrowed on the command line, not replaced (`narrowed`)."""

    _target_: str = "hydra_plugins.q3q.StudySweeper"
    params: dict[str, str] | None = None
    rows: list[dict[str, str]] | None = None


Work = Callable[
    ..., Json | None
]  # a trial's spec, whom to report to and, of a gang, the rank's seat


def work(spec: Json, report: Callable[[Any], None], seat: Seat | None = None) -> Json | None:
    """What a worker does: one trial, or its part of one. Imported there, so that the driver needs no torch."""
    from q3q.trial import attempt_trial, share_trial

    trial = TrialSpec.from_json(spec)
    record = attempt_trial(trial, report) if seat is None else share_trial(trial, report, seat)
    if record is None:
        return None
    if not record.completed and ran_out_of_memory(record.reason):
        raise MemoryError(record.reason)  # the driver knows whether there is a larger plan
    return record.to_json()


class StudySweeper(Sweeper):
    """See the module's first lines.

    trial: what a worker does for a trial: takes its spec and where to report, and gives its record, all three as JSON.
    """

    trial: Work = staticmethod(work)

    def __init__(
        self, params: dict[str, str] | None = None, rows: list[dict[str, str]] | None = None
    ) -> None:
        self.params = params or {}
        self.rows = rows or [{}]
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
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
        jobs = OneSetting(self._jobs(arguments))
        trials, left_out = resolve(jobs)
        jobs.refuse_many()
        settings = jobs.config
        if left_out:
            print(left_out)
        asked = set(trials)
        trials |= self._baselines(trials)
        if added := [mine.spec for key, mine in trials.items() if key not in asked]:
            models = ", ".join(str(spec.model["name"]) for spec in added)
            print(
                f"method=none of {models} is added, to compare with; evaluation.baseline=false leaves it out"
            )
        storage = refreshed(settings.storage)
        finished = {} if settings.fresh else _finished(trials)
        with ExitStack() as stack:
            wishes = wishes_of(settings.cluster.get)
            cluster, machines = self._machines(stack, settings, wishes)
            ordered = plan(
                [mine.spec for mine in trials.values()],
                finished,
                {key: mine.facts for key, mine in trials.items()},
                machines=machines,
                wishes=wishes,
                model=CostModel().learned(recent_records(storage), facts_of_spec),
            )
            waiting = [] if settings.fresh else [one.spec for one in ordered if not one.done]
            if waiting and (again := quantized_again(waiting, recent_records(storage))):
                print(
                    f"{len(again)} trials quantize what finished ones here have quantized, of which nothing was kept: "
                    "with keep=blocks a new evaluation needs only to evaluate"
                )
            if settings.plan:
                print(
                    describe(
                        ordered,
                        machines=machines,
                        where=settings.cluster.address or "this machine",
                        storage=settings.storage,
                    )
                )
                return []
            if settings.fresh:
                since = now()
                for mine in trials.values():
                    mine.spec = afresh(mine.spec, since)
            specs = [mine.spec for mine in trials.values()]
            command = "python launch.py -m " + shlex.join(arguments)
            left = [one for one in ordered if not one.done]
            stack.enter_context(
                sole_driver(specs, settings.storage, partial(print, file=sys.stderr))
            )
            ready, launch = self._launcher(stack, settings, cluster) if left else (None, None)
            predicted = {one.spec.id: one.seconds for one in left}
            study = stack.enter_context(
                running_study(settings, specs, command, finished, ready, predicted)
            )
            if launch:
                launch([(trials[one.spec.id], one) for one in left], study)
            records = study.records
        by_number = {
            number: _job_return(overrides, records.get(key))
            for key in asked
            for number, overrides in trials[key].jobs.items()
        }
        return [[by_number[number] for number in sorted(by_number)]]

    def _machines(
        self, stack: ExitStack, settings: DictConfig, wishes: Wishes
    ) -> tuple[Cluster | None, list[Machine]]:
        """The cluster that trials run on, None with another launcher than Ray's; and the machines to plan with. One at
        an address is joined; one of this machine's own has what the plan counts, and is started when it is needed."""
        here, launcher, address = machine_here(), self.launcher, settings.cluster.address
        if not isinstance(launcher, RayLauncher):
            return None, expected([here], wishes)
        if not address:
            cluster = launcher.cluster()
            cluster.cpus = int(here.cpus) if cluster.cpus is None else cluster.cpus
            cluster.gpus = int(here.gpus) if cluster.gpus is None else cluster.gpus
            return cluster, expected([replace(here, cpus=cluster.cpus, gpus=cluster.gpus)], wishes)
        cluster = Cluster(address=address, patience=wishes.patience)
        return cluster, expected(
            [
                Machine(
                    cpus=one.cpus,
                    gpus=one.gpus,
                    memory=one.memory,
                    gpu_memory=sized(one.kind, here) if one.gpus else None,
                    kind=one.kind,
                )
                for one in stack.enter_context(cluster).machines()
            ],
            wishes,
        )

    def _jobs(self, arguments: Sequence[str]) -> Iterator[Job]:
        """Every combination of the overrides' values, composed."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        given = parser.parse_overrides(list(arguments))
        refuse_contradictions(given)
        rows = [
            parser.parse_overrides(
                [f"{key}={value}" for key, value in {**self.params, **row}.items()]
            )
            for row in self.rows
        ]
        study = OmegaConf.select(self.config, "hydra.runtime.choices.study")
        # What is said of Hydra itself does not come with the arguments, and the rows are its sweeper's.
        of_hydra = parser.parse_overrides(list(self.config.hydra.overrides.hydra))
        combined = (
            narrowed(str(study), rows, given, of_hydra)
            if study
            else [replaced(row, given) for row in rows]
        )
        jobs = [
            overrides for row in combined for overrides in itertools.product(*map(_choices, row))
        ]
        for number, overrides in enumerate(counted(jobs, len(jobs), "composing", "jobs")):
            config = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            yield Job(number=number, overrides=tuple(overrides), config=config)

    def _baselines(self, trials: dict[str, "Trial"]) -> dict[str, "Trial"]:
        """The trials of the unquantized model that these are compared with, as far as they are not among them."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader, added = self.hydra_context.config_loader, dict[str, Trial]()
        for mine in trials.values():
            baseline = mine.spec.places.get("baseline")
            if baseline is None or baseline in trials or baseline in added:
                continue
            overrides = unquantized(next(iter(mine.jobs.values())))
            config = loader.load_sweep_config(self.config, overrides)
            spec = spec_from(config)
            if spec.id != baseline:
                raise ConfigError(
                    f"the baseline of {mine.spec.name} cannot be made from this command ({' '.join(overrides)}): "
                    "run method=none by itself, and this with evaluation.baseline=false"
                )
            added[baseline] = Trial(
                spec, facts_of(config), {-1 - len(added): tuple(overrides)}
            )  # nobody's job
        return added

    def _launcher(
        self, stack: ExitStack, settings: DictConfig, cluster: Cluster | None
    ) -> tuple[
        Callable[[], object], Callable[[Sequence[tuple["Trial", Planned]], "RunningStudy"], None]
    ]:
        """What waits for a cluster, which starts in the background and lives as long as `stack`; what runs trials."""
        launcher = self.launcher
        assert launcher is not None
        if isinstance(launcher, RayLauncher) and cluster is not None:
            cluster.env |= WORKER_ENV
            if not cluster.address:
                stack.enter_context(cluster)
            return cluster.total, partial(_run_on_ray, launcher, cluster, settings, self.trial)

        def launch(trials: Sequence[tuple[Trial, Planned]], study: RunningStudy) -> None:
            # Another launcher was asked for: it composes and runs Hydra's way, and the task function returns records.
            jobs = [list(next(iter(mine.jobs.values()))) for mine, _ in trials]
            for done in launcher.launch(jobs, initial_job_idx=0):
                study.finished(done.return_value)

        return lambda: None, launch


def _run_on_ray(
    launcher: RayLauncher,
    cluster: Cluster,
    settings: DictConfig,
    work: Work,
    trials: Sequence[tuple["Trial", Planned]],
    study: "RunningStudy",
) -> None:
    shares = Counter(f"{one.share}, {one.share.loader}" for _, one in trials if one.share)
    plans = "; ".join(f"{count} on {share}" for share, count in shares.items())
    study.display.note(f"Ray has {cluster.total()}; of {len(trials)} trials {plans} each")
    policy = TrialPolicy({min(mine.jobs): (mine.spec, one) for mine, one in trials}, study, work)
    # What a trial is told is in its spec; of the jobs' own configs, a megabyte each, none is kept.
    jobs = [
        Job(number=min(mine.jobs), overrides=mine.jobs[min(mine.jobs)], config=settings)
        for mine, _ in trials
    ]
    with study.heeding_interrupts():
        launcher.run(jobs, policy, cluster=cluster)


@dataclass
class Trial:
    """One trial, its model's facts, and all the jobs that mean it: their overrides by number."""

    spec: TrialSpec
    facts: ModelFacts
    jobs: dict[int, tuple[str, ...]]


def unquantized(overrides: Sequence[str]) -> list[str]:
    """The same job's overrides, but for the unquantized model."""
    keys = ("method", "calibration", "export", *NOTHING_QUANTIZED)
    kept = [
        one for one in overrides if one.lstrip("+~").partition("=")[0].partition(".")[0] not in keys
    ]
    return [
        *kept,
        "method=none",
        "export=none",
        *(f"{key}={value}" for key, value in NOTHING_QUANTIZED.items()),
    ]


def refuse_contradictions(overrides: Sequence[Override]) -> None:
    """Two overrides of one key: whichever won, somebody would be surprised."""
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element().lstrip("+")
        if key in seen and seen[key] != override.input_line:
            raise ConfigError(
                f"{seen[key]} and {override.input_line} contradict each other: give {key} once"
            )
        seen[key] = str(override.input_line)


def replaced(row: Sequence[Override], given: Sequence[Override]) -> list[Override]:
    """A row with the command line's values in the place of its own."""
    named = {override.get_key_element() for override in given}
    return [override for override in row if override.get_key_element() not in named] + list(given)


def narrowed(
    study: str,
    rows: Sequence[Sequence[Override]],
    given: Sequence[Override],
    of_hydra: Sequence[Override] = (),
) -> list[list[Override]]:
    """The rows of a saved study that the command line leaves, with the values that it leaves.

    of_hydra: what it says of Hydra itself, which is in force already.

    A study is a question: one of its own values given on the command line asks for that part of it, anything else would
    change what every row means under the study's name. With a name of its own (name=..., another than the study's) it
    is another study, and the command line wins.

    Raises:
        ConfigError: an override would change every row, or leaves none.
    """
    named = [one for one in given if one.get_key_element().lstrip("+") == "name"]
    if any(one.is_delete() or str(one.value()) != study for one in named):
        return [replaced(row, given) for row in rows]
    swept = {key: values for row in rows for key, values in _values(row).items()}
    for row in rows:
        for key, values in _values(row).items():
            swept[key] = list(dict.fromkeys([*swept[key], *values]))
    for override in of_hydra:
        if not _may_be_said(override.get_key_element().lstrip("+")):
            raise ConfigError(_changes_all(study, override, swept))
    left = list(map(list, rows))
    others = []
    for override in given:
        key = override.get_key_element().lstrip("+")
        if key not in swept:
            if not _may_be_said(key):
                raise ConfigError(_changes_all(study, override, swept))
            others.append(override)
            continue
        wanted = _values([override])[key]
        strange = [value for value in wanted if value not in swept[key]]
        if strange:
            raise ConfigError(_changes_all(study, override, swept))
        left = [kept for row in left if (kept := _kept(row, key, wanted))]
    if not left:
        raise ConfigError(
            f"study={study} has no row with all of {' '.join(str(one.input_line) for one in given)}"
        )
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
    return {
        one.get_key_element().lstrip("+"): [choice.partition("=")[2] for choice in _choices(one)]
        for one in row
    }


def _may_be_said(key: str) -> bool:
    """Whether an override leaves every row of a study what it means. `hydra.sweeper` is where the rows are."""
    if key.startswith("hydra.sweeper") or key == "hydra/sweeper":
        return False
    group = key.replace("/", ".").partition(".")[0]
    return key in ("study", "evaluation.baseline") or group in (*SWEEP_SETTINGS, *PLACES, "hydra")


def _changes_all(study: str, override: Override, swept: Mapping[str, Sequence[str]]) -> str:
    key = override.get_key_element().lstrip("+")
    may = (
        f"the study has {key}={','.join(swept[key])}"
        if key in swept
        else f"it can be narrowed by {', '.join(swept)}"
    )
    return (
        f"{override.input_line} would change every row of study={study}: {may}. "
        "Give it a name of its own (name=...) to ask another question with it"
    )


class OneSetting:
    """Passes jobs on, and sees that what belongs to the sweep and not to a trial is the same for all of them.

    config: the first one's. Only its own config is kept, the others are a megabyte each.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.jobs = jobs
        self.config: DictConfig = OmegaConf.create()
        self._values: dict[str, dict[str, None]] = {key: {} for key in SWEEP_SETTINGS}

    def __iter__(self) -> Iterator[Job]:
        for number, job in enumerate(self.jobs):
            self.config = self.config if number else job.config
            for key, values in self._values.items():
                values[str(OmegaConf.select(job.config, key))] = None
            yield job

    def refuse_many(self) -> None:
        """Raises ConfigError if there are several values of one."""
        for key, values in self._values.items():
            if len(values) > 1:
                raise ConfigError(
                    f"{key} is the whole sweep's, give it one value: {', '.join(sorted(values))}"
                )


def resolve(jobs: Iterable[Job]) -> tuple[dict[str, Trial], str]:
    """Jobs as trials by id, in the jobs' order, and a line that counts what was left out (or nothing).

    Raises:
        ConfigError: any job has an invalid value, or no job is left.
    """
    trials: dict[str, Trial] = {}
    incompatible: dict[str, int] = {}
    number = 0
    for job in jobs:
        number += 1
        try:
            spec = spec_from(job.config)
        except IncompatibleError as error:
            incompatible[str(error)] = incompatible.get(str(error), 0) + 1
            continue
        if spec.id not in trials:
            trials[spec.id] = Trial(spec, facts_of(job.config), {})
        trials[spec.id].jobs[job.number] = job.overrides
    reasons = "; ".join(incompatible)
    if not trials:
        raise IncompatibleError(reasons or "the sweep has no jobs")
    refuse_shared(trial.spec for trial in trials.values())
    check_room((trial.spec, trial.facts) for trial in trials.values())
    count = sum(incompatible.values())
    return trials, f"{count} of {number} combinations left out: {reasons}" if count else ""


class Furthest:
    """Whether a trial got further than it ever was: on its way there it replays what is on disk."""

    def __init__(self) -> None:
        self.share = 0.0

    def __call__(self, event: Any) -> bool:
        from q3q.sweep.progress import share_done

        share = share_done(event) if isinstance(event, Progress) else 0.0
        further, self.share = share > self.share, max(share, self.share)
        return further


class TrialPolicy(JobPolicy):
    """q3q's say in how its jobs run: only specs, records and progress cross a process border."""

    def __init__(
        self, trials: Mapping[int, tuple[TrialSpec, Planned]], study: "RunningStudy", work: Work
    ) -> None:
        self.specs = {number: spec for number, (spec, _) in trials.items()}
        self.planned = {number: planned for number, (_, planned) in trials.items()}
        self.shares = {number: planned.share for number, planned in self.planned.items()}
        self.study = study
        self.work = work

    def task(self, job: Job, plain: Task) -> Task:
        planned = self.planned[job.number]
        assert planned.share is not None
        larger = None if planned.larger is None else self._task(job.number, planned.larger)
        return replace(self._task(job.number, planned.share), larger=larger)

    def _task(self, number: int, share: Share) -> Task:
        spec = self.specs[number]
        told = spec.with_places({**spec.places, "share": share.to_places()})
        resources = Resources(
            cpus=share.cpus,
            gpus=share.gpus,
            memory=share.memory,
            ranks=share.ranks,
            kind=share.kind,
        )
        call = partial(self.work, told.to_json())
        return Task(
            key=spec.id, call=call, resources=resources, furthers=Furthest(), near=model_key(spec)
        )

    def on_event(self, job: Job, event: Any) -> None:
        spec = self.specs[job.number]
        if isinstance(event, Started):
            self.study.display.started(spec.id, f"{spec.name} · {spec.model['name']}")
        elif isinstance(event, Progress):
            self.study.heard(spec, event)

    def on_tick(self) -> None:
        self.study.tick()
        if self.study.interruption is not None:
            raise self.study.interruption

    def on_retry(self, job: Job, error: WorkerDiedError) -> None:
        why, larger = str(error), self.planned[job.number].larger
        if isinstance(error, OutOfMemoryError) and larger is not None:
            self.shares[job.number] = larger
            why += f"; now with {larger}, {in_gb(larger.memory)} of memory, {larger.loader}"
        self.study.display.retried(self.specs[job.number].id, why)

    def on_outcome(self, job: Job, outcome: Outcome) -> JobReturn:
        spec, planned, share = (
            self.specs[job.number],
            self.planned[job.number],
            self.shares[job.number],
        )
        if outcome.error is None:
            record = TrialRecord.from_json(outcome.value)
        else:
            record = TrialRecord.failed(spec, f"{outcome.error} ({outcome.attempts} attempts)")
        self.study.fetch(spec)
        record = with_plan(record, planned, share)
        record.save()  # again, if the worker could: its disk may not be ours
        self.study.finished(record, outcome.seconds)
        return _job_return(job.overrides, record)


def with_plan(record: TrialRecord, planned: Planned, share: Share | None = None) -> TrialRecord:
    """The record with what was planned beside what it took. share: what the trial had in the end, if it is known."""
    kept = planned.to_json(share) | measured(record)
    if share is not None and planned.share is not None and share != planned.share:
        kept["first"] = f"{planned.share}, {planned.share.loader}: out of memory"
    return replace(record, environment={**record.environment, "planned": kept})


def measured(record: TrialRecord) -> Json:
    """What a trial took, to stand beside what was planned: seconds of its phases, and its peak where its model lay."""
    metrics = record.metrics
    kind = (
        "gpu_peak_bytes/"
        if any(name.startswith("gpu_peak_bytes/") for name in metrics)
        else "peak_bytes/"
    )
    peaks = [value for name, value in metrics.items() if name.startswith(kind)]
    took = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    return {"took": round(took, 3), "peak": max(peaks)} if peaks else {}


class RunningStudy:
    """A study and what the person at the terminal sees of it."""

    def __init__(self, study: Study, display: "Display") -> None:
        self.study = study
        self.display = display
        self.interruption: BaseException | None = None

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM wait, for a second at most, until `on_tick` is asked.

        Python drops what a signal's handler raises if it happens to land in a callback of the garbage collector. The
        next one lands where it lands.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def notice(number: int, frame: Any) -> None:
            if self.interruption is not None:
                raise self.interruption
            self.interruption = (
                KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
            )

        before = {
            number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def records(self) -> dict[str, TrialRecord]:
        return self.study.records

    def heard(self, spec: TrialSpec, event: Progress) -> None:
        self.display.event(event)
        self.study.progressed(spec, event)

    def tick(self) -> None:
        self.study.tick()

    def fetch(self, spec: TrialSpec) -> None:
        self.study.fetch(spec)

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
    storage, mirror = folder_of(settings.storage), mirror_at(settings.storage)
    artifacts = f"{storage}/artifacts"
    tracker = MlflowTracker(tracking_uri(settings), artifacts, experiment, settings.track.register)
    tracker.check()
    if ready is not None:
        ready()  # a cluster that does not answer must not leave an open run behind
    if settings.fresh:
        for spec in specs:
            shutil.rmtree(kept_blocks_folder(spec), ignore_errors=True)
            if mirror is not None:
                mirror.remove(f"trials/blocks/{spec.quantization_id}")
    shown = OmegaConf.masked_copy(settings, [str(key) for key in settings if key != "hydra"])
    methods = list(dict.fromkeys(str(spec.method["name"]) for spec in specs))
    name = settings.name or "+".join([method for method in methods if method != "none"] or methods)
    command = masked(command)
    publisher = Publisher(storage, name, command)
    with (
        _courier(settings.storage, finished) as courier,
        Display(total=len(specs) - len(finished), publisher=publisher) as display,
    ):
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
            courier=courier,
            takes_exports=settings.track.register is not None,
        )
        study.open()
        if finished:
            display.skipped(
                [
                    f"{record.spec.name} · {record.spec.model['name']}"
                    for record in finished.values()
                ]
            )
        interruption: BaseException | None = None
        running = RunningStudy(study, display)
        try:
            yield running
        except (
            KeyboardInterrupt,
            SystemExit,
        ) as asked:  # SystemExit: SIGTERM, of a spot machine or a scheduler
            interruption = asked
        except BaseException:
            study.close()  # what is finished is reported, however this ends
            raise
        report = study.close()
    print(report.text)
    print(f"\nReport and plots: {report.folder}")
    print(_where_to_browse(tracker))
    if is_url(settings.storage):
        print(_what_is_here_alone(tracker, masked(settings.storage)))
    if interruption is not None:
        print(
            f"Interrupted: {len(study.records)} of {len(specs)} trials are recorded; the same command goes on."
        )
        raise interruption
    failed = [record for record in study.records.values() if not record.completed]
    if failed:
        for record in failed:
            print(
                f"FAILED {record.spec.name} · {record.spec.model['name']}: {record.reason}",
                file=sys.stderr,
            )
        raise SweepFailedError(
            f"{len(failed)} of {len(specs)} trials failed; the same command tries them again"
        )


def _where_to_browse(tracker: "MlflowTracker") -> str:
    uri, page = masked(tracker.uri), tracker.page
    if not uri.startswith("sqlite:"):
        return f"MLflow: {uri}/{page}"
    return f"MLflow: make ui (or: mlflow ui --backend-store-uri {uri}), then http://127.0.0.1:5000/{page}"


@contextmanager
def _courier(storage: str, finished: Mapping[str, TrialRecord]) -> Iterator[Courier | None]:
    """What brings a driver's files to a storage that is a URL; None for a folder, which needs nothing of the kind."""
    mirror = mirror_at(storage)
    if mirror is None:
        yield None
        return
    with delivering(mirror, "sweeps", "reports", "running", every=DRIVER_SECONDS) as courier:
        courier.add(
            *(f"trials/{trial}" for trial in finished)
        )  # what a worker of this machine could not send any more
        yield courier


def _what_is_here_alone(tracker: "MlflowTracker", storage: str) -> str:
    database = "; MLflow's database is on this machine alone, track.uri= names a shared one"
    return f"Records and report are in {storage}{database if tracker.uri.startswith('sqlite:') else ''}."


def _choices(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return (
            [f"{key}={override.get_value_element_as_str()}"]
            if not override.is_delete()
            else [str(override.input_line)]
        )
    if not override.is_discrete_sweep():
        raise HydraException(
            f"{override.input_line}: give a list of values to sweep over, not an interval"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def quantized_again(left: Sequence[TrialSpec], recent: Iterable[TrialRecord]) -> list[TrialSpec]:
    """Those of the trials to run that have to quantize what a finished trial has, since its blocks were not kept."""
    done = {record.spec.quantization_id for record in recent if record.completed}
    return [
        spec
        for spec in left
        if spec.scheme is not None
        and spec.quantization_id in done
        and not kept_blocks_folder(spec).exists()
    ]


def _finished(trials: dict[str, Trial]) -> dict[str, TrialRecord]:
    found = {key: finished_record(mine.spec) for key, mine in trials.items()}
    return {key: record for key, record in found.items() if record is not None}


def _job_return(overrides: Sequence[str], record: TrialRecord | None) -> JobReturn:
    """Hydra's view of a job's trial: its record, which says what it ran, or the reason why there is none."""
    done = record is not None and record.completed
    return JobReturn(
        overrides=list(overrides),
        status=JobStatus.COMPLETED if done else JobStatus.FAILED,
        _return_value=record if done else Q3QError(record.reason if record else "not run"),
    )

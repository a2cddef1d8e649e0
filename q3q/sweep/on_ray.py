"""Run a study's trials on Ray: what a worker does, and what q3q decides about its jobs."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from q3q.errors import Q3QError
from q3q.models.footprint import in_gb
from q3q.record import Progress, TrialRecord
from q3q.spec import Json, TrialSpec
from q3q.sweep.grid import SweepTrial
from q3q.sweep.launcher import Job, JobPolicy, RayLauncher
from q3q.sweep.plan import Planned, model_key
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.deaths import ran_out_of_memory
from q3q.sweep.ray.tasks import Outcome, OutOfMemoryError, Resources, Started, Task, WorkerDiedError
from q3q.sweep.run import RunningStudy
from q3q.sweep.shares import Allocation
from q3q.team import Seat

if TYPE_CHECKING:
    pass

# Workers show nothing themselves, and must not all start as many threads as there are cores.
WORKER_ENV = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
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


def run_on_ray(
    launcher: RayLauncher,
    cluster: Cluster,
    settings: DictConfig,
    work: Work,
    trials: Sequence[tuple["SweepTrial", Planned]],
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

    def _task(self, number: int, share: Allocation) -> Task:
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
        return job_return(job.overrides, record)


def with_plan(
    record: TrialRecord, planned: Planned, share: Allocation | None = None
) -> TrialRecord:
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


def job_return(overrides: Sequence[str], record: TrialRecord | None) -> JobReturn:
    """Hydra's view of a job's trial: its record, which says what it ran, or the reason why there is none."""
    done = record is not None and record.completed
    return JobReturn(
        overrides=list(overrides),
        status=JobStatus.COMPLETED if done else JobStatus.FAILED,
        _return_value=record if done else Q3QError(record.reason if record else "not run"),
    )

"""Run a study's trials on Ray: what a worker does, and what q3q decides about its jobs."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from q3q.errors import GPU_LOST_WORDS, GPU_SUSPECT_WORDS, Q3QError
from q3q.formatting import in_gb
from q3q.placement import Trial
from q3q.record import Progress, TrialRecord
from q3q.spec import Json
from q3q.sweep.allocation import Allocation
from q3q.sweep.downloads import download_on_each_machine
from q3q.sweep.grid import SweepTrial
from q3q.sweep.launcher import Job, JobPolicy, RayLauncher
from q3q.sweep.machines import Machine, ResourceRequest, expected, machine_here, sized
from q3q.sweep.made import is_over
from q3q.sweep.plan import Planned
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.deaths import ran_out_of_memory
from q3q.sweep.ray.tasks import (
    GpuFailedError,
    Outcome,
    OutOfMemoryError,
    Resources,
    Started,
    Task,
    WorkerDiedError,
)
from q3q.sweep.run import Host, with_plan
from q3q.sweep.running import RunningStudy
from q3q.team import Rendezvous

# Workers show no progress bars, and must not all start as many threads as there are cores.
WORKER_ENV = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Receives a trial as JSON, its reporter and, in a gang, the rank's rendezvous; returns the record.
TrialCall = Callable[..., Json | None]


def work(trial: Json, report: Callable[[Any], None], seat: Rendezvous | None = None) -> Json | None:
    """Run one trial, or a rank's part of it, in a worker; the driver needs no torch."""
    from q3q.trial import attempt_trial, share_trial

    placed = Trial.from_json(trial)
    record = share_trial(placed, report, seat) if seat else attempt_trial(placed, report)
    if record is None:
        return None
    if not record.completed and ran_out_of_memory(record.reason):
        raise MemoryError(record.reason)  # the driver knows whether there is a larger allocation
    grant = placed.placement.grant
    if not record.completed and grant is not None and grant.gpus and _blames_gpu(record.reason):
        raise GpuFailedError(record.reason)  # the driver knows whether there is another GPU
    return record.to_json()


def _blames_gpu(reason: str) -> bool:
    return any(words.search(reason) for words in (GPU_LOST_WORDS, GPU_SUSPECT_WORDS))


class OnRay(Host):
    """A Ray cluster: one at an address, or this machine's own, started when it is needed."""

    def __init__(
        self,
        launcher: RayLauncher,
        config: DictConfig,
        trials: Mapping[str, SweepTrial],
        work: TrialCall,
    ) -> None:
        self.launcher, self.config, self.trials, self.work = launcher, config, trials, work
        address = config.cluster.address
        self.where = address or "this machine"
        self.cluster = Cluster(address=address) if address else launcher.cluster()
        self._joined = ExitStack()

    def __enter__(self) -> "OnRay":
        return self

    def __exit__(self, *_: object) -> None:
        self._joined.close()

    def machines(self, request: ResourceRequest) -> tuple[list[Machine], ResourceRequest]:
        cluster = self.cluster
        here = machine_here(None if cluster.address else request)
        if not cluster.address:
            cluster.cpus = int(here.cpus) if cluster.cpus is None else cluster.cpus
            cluster.gpus = int(here.gpus) if cluster.gpus is None else cluster.gpus
            cluster.memory = here.memory
            own = replace(here, cpus=cluster.cpus, gpus=cluster.gpus)
            return expected([own], request), request
        cluster.patience = request.patience
        machines = [
            Machine(
                cpus=node.cpus,
                gpus=node.gpus,
                memory=node.memory,
                gpu_memory=sized(node.kind, here) if node.gpus else None,
                kind=node.kind,
            )
            for node in self._joined.enter_context(cluster).machines()
        ]
        return expected(machines, request), request

    @contextmanager
    def running(self) -> Iterator[None]:
        self.cluster.env |= WORKER_ENV
        if not self.cluster.address:
            self._joined.enter_context(self.cluster)
        with self._joined:
            yield

    def wait_until_ready(self) -> None:
        self.cluster.total()

    def run(self, planned: Sequence[Planned], study: RunningStudy) -> None:
        allocations = filter(None, (entry.allocation for entry in planned))
        counts = Counter(f"{allocation}, {allocation.loader}" for allocation in allocations)
        kinds = "; ".join(f"{count} on {kind}" for kind, count in counts.items())
        study.display.note(f"Ray has {self.cluster.total()}; of {len(planned)} trials {kinds} each")
        first_jobs = [min(self.trials[entry.trial.id].jobs.items()) for entry in planned]
        numbers = [number for number, _ in first_jobs]
        policy = TrialPolicy(dict(zip(numbers, planned, strict=True)), study, self.work)
        # A trial carries all that it needs; the jobs' own configs, a megabyte each, are not kept.
        jobs = [
            Job(number=number, overrides=overrides, config=self.config)
            for number, overrides in first_jobs
        ]
        with study.deferring_interrupts():
            if self.cluster.address:  # elsewhere the weights are here by now
                download_on_each_machine(
                    self.cluster,
                    [entry.trial for entry in planned],
                    gpus=any(entry.allocation and entry.allocation.gpus for entry in planned),
                    say=study.display.note,
                    tick=study.tick,
                )
            self.launcher.run(jobs, policy, cluster=self.cluster)


class Furthest:
    """Tells whether a trial got further than ever: on its way there it replays what is on disk."""

    def __init__(self) -> None:
        self.share = 0.0

    def __call__(self, event: Any) -> bool:
        from q3q.sweep.pace import share_done

        share = share_done(event) if isinstance(event, Progress) else 0.0
        further, self.share = share > self.share, max(share, self.share)
        return further


class TrialPolicy(JobPolicy):
    """q3q's decisions about its jobs: only trials, records and progress cross a process border."""

    def __init__(
        self, planned: Mapping[int, Planned], study: RunningStudy, work: TrialCall
    ) -> None:
        self.planned = dict(planned)
        self.allocations = {number: entry.allocation for number, entry in planned.items()}
        self.study = study
        self.work = work

    def task(self, job: Job, plain: Task) -> Task:
        planned = self.planned[job.number]
        assert planned.allocation is not None
        larger = None if planned.larger is None else self._task(planned, planned.larger)
        return replace(self._task(planned, planned.allocation), larger=larger)

    def _task(self, planned: Planned, allocation: Allocation) -> Task:
        trial = planned.trial
        placed = trial.placed(grant=allocation.grant())
        return Task(
            key=trial.id,
            call=partial(self.work, placed.to_json()),
            resources=Resources(
                cpus=allocation.cpus,
                gpus=allocation.gpus,
                memory=allocation.memory,
                ranks=allocation.ranks,
                kind=allocation.kind,
            ),
            furthers=Furthest(),
            near=trial.spec.model.files,
            makes=tuple(planned.makes),
            made=partial(_made, planned.makes),
        )

    def on_event(self, job: Job, event: Any) -> None:
        spec = self.planned[job.number].trial.spec
        if isinstance(event, Started):
            self.study.display.started(spec.id, self.study.name_of(spec))
        elif isinstance(event, Progress):
            self.study.progressed(spec, event)

    def on_tick(self) -> None:
        self.study.tick()

    def on_retry(self, job: Job, error: WorkerDiedError) -> None:
        planned, reason = self.planned[job.number], str(error)
        larger = planned.larger
        if isinstance(error, OutOfMemoryError) and larger is not None:
            self.allocations[job.number] = larger
            reason += f"; now with {larger}, {in_gb(larger.memory)} of memory, {larger.loader}"
        elif isinstance(error, GpuFailedError):
            allocation = self.allocations[job.number]
            # The rest of the GPU stays free, and Ray may give the trial that next.
            is_share = allocation is not None and allocation.is_share
            what, where = ("part of the GPU", "") if is_share else ("GPU", " on another")
            reason += f". That {what} gets no more trials of this sweep; this one runs again{where}"
        self.study.display.retried(planned.trial.id, reason)

    def on_outcome(self, job: Job, outcome: Outcome) -> JobReturn:
        planned = self.planned[job.number]
        if outcome.error is None:
            record = TrialRecord.from_json(outcome.value)
        else:
            reason = f"{outcome.error} ({outcome.attempts} attempts)"
            record = TrialRecord.failed(planned.trial, reason)
        self.study.study.fetch(planned.trial)
        record = with_plan(record, planned, self.allocations[job.number])
        record.save()  # again, if the worker could: its disk may not be ours
        self.study.finished(record, outcome.seconds)
        return job_return(job.overrides, record)


def job_return(overrides: Sequence[str], record: TrialRecord | None) -> JobReturn:
    """Return Hydra's view of a trial: its record, or the reason why there is none."""
    done = record is not None and record.completed
    return JobReturn(
        overrides=list(overrides),
        status=JobStatus.COMPLETED if done else JobStatus.FAILED,
        _return_value=record if done else Q3QError(record.reason if record else "not run"),
    )


def _made(makes: Mapping[str, str], event: Any) -> set[str]:
    """Name what a trial has made for others by the time that it reports this."""
    if not isinstance(event, Progress):
        return set()
    return {name for name, phase in makes.items() if is_over(phase, event)}

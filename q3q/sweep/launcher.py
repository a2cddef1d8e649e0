"""A Hydra launcher on Ray, for any Hydra task function.

What a project decides about its jobs enters as a JobPolicy.
"""

import copy
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from q3q.masking import masked
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Outcome, Report, Resources, Task, WorkerDiedError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a sweep.

    config: composed from the overrides, with its hydra node, job number included
    """

    number: int
    overrides: tuple[str, ...]
    config: DictConfig


class JobPolicy:
    """A project's decisions about its jobs. By default each runs as Hydra would run it."""

    def task(self, job: Job, plain: Task) -> Task:
        """Return what to run for the job.

        `plain` calls Hydra's task function and ends with its JobReturn.
        """
        return plain

    def on_event(self, job: Job, event: Any) -> None:
        """Take note that the job started (again), or of what its task reported."""

    def on_tick(self) -> None:
        """Do something about once a second while jobs run; what this raises ends them."""

    def on_retry(self, job: Job, error: WorkerDiedError) -> None:
        log.warning(f"\t#{job.number} : runs again, {error}")

    def on_outcome(self, job: Job, outcome: Outcome) -> JobReturn:
        """Return what the sweeper receives for a job that ended."""
        return outcome.value if outcome.error is None else failed_return(job, outcome.error)


class RayLauncher(Launcher):
    """Runs jobs in parallel on Ray, each on its own reserved CPUs and GPUs.

    A job that fails, or whose process dies even when it is retried, is a FAILED JobReturn and costs
    no other job.

    Args:
        address: `host:port` or `auto` of a running Ray cluster; None starts one on this machine for
            the launch.
        cpus, gpus: what a cluster on this machine may hand out; with None, the cores that this
            process may use, and the GPUs that Ray counts.
        cpus_per_job, gpus_per_job: what each job reserves; may be fractions.
        retries: how often a job runs again if its process or machine died.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        cpus: int | None = None,
        gpus: int | None = None,
        cpus_per_job: float = 1.0,
        gpus_per_job: float = 0.0,
        retries: int = 1,
    ) -> None:
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self.resources_per_job = Resources(cpus=cpus_per_job, gpus=gpus_per_job)
        self.retries = retries

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def cluster(self) -> Cluster:
        """Return the cluster that the launcher's configuration asks for, not started yet."""
        env = {
            name: os.environ[name] for name in self.config.hydra.job.env_copy if name in os.environ
        }
        return Cluster(address=self.address, cpus=self.cpus, gpus=self.gpus, env=env)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log.info(f"Launching {len(job_overrides)} jobs on Ray")
        with self.cluster() as cluster:  # starts while the jobs are composed
            jobs = [
                self.compose(list(overrides), initial_job_idx + i)
                for i, overrides in enumerate(job_overrides)
            ]
            return self.run(jobs, cluster=cluster)

    def compose(self, overrides: list[str], number: int) -> Job:
        log.info(f"\t#{number} : {masked(' '.join(filter_overrides(overrides)))}")
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
        return Job(number=number, overrides=tuple(overrides), config=config)

    def run(
        self, jobs: Sequence[Job], policy: JobPolicy | None = None, cluster: Cluster | None = None
    ) -> list[JobReturn]:
        """Run composed jobs; return in the jobs' order, whatever the order in which they end.

        Args:
            cluster: a started one, which is left running; None starts one for this call.
        """
        policy = policy or JobPolicy()
        singletons = Singleton.get_state()
        job_of_task: dict[str, Job] = {}
        tasks = []
        for job in jobs:
            call = _HydraJob(self.task_function, self.hydra_context, singletons, job.config)
            plain = Task(
                key=f"job {job.number}",
                call=call,
                resources=self.resources_per_job,
                retries=self.retries,
            )
            tasks.append(policy.task(job, plain))
            job_of_task[tasks[-1].key] = job
        returns: dict[str, JobReturn] = {}
        with ExitStack() as stack:
            cluster = cluster or stack.enter_context(self.cluster())
            outcomes = cluster.run(
                tasks,
                on_event=lambda key, event: policy.on_event(job_of_task[key], event),
                on_retry=lambda key, error: policy.on_retry(job_of_task[key], error),
                on_tick=policy.on_tick,
            )
            for outcome in stack.enter_context(closing(outcomes)):
                returns[outcome.key] = policy.on_outcome(job_of_task[outcome.key], outcome)
        return [returns[task.key] for task in tasks]


def failed_return(job: Job, error: BaseException) -> JobReturn:
    """Return a JobReturn whose `return_value` raises `error`, with which the job ended."""
    config = copy.deepcopy(job.config)
    hydra_config = OmegaConf.masked_copy(config, "hydra")
    with read_write(config), open_dict(config):
        del config["hydra"]
    return JobReturn(
        overrides=list(hydra_config.hydra.overrides.task),
        cfg=config,
        hydra_cfg=hydra_config,
        task_name=hydra_config.hydra.job.name,
        status=JobStatus.FAILED,
        _return_value=error,
    )


@dataclass(frozen=True)
class _HydraJob:
    """Runs one job in a worker as Hydra's own launcher would run it in the driver."""

    task_function: TaskFunction
    hydra_context: HydraContext
    singletons: Any
    config: DictConfig

    def __call__(self, report: Report) -> JobReturn:
        setup_globals()
        Singleton.set_state(self.singletons)
        job_return = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=self.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        # This raises the task function's own exception, so that the driver receives it.
        _ = job_return.return_value
        return job_return

"""A Hydra Sweeper for studies: overrides become jobs, jobs become trial specs, each spec runs once.

Every job is composed once and validated before anything starts. Equal jobs run once, each with its JobReturn; pairs of
values that make no sense together are left out and counted; what is done already is not run again.
"""

import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from q3q.attempt import afresh
from q3q.config.model import facts_of
from q3q.config.resolve import spec_from
from q3q.environment import now
from q3q.errors import ConfigError
from q3q.storage.mirror import refreshed
from q3q.sweep.costs import CostModel
from q3q.sweep.grid import (
    OneSetting,
    SweepTrial,
    choices_of,
    narrowed,
    refuse_contradictions,
    replaced,
    trials_of,
    unquantized,
)
from q3q.sweep.launcher import Job, RayLauncher
from q3q.sweep.machines import Machine, ResourceRequest, expected, machine_here, request_of, sized
from q3q.sweep.on_ray import WORKER_ENV, Work, job_return, run_on_ray, work
from q3q.sweep.plan import Planned, describe, plan
from q3q.sweep.progress import counted
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.run import RunningStudy, finished_records, quantized_again, running_study
from q3q.sweep.study import facts_of_spec, recent_records, sole_driver

if TYPE_CHECKING:
    pass


@dataclass
class StudySweeperConf:
    """For saved studies. params: sweep values by key, of all rows. rows: each sweeps some keys of its own; together
    they are the study. Its values can be narrowed on the command line, not replaced (`narrowed`)."""

    _target_: str = "hydra_plugins.q3q.StudySweeper"
    params: dict[str, str] | None = None
    rows: list[dict[str, str]] | None = None


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
        trials, left_out = trials_of(jobs)
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
        finished = {} if settings.fresh else finished_records(trials)
        with ExitStack() as stack:
            wishes = request_of(settings.cluster.get)
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
            number: job_return(overrides, records.get(key))
            for key in asked
            for number, overrides in trials[key].jobs.items()
        }
        return [[by_number[number] for number in sorted(by_number)]]

    def _machines(
        self, stack: ExitStack, settings: DictConfig, wishes: ResourceRequest
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
            overrides for row in combined for overrides in itertools.product(*map(choices_of, row))
        ]
        for number, overrides in enumerate(counted(jobs, len(jobs), "composing", "jobs")):
            config = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            yield Job(number=number, overrides=tuple(overrides), config=config)

    def _baselines(self, trials: dict[str, "SweepTrial"]) -> dict[str, "SweepTrial"]:
        """The trials of the unquantized model that these are compared with, as far as they are not among them."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader, added = self.hydra_context.config_loader, dict[str, SweepTrial]()
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
            added[baseline] = SweepTrial(
                spec, facts_of(config), {-1 - len(added): tuple(overrides)}
            )  # nobody's job
        return added

    def _launcher(
        self, stack: ExitStack, settings: DictConfig, cluster: Cluster | None
    ) -> tuple[
        Callable[[], object],
        Callable[[Sequence[tuple["SweepTrial", Planned]], "RunningStudy"], None],
    ]:
        """What waits for a cluster, which starts in the background and lives as long as `stack`; what runs trials."""
        launcher = self.launcher
        assert launcher is not None
        if isinstance(launcher, RayLauncher) and cluster is not None:
            cluster.env |= WORKER_ENV
            if not cluster.address:
                stack.enter_context(cluster)
            return cluster.total, partial(run_on_ray, launcher, cluster, settings, self.trial)

        def launch(trials: Sequence[tuple[SweepTrial, Planned]], study: RunningStudy) -> None:
            # Another launcher was asked for: it composes and runs Hydra's way, and the task function returns records.
            jobs = [list(next(iter(mine.jobs.values()))) for mine, _ in trials]
            for done in launcher.launch(jobs, initial_job_idx=0):
                study.finished(done.return_value)

        return lambda: None, launch

"""A Hydra Sweeper for studies: overrides become jobs, jobs become trials, each trial runs once.

Every job is composed once and validated before anything starts. Equal jobs run once, each with its
JobReturn; pairs of values that make no sense together are left out and counted; what is done is
not run again.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from q3q.config.arguments import as_typed
from q3q.config.composing import Composer
from q3q.config.judged import original_job
from q3q.config.model import facts_of
from q3q.config.needs import AnyNeed, everything_unavailable, fetching, to_download, union
from q3q.config.noise_floor import floor_job, floor_of
from q3q.config.resolve import trial_from
from q3q.config.unread import without_effect
from q3q.errors import ConfigError, UnavailableError
from q3q.quoting import launch
from q3q.sweep.grid import (
    OneSetting,
    SweepTrial,
    trials_of,
    unquantized,
)
from q3q.sweep.jobs import composed_jobs, noting_needs
from q3q.sweep.launcher import Job, RayLauncher
from q3q.sweep.machines import Machine, ResourceRequest, expected, machine_here
from q3q.sweep.on_ray import OnRay, TrialCall, job_return, work
from q3q.sweep.plan import Planned
from q3q.sweep.run import Host, run_study
from q3q.sweep.running import RunningStudy
from q3q.sweep.settings import StudySettings


@dataclass
class StudySweeperConf:
    """A saved study's part of the config.

    params: sweep values by key, of all rows
    rows: each sweeps some keys of its own; together they are the study. The command line can
        narrow a study's values, not replace them (`grid.narrowed`)
    """

    _target_: str = "hydra_plugins.q3q.StudySweeper"
    params: dict[str, str] | None = None
    rows: list[dict[str, str]] | None = None


class StudySweeper(Sweeper):
    """See the module's first lines.

    trial: what a worker does for a trial.
    """

    trial: TrialCall = staticmethod(work)

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
            ConfigError: an invalid value; nothing has started.
            SweepFailedError: it ended, and some trials failed.
        """
        typed, needs = as_typed(arguments), dict[AnyNeed, None]()
        composed = noting_needs(self._jobs(arguments), needs)
        jobs, fetch = OneSetting(composed), fetching(typed, sweep=True)
        try:
            trials, left_out = trials_of(jobs)
        except UnavailableError as error:
            for _ in composed:  # what the other jobs need
                pass
            raise everything_unavailable(union(needs), error, fetch) from error
        jobs.refuse_many()
        if left_out:
            print(left_out)
        specs = [entry.trial.spec for entry in trials.values()]
        notes = without_effect(OverridesParser.create().parse_overrides(typed), specs)
        requested, baselines = set(trials), self._baselines(trials)
        trials |= baselines
        measured = bool(jobs.config.evaluation.floor)
        trials |= (floors := self._floors(trials, len(baselines), measured=measured))
        if baselines:
            models = ", ".join(str(entry.trial.spec.model.name) for entry in baselines.values())
            print(
                f"method=none of {models} is added, to compare with; evaluation.baseline=false "
                "leaves it out"
            )
        for entry in floors.values():
            model = entry.trial.spec.model
            # A judged checkpoint's floor stands beside its original; any other stands alone.
            judged = entry.trial.placement.baseline is not None
            setting = "evaluation.baseline" if judged else "evaluation.floor"
            print(
                f"{model.name} in {model.dtype} is added, to see what rounding alone costs; "
                f"{setting}=false leaves it out"
            )
        settings = StudySettings.of(jobs.config)
        absent = to_download(union(needs), fetch) if settings.plan_only else ""
        with self._host(jobs.config, trials) as host:
            records = run_study(
                [entry.trial for entry in trials.values()],
                {key: entry.facts for key, entry in trials.items()},
                replace(settings, notes=tuple(notes), absent=absent),
                launch(typed, sweep=True),
                host,
            )
        if records is None:
            return []
        by_number = {
            number: job_return(overrides, records.get(key))
            for key in requested
            for number, overrides in trials[key].jobs.items()
        }
        return [[by_number[number] for number in sorted(by_number)]]

    def _host(
        self, config: DictConfig, trials: dict[str, SweepTrial]
    ) -> AbstractContextManager[Host]:
        assert self.launcher is not None
        if isinstance(self.launcher, RayLauncher):
            return OnRay(self.launcher, config, trials, self.trial)
        return nullcontext(_OnOtherLauncher(self.launcher, trials))

    def _jobs(self, arguments: Sequence[str]) -> Iterator[Job]:
        """Compose every combination of the overrides' values."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return composed_jobs(loader, self.config, self.params, self.rows, arguments)

    def _baselines(self, trials: dict[str, SweepTrial]) -> dict[str, SweepTrial]:
        """Return the unquantized models' trials that these are compared with and do not have."""
        assert self.config is not None
        assert self.hydra_context is not None
        composer = Composer(self.hydra_context.config_loader, self.config)
        added = dict[str, SweepTrial]()
        for entry in trials.values():
            baseline = entry.trial.placement.baseline
            if baseline is None or baseline in trials or baseline in added:
                continue
            overrides = unquantized(next(iter(entry.jobs.values())))
            if entry.trial.spec.reference is not None:
                overrides = original_job(overrides)
            config = composer.compose(overrides)
            trial = trial_from(config)
            if trial.id != baseline:
                raise ConfigError(
                    f"the baseline of {entry.trial.spec.name} cannot be made from this command "
                    f"({' '.join(overrides)}): run method=none by itself, and this with "
                    "evaluation.baseline=false"
                )
            # A negative number: no job of the user's means it.
            jobs = {-1 - len(added): tuple(overrides)}
            added[baseline] = SweepTrial(trial, facts_of(config), jobs)
        return added

    def _floors(
        self, trials: dict[str, SweepTrial], added: int, *, measured: bool
    ) -> dict[str, SweepTrial]:
        """Return the trials that measure noise floors, which are not there.

        Args:
            added: number of other trials that were added.
            measured: of all trials; otherwise of judged checkpoints alone.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        composer = Composer(self.hydra_context.config_loader, self.config)
        floors = dict[str, SweepTrial]()
        for entry in trials.values():
            judged = entry.trial.spec.reference is not None
            compared = entry.trial.placement.baseline is not None
            floor = floor_of(entry.trial) if (compared if judged else measured) else None
            if floor is None or floor.id in trials or floor.id in floors:
                continue
            overrides = floor_job(unquantized(next(iter(entry.jobs.values()))), floor)
            config = composer.compose(overrides)
            trial = trial_from(config)
            if trial.id != floor.id:
                setting = "evaluation.baseline" if judged else "evaluation.floor"
                raise ConfigError(
                    f"the noise floor of {entry.trial.spec.name} cannot be made from this command "
                    f"({' '.join(overrides)}): give {setting}=false"
                )
            jobs = {-1 - added - len(floors): tuple(overrides)}
            floors[floor.id] = SweepTrial(trial, facts_of(config), jobs)
        return floors


class _OnOtherLauncher(Host):
    """Another Hydra launcher: it composes and runs Hydra's way, and the task returns records."""

    def __init__(self, launcher: Launcher, trials: dict[str, SweepTrial]) -> None:
        self.launcher, self.trials = launcher, trials

    def machines(self, request: ResourceRequest) -> tuple[list[Machine], ResourceRequest]:
        return expected([machine_here(request)], request), request

    def run(self, planned: Sequence[Planned], study: RunningStudy) -> None:
        jobs = [list(next(iter(self.trials[entry.trial.id].jobs.values()))) for entry in planned]
        for done in self.launcher.launch(jobs, initial_job_idx=0):
            study.finished(done.return_value)

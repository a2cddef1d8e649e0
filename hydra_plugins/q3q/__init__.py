"""q3q's Hydra plugins, where Hydra looks for plugins; the code is in q3q.sweep."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from q3q.sweep import launcher, sweeper


class RayLauncher(launcher.RayLauncher):
    """`hydra/launcher=q3q_ray`."""


@dataclass
class RayLauncherConf:
    _target_: str = "hydra_plugins.q3q.RayLauncher"
    address: str | None = None
    cpus: int | None = None
    gpus: int | None = None
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0
    retries: int = 1


class StudySweeper(sweeper.StudySweeper):
    """`hydra/sweeper=q3q`."""


ConfigStore.instance().store(
    group="hydra/sweeper", name="q3q", node=sweeper.StudySweeperConf, provider="q3q"
)
ConfigStore.instance().store(
    group="hydra/launcher", name="q3q_ray", node=RayLauncherConf, provider="q3q"
)

"""Configs and trials for tests, as Hydra composes them, each combination of pages once."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from q3q.config.composing import Composer
from q3q.config.resolve import trial_from
from q3q.config.schema import register
from q3q.placement import Trial

CONF = Path(__file__).parent.parent / "conf"


@cache
def _composer() -> Composer:
    register()
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        sweep = loader.load_configuration("config", [], RunMode.MULTIRUN)
    GlobalHydra.instance().hydra = before
    return Composer(loader, sweep)


def compose(name: str, words: Sequence[str]) -> DictConfig:
    """Return what `hydra.compose` returns."""
    assert name == "config"
    config = _composer().compose(list(words))
    with open_dict(config):
        del config["hydra"]
    return config


def composed_trial(*words: str) -> Trial:
    """Return the trial that a command line's words make."""
    return trial_from(compose("config", words))

"""Compose a sweep's jobs as Hydra does, but choose the same pages only once.

Most of Hydra's time goes into the defaults list and the merging of its pages, and the jobs of a
sweep differ in few pages and in many single settings.
"""

import copy
import functools
from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


class Composer:
    """Composes jobs: Hydra composes each combination of pages, and settings change a copy of that.

    Hydra composes a job with an override of another kind (`+key`, `~key`, `group@package`,
    `hydra.`), and a job with an error, so that the message is Hydra's. The results equal Hydra's
    own composition (tested).

    Args:
        sweep: the sweep's own config, with the overrides of Hydra itself.
    """

    def __init__(self, loader: ConfigLoader, sweep: DictConfig) -> None:
        self._loader, self._sweep = loader, sweep
        self._parsed = functools.cache(OverridesParser.create().parse_override)
        self._of_pages = functools.cache(self._as_hydra_does)
        self._is_group = functools.cache(self._has_pages)

    def compose(self, words: Sequence[str]) -> DictConfig:
        """Return what `ConfigLoader.load_sweep_config` returns for these overrides.

        Raises:
            HydraException: an override is wrong.
        """
        try:
            overrides = [self._parsed(word) for word in words]
        except HydraException:
            return self._as_hydra_does(words)
        pages = tuple(
            word for word, override in zip(words, overrides, strict=True) if self._is_page(override)
        )
        settings = [override for override in overrides if not self._is_page(override)]
        if not all(map(self._is_setting, settings)):
            return self._as_hydra_does(words)
        config = copy.deepcopy(self._of_pages(pages))
        try:
            for override in settings:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self._as_hydra_does(words)
        # Where Hydra keeps the words themselves; those of Hydra's own overrides are there already.
        own = [
            str(override.input_line) for override in overrides if not override.is_hydra_override()
        ]
        names = config.hydra.job.config.override_dirname
        shown = sorted(
            str(override.input_line)
            for override in overrides
            if not override.is_hydra_override() and override.key_or_group not in names.exclude_keys
        )
        with open_dict(config.hydra):
            config.hydra.overrides.task = own
            config.hydra.job.override_dirname = names.item_sep.join(shown).replace(
                "=", names.kv_sep
            )
        return config

    def _as_hydra_does(self, words: Sequence[str]) -> DictConfig:
        return self._loader.load_sweep_config(self._sweep, list(words))

    def _has_pages(self, key: str) -> bool:
        return bool(self._loader.get_group_options(key, results_filter=None))

    def _is_page(self, override: Override) -> bool:
        """Return True if an override chooses a page, which changes the defaults list alone."""
        return (
            override.type in (OverrideType.CHANGE, OverrideType.ADD)
            and override.package is None
            and isinstance(override.value(), str)
            and not override.is_hydra_override()
            and self._is_group(override.key_or_group)
        )

    def _is_setting(self, override: Override) -> bool:
        return (
            override.type is OverrideType.CHANGE
            and override.package is None
            and not override.is_sweep_override()
            and not override.is_hydra_override()
            and not self._is_group(override.key_or_group)
        )

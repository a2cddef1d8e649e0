"""Compose a command line's jobs: every combination of its values, in each row of its study."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from q3q.config.arguments import as_typed
from q3q.config.composing import Composer
from q3q.config.needs import AnyNeed, needs_of
from q3q.sweep.grid import choices_of, for_own_methods, narrowed, refuse_contradictions, replaced
from q3q.sweep.launcher import Job
from q3q.sweep.progress import counted


def composed_jobs(
    loader: ConfigLoader,
    config: DictConfig,
    params: Mapping[str, str],
    rows: Sequence[Mapping[str, str]],
    arguments: Sequence[str],
) -> Iterator[Job]:
    """Yield a composed job for each combination of the overrides' values.

    Args:
        params, rows: a saved study's; see `sweeper.StudySweeperConf`.
        arguments: the command line's overrides.

    Raises:
        ConfigError: the overrides contradict each other, or the study.
    """
    parser = OverridesParser.create(config_loader=loader)
    overrides = parser.parse_overrides(as_typed(arguments))
    refuse_contradictions(overrides)
    swept = [
        parser.parse_overrides([f"{key}={value}" for key, value in row.items()])
        for row in ({**params, **row} for row in rows)
    ]
    study = OmegaConf.select(config, "hydra.runtime.choices.study")
    if study:
        # Overrides of Hydra itself do not come with the arguments; the rows are its sweeper's.
        of_hydra = parser.parse_overrides(list(config.hydra.overrides.hydra))
        swept = narrowed(str(study), swept, overrides, of_hydra)
    else:
        swept = [replaced(row, overrides) for row in swept]
    jobs = [job for row in swept for job in itertools.product(*map(choices_of, row))]
    default = str(OmegaConf.select(config, "hydra.runtime.choices.method"))
    jobs = for_own_methods(jobs, default, overrides)
    composer = Composer(loader, config)
    for number, job in enumerate(counted(jobs, len(jobs), "composing", "jobs")):
        made = composer.compose(job)
        with open_dict(made):
            made.hydra.job.id = made.hydra.job.num = number
        yield Job(number=number, overrides=tuple(job), config=made)


def noting_needs(jobs: Iterator[Job], needs: dict[AnyNeed, None]) -> Iterator[Job]:
    """Pass jobs on, and note what each needs from the Hub after it was resolved or refused."""
    for job in jobs:
        yield job
        needs |= dict.fromkeys(needs_of(job.config))

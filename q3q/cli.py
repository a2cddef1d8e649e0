"""What launch.py does beyond Hydra: one trial without a sweep, and errors as one line and an exit code."""

import dataclasses
import errno
import re
import shlex
import sys
import traceback
from functools import partial
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from q3q.config.model import facts_of
from q3q.config.resolve import spec_from
from q3q.config.schema import Config, nearest
from q3q.errors import ConfigError, Q3QError, SweepFailedError
from q3q.masking import masked

if TYPE_CHECKING:
    from q3q.sweep.machines import ResourceRequest

FAILED, MISUSED = 1, 2  # exit codes: something went wrong while running; nothing was started
UNUSABLE = (
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
)  # of a folder, or a file in its place


def run_alone(config: DictConfig) -> object:
    """One trial, in this process: what `python launch.py` does without -m."""
    from q3q.attempt import afresh, finished_record
    from q3q.environment import now
    from q3q.storage.mirror import refreshed
    from q3q.sweep.comparing import baseline_record
    from q3q.sweep.costs import CostModel
    from q3q.sweep.grid import refuse_contradictions
    from q3q.sweep.machines import expected, machine_here, request_of
    from q3q.sweep.on_ray import with_plan
    from q3q.sweep.plan import describe, plan
    from q3q.sweep.ray.worker import keep_to
    from q3q.sweep.run import running_study
    from q3q.sweep.study import facts_of_spec, recent_records, sole_driver

    overrides = list(HydraConfig.get().overrides.task)
    study = HydraConfig.get().runtime.choices.get("study")
    if study:
        raise ConfigError(
            f"study={study} is a sweep, give -m: python launch.py -m {shlex.join(overrides)}"
        )
    refuse_contradictions(OverridesParser.create().parse_overrides(overrides))
    spec, wishes = spec_from(config), request_of(config.cluster.get)
    _refuse_many(config, wishes, overrides)
    storage = refreshed(config.storage)
    done = None if config.fresh else finished_record(spec)
    finished = {} if done is None else {spec.id: done}
    here = machine_here()  # all its cores, and of its GPUs the first
    wishes = dataclasses.replace(wishes, cpus=wishes.cpus or here.cpus)
    machines = expected([dataclasses.replace(here, gpus=min(here.gpus, 1))], wishes)
    costs = CostModel().learned(recent_records(storage), facts_of_spec)
    [planned] = plan(
        [spec], finished, {spec.id: facts_of(config)}, machines=machines, wishes=wishes, model=costs
    )
    if config.plan:
        print(describe([planned], machines=machines, where="this process", storage=config.storage))
        return None
    if config.fresh:
        spec = afresh(spec, now())
    command = "python launch.py " + shlex.join(overrides)
    with (
        sole_driver([spec], config.storage, partial(print, file=sys.stderr)),
        running_study(config, [spec], command, finished) as study,
    ):
        if "baseline" in spec.places and baseline_record(spec, {}) is None:
            study.display.note(
                "Nothing to compare with yet: run the same with method=none once, then this again (it only compares)"
            )
        if done is None:
            from q3q.trial import attempt_trial

            assert planned.share is not None
            keep_to(planned.share.cpus, planned.share.gpus)
            study.display.started(spec.id, f"{spec.name} · {spec.model['name']}")
            told = spec.with_places({**spec.places, "share": planned.share.to_places()})
            record = with_plan(attempt_trial(told, partial(study.heard, spec)), planned)
            record.save()
            study.finished(record)
    return study.records[spec.id]


def _refuse_many(config: DictConfig, wishes: "ResourceRequest", overrides: list[str]) -> None:
    """What only a sweep has: other machines, and several processes for a trial."""
    asked = {
        f"cluster={config.cluster.name}": config.cluster.address is not None,
        f"cluster.ranks_per_trial={wishes.ranks}": (wishes.ranks or 1) > 1,
        f"cluster.gpus_per_trial={wishes.gpus:g}" if wishes.gpus else "": (wishes.gpus or 0) > 1,
    }
    if several := next((word for word, given in asked.items() if given), None):
        raise ConfigError(
            f"{several} is for sweeps, and without -m one process does it all here: "
            f"python launch.py -m {shlex.join(overrides)}"
        )


def explain(error: Exception) -> int:
    """Say in one line what is wrong and what to do; the exit code. A bug of ours keeps its traceback."""
    if isinstance(error, SweepFailedError):
        print(f"q3q: {masked(str(error))}", file=sys.stderr)
        return FAILED
    if isinstance(error, Q3QError):
        print(f"q3q: {masked(str(error))}", file=sys.stderr)
        return MISUSED if isinstance(error, ConfigError) else FAILED
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        print(f"q3q: {masked(_hydra_line(error))}", file=sys.stderr)
        return MISUSED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"q3q: the disk is full{where}: free some space, and the same command goes on",
            file=sys.stderr,
        )
        return FAILED
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename:
        print(
            f"q3q: {error.filename}: {error.strerror}. storage= must be a folder that can be made and written here, "
            "or an object store's URL; other files must be readable",
            file=sys.stderr,
        )
        return MISUSED
    print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return FAILED


def _hydra_line(error: Exception) -> str:
    """Hydra's and OmegaConf's own errors, whose messages run over several lines, in one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options if not option.startswith("_")]
        return (
            f"{group}={name} is not known{nearest(name, options)}Choose from: {', '.join(options)}"
        )
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    lines = [
        line.strip() for line in str(error if key is None else cause).splitlines() if line.strip()
    ]
    unknown = re.search(r"Key '(\w+)' (?:is )?not in", " ".join([*lines, str(error.__cause__)]))
    if unknown:
        owner = getattr(cause, "object_type", None)
        known = [
            field.name
            for field in dataclasses.fields(owner if dataclasses.is_dataclass(owner) else Config)
        ]
        return f"{key or unknown[1]} is not a setting{nearest(unknown[1], known)}See python launch.py --help"
    return f"{key}: {lines[0]}" if key and lines else " ".join(lines[:3])

"""launch.py beyond Hydra: one trial without a sweep, and errors as one line and an exit code."""

import dataclasses
import errno
import re
import shlex
import sys
import traceback

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from q3q.config.model import facts_of
from q3q.config.resolve import trial_from
from q3q.config.schema import Config, nearest
from q3q.errors import EXIT_FAILED, EXIT_MISUSED, ConfigError, Q3QError
from q3q.masking import masked
from q3q.sweep.machines import ResourceRequest

# Errors of a folder that cannot be used, or of a file in its place.
UNUSABLE = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS)


def run_alone(config: DictConfig) -> object:
    """Run one trial in this process: `python launch.py` without -m."""
    from q3q.sweep.grid import refuse_contradictions
    from q3q.sweep.in_process import InProcess
    from q3q.sweep.run import StudySettings, run_study

    overrides = list(HydraConfig.get().overrides.task)
    study = HydraConfig.get().runtime.choices.get("study")
    if study:
        raise ConfigError(
            f"study={study} is a sweep, give -m: python launch.py -m {shlex.join(overrides)}"
        )
    refuse_contradictions(OverridesParser.create().parse_overrides(overrides))
    trial, settings = trial_from(config), StudySettings.of(config)
    _refuse_many(config, settings.request, overrides)
    command = "python launch.py " + shlex.join(overrides)
    facts = {trial.id: facts_of(config)}
    records = run_study([trial], facts, settings, command, InProcess())
    return None if records is None else records[trial.id]


def _refuse_many(config: DictConfig, request: ResourceRequest, overrides: list[str]) -> None:
    """Refuse what only a sweep has: other machines, and several processes for a trial."""
    only_in_sweeps = {
        f"cluster={config.cluster.name}": config.cluster.address is not None,
        f"cluster.ranks_per_trial={request.ranks}": (request.ranks or 1) > 1,
        f"cluster.gpus_per_trial={request.gpus:g}" if request.gpus else "": (request.gpus or 0) > 1,
    }
    if setting := next((words for words, applies in only_in_sweeps.items() if applies), None):
        raise ConfigError(
            f"{setting} is for sweeps, and without -m one process does it all here: "
            f"python launch.py -m {shlex.join(overrides)}"
        )


def explain(error: Exception) -> int:
    """Print one line that says what is wrong and what to do; return the exit code.

    A bug of ours keeps its traceback.
    """
    code = EXIT_MISUSED
    if isinstance(error, Q3QError):
        line, code = str(error), EXIT_MISUSED if isinstance(error, ConfigError) else EXIT_FAILED
    elif isinstance(error, (HydraException, OmegaConfBaseException)):
        line = _hydra_line(error)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where, code = f" ({error.filename})" if error.filename else "", EXIT_FAILED
        line = f"the disk is full{where}: free some space, and the same command goes on"
    elif isinstance(error, OSError) and error.errno in UNUSABLE and error.filename:
        line = (
            f"{error.filename}: {error.strerror}. storage= must be a folder that can be made and "
            "written here, or an object store's URL; other files must be readable"
        )
    else:
        print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        return EXIT_FAILED
    print(f"q3q: {masked(line)}", file=sys.stderr)
    return code


def _hydra_line(error: Exception) -> str:
    """Put an error of Hydra's or OmegaConf's, whose message has several lines, into one."""
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
        schema = owner if dataclasses.is_dataclass(owner) else Config
        names = [field.name for field in dataclasses.fields(schema)]
        return (
            f"{key or unknown[1]} is not a setting{nearest(unknown[1], names)}See python launch.py "
            "--help"
        )
    return f"{key}: {lines[0]}" if key and lines else " ".join(lines[:3])

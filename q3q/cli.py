"""launch.py beyond Hydra: one trial without a sweep, and errors as one line and an exit code."""

import errno
import os
import re
import select
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from q3q.attempt import finished_record
from q3q.config.known import not_a_setting
from q3q.config.model import facts_of
from q3q.config.needs import everything_unavailable, fetching, needs_of, to_download
from q3q.config.resolve import trial_from
from q3q.config.schema import nearest
from q3q.config.unread import without_effect
from q3q.errors import EXIT_FAILED, EXIT_MISUSED, ConfigError, Q3QError, UnavailableError
from q3q.evaluate.catalogue import OWN_TASKS, TASKS
from q3q.evaluate.names import task_names
from q3q.masking import masked
from q3q.placement import Trial
from q3q.quantize.methods.settings import MethodSettings
from q3q.quoting import launch
from q3q.sweep.machines import ResourceRequest

# Errors of a folder that cannot be used, or of a file in its place.
UNUSABLE = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS)
EVERY = ("all", "any", "every", "*")


def program_version() -> str:
    return f"q3q {version('q3q')}"


def run_alone(config: DictConfig) -> object:
    """Run one trial in this process: `python launch.py` without -m."""
    from q3q.sweep.grid import refuse_contradictions
    from q3q.sweep.in_process import InProcess
    from q3q.sweep.run import run_study
    from q3q.sweep.settings import StudySettings

    overrides = list(HydraConfig.get().overrides.task)
    alone = HydraConfig.get().mode == RunMode.RUN  # not a job of a sweep with another launcher
    study = HydraConfig.get().runtime.choices.get("study")
    if study and alone:
        raise ConfigError(f"study={study} is a sweep, give -m: {launch(overrides, sweep=True)}")
    typed = OverridesParser.create().parse_overrides(overrides)
    refuse_contradictions(typed)
    trial, settings = _trial(config, overrides), StudySettings.of(config)
    if settings.plan_only:
        absent = to_download(needs_of(config), fetching(overrides, sweep=False))
        settings = replace(settings, absent=absent)
    _refuse_many(config, settings.request, overrides)
    lines = without_effect(typed, [trial.spec]) if alone else []
    if config.evaluation.floor and alone:
        lines.append("evaluation.floor=true has no effect without -m: only sweeps add its trial")
    if not settings.fresh:
        lines += _without_effect_on_finished(trial, overrides)
    if not overrides:
        lines.append(
            f"no setting is given, so this runs one trial, {trial.spec.label}; python launch.py "
            "--help lists what can be set"
        )
    facts, settings = {trial.id: facts_of(config)}, replace(settings, notes=tuple(lines))
    records = run_study([trial], facts, settings, launch(overrides), InProcess())
    return None if records is None else records[trial.id]


def _trial(config: DictConfig, overrides: Sequence[str]) -> Trial:
    """Return the trial; where something is missing, name all that is."""
    try:
        return trial_from(config)
    except UnavailableError as error:
        fetch = fetching(overrides, sweep=False)
        raise everything_unavailable(needs_of(config), error, fetch) from error


def _without_effect_on_finished(trial: Trial, overrides: Sequence[str]) -> list[str]:
    """Name the settings of how a trial is run, if it is not run because it is finished."""
    words = [word for word in overrides if re.match(r"cluster[.=]|memory=|loader=", word)]
    if not words or finished_record(trial) is None:
        return []
    return [f"{shlex.join(words)}: no effect, the trial is finished already"]


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
            f"{launch(overrides, sweep=True)}"
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
    elif isinstance(error, BrokenPipeError) and _nobody_reads():
        return EXIT_FAILED
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where, code = f" ({error.filename})" if error.filename else "", EXIT_FAILED
        line = f"the disk is full{where}: free some space, and the same command continues"
    elif isinstance(error, OSError) and error.filename and _is_unusable(error):
        line = (
            f"{error.filename}: {error.strerror}. storage= must be a folder that can be made and "
            "written here, or an object store's URL; other files must be readable"
        )
    else:
        print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        return EXIT_FAILED
    print(f"q3q: {masked(line)}", file=sys.stderr)
    return code


def _is_unusable(error: OSError) -> bool:
    """Return True if a folder cannot be used. In some file systems none can be made: ENOENT."""
    if error.errno in UNUSABLE:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return error.errno == errno.ENOENT and frames[-1:] != [] and frames[-1].name == "mkdir"


def _nobody_reads() -> bool:
    """Return True if standard output is closed (after `| head`, say), and silence it."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(events & select.POLLERR for _, events in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _hydra_line(error: Exception) -> str:
    """Put an error of Hydra's or OmegaConf's, whose message has several lines, into one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _unknown_page(error.missing_cfg_file, error.options)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    lines = [
        line.strip() for line in str(error if key is None else cause).splitlines() if line.strip()
    ]
    unknown = re.search(r"Key '(\w+)' (?:is )?not in", " ".join([*lines, str(error.__cause__)]))
    if unknown:
        owner = getattr(cause, "object_type", None)
        method = None
        if isinstance(owner, type) and issubclass(owner, MethodSettings):
            method = owner().name
        return not_a_setting(key or unknown[1], method)
    return f"{key}: {lines[0]}" if key and lines else " ".join(lines[:3])


def _unknown_page(path: str, options: Sequence[str]) -> str:
    """Return a line about a page that conf/ does not have."""
    group, _, name = path.rpartition("/")
    options = [option for option in options if not option.startswith("_")]
    unknown, choices = f"{group}={name} is not known", f"Choose from: {', '.join(options)}"
    if name.lower() in EVERY:
        every = launch([f"{group}=glob(*)"], sweep=True)
        return f"{unknown}; for every {group}: {every}. {choices}"
    if group == "evaluation" and (name in TASKS or name in task_names([OWN_TASKS])):
        tasks = launch(["evaluation=tasks", f"evaluation.tasks=[{name}]"])
        return f"{unknown}; {name} is a task: {tasks}. {choices}"
    return f"{unknown}{nearest(name, options)}{choices}"

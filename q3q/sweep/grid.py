"""Compose a study's jobs: every combination of the overrides' values, as trials without repeats."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from q3q.config.arguments import KNOB
from q3q.config.known import methods
from q3q.config.model import facts_of
from q3q.config.resolve import trial_from
from q3q.errors import ConfigError, IncompatibleError
from q3q.export.destination import check_room, refuse_shared
from q3q.models.facts import ModelFacts
from q3q.placement import Trial
from q3q.sweep.launcher import Job

NOTHING_QUANTIZED = {
    **dict.fromkeys(
        (
            *("bits", "group_size", "group_rows", "symmetric", "act_bits", "act_format"),
            *("act_group_size", "act_scales", "head_bits", "embedding_bits"),
            *("kv_bits", "kv_format", "kv_scales", "kv_group_size", "kv_chunk"),
            *("kv_window", "kv_symmetric"),
        ),
        "null",
    ),
    "format": "int",
    "four_over_six": "false",
    "overrides": "{}",
    "skip": "null",
}
# How a trial is run changes none of its numbers; nor does adding the unquantized model.
RUN_SETTINGS = ("data", "memory", "loader")
SWEEP_SETTINGS = tuple(
    "cluster track storage name question expectation report plan fresh keep context".split()
)


@dataclass
class SweepTrial:
    """One trial of a sweep.

    facts: of its model
    jobs: overrides of every job that means this trial, by the job's number
    """

    trial: Trial
    facts: ModelFacts
    jobs: dict[int, tuple[str, ...]]


class OneSetting:
    """Pass jobs on, and check that sweep-wide settings are the same for all of them.

    config: the first job's. The others, a megabyte each, are not kept.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.jobs = jobs
        self.config: DictConfig = OmegaConf.create()
        self._values: dict[str, dict[str, None]] = {key: {} for key in SWEEP_SETTINGS}

    def __iter__(self) -> Iterator[Job]:
        for number, job in enumerate(self.jobs):
            self.config = self.config if number else job.config
            for key, values in self._values.items():
                values[str(OmegaConf.select(job.config, key))] = None
            yield job

    def refuse_many(self) -> None:
        """Raise ConfigError if there are several values of one setting."""
        for key, values in self._values.items():
            if len(values) > 1:
                raise ConfigError(
                    f"{key} is for the whole sweep, give it one value: {', '.join(sorted(values))}"
                )


def trials_of(jobs: Iterable[Job]) -> tuple[dict[str, SweepTrial], str]:
    """Return trials by id, in the jobs' order, and a line that counts the jobs left out, if any.

    Raises:
        ConfigError: a job has an invalid value, or no job is left.
    """
    trials: dict[str, SweepTrial] = {}
    incompatible: dict[str, int] = {}
    total = 0
    for job in jobs:
        total += 1
        try:
            trial = trial_from(job.config)
        except IncompatibleError as error:
            incompatible[str(error)] = incompatible.get(str(error), 0) + 1
            continue
        if trial.id not in trials:
            trials[trial.id] = SweepTrial(trial, facts_of(job.config), {})
        trials[trial.id].jobs[job.number] = job.overrides
    reasons = "; ".join(incompatible)
    if not trials:
        raise IncompatibleError(reasons or "the sweep has no jobs")
    refuse_shared(entry.trial for entry in trials.values())
    check_room((entry.trial, entry.facts) for entry in trials.values())
    count = sum(incompatible.values())
    return trials, f"{count} of {total} combinations left out: {reasons}" if count else ""


def unquantized(overrides: Sequence[str]) -> list[str]:
    """Return the same job's overrides, but for the unquantized model."""
    keys = ("method", "calibration", "export", "budget", *NOTHING_QUANTIZED)
    others = [
        override
        for override in overrides
        if override.lstrip("+~").partition("=")[0].partition(".")[0] not in keys
    ]
    nothing = (f"{key}={value}" for key, value in NOTHING_QUANTIZED.items())
    return [*others, "method=none", "export=none", *nothing]


def refuse_contradictions(overrides: Sequence[Override]) -> None:
    """Refuse two overrides of one key: whichever won, somebody would be surprised."""
    seen: dict[str, str] = {}
    for override in overrides:
        key, line = _key(override), str(override.input_line)
        if seen.setdefault(key, line) != line:
            raise ConfigError(f"{seen[key]} and {line} contradict each other: give {key} once")


def replaced(row: Sequence[Override], arguments: Sequence[Override]) -> list[Override]:
    """Return a row with the command line's values in place of its own."""
    keys = {override.get_key_element() for override in arguments}
    return [*(own for own in row if own.get_key_element() not in keys), *arguments]


def narrowed(
    study: str,
    rows: Sequence[Sequence[Override]],
    arguments: Sequence[Override],
    of_hydra: Sequence[Override] = (),
) -> list[list[Override]]:
    """Return the rows and values of a saved study that the command line leaves.

    A study is a question. One of its own values on the command line asks for that part of it;
    anything else would change what every row means under the study's name. With a name of its own
    (name=..., another than the study's) it is another study, and the command line wins.

    Args:
        of_hydra: overrides of Hydra itself, which are in force already.

    Raises:
        ConfigError: an override would change every row, or leaves none.
    """
    names = [override for override in arguments if _key(override) == "name"]
    if any(override.is_delete() or str(override.value()) != study for override in names):
        return [replaced(row, arguments) for row in rows]
    swept: dict[str, list[str]] = {}
    for row in rows:
        for key, values in _values(row).items():
            swept[key] = list(dict.fromkeys([*swept.get(key, []), *values]))
    for override in of_hydra:
        if not _leaves_rows_alone(_key(override)):
            raise ConfigError(_would_change_all(study, override, swept))
    left, others = list(map(list, rows)), []
    for override in arguments:
        key = _key(override)
        if key not in swept:
            if not _leaves_rows_alone(key):
                raise ConfigError(_would_change_all(study, override, swept))
            others.append(override)
            continue
        values = _values([override])[key]
        if any(value not in swept[key] for value in values):
            raise ConfigError(_would_change_all(study, override, swept))
        left = [row for row in (_narrowed_row(row, key, values) for row in left) if row]
    if not left:
        lines = " ".join(str(override.input_line) for override in arguments)
        raise ConfigError(f"study={study} has no row with all of {lines}")
    return [row + others for row in left]


def choices_of(override: Override) -> list[str]:
    """Return an override's values, each as an override of its own."""
    key = override.get_key_element()
    if override.is_delete():
        return [str(override.input_line)]
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise HydraException(
            f"{override.input_line}: give a list of values to sweep over, not an interval"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def for_own_methods(
    jobs: Sequence[tuple[str, ...]], default: str, arguments: Sequence[Override]
) -> list[tuple[str, ...]]:
    """Give each job the settings meant for its method alone, such as `method.gptq.damping`.

    Jobs that are equal without the settings of other methods are one.

    Args:
        default: the method of jobs that choose none.
        arguments: the command line's overrides.

    Raises:
        ConfigError: a setting is for a method that no job has, or a job has it twice.
    """
    chosen = [_method_of(job) or default for job in jobs]
    meant = [(override, _one_method(override.key_or_group)) for override in arguments]
    for override, method in meant:
        if method is not None and method not in chosen:
            raise ConfigError(
                f"{override.input_line}: no trial of this sweep is of method={method}"
            )
    if not any(method for _, method in meant):
        return list(jobs)
    return list(dict.fromkeys(map(_with_own_knobs, jobs, chosen)))


def _with_own_knobs(job: tuple[str, ...], chosen: str) -> tuple[str, ...]:
    own: list[str] = []
    for override in job:
        key, _, value = override.partition("=")
        method, knob = _one_method(key), key.rpartition(".")[2]
        if method is None:
            own.append(override)
        elif method == chosen:
            own.append(f"method.{knob}={value}")
    keys = [override.partition("=")[0].lstrip("+") for override in own]
    for key in keys:
        if key.startswith("method.") and keys.count(key) > 1:
            knob = key.removeprefix("method.")
            raise ConfigError(f"{key} and method.{chosen}.{knob} contradict each other: give one")
    return tuple(own)


def _method_of(job: Sequence[str]) -> str | None:
    values = [override.partition("=")[2] for override in job if override.startswith("method=")]
    return values[-1] if values else None


def _one_method(key: str) -> str | None:
    """Return the method that a key like `method.gptq.damping` is for; None for any other key."""
    knob = KNOB.fullmatch(key)
    return knob["method"] if knob is not None and knob["method"] in methods() else None


def _key(override: Override) -> str:
    return str(override.get_key_element().lstrip("+"))


def _values(row: Sequence[Override]) -> dict[str, list[str]]:
    return {
        _key(override): [choice.partition("=")[2] for choice in choices_of(override)]
        for override in row
    }


def _narrowed_row(row: list[Override], key: str, values: Sequence[str]) -> list[Override] | None:
    """Return the row with those of its values that are asked for; None if it has none of them."""
    left = [value for value in _values(row).get(key, []) if value in values]
    if not left:
        return None
    [narrow] = OverridesParser.create().parse_overrides([f"{key}={','.join(left)}"])
    return [narrow if override.get_key_element() == key else override for override in row]


def _leaves_rows_alone(key: str) -> bool:
    """Return True for an override that changes no row. `hydra.sweeper` is where the rows are."""
    if key.startswith("hydra.sweeper") or key == "hydra/sweeper":
        return False
    group = key.replace("/", ".").partition(".")[0]
    own = (*SWEEP_SETTINGS, *RUN_SETTINGS, "hydra")
    return key in ("study", "evaluation.baseline", "evaluation.floor") or group in own


def _would_change_all(study: str, override: Override, swept: Mapping[str, Sequence[str]]) -> str:
    key = _key(override)
    allowed = (
        f"the study has {key}={','.join(swept[key])}"
        if key in swept
        else f"it can be narrowed by {', '.join(swept)}"
    )
    return (
        f"{override.input_line} would change every row of study={study}: {allowed}. To change a "
        "study in any other way, give it another name: name=..."
    )

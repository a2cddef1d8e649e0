"""The jobs of a study: every combination of the overrides' values, narrowed and without contradictions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from q3q.config.model import facts_of
from q3q.config.resolve import spec_from
from q3q.errors import ConfigError, IncompatibleError
from q3q.export.destination import check_room, refuse_shared
from q3q.models.facts import ModelFacts
from q3q.spec import TrialSpec
from q3q.sweep.launcher import Job

if TYPE_CHECKING:
    pass

NOTHING_QUANTIZED = {
    **dict.fromkeys(
        ("bits", "group_size", "symmetric", "act_bits", "head_bits", "embedding_bits"), "null"
    ),
    "overrides": "{}",
    "skip": "[]",
}
# Where and how a trial is held changes none of its numbers; nor does whether the unquantized model is added.
PLACES = ("data", "memory", "loader")
SWEEP_SETTINGS = (
    "cluster",
    "track",
    "storage",
    "name",
    "question",
    "expectation",
    "plan",
    "fresh",
    "keep",
)


@dataclass
class SweepTrial:
    """One trial, its model's facts, and all the jobs that mean it: their overrides by number."""

    spec: TrialSpec
    facts: ModelFacts
    jobs: dict[int, tuple[str, ...]]


def unquantized(overrides: Sequence[str]) -> list[str]:
    """The same job's overrides, but for the unquantized model."""
    keys = ("method", "calibration", "export", *NOTHING_QUANTIZED)
    kept = [
        one for one in overrides if one.lstrip("+~").partition("=")[0].partition(".")[0] not in keys
    ]
    return [
        *kept,
        "method=none",
        "export=none",
        *(f"{key}={value}" for key, value in NOTHING_QUANTIZED.items()),
    ]


def refuse_contradictions(overrides: Sequence[Override]) -> None:
    """Two overrides of one key: whichever won, somebody would be surprised."""
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element().lstrip("+")
        if key in seen and seen[key] != override.input_line:
            raise ConfigError(
                f"{seen[key]} and {override.input_line} contradict each other: give {key} once"
            )
        seen[key] = str(override.input_line)


def replaced(row: Sequence[Override], given: Sequence[Override]) -> list[Override]:
    """A row with the command line's values in the place of its own."""
    named = {override.get_key_element() for override in given}
    return [override for override in row if override.get_key_element() not in named] + list(given)


def narrowed(
    study: str,
    rows: Sequence[Sequence[Override]],
    given: Sequence[Override],
    of_hydra: Sequence[Override] = (),
) -> list[list[Override]]:
    """The rows of a saved study that the command line leaves, with the values that it leaves.

    of_hydra: what it says of Hydra itself, which is in force already.

    A study is a question: one of its own values given on the command line asks for that part of it, anything else would
    change what every row means under the study's name. With a name of its own (name=..., another than the study's) it
    is another study, and the command line wins.

    Raises:
        ConfigError: an override would change every row, or leaves none.
    """
    named = [one for one in given if one.get_key_element().lstrip("+") == "name"]
    if any(one.is_delete() or str(one.value()) != study for one in named):
        return [replaced(row, given) for row in rows]
    swept = {key: values for row in rows for key, values in _values(row).items()}
    for row in rows:
        for key, values in _values(row).items():
            swept[key] = list(dict.fromkeys([*swept[key], *values]))
    for override in of_hydra:
        if not _may_be_said(override.get_key_element().lstrip("+")):
            raise ConfigError(_changes_all(study, override, swept))
    left = list(map(list, rows))
    others = []
    for override in given:
        key = override.get_key_element().lstrip("+")
        if key not in swept:
            if not _may_be_said(key):
                raise ConfigError(_changes_all(study, override, swept))
            others.append(override)
            continue
        wanted = _values([override])[key]
        strange = [value for value in wanted if value not in swept[key]]
        if strange:
            raise ConfigError(_changes_all(study, override, swept))
        left = [kept for row in left if (kept := _kept(row, key, wanted))]
    if not left:
        raise ConfigError(
            f"study={study} has no row with all of {' '.join(str(one.input_line) for one in given)}"
        )
    return [row + others for row in left]


def _kept(row: list[Override], key: str, wanted: Sequence[str]) -> list[Override] | None:
    """A row with those of its values that are wanted, None if it has none of them."""
    own = _values(row).get(key)
    left = [value for value in own or [] if value in wanted]
    if not left:
        return None
    [narrow] = OverridesParser.create().parse_overrides([f"{key}={','.join(left)}"])
    return [narrow if one.get_key_element() == key else one for one in row]


def _values(row: Sequence[Override]) -> dict[str, list[str]]:
    return {
        one.get_key_element().lstrip("+"): [choice.partition("=")[2] for choice in choices_of(one)]
        for one in row
    }


def _may_be_said(key: str) -> bool:
    """Whether an override leaves every row of a study what it means. `hydra.sweeper` is where the rows are."""
    if key.startswith("hydra.sweeper") or key == "hydra/sweeper":
        return False
    group = key.replace("/", ".").partition(".")[0]
    return key in ("study", "evaluation.baseline") or group in (*SWEEP_SETTINGS, *PLACES, "hydra")


def _changes_all(study: str, override: Override, swept: Mapping[str, Sequence[str]]) -> str:
    key = override.get_key_element().lstrip("+")
    may = (
        f"the study has {key}={','.join(swept[key])}"
        if key in swept
        else f"it can be narrowed by {', '.join(swept)}"
    )
    return (
        f"{override.input_line} would change every row of study={study}: {may}. "
        "Give it a name of its own (name=...) to ask another question with it"
    )


class OneSetting:
    """Passes jobs on, and sees that what belongs to the sweep and not to a trial is the same for all of them.

    config: the first one's. Only its own config is kept, the others are a megabyte each.
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
        """Raises ConfigError if there are several values of one."""
        for key, values in self._values.items():
            if len(values) > 1:
                raise ConfigError(
                    f"{key} is the whole sweep's, give it one value: {', '.join(sorted(values))}"
                )


def trials_of(jobs: Iterable[Job]) -> tuple[dict[str, SweepTrial], str]:
    """Jobs as trials by id, in the jobs' order, and a line that counts what was left out (or nothing).

    Raises:
        ConfigError: any job has an invalid value, or no job is left.
    """
    trials: dict[str, SweepTrial] = {}
    incompatible: dict[str, int] = {}
    number = 0
    for job in jobs:
        number += 1
        try:
            spec = spec_from(job.config)
        except IncompatibleError as error:
            incompatible[str(error)] = incompatible.get(str(error), 0) + 1
            continue
        if spec.id not in trials:
            trials[spec.id] = SweepTrial(spec, facts_of(job.config), {})
        trials[spec.id].jobs[job.number] = job.overrides
    reasons = "; ".join(incompatible)
    if not trials:
        raise IncompatibleError(reasons or "the sweep has no jobs")
    refuse_shared(trial.spec for trial in trials.values())
    check_room((trial.spec, trial.facts) for trial in trials.values())
    count = sum(incompatible.values())
    return trials, f"{count} of {number} combinations left out: {reasons}" if count else ""


def choices_of(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return (
            [f"{key}={override.get_value_element_as_str()}"]
            if not override.is_delete()
            else [str(override.input_line)]
        )
    if not override.is_discrete_sweep():
        raise HydraException(
            f"{override.input_line}: give a list of values to sweep over, not an interval"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]

"""The tasks that q3q knows by itself, one row each, and how an evaluation groups and draws their questions."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.data.questions import MMLU, WIKITEXT, DataSet
from q3q.errors import ConfigError
from q3q.spec import QUICK_SEED, Json

if TYPE_CHECKING:
    pass

Tell = Callable[[int, int], None]
Choose = Callable[[str, int], Sequence[int]]
EVALUATION_VERSION = (
    1  # of all numbers here: raised when a text is cut, a prompt put or an answer scored otherwise
)
OWN_TASKS = Path(__file__).parent / "tasks"
STUDY_MMLU = "mmlu_paper"
PLAIN_CHAT = "none"
# chat template applied, and its `enable_thinking` (None: as the template has it)
CHATS: dict[str, tuple[bool, bool | None]] = {
    PLAIN_CHAT: (False, None),
    "template": (True, None),
    "thinking": (True, True),
    "no_thinking": (True, False),
}
THINK_START, THINK_END = "<think>", "</think>"  # around a thought of a post-trained Qwen3
SUBJECTS = tuple(
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry "
    "college_computer_science college_mathematics college_medicine college_physics computer_security "
    "conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_european_history "
    "high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics "
    "high_school_microeconomics high_school_physics high_school_psychology high_school_statistics "
    "high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence "
    "logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes "
    "moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine "
    "professional_psychology public_relations security_studies sociology us_foreign_policy virology "
    "world_religions".split()
)
_ASKED = (
    "100 135 152 100 265 144 100 100 100 173 102 100 235 114 145 378 126 100 310 203 100 165 198 193 390 270 238 "
    "151 545 216 204 237 223 131 121 108 163 112 103 234 100 783 346 895 306 311 324 282 1534 272 612 110 245 201 100 "
    "166 171"
)
MMLU_DATA = tuple(DataSet(MMLU, subject, ("test", "dev")) for subject in SUBJECTS)
# Known without asking lm-eval, whose thousands of task files take seconds to read. The first split is asked from.
KNOWN: dict[str, tuple[DataSet, ...]] = {
    "piqa": (DataSet("baber/piqa", None, ("validation",)),),
    "arc_easy": (DataSet("allenai/ai2_arc", "ARC-Easy", ("test",)),),
    "arc_challenge": (DataSet("allenai/ai2_arc", "ARC-Challenge", ("test",)),),
    "hellaswag": (DataSet("Rowan/hellaswag", None, ("validation",)),),
    "winogrande": (DataSet("allenai/winogrande", "winogrande_xl", ("validation",)),),
    "boolq": (DataSet("aps/super_glue", "boolq", ("validation",)),),
    "wikitext": (DataSet(WIKITEXT, "wikitext-2-raw-v1", ("test",)),),
    "mmlu": MMLU_DATA,
    STUDY_MMLU: MMLU_DATA,
    **{path.stem: () for path in sorted(OWN_TASKS.glob("*.yaml"))},
}
# Questions of each data set; another number under the same name would be another metric.
QUESTIONS = {
    "baber/piqa": 1838,
    "allenai/ai2_arc:ARC-Easy": 2376,
    "allenai/ai2_arc:ARC-Challenge": 1172,
    "Rowan/hellaswag": 10042,
    "allenai/winogrande:winogrande_xl": 1267,
    "aps/super_glue:boolq": 3270,
    f"{WIKITEXT}:wikitext-2-raw-v1": 62,
    **{data.key: int(count) for data, count in zip(MMLU_DATA, _ASKED.split(), strict=True)},
}
FIRST_SHOTS = (
    "mmlu",
    STUDY_MMLU,
)  # their examples are the first ones; of others they are drawn at random


def lm_eval_version() -> str:
    """Whose task files the prompts are made by."""
    return metadata.version("lm_eval")


@dataclass
class Part:
    """One part of an evaluation. samples: rows as `samples.py` files them. results: lm-eval's own, plain JSON."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    results: Json = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)

    def to_json(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Tasks that one run of lm-eval scores together. shots, limit: None for the tasks' own, and for all questions."""

    tasks: tuple[str, ...]
    shots: int | None
    limit: int | None


def batches(evaluation: Json) -> list[Batch]:
    """The tasks of an evaluation, those with equal settings together, in the order of their first."""
    found: dict[tuple[bool, int | None, int | None], list[str]] = {}
    for task in evaluation["tasks"]:
        shots = evaluation.get("shots", {}).get(task)
        limit = evaluation.get("limits", {}).get(task, evaluation.get("task_limit"))
        found.setdefault((task == STUDY_MMLU, shots, limit), []).append(task)
    return [Batch(tuple(tasks), shots, limit) for (_, shots, limit), tasks in found.items()]


def draws_shots(tasks: Iterable[str], shots: Mapping[str, int]) -> bool:
    """Whether a seed decides which examples some task shows."""
    return any(
        task not in FIRST_SHOTS and (task not in KNOWN or shots.get(task, 0) > 0) for task in tasks
    )


def refuse_other_versions(evaluation: Json) -> None:
    """A trial that was planned with another evaluation, on another machine or before an upgrade, has another name.

    Raises:
        ConfigError: q3q's evaluation or lm-eval is not of the version here that the trial was planned with.
    """
    here: Json = (
        {"version": EVALUATION_VERSION}
        if evaluation.get("texts") or evaluation.get("tasks")
        else {}
    )
    here |= {"lm_eval": lm_eval_version()} if evaluation.get("tasks") else {}
    for key, version in here.items():
        if evaluation.get(key) != version:
            name = "lm-eval" if key == "lm_eval" else "q3q's evaluation"
            raise ConfigError(
                f"the trial was planned with {name} {evaluation.get(key)}, and this process has {version}; plan it anew"
            )


def first(limit: int | None, task: str, count: int) -> Sequence[int]:
    """The numbers of the first questions."""
    return range(count if limit is None else min(count, limit))


def drawn(limit: int | None, task: str, count: int) -> Sequence[int]:
    """The numbers, ascending, of so many of a task's questions, drawn once and for all."""
    if limit is None or count <= limit:
        return range(count)
    return sorted(random.Random(f"{QUICK_SEED} {task}").sample(range(count), limit))


@dataclass(frozen=True)
class Chat:
    """How prompts are put to a post-trained model: through its chat template, with or without thinking.

    template: apply it. thinking: the template's `enable_thinking`, None to leave it to the template. think_start,
    think_end: around a thought; only what comes after it counts as the answer.
    """

    template: bool = False
    thinking: bool | None = None
    think_start: str = THINK_START
    think_end: str = THINK_END
    system: str | None = None

    @property
    def thinks(self) -> bool:
        """Whether an answer may begin with a thought."""
        return self.template and self.thinking is not False

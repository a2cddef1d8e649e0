"""The tasks that q3q knows by itself, one row each: lm-eval's task files take seconds to read."""

from dataclasses import dataclass
from pathlib import Path

from q3q.data.repositories import MMLU, WIKITEXT, DataSet

OWN_TASKS = Path(__file__).parent / "tasks"
STUDY_MMLU = "mmlu_paper"
# MMLU's subjects and the number of their questions.
SUBJECTS = {
    "abstract_algebra": 100,
    "anatomy": 135,
    "astronomy": 152,
    "business_ethics": 100,
    "clinical_knowledge": 265,
    "college_biology": 144,
    "college_chemistry": 100,
    "college_computer_science": 100,
    "college_mathematics": 100,
    "college_medicine": 173,
    "college_physics": 102,
    "computer_security": 100,
    "conceptual_physics": 235,
    "econometrics": 114,
    "electrical_engineering": 145,
    "elementary_mathematics": 378,
    "formal_logic": 126,
    "global_facts": 100,
    "high_school_biology": 310,
    "high_school_chemistry": 203,
    "high_school_computer_science": 100,
    "high_school_european_history": 165,
    "high_school_geography": 198,
    "high_school_government_and_politics": 193,
    "high_school_macroeconomics": 390,
    "high_school_mathematics": 270,
    "high_school_microeconomics": 238,
    "high_school_physics": 151,
    "high_school_psychology": 545,
    "high_school_statistics": 216,
    "high_school_us_history": 204,
    "high_school_world_history": 237,
    "human_aging": 223,
    "human_sexuality": 131,
    "international_law": 121,
    "jurisprudence": 108,
    "logical_fallacies": 163,
    "machine_learning": 112,
    "management": 103,
    "marketing": 234,
    "medical_genetics": 100,
    "miscellaneous": 783,
    "moral_disputes": 346,
    "moral_scenarios": 895,
    "nutrition": 306,
    "philosophy": 311,
    "prehistory": 324,
    "professional_accounting": 282,
    "professional_law": 1534,
    "professional_medicine": 272,
    "professional_psychology": 612,
    "public_relations": 110,
    "security_studies": 245,
    "sociology": 201,
    "us_foreign_policy": 100,
    "virology": 166,
    "world_religions": 171,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task that is known without lm-eval.

    name: lm-eval's, or of a file in `tasks/`
    data: data sets; each one's first split holds the questions. Empty if they are generated
    questions: their number in each data set (in the task, if it has none). Another number under
        the same name would be another metric
    tokens: distinct tokens of one question with its answers, roughly; for predictions of cost
    shared_tokens: besides these, tokens that all questions of one data set share
    lm_eval_folder: where lm-eval's folder of tasks has its file; None if the task is q3q's own
    subtasks: its tasks in lm-eval, if it is a group
    examples_split: split of the few-shot examples; None if the task cannot show any
    first_examples: it shows the first examples, where otherwise a seed draws them
    in_mean: part of the mean accuracy, as in the study's tables
    is_text: it measures a text, so its metrics are a text's
    """

    name: str
    data: tuple[DataSet, ...] = ()
    questions: tuple[int, ...]
    tokens: int
    shared_tokens: int = 0
    lm_eval_folder: str | None = None
    subtasks: tuple[str, ...] = ()
    examples_split: str | None = "train"
    first_examples: bool = False
    in_mean: bool = True
    is_text: bool = False


def _stories(kind: str) -> Task:
    return Task(name=f"stories_{kind}", questions=(200,), tokens=60, examples_split=None)


_SUBJECTS = tuple(DataSet(MMLU, subject, ("test", "dev")) for subject in SUBJECTS)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="piqa",
            data=(DataSet("baber/piqa", None, ("validation",)),),
            questions=(1838,),
            tokens=60,
            lm_eval_folder="piqa",
        ),
        Task(
            name="arc_easy",
            data=(DataSet("allenai/ai2_arc", "ARC-Easy", ("test",)),),
            questions=(2376,),
            tokens=50,
            lm_eval_folder="arc",
        ),
        Task(
            name="arc_challenge",
            data=(DataSet("allenai/ai2_arc", "ARC-Challenge", ("test",)),),
            questions=(1172,),
            tokens=60,
            lm_eval_folder="arc",
        ),
        Task(
            name="hellaswag",
            data=(DataSet("Rowan/hellaswag", None, ("validation",)),),
            questions=(10042,),
            tokens=180,
            lm_eval_folder="hellaswag",
        ),
        Task(
            name="winogrande",
            data=(DataSet("allenai/winogrande", "winogrande_xl", ("validation",)),),
            questions=(1267,),
            tokens=50,
            lm_eval_folder="winogrande",
        ),
        Task(
            name="boolq",
            data=(DataSet("aps/super_glue", "boolq", ("validation",)),),
            questions=(3270,),
            tokens=140,
            lm_eval_folder="super_glue/boolq",
        ),
        Task(
            name="wikitext",
            data=(DataSet(WIKITEXT, "wikitext-2-raw-v1", ("test",)),),
            questions=(62,),
            tokens=4500,
            lm_eval_folder="wikitext",
            examples_split=None,
            in_mean=False,
            is_text=True,
        ),
        Task(
            name="mmlu",
            data=_SUBJECTS,
            questions=tuple(SUBJECTS.values()),
            tokens=120,
            shared_tokens=700,
            lm_eval_folder="mmlu/default",
            subtasks=tuple(f"mmlu_{subject}" for subject in SUBJECTS),
            examples_split="dev",
            first_examples=True,
            in_mean=False,
        ),
        Task(
            name=STUDY_MMLU,
            data=_SUBJECTS,
            questions=tuple(SUBJECTS.values()),
            tokens=120,
            shared_tokens=700,
            examples_split="dev",
            first_examples=True,
            in_mean=False,
        ),
        *map(_stories, ("count", "order", "where", "who")),
    )
}

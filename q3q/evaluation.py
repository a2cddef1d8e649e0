"""What is measured: texts and tasks, as a spec has them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from q3q.canonical import Json, checked, without_none
from q3q.formatting import changes, decimals_of, percent, signed, significant

MEAN_ACCURACY = "accuracy"  # metric: the mean over the tasks of `evaluate.metrics.mean_metrics`
QUICK_SEED = 0  # of the windows and questions that evaluation.quick draws
AUTO_DRIFT = "auto"
# Bins of the original's confidence, the probability of its likeliest token, in percent.
CONFIDENCE = ((0, 50), (50, 90), (90, 99), (99, 100))


@dataclass(frozen=True, kw_only=True)
class TextRef:
    """A text whose perplexity is measured, in windows of `window` tokens.

    limit: most windows, None for all
    draw, samples: random, of `samples` windows; or first, and None
    """

    name: str
    source: str | None = None
    digest: str
    window: int
    limit: int | None = None
    draw: str = "first"
    samples: int | None = None

    def to_json(self) -> Json:
        return without_none(asdict(self), keep=("limit", "samples"))


@dataclass(frozen=True, kw_only=True)
class TaskRef:
    """A task of lm-eval's or q3q's own.

    shots: examples in each prompt, None for the task's own number
    limit: most questions, None for `Evaluation.task_limit`
    """

    name: str
    shots: int | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, on which texts and tasks.

    task_limit: most questions of each task, None for all
    chat: how prompts use the chat template; None: they do not
    include: digest of the user's own task files
    data: identity (commit or digest) of each data set
    generates: tasks that have the model generate text
    max_gen_toks: most tokens of a generated text, None for each task's own number
    ends: tokens that end a generated text
    lm_eval, version: of the code that makes prompts, cuts texts and scores answers
    quick: windows and questions are drawn at random once, and every metric's name says so
    drift: windows that are compared with the unquantized model: a number, `auto`, or None
    """

    texts: tuple[TextRef, ...] = ()
    tasks: tuple[TaskRef, ...] = ()
    task_limit: int | None = None
    chat: str | None = None
    include: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    generates: tuple[str, ...] = ()
    max_gen_toks: int | None = None
    ends: tuple[int, ...] = ()
    lm_eval: str | None = None
    version: int | None = None
    quick: bool = False
    drift: int | str | None = None

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def limit_of(self, task: TaskRef) -> int | None:
        return self.task_limit if task.limit is None else task.limit

    def to_json(self) -> Json:
        """Return plain JSON without what is not asked for; shots and limits by task, sorted."""
        by_name = sorted(self.tasks, key=lambda task: task.name)
        facts = {
            "texts": [text.to_json() for text in self.texts],
            "tasks": list(self.task_names),
            "task_limit": self.task_limit,
        }
        optional = {
            "shots": {task.name: task.shots for task in by_name if task.shots is not None},
            "limits": {task.name: task.limit for task in by_name if task.limit is not None},
            **vars(self),
            "data": dict(self.data),
            "generates": list(self.generates),
            "ends": list(self.ends),
        }
        return facts | {key: fact for key, fact in optional.items() if fact and key not in facts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Evaluation":
        rest = dict(data)
        shots, limits = (checked(key, rest.pop(key, {}), dict) for key in ("shots", "limits"))
        tasks = [checked("a task", name, str) for name in rest.pop("tasks", ())]
        for text in rest.get("texts", ()):
            checked("a text's name", text["name"], str)
        checked("data", rest.get("data", {}), dict)
        for key in ("generates", "ends"):
            rest[key] = tuple(rest.get(key, ()))
        rest["texts"] = tuple(TextRef(**text) for text in rest.get("texts", ()))
        rest["tasks"] = tuple(
            TaskRef(name=name, shots=shots.get(name), limit=limits.get(name)) for name in tasks
        )
        return cls(**rest)


def is_perplexity(metric: str) -> bool:
    return metric.partition("/")[0] in ("perplexity", "perplexity_quick")


def is_accuracy(metric: str) -> bool:
    return metric == MEAN_ACCURACY or metric.endswith("/acc")


def is_share(metric: str) -> bool:
    """Return True for shares of right answers, which are shown in percent."""
    return is_accuracy(metric) or metric.endswith("/acc_norm")


def value_in_words(value: float, metric: str) -> str:
    """Return a metric in percent, if it is a share, else to four digits."""
    return percent(value) if is_share(metric) else significant(value)


def change_of(metric: str, ours: float, theirs: float) -> float:
    """Return how our metric differs from theirs: a perplexity by a share of it."""
    return ours / theirs - 1 if is_perplexity(metric) else ours - theirs


def change_in_words(metric: str, change: float, *ends: float) -> str:
    """Return a change with its sign, unit and interval: `+20.0 % [+10.0, +30.0]`, `-0.3 points`.

    A perplexity changes by a percentage, however large, and an accuracy by points. Any other
    metric changes by a number in its own unit.
    """
    if not is_perplexity(metric) and not is_share(metric):
        return signed(change, max(0, 1 + decimals_of(change)) if change else 1)
    number, *bounds = changes(change, *ends)
    return f"{number} {change_unit(metric)}" + (f" [{', '.join(bounds)}]" if bounds else "")


def change_unit(metric: str) -> str:
    return "%" if is_perplexity(metric) else "points"


def text_metric(measure: str, text: str, quick: bool) -> str:
    """Return `perplexity/wikitext2`; of a quick evaluation `perplexity_quick/wikitext2`."""
    return f"{measure}{'_quick' if quick else ''}/{text}"

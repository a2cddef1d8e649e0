"""The names that a record has for its metrics, and which texts were calibrated on."""

import math
from collections.abc import Iterable, Mapping

from q3q.evaluate.catalogue import TASKS
from q3q.record import TrialRecord
from q3q.spec import TextRef, TrialSpec, text_metric


def measures_text(task: str) -> bool:
    """Return True if a task measures a text instead of asking questions."""
    return task in TASKS and TASKS[task].is_text


def task_metric(name: str, quick: bool) -> str:
    """Return the record's name of one of lm-eval's metrics: `mmlu/acc`, quick `mmlu_quick/acc`.

    lm-eval's `wikitext` task measures a text: its wikitext/word_perplexity is
    word_perplexity/wikitext2 here.
    """
    task, _, metric = name.partition("/")
    if measures_text(task):
        return text_metric(metric, "wikitext2", quick)
    return text_metric(task, metric, quick)


def accuracy_metric(spec: TrialSpec, task: str) -> str:
    return text_metric(task, "acc", spec.evaluation.quick)


def mean_metrics(spec: TrialSpec) -> list[str]:
    """Return the accuracies that a trial's mean is over.

    MMLU's are among them only if there are no others, as in the study's tables.
    """
    tasks = [task for task in spec.evaluation.task_names if not measures_text(task)]
    in_mean = [task for task in tasks if task not in TASKS or TASKS[task].in_mean]
    return [accuracy_metric(spec, task) for task in in_mean or tasks]


def mean_accuracy(spec: TrialSpec, metrics: Mapping[str, float]) -> float | None:
    """Return the mean over `mean_metrics`; None if one of them was not measured."""
    names = mean_metrics(spec)
    if not names or not all(name in metrics for name in names):
        return None
    return math.fsum(metrics[name] for name in names) / len(names)


def reads_calibrated_kind(text: TextRef, spec: TrialSpec) -> bool:
    """Return True if a trial is calibrated on text of the kind that it is evaluated on.

    So is one whose bits were allotted by sensitivities that were measured on such text. The two
    parts of a data set (C4's training and validation files, two halves of the demo's stories) are
    of one kind. Of two files that a user gives, only equal ones are known to be.
    """
    calibration, budget = spec.calibration, spec.budget
    read = [(part.source, part.digest) for part in calibration.every_part] if calibration else []
    read += [(budget.source, budget.digest)] if budget else []
    if text.source == "file":
        return text.digest in {digest for _, digest in read}
    return (text.source or text.name) in {source for source, _ in read}


def reads_text(spec: TrialSpec) -> bool:
    """Return True if the weights depend on windows of a text, and so on the seed's draw of them."""
    return spec.calibration is not None or spec.budget is not None


def held_out(metric: str, specs: Iterable[TrialSpec]) -> bool:
    """Return True for a perplexity of a kind of text that none of these trials is calibrated on."""
    for spec in specs:
        for text in spec.evaluation.texts:
            name = text_metric("perplexity", text.name, spec.evaluation.quick)
            if name == metric and reads_calibrated_kind(text, spec):
                return False
    return True


def directions(record: TrialRecord) -> dict[str, bool]:
    """Return by metric whether higher is better, as far as lm-eval's results say so.

    Older records do not say so.
    """
    quick = record.spec.evaluation.quick
    by_metric: dict[str, bool] = {}
    for results in record.results.values():
        for owner, metrics in results.get("higher_is_better", {}).items():
            for metric in record.numbers:
                own = [
                    name
                    for name in metrics
                    if _is_of(metric, task_metric(f"{owner}/{name}", quick))
                ]
                if own and isinstance(metrics[own[0]], bool):
                    by_metric[metric] = metrics[own[0]]
    texts = (text_metric("perplexity", text.name, quick) for text in record.spec.evaluation.texts)
    return by_metric | dict.fromkeys(texts, False)


def _is_of(metric: str, name: str) -> bool:
    """Return True if a metric is the one of this name, after whatever filter."""
    return metric == name or metric.startswith(f"{name}/")


def exp_or_infinity(value: float) -> float:
    """Return exp(value), infinity on overflow: a perplexity that diverged is a result."""
    return math.exp(value) if not value > 700 else math.inf

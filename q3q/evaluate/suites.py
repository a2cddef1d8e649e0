"""Which tasks q3q knows by itself, on which data sets they stand, and how all tasks of a trial are scored."""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from q3q.data.questions import DataSet, Library, serving
from q3q.errors import ConfigError
from q3q.evaluate import mmlu_paper
from q3q.evaluate.catalogue import (
    CHATS,
    FIRST_SHOTS,
    KNOWN,
    MMLU_DATA,
    OWN_TASKS,
    PLAIN_CHAT,
    QUESTIONS,
    STUDY_MMLU,
    SUBJECTS,
    Batch,
    Choose,
    Part,
    Tell,
    drawn,
    first,
)
from q3q.spec import Json, task_metric

if TYPE_CHECKING:
    from datasets import DatasetDict

    from q3q.evaluate.prefixes import Ids
    from q3q.models.decoder import Decoder


def settle(
    tasks: Sequence[str],
    library: Library,
    *,
    shots: Mapping[str, int] = MappingProxyType({}),
    limits: Mapping[str, int | None] = MappingProxyType({}),
    include: Path | None = None,
    most: int | None = None,
    window: int = sys.maxsize,
) -> list[str]:
    """Have every data set that the tasks stand on identified and so known to be there, and refuse what no trial can do.

    Tasks that are not known here are loaded by lm-eval, to see what they ask for; none that is known generates.

    Args:
        shots, limits: by task. include: a folder with task files. most: tokens of a generated text, the task's own
            number if None. window: the model's, in tokens.

    Returns:
        Those tasks (of groups, their tasks) that have the model generate text.

    Raises:
        ConfigError: a data set is not to be had or not whole, a task cannot be loaded or run as asked, or two of them
            have a task in common. IntegrityError: a task has no documents.
    """
    for task in tasks:
        _settle_known(task, library, shots.get(task, 0), limits.get(task))
    strangers = [task for task in tasks if task not in KNOWN]
    if not strangers:
        return []
    from q3q.evaluate.harness.task_files import examine, tasks_from

    def note(data: DataSet, options: dict[str, Any]) -> "DatasetDict":
        library.identify(data, **options)
        return library.load(data, **options)

    with serving(note):
        manager = tasks_from([OWN_TASKS, *([include] if include else [])], strangers)
        found = examine(manager, strangers, shots, most, window)
    _refuse_overlaps({task: found.get(task) or _parts(task) for task in tasks})
    return [
        name
        for parts in found.values()
        for name, output in parts.items()
        if output == "generate_until"
    ]


def _parts(task: str) -> list[str]:
    """The tasks that a known one consists of."""
    return [f"mmlu_{subject}" for subject in SUBJECTS] if task == "mmlu" else [task]


def _settle_known(task: str, library: Library, shots: int, limit: int | None) -> None:
    """The data sets of a known task: there, with enough examples to show, and whole, unless no more is asked of a part
    of them than it has. What has more than the official rows is no part of them."""
    if shots and (task == "wikitext" or not KNOWN.get(task, (task,))):
        raise ConfigError(
            f"{task} has no examples, and cannot show {shots}; name others in evaluation.shots"
        )
    for data in KNOWN.get(task, ()):
        asked, whole = data.splits[0], QUESTIONS[data.key]
        source = "dev" if task in FIRST_SHOTS else "train"
        library.identify(
            replace(data, splits=(asked, source) if shots or source in data.splits else (asked,))
        )
        rows, where = library.load(data), library.where(data)
        if shots > len(rows[source]):
            raise ConfigError(
                f"{task} is to show {shots} examples, and {where} has {len(rows[source])} in {source}"
            )
        count = len(rows[asked])
        if count > whole or (count < whole and (limit is None or count < limit)):
            other = (
                "these alone"
                if count > whole
                else f"all of them, or say evaluation.limits={{{task}:{count}}}"
            )
            raise ConfigError(
                f"{task}: {where} has {count} rows of the split {asked}, and {whole} are its questions: give {other}"
            )


def _refuse_overlaps(parts: Mapping[str, Iterable[str]]) -> None:
    owner: dict[str, str] = {}
    for task, names in parts.items():
        for name in names:
            if owner.setdefault(name, task) != task:
                raise ConfigError(
                    f"evaluation.tasks: {name} is in {owner[name]} and in {task}, and has one place in the record; "
                    "leave one of them out"
                )


def score_batch(
    model: "Decoder",
    tokenizer: Any,
    evaluation: Json,
    batch: Batch,
    library: Library,
    *,
    include: Path | None,
    seed: int,
    journal: Path,
    identity: str,
    tell: Tell,
) -> Part:
    """Score some tasks; metrics are named as `spec.task_metric` says.

    journal: folder of the scores so far. identity: of the model, and of all that was done to it.

    Raises:
        IntegrityError: a score is not finite, a task is empty or has another number of samples than documents.
    """
    quick = bool(evaluation.get("quick"))
    if batch.tasks == (STUDY_MMLU,):
        choose = partial(drawn if quick else first, batch.limit)
        part = _study_mmlu(model, tokenizer, library, choose, journal, identity, tell)
    else:
        part = _lm_eval(
            model, tokenizer, evaluation, batch, library, include, seed, journal, identity, tell
        )
    return _named(part, quick)


def _lm_eval(
    model: "Decoder",
    tokenizer: Any,
    evaluation: Json,
    batch: Batch,
    library: Library,
    include: Path | None,
    seed: int,
    journal: Path,
    identity: str,
    tell: Tell,
) -> Part:
    from q3q.evaluate.catalogue import Chat
    from q3q.evaluate.harness.run import run_tasks  # lm-eval takes seconds to import

    template, thinking = CHATS[evaluation.get("chat", PLAIN_CHAT)]
    with serving(lambda data, options: library.load(data, **options)):
        found = run_tasks(
            model,
            tokenizer,
            batch.tasks,
            limit=batch.limit,
            choose=partial(drawn, batch.limit) if evaluation.get("quick") else None,
            num_fewshot=batch.shots,
            max_gen_toks=evaluation.get("max_gen_toks"),
            seed=seed,
            include_path=include,
            chat=Chat(template=template, thinking=thinking),
            journal=journal,
            identity=identity,
            progress=tell,
        )
    members = found.results.get("group_subtasks", {})
    leaves = {group: _leaves(group, members) for group in members}
    samples: list[Json] = []
    intervals = dict(found.intervals)
    for task, rows in found.samples.items():
        groups = [group for group, tasks in leaves.items() if task in tasks and task != group]
        weighted = weighted_losses(rows)
        intervals |= weighted_intervals(task, weighted)
        for number, row in enumerate(rows):
            samples.append(
                _sample(
                    task, groups, row, {name: losses[number] for name, losses in weighted.items()}
                )
            )
    results = {**_plain(found.results), "effort": asdict(found.effort)}
    return Part(dict(found.metrics), intervals, {"+".join(batch.tasks): results}, samples)


def weighted_losses(rows: Sequence[Json]) -> dict[str, list[float]]:
    """What each document contributes to a perplexity per word or byte, and to the bits per byte: nats (bits) of which
    the mean is its logarithm, L = -sum l / sum w of documents with log-likelihoods l and weights w (words or bytes).

    A document that is longer counts more. Its contribution is L + n (-l - L w) / sum w, of n documents, whose variance
    is that of the ratio (Cochran, Sampling Techniques, 1977, section 6.4); so intervals and paired comparisons of the
    mean are those of the ratio.
    """
    found: dict[str, list[float]] = {}
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        pairs = [tuple(row[name]) for row in rows if isinstance(row.get(name), (tuple, list))]
        if not pairs or len(pairs) < len(rows):
            continue
        n, weight = len(pairs), sum(w for _, w in pairs)
        loss = -sum(score for score, _ in pairs) / weight
        unit = math.log(2) if name == "bits_per_byte" else 1.0
        found[name] = [(loss + n * (-score - loss * w) / weight) / unit for score, w in pairs]
    return found


def weighted_intervals(
    task: str, losses: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float]]:
    """95 % intervals of what `weighted_losses` are the contributions to: lm-eval gives none."""
    from q3q.evaluate.compare import NORMAL_95, estimate
    from q3q.evaluate.perplexity import exp_or_infinity

    found: dict[str, tuple[float, float]] = {}
    for name, values in losses.items():
        if len(values) < 2:
            continue
        mean = estimate({str(number): value for number, value in enumerate(values)})
        spread = NORMAL_95 * mean.standard_error
        low, high = mean.value - spread, mean.value + spread
        found[f"{task}/{name}"] = (
            (low, high)
            if name == "bits_per_byte"
            else (exp_or_infinity(low), exp_or_infinity(high))
        )
    return found


def _leaves(group: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, those of its groups among them."""
    if not members.get(group):
        return [group]
    return [leaf for member in members[group] for leaf in _leaves(member, members)]


ROW = ("doc_id", "doc_hash", "prompt_hash", "filter", "target", "log_likelihood", "greedy", "text")


def _sample(task: str, groups: Sequence[str], row: Json, weighted: dict[str, float]) -> Json:
    """One of lm-eval's samples as `samples.py` files it; of the metrics, those that are numbers of their own, and its
    `weighted_losses`."""
    scores = {
        name: float(value)
        for name, value in row.items()
        if name not in ROW and isinstance(value, (int, float, bool))
    } | weighted
    kept = {name: row.get(name) for name in ROW}
    kept["target"] = None if row.get("target") is None else str(row["target"])
    suffix = "" if row["filter"] == "none" else f"/{row['filter']}"
    return {
        "task": task,
        "groups": groups,
        **kept,
        "scores": {name + suffix: value for name, value in scores.items()},
    }


def _study_mmlu(
    model: "Decoder",
    tokenizer: Any,
    library: Library,
    choose: Choose,
    journal: Path,
    identity: str,
    tell: Tell,
) -> Part:
    """MMLU by the study's script: see mmlu_paper.py. All subjects' questions count alike."""
    from q3q.evaluate.compare import NORMAL_95, estimate
    from q3q.evaluate.encoding import LineEncoder, as_ids
    from q3q.evaluate.harness.lm import HarnessLM
    from q3q.evaluate.journal import SCORES, Journal

    encode = LineEncoder(tokenizer)
    tokens = mmlu_paper.answer_tokens(encode)
    rows: list[tuple[int, Json]] = []
    prompts: list[Ids] = []
    for data in MMLU_DATA:
        splits = library.load(data)
        examples = list(splits["dev"])
        for number in choose(
            f"mmlu_{data.name}", len(splits["test"])
        ):  # the same as lm-eval's task asks
            question = {**splits["test"][number], "subject": data.name}
            rows.append((number, question))
            prompts.append(as_ids(mmlu_paper.fitting_prompt(question, examples, encode)))
    kept = Journal(journal / SCORES, identity)
    try:
        lm = HarnessLM(model, tokenizer, tell, journal=kept)
        asked = [
            lm._request(ids, as_ids([token]), STUDY_MMLU) for ids in prompts for token in tokens
        ]
        found = [one.log_likelihood for one in lm._score(asked, tell)]
    finally:
        kept.close()
    samples: list[Json] = []
    for (number, row), ids, start in zip(
        rows, prompts, range(0, len(found), len(tokens)), strict=True
    ):
        scores = found[start : start + len(tokens)]
        right = max(range(len(tokens)), key=lambda k: scores[k]) == row["answer"]
        samples.append(
            {
                "task": STUDY_MMLU,
                **dict.fromkeys(ROW),
                "doc_id": number,
                "doc_hash": _hash([row["subject"], row["question"], row["choices"], row["answer"]]),
                "prompt_hash": _hash(ids.tolist()),
                "filter": "none",
                "target": mmlu_paper.LETTERS[row["answer"]],
                "log_likelihood": scores,
                "scores": {"acc": float(right)},
            }
        )
    mean = estimate({str(number): row["scores"]["acc"] for number, row in enumerate(samples)})
    spread = NORMAL_95 * mean.standard_error
    name = f"{STUDY_MMLU}/acc"
    interval = (max(0.0, mean.value - spread), min(1.0, mean.value + spread))
    return Part(
        {name: mean.value}, {name: interval}, {STUDY_MMLU: {"effort": asdict(lm.effort)}}, samples
    )


def _named(part: Part, quick: bool) -> Part:
    """The same under the names that records use."""
    return Part(
        metrics={task_metric(name, quick): value for name, value in part.metrics.items()},
        intervals={task_metric(name, quick): value for name, value in part.intervals.items()},
        results=part.results,
        samples=part.samples,
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON's own types only: lm-eval's results hold functions and arrays."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if (
        value is None
        or isinstance(value, (str, int, bool))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return str(getattr(value, "__name__", value))

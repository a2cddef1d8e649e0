"""Which tasks q3q knows by itself, on which data sets they stand, and how all tasks of a trial are scored."""

import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from q3q.data import MMLU, WIKITEXT, DataSet, Library, serving
from q3q.errors import ConfigError
from q3q.evaluate import mmlu_paper
from q3q.spec import Json, task_metric

if TYPE_CHECKING:
    from datasets import DatasetDict

    from q3q.evaluate.prefixes import Ids
    from q3q.models.decoder import Decoder

Tell = Callable[[int, int], None]
Choose = Callable[[str, int], Sequence[int]]

EVALUATION_VERSION = (
    1  # of all numbers here: raised when a text is cut, a prompt put or an answer scored otherwise
)
OWN_TASKS = Path(__file__).parent / "tasks"
STUDY_MMLU = "mmlu_paper"
QUICK_SEED = 0  # of the questions that evaluation.quick draws
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
_MMLU = tuple(DataSet(MMLU, subject, ("test", "dev")) for subject in SUBJECTS)
# Known without asking lm-eval, whose thousands of task files take seconds to read. The first split is asked from.
KNOWN: dict[str, tuple[DataSet, ...]] = {
    "piqa": (DataSet("baber/piqa", None, ("validation",)),),
    "arc_easy": (DataSet("allenai/ai2_arc", "ARC-Easy", ("test",)),),
    "arc_challenge": (DataSet("allenai/ai2_arc", "ARC-Challenge", ("test",)),),
    "hellaswag": (DataSet("Rowan/hellaswag", None, ("validation",)),),
    "winogrande": (DataSet("allenai/winogrande", "winogrande_xl", ("validation",)),),
    "boolq": (DataSet("aps/super_glue", "boolq", ("validation",)),),
    "wikitext": (DataSet(WIKITEXT, "wikitext-2-raw-v1", ("test",)),),
    "mmlu": _MMLU,
    STUDY_MMLU: _MMLU,
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
    **{data.key: int(count) for data, count in zip(_MMLU, _ASKED.split(), strict=True)},
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
    from q3q.evaluate.harness import examine, tasks_from

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


def refuse_generation(evaluation: Json, loader: str) -> None:
    """Generated text takes a pass through all blocks for each token: only a resident model does it.

    Raises:
        ConfigError: a task generates, and the loader does not hold the whole model.
    """
    found = evaluation.get("generates")
    if found and loader != "resident":
        raise ConfigError(
            f"{', '.join(found)}: text is generated token by token, and a {loader} model would be read anew for each; "
            "give more memory (loader=resident), or leave such tasks out of evaluation.tasks"
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


def first(limit: int | None, task: str, count: int) -> Sequence[int]:
    """The numbers of the first questions."""
    return range(count if limit is None else min(count, limit))


def drawn(limit: int | None, task: str, count: int) -> Sequence[int]:
    """The numbers, ascending, of so many of a task's questions, drawn once and for all."""
    if limit is None or count <= limit:
        return range(count)
    return sorted(random.Random(f"{QUICK_SEED} {task}").sample(range(count), limit))


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
    from q3q.evaluate.harness import Chat, run_tasks  # lm-eval takes seconds to import

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
    from q3q.evaluate.harness import HarnessLM
    from q3q.evaluate.journal import SCORES, Journal

    encode = LineEncoder(tokenizer)
    tokens = mmlu_paper.answer_tokens(encode)
    rows: list[tuple[int, Json]] = []
    prompts: list[Ids] = []
    for data in _MMLU:
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

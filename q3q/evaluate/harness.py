"""lm-eval's tasks on our forward: the only file that imports lm_eval."""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.metrics import weighted_mean, weighted_perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from q3q.errors import ConfigError, IntegrityError, Q3QError
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.compare import share_interval
from q3q.evaluate.encoding import LineEncoder, as_ids, encode_pair
from q3q.evaluate.generation import generate
from q3q.evaluate.journal import SCORES, Journal, request_key
from q3q.evaluate.perplexity import NORMAL_95, exp_or_infinity
from q3q.evaluate.prefixes import Ids
from q3q.evaluate.scoring import Effort, Request, Score, score
from q3q.evaluate.suites import OWN_TASKS, THINK_END, THINK_START, Choose, Tell
from q3q.models.checkpoint import end_tokens
from q3q.models.decoder import Decoder

OFFICIAL = Path(lm_eval.tasks.__file__).parent
# Where in lm-eval some tasks lie: to look through all of it takes seconds.
SHIPPED = {
    **{name: name for name in ("piqa", "hellaswag", "winogrande", "wikitext")},
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "boolq": "super_glue/boolq",
    "mmlu": "mmlu/default",
}
LEARNT_TOGETHER = 1 << 12  # requests whose texts go to the tokenizer together
GENERATED_TOKENS = 256  # where a task does not say how many, as in HFLM
# Settings of a generation that leave greedy decoding as it is.
GREEDY_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


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


class HarnessLM(TemplateLM):
    """Our decoder behind lm-eval's interface; answers what lm-eval's HFLM answers.

    What requests have in common at their beginning runs once, and only positions whose score somebody reads go through
    the head.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        progress: Tell = lambda done, total: None,
        *,
        max_length: int | None = None,
        journal: Journal | None = None,
        chat: Chat = Chat(),
        max_gen_toks: int | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        """progress: told (requests done, in all). max_length: the window in tokens, the model's own if None.

        journal: scores found there are not computed again, others go there as batches end. max_gen_toks: of a
        generated text, the task's own if None. finished: by task, whether each generated text ended after its thought.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.progress = progress
        self.max_length = max_length or model.facts.max_positions
        self.journal = journal
        self.chat = chat
        self.max_gen_toks = max_gen_toks
        self.finished: dict[str, list[bool]] = {}
        self.budget = budget or TokenBudget.measured(model)
        self.effort = Effort()
        self.batch_size = 1  # lm-eval prints it; batches here are packed by tokens
        self.encode = LineEncoder(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """What ends a generated text: the tokenizer's token and the model's own."""
        return tuple(sorted({self.eot_token_id, *end_tokens(Path(self.tokenizer.name_or_path))}))

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if (
            add_special_tokens is None
            and self.tokenizer.bos_token
            and string.startswith(self.tokenizer.bos_token)
        ):
            add_special_tokens = False  # it is there already
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.encode(string, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        thinking = {} if self.chat.thinking is None else {"enable_thinking": self.chat.thinking}
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **thinking,
        )
        return text

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        # Several continuations share a context, one after the other, and several requests a context's array.
        encode = lru_cache(maxsize=64)(lambda text: as_ids(self.tok_encode(text)))
        encoded = []
        for number, instance in enumerate(requests):
            if number % LEARNT_TOGETHER == 0:
                some = [one.args for one in requests[number : number + LEARNT_TOGETHER]]
                self.encode.learn(
                    text for context, more in some for text in (context.rstrip(), context + more)
                )
            context, continuation = instance.args
            if context == "":
                ids = as_ids(self.tok_encode(continuation, add_special_tokens=False))
                prefix = as_ids([self.prefix_token_id])
                pair = (ids[:1], ids[1:]) if ids[:1].tolist() == prefix.tolist() else (prefix, ids)
            else:
                pair = encode_pair(encode, context, continuation)
            encoded.append(self._request(*pair, task=instance.task_name or "a task"))
        return [
            (found.log_likelihood, found.greedy) for found in self._score(encoded, self.progress)
        ]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        encoded = [
            self._request(as_ids(context), as_ids(target), "a task")
            for _, context, target in requests
        ]
        return [
            (found.log_likelihood, found.greedy) for found in self._score(encoded, self.progress)
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once, in windows with one token of context."""
        encoded, owners = [], []
        for number, instance in enumerate(requests):
            [text] = instance.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, target in map(make_disjoint_window, windows):
                encoded.append(
                    self._request(as_ids(context), as_ids(target), instance.task_name or "a task")
                )
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, found in zip(owners, self._score(encoded, self.progress), strict=True):
            totals[number] += found.log_likelihood
        return totals

    def _request(self, context: Ids, continuation: Ids, task: str) -> Request:
        """The right end of what does not fit into the window, as HFLM does it."""
        if not 0 < len(continuation) <= self.max_length:
            raise ConfigError(
                f"{task}: a continuation has {len(continuation)} tokens; a window of {self.max_length} tokens can "
                f"score 1 to {self.max_length}"
            )
        if not len(context):
            raise ConfigError(
                f"{task}: a context is nothing but spaces, so there is no token to begin with"
            )
        inputs = context if len(continuation) == 1 else np.concatenate((context, continuation[:-1]))
        return Request(inputs[-self.max_length :], continuation, task)

    @torch.inference_mode()
    def _score(self, requests: Sequence[Request], tell: Tell) -> list[Score]:
        found: dict[int, Score] = {}
        keys: list[str] = []
        if self.journal is not None:
            keys = [
                request_key(b"score", r.inputs.tobytes(), r.targets.tobytes()) for r in requests
            ]
            found = {
                i: Score(*known)
                for i, key in enumerate(keys)
                if (known := self.journal.get(key)) is not None
            }
        missing = [i for i in range(len(requests)) if i not in found]
        before = self.effort
        tell(len(found), len(requests))
        for ended, effort in score(self.model, [requests[i] for i in missing], self.budget):
            found.update((missing[i], one) for i, one in ended)
            if self.journal is not None:
                self.journal.add(
                    (keys[missing[i]], [one.log_likelihood, one.greedy]) for i, one in ended
                )
            self.effort = before + effort
            tell(len(found), len(requests))
        return [found[i] for i in range(len(requests))]

    @torch.inference_mode()
    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to a stop string, an end-of-text token, or the task's most tokens.

        Raises:
            ConfigError: a task wants sampling or beams, or the model is streamed.
        """
        if self.model.streamed:
            tasks = ", ".join(sorted({instance.task_name or "a task" for instance in requests}))
            raise ConfigError(
                f"{tasks} generates text, and this model is read from disk block by block, all of it for each token; "
                "leave the task out, or give the trial memory for the whole model"
            )
        wanted = []
        for instance in requests:
            prompt, settings = instance.args
            wanted.append(Generation.of(prompt, settings, instance.task_name or "a task", self))
        answers: dict[int, Answer] = {}
        groups: dict[Generation, dict[bytes, list[int]]] = {}
        for i, (instance, generation) in enumerate(zip(requests, wanted, strict=True)):
            ids = as_ids(self.tok_encode(instance.args[0]) or [self.prefix_token_id])
            tokens = ids[-(self.max_length - generation.most) :].astype(">u4").tobytes()
            known = None if self.journal is None else self.journal.get(generation.key(tokens))
            if known is not None:
                answers[i] = Answer(*known)
            else:
                groups.setdefault(generation, {}).setdefault(tokens, []).append(i)
        self.progress(len(answers), len(requests))
        for generation, readers in groups.items():
            order = sorted(readers)
            contexts = [np.frombuffer(tokens, ">u4").astype(np.int32) for tokens in order]
            ended = partial(generation.ended, self.tokenizer)
            for number, generated in generate(
                self.model, contexts, generation.most, ended, self.budget
            ):
                answer = generation.answer(generated, self.tokenizer)
                answers.update((i, answer) for i in readers[order[number]])
                if self.journal is not None:
                    self.journal.add(
                        [(generation.key(order[number]), [answer.text, answer.finished])]
                    )
                self.progress(len(answers), len(requests))
        for i, instance in enumerate(requests):
            self.finished.setdefault(instance.task_name or "a task", []).append(answers[i].finished)
        return [answers[i].text for i in range(len(requests))]


@dataclass(frozen=True)
class Answer:
    """A generated text without its thought. finished: False if it ended in the middle of one, and answers nothing."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Thought:
    """Where a thought begins and ends. begun: the text stands in one from its first token on."""

    start: str
    end: str
    begun: bool

    def after(self, text: str) -> str | None:
        """What follows the thought, or the whole of a text without one; None while it lasts."""
        if not self.begun and not text.lstrip().startswith(self.start):
            return text
        _, ended, answer = text.rpartition(self.end)
        return answer.lstrip() if ended else None


@dataclass(frozen=True)
class Generation:
    """until: stop strings, the tokenizer's end-of-text token's among them. most: tokens. ends: tokens after which
    nothing comes, the tokenizer's and those of the model's generation_config.json. thought: None if there can be none.
    """

    until: tuple[str, ...]
    most: int
    ends: tuple[int, ...]
    thought: Thought | None

    @classmethod
    def of(cls, prompt: str, settings: dict[str, Any], task: str, lm: HarnessLM) -> "Generation":
        """What lm-eval's settings of a request mean."""
        kwargs = greedy_settings(settings, task, lm.max_gen_toks, lm.max_length)
        end = lm.tokenizer.decode([lm.eot_token_id], skip_special_tokens=False)
        until = tuple(handle_stop_sequences(list(kwargs["until"]), eos=end))
        chat, thought = lm.chat, None
        if (
            chat.thinks
        ):  # asked to, or where the template itself begins a thought, or the model does
            begun = bool(chat.thinking) or prompt.rstrip().endswith(chat.think_start)
            thought = Thought(chat.think_start, chat.think_end, begun)
        return cls(until, kwargs["max_gen_toks"], lm.end_tokens, thought)

    def key(self, tokens: bytes) -> str:
        return request_key(b"generate", tokens, json.dumps(asdict(self)).encode())

    def ended(self, tokenizer: Any, tokens: list[int]) -> bool:
        """Whether a stop string is there. While the model thinks, none counts."""
        if tokens[-1] in self.ends:
            return True
        # Asked after each token: a stop string that was not there before is at the end, and a token is a byte at least.
        tail = tokenizer.decode(tokens[-(self._longest + 4) :])
        if not any(stop in tail for stop in self.until):
            return False
        return any(stop in (self._answered(tokenizer.decode(tokens)) or "") for stop in self.until)

    def answer(self, tokens: list[int], tokenizer: Any) -> Answer:
        text = self._answered(tokenizer.decode(tokens, skip_special_tokens=True))
        if text is None:
            return Answer("", finished=False)
        return Answer(postprocess_generated_text(text, list(self.until), None), finished=True)

    def _answered(self, text: str) -> str | None:
        return text if self.thought is None else self.thought.after(text)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest stop string."""
        return max((len(stop.encode()) for stop in self.until), default=0)


def greedy_settings(
    settings: dict[str, Any], task: str, most: int | None, window: int
) -> dict[str, Any]:
    """lm-eval's settings of a generation in their normal form; `most` tokens, if it is given.

    Raises:
        ConfigError: they want sampling or beams, or the window holds nothing beside so many tokens.
    """
    kwargs = dict(normalize_gen_kwargs(settings, GENERATED_TOKENS))
    if kwargs["do_sample"]:
        raise ConfigError(
            f"{task} wants sampled text ({settings}); only greedy generation is supported"
        )
    if unknown := set(kwargs) - GREEDY_SETTINGS:
        raise ConfigError(
            f"{task} sets {', '.join(sorted(unknown))}; only greedy generation is supported"
        )
    if most is not None:
        kwargs["max_gen_toks"] = most
    if not 0 < kwargs["max_gen_toks"] < window:
        raise ConfigError(
            f"{task} wants {kwargs['max_gen_toks']} generated tokens, the window has {window}; "
            "evaluation.max_gen_toks=N takes fewer"
        )
    return kwargs


class CheckedTasks(TaskManager):
    """lm-eval's tasks, refused where they cannot be loaded or there is nothing to evaluate.

    documents: how many each of the tasks loaded last has.
    """

    documents: dict[str, int]
    _loaded: tuple[list[str], Any] | None = None

    def load(self, task_list: Any) -> Any:
        """What lm-eval's own returns; asked for the same tasks again, the same objects.

        Raises:
            ConfigError: a task's file is broken. IntegrityError: a task has no documents.
        """
        names = [str(name) for name in task_list]
        if self._loaded is None or self._loaded[0] != names:
            parts = [self._load_one(name) for name in names]
            keys = ("tasks", "groups", "group_map")
            loaded = {key: {k: v for part in parts for k, v in part[key].items()} for key in keys}
            for task in loaded["tasks"].values():
                aggregations = task.aggregation()
                for name in [
                    name for name, one in aggregations.items() if one is weighted_perplexity
                ]:
                    aggregations[name] = perplexity_or_infinity
            self.documents = {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
            if empty := [name for name, count in self.documents.items() if not count]:
                raise IntegrityError(f"no documents to evaluate: {', '.join(empty)}")
            self._loaded = names, loaded
        return self._loaded[1]

    def _load_one(self, name: str) -> Any:
        try:
            return super().load([name])
        except Q3QError:
            raise
        except (
            Exception
        ) as error:  # a task file is a program: its templates and functions may raise anything
            if isinstance(error, IndexError) and "size 0" in str(
                error
            ):  # `datasets`, asked for a first row
                raise IntegrityError(f"{name} has no documents to evaluate") from error
            entry = self.task_index.get(name)
            where = f" ({entry.yaml_path})" if entry is not None and entry.yaml_path else ""
            raise ConfigError(f"{name}{where} cannot be loaded: {_told(error)}") from error


def perplexity_or_infinity(items: Sequence[tuple[float, float]]) -> float:
    """lm-eval's `weighted_perplexity`, which ends in an OverflowError where that is too large for a number.

    items: log-likelihood and weight (words, bytes) of each document.
    """
    return exp_or_infinity(-weighted_mean(items))


def _told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def tasks_from(folders: Sequence[Path], wanted: Sequence[str]) -> CheckedTasks:
    """A manager that knows the wanted tasks. lm-eval's own thousands are read only if the folders lack one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(folder) for folder in folders]
    few = [
        str(OFFICIAL / folder)
        for folder in dict.fromkeys(SHIPPED[task] for task in wanted if task in SHIPPED)
    ]
    manager = CheckedTasks(include_path=[*few, *paths], include_defaults=False)
    known = set(manager.all_tasks)
    return manager if known.issuperset(wanted) else CheckedTasks(include_path=paths)


def refuse_namesakes(include: Path, wanted: Sequence[str]) -> None:
    """The user's task files must be readable, and not put themselves in the place of tasks that are there already:
    lm-eval would take them for the official ones, and say nothing.

    wanted: what is asked for. A tag of lm-eval's that the user's tasks bear too would mean these alone; that counts
    only if it is asked for, since whoever includes an official file has its tags.

    Raises:
        ConfigError: a file is broken, or defines a name that lm-eval or q3q defines.
    """
    own: dict[str, Path] = {}
    tags: set[str] = set()
    for path in sorted(include.rglob("*.yaml")):
        try:
            content = load_yaml(path, resolve_func=False)
        except Exception as error:
            raise ConfigError(
                f"evaluation.include_path: {path} cannot be read: {_told(error)}"
            ) from error
        name, borne = content.get("group", content.get("task")), content.get("tag") or []
        asked = {borne} & set(wanted) if isinstance(borne, str) else set(borne) & set(wanted)
        tags |= asked
        own |= dict.fromkeys([*asked, *([name] if isinstance(name, str) else [])], path)
    if not own:
        return
    # lm-eval's index says the same, and takes ten times as long to build.
    names = "|".join(map(re.escape, own))
    says = (
        rf"""^(?:(?:task|group|tag):|(?P<item>[ ]*-))[ ]*(["']?)(?P<name>{names})\2[ ]*(?:#.*)?$"""
    )
    defines = re.compile(says, re.MULTILINE)
    files = [
        path for path in OFFICIAL.rglob("*yaml*") if path.suffix in ("", ".yaml")
    ]  # some that are included have none
    for path in (*OWN_TASKS.rglob("*.yaml"), *files):
        for found in defines.finditer(path.read_text(encoding="utf-8")):
            if found["item"] is None or found["name"] in tags:
                raise ConfigError(
                    f"evaluation.include_path: {own[found['name']]} defines {found['name']}, which is a name of "
                    f"{'q3q' if path.is_relative_to(OWN_TASKS) else 'lm-eval'}'s; give it another"
                )


def examine(
    manager: CheckedTasks,
    tasks: Sequence[str],
    shots: Mapping[str, int],
    most: int | None,
    window: int,
) -> dict[str, dict[str, str]]:
    """Load tasks as a trial will, and refuse what it would refuse after hours of quantization, or not even notice.

    Args:
        shots: examples asked for, by task. most: tokens of a generated text, the task's own number if None. window: in
            tokens.

    Returns:
        For each of the tasks those that it consists of, with their types of output.

    Raises:
        ConfigError: a task cannot be loaded or run. IntegrityError: it has no documents.
    """
    found = {}
    for task in tasks:
        leaves = manager.load([task])["tasks"]
        for name, leaf in leaves.items():
            _refuse_unusable(name, leaf, shots.get(task), most, window)
        found[task] = {name: str(leaf.OUTPUT_TYPE) for name, leaf in leaves.items()}
    return found


def _refuse_unusable(
    name: str, task: Any, shots: int | None, most: int | None, window: int
) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"{name} runs the code that a model writes, which q3q does not do; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"{name} shows images or sound, and Qwen3 reads text; leave it out")
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise ConfigError(
            f"{name} says num_fewshot: 0 in its file, and lm-eval then shows no example: not {shots}"
        )
    if shots and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ConfigError(f"{name} reads whole texts and shows no example: not {shots}")
    if shots and not _has_examples(task):
        raise ConfigError(
            f"{name} has no examples but the questions themselves, so it cannot show {shots}"
        )
    needed = shots if shots is not None and own != 0 else own or 0
    if needed and len(there := list(task.fewshot_docs())) < needed:
        raise ConfigError(f"{name} is to show {needed} examples, and its data set has {len(there)}")
    if task.OUTPUT_TYPE == "generate_until":
        greedy_settings(task.get_config("generation_kwargs") or {}, name, most, window)


def _has_examples(task: Any) -> bool:
    """Whether examples come from elsewhere than the questions, which lm-eval falls back on."""
    config, given = task.config, getattr(task, "fewshot_cfg", None)
    asked = config.test_split or config.validation_split
    if given is not None and given.split is not None:
        return (
            given.split != asked or given.split == config.test_split
        )  # then no question is its own example
    if given is not None and given.samples is not None:
        return True
    if task.has_training_docs() and config.training_split != asked:
        return True
    return (
        bool(task.has_test_docs() and task.has_validation_docs())
        and config.validation_split != asked
    )


@dataclass(frozen=True)
class TaskScores:
    """metrics by `<task>/<metric>`, their 95 % intervals where lm-eval gives a standard error (and of unfinished
    thoughts), and its own results.

    samples: for each task a row a document (and filter), see `sample_row`. effort: what it cost, in tokens.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    effort: Effort = field(default_factory=Effort)


def run_tasks(
    model: Decoder,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    choose: Choose | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    chat: Chat = Chat(),
    max_gen_toks: int | None = None,
    max_length: int | None = None,
    journal: Path | None = None,
    identity: str = "",
    progress: Tell = lambda done, total: None,
) -> TaskScores:
    """Score lm-eval tasks through `lm_eval.simple_evaluate`.

    Args:
        limit: the first documents of each task, all if None. choose: instead, which ones (their numbers, ascending) of
            a task by its name and how many it has. num_fewshot, max_gen_toks: the task's own if None.
        include_path: a folder with the user's own task files. max_length: tokens of a window, the model's own if None.
        journal: folder where scores are kept as batches end; what it holds is not scored again. identity: whose scores.
        progress: told (requests done, in all).

    Raises:
        IntegrityError: a score is not finite, a task is empty, or a document has no sample or more than one.
    """
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # else its bootstrap forks this process, model and threads and all
    manager = tasks_from(
        [OWN_TASKS, *([Path(include_path)] if include_path is not None else [])], tasks
    )
    kept = None if journal is None else Journal(journal / SCORES, identity)
    lm = HarnessLM(
        model,
        tokenizer,
        progress,
        max_length=max_length,
        journal=kept,
        chat=chat,
        max_gen_toks=max_gen_toks,
    )
    try:
        manager.load(tasks)
        asked = asked_documents(manager.documents, limit, choose)
        answer: Any = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            limit=limit if choose is None else None,
            samples=None if choose is None else asked,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=1000,  # means have closed-form standard errors; 0 would switch those off too
            log_samples=True,
            apply_chat_template=chat.template,
            system_instruction=chat.system,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    finally:
        if kept is not None:
            kept.close()
    check_samples(answer["samples"], asked)
    metrics, intervals = read_metrics(answer["results"], shares(answer["samples"]))
    for task, finished in lm.finished.items() if chat.thinks else ():
        share, name = finished.count(False) / len(finished), f"unfinished/{task}"
        metrics[name], intervals[name] = share, share_interval(share, len(finished))
    samples = {
        task: [sample_row(sample) for sample in rows] for task, rows in answer["samples"].items()
    }
    results = {
        key: answer[key]
        for key in ("results", "n-samples", "versions", "configs", "group_subtasks")
        if key in answer
    }
    return TaskScores(metrics, intervals, results, samples, lm.effort)


def asked_documents(
    documents: Mapping[str, int], limit: int | None, choose: Choose | None
) -> dict[str, list[int]]:
    """The numbers of the documents that each task is scored on."""
    if choose is not None:
        return {task: list(choose(task, count)) for task, count in documents.items()}
    return {
        task: list(range(count if limit is None else min(count, limit)))
        for task, count in documents.items()
    }


def check_samples(
    samples: Mapping[str, Sequence[dict[str, Any]]], asked: Mapping[str, Sequence[int]]
) -> None:
    """Each document asked must have one sample of each filter, and no other has any.

    Raises:
        IntegrityError: that is not so.
    """
    for task, wanted in asked.items():
        by_filter: dict[str, list[int]] = {}
        for sample in samples.get(task, ()):
            by_filter.setdefault(sample["filter"], []).append(sample["doc_id"])
        for name, found in by_filter.items() or [("none", [])]:
            if sorted(found) != sorted(wanted):
                raise IntegrityError(
                    f"{task} (filter {name}): {len(found)} samples of {len(set(found))} documents, "
                    f"there should be {len(wanted)}"
                )


def sample_row(sample: dict[str, Any]) -> dict[str, Any]:
    """What statistics need of one of lm-eval's samples, and to know that two are about the same document.

    Returns:
        doc_id, doc_hash, prompt_hash, filter, target, the task's metrics, and for each of the document's requests
        log_likelihood (and greedy), or text.
    """
    row = {name: sample[name] for name in ("doc_id", "doc_hash", "prompt_hash", "filter", "target")}
    row.update((name, sample[name]) for name in sample["metrics"])
    answers = sample["filtered_resps"]
    if all(isinstance(answer, tuple) for answer in answers):
        row["log_likelihood"], row["greedy"] = (
            [answer[0] for answer in answers],
            [answer[1] for answer in answers],
        )
    elif all(isinstance(answer, float) for answer in answers):
        row["log_likelihood"] = list(answers)
    else:
        row["text"] = list(answers)
    return row


def shares(samples: Mapping[str, Sequence[dict[str, Any]]]) -> set[tuple[str, str]]:
    """Metric and filter of those that are 0 or 1 for every document that has them, of whatever task."""
    found: dict[tuple[str, str], bool] = {}
    for sample in chain.from_iterable(samples.values()):
        for name in sample["metrics"]:
            key, value = (name, sample["filter"]), sample[name]
            found[key] = found.get(key, True) and np.ndim(value) == 0 and value in (0, 1)
    return {key for key, share in found.items() if share}


def read_metrics(
    results: dict[str, dict[str, Any]], within_1: Collection[tuple[str, str]] = ()
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values by `<task>/<metric>` (and `/<filter>`, if one is named), and 95 % intervals.

    within_1: `shares`, whose intervals end at 0 and 1, as those of accuracies do.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for task, scores in results.items():
        for key, value in scores.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or not filtered or name.endswith("_stderr"):
                continue
            metric = f"{task}/{name}" + ("" if filtered == "none" else f"/{filtered}")
            metrics[metric] = float(value)
            error = scores.get(f"{name}_stderr,{filtered}")
            if isinstance(error, (int, float)):
                low, high = value - NORMAL_95 * error, value + NORMAL_95 * error
                share = name.startswith("acc") or (name, filtered) in within_1
                intervals[metric] = (max(0.0, low), min(1.0, high)) if share else (low, high)
    return metrics, intervals

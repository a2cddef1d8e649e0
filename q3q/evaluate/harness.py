"""lm-eval's tasks on our forward: the only file that imports lm_eval."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from q3q.errors import ConfigError, IntegrityError
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.encoding import LineEncoder, as_ids, encode_pair
from q3q.evaluate.generation import generate
from q3q.evaluate.journal import Journal, request_key
from q3q.evaluate.perplexity import NORMAL_95
from q3q.evaluate.prefixes import Ids
from q3q.evaluate.scoring import Effort, Request, Score, score
from q3q.models.checkpoint import end_tokens
from q3q.models.decoder import Decoder

OWN_TASKS = Path(__file__).parent / "tasks"
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

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Chat:
    """How prompts are put to a post-trained model: through its chat template, with or without thinking.

    template: apply it. thinking: the template's `enable_thinking`, None to leave it to the template. think_end: only
    what comes after it counts as the answer.
    """

    template: bool = False
    thinking: bool | None = None
    think_end: str = "</think>"
    system: str | None = None


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
        budget: TokenBudget | None = None,
    ) -> None:
        """progress: told (requests done, in all). max_length: the window in tokens, the model's own if None.

        journal: scores found there are not computed again, others go there as batches end.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.progress = progress
        self.max_length = max_length or model.facts.max_positions
        self.journal = journal
        self.chat = chat
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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token):
            add_special_tokens = False  # it is there already
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.encode(string, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
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
                self.encode.learn(text for context, more in some for text in (context.rstrip(), context + more))
            context, continuation = instance.args
            if context == "":
                ids = as_ids(self.tok_encode(continuation, add_special_tokens=False))
                prefix = as_ids([self.prefix_token_id])
                pair = (ids[:1], ids[1:]) if ids[:1].tolist() == prefix.tolist() else (prefix, ids)
            else:
                pair = encode_pair(encode, context, continuation)
            encoded.append(self._request(*pair, task=instance.task_name or "a task"))
        return [(found.log_likelihood, found.greedy) for found in self._score(encoded, self.progress)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        encoded = [self._request(as_ids(context), as_ids(target), "a task") for _, context, target in requests]
        return [(found.log_likelihood, found.greedy) for found in self._score(encoded, self.progress)]

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
                encoded.append(self._request(as_ids(context), as_ids(target), instance.task_name or "a task"))
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
            raise ConfigError(f"{task}: a context is nothing but spaces, so there is no token to begin with")
        inputs = context if len(continuation) == 1 else np.concatenate((context, continuation[:-1]))
        return Request(inputs[-self.max_length :], continuation, task)

    @torch.inference_mode()
    def _score(self, requests: Sequence[Request], tell: Tell) -> list[Score]:
        found: dict[int, Score] = {}
        keys: list[str] = []
        if self.journal is not None:
            keys = [request_key(b"score", r.inputs.tobytes(), r.targets.tobytes()) for r in requests]
            found = {i: Score(*known) for i, key in enumerate(keys) if (known := self.journal.get(key)) is not None}
        missing = [i for i in range(len(requests)) if i not in found]
        before = self.effort
        tell(len(found), len(requests))
        for ended, effort in score(self.model, [requests[i] for i in missing], self.budget):
            found.update((missing[i], one) for i, one in ended)
            if self.journal is not None:
                self.journal.add((keys[missing[i]], [one.log_likelihood, one.greedy]) for i, one in ended)
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
        wanted = [Generation.of(instance.args[1], instance.task_name or "a task", self) for instance in requests]
        answers: dict[int, str] = {}
        groups: dict[Generation, dict[bytes, list[int]]] = {}
        for i, (instance, generation) in enumerate(zip(requests, wanted, strict=True)):
            ids = as_ids(self.tok_encode(instance.args[0]) or [self.prefix_token_id])
            tokens = ids[-(self.max_length - generation.most) :].astype(">u4").tobytes()
            known = None if self.journal is None else self.journal.get(generation.key(tokens))
            if known is not None:
                answers[i] = known
            else:
                groups.setdefault(generation, {}).setdefault(tokens, []).append(i)
        self.progress(len(answers), len(requests))
        for generation, readers in groups.items():
            order = sorted(readers)
            contexts = [np.frombuffer(tokens, ">u4").astype(np.int32) for tokens in order]
            ended = partial(generation.ended, self.tokenizer)
            for number, generated in generate(self.model, contexts, generation.most, ended, self.budget):
                answer = generation.answer(generated, self.tokenizer)
                answers.update((i, answer) for i in readers[order[number]])
                if self.journal is not None:
                    self.journal.add([(generation.key(order[number]), answer)])
                self.progress(len(answers), len(requests))
        return [answers[i] for i in range(len(requests))]


@dataclass(frozen=True)
class Generation:
    """until: stop strings, the tokenizer's end-of-text token's among them. most: tokens. ends: tokens after which
    nothing comes, the tokenizer's and those of the model's generation_config.json. think_end: None without thinking."""

    until: tuple[str, ...]
    most: int
    ends: tuple[int, ...]
    think_end: str | None

    @classmethod
    def of(cls, settings: dict[str, Any], task: str, lm: HarnessLM) -> "Generation":
        """What lm-eval's settings of a request mean."""
        kwargs = dict(normalize_gen_kwargs(settings, GENERATED_TOKENS))
        if kwargs["do_sample"]:
            raise ConfigError(f"{task} wants sampled text ({settings}); only greedy generation is supported")
        if unknown := set(kwargs) - GREEDY_SETTINGS:
            raise ConfigError(f"{task} sets {', '.join(sorted(unknown))}; only greedy generation is supported")
        most = kwargs["max_gen_toks"]
        if not 0 < most < lm.max_length:
            raise ConfigError(f"{task} wants {most} generated tokens, the window has {lm.max_length}")
        end = lm.tokenizer.decode([lm.eot_token_id], skip_special_tokens=False)
        until = tuple(handle_stop_sequences(list(kwargs["until"]), eos=end))
        return cls(until, most, lm.end_tokens, lm.chat.think_end if lm.chat.thinking else None)

    def key(self, tokens: bytes) -> str:
        return request_key(b"generate", tokens, json.dumps(asdict(self)).encode())

    def ended(self, tokenizer: Any, tokens: list[int]) -> bool:
        """Whether a stop string is there. While the model thinks, none counts."""
        if tokens[-1] in self.ends:
            return True
        text = tokenizer.decode(tokens)
        if self.think_end is not None:
            _, thought, text = text.rpartition(self.think_end)
            if not thought:
                return False
        return any(stop in text for stop in self.until)

    def answer(self, tokens: list[int], tokenizer: Any) -> str:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answer: str = postprocess_generated_text(text, list(self.until), self.think_end)
        return answer


class CheckedTasks(TaskManager):
    """lm-eval's tasks, refused where there is nothing to evaluate; remembers how many documents each one has."""

    documents: dict[str, int]

    def load(self, task_list: Any) -> Any:
        try:
            loaded = super().load(task_list)
            self.documents = {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
            if empty := [name for name, count in self.documents.items() if not count]:
                raise IntegrityError(f"no documents to evaluate: {', '.join(empty)}")
        except IndexError as error:  # lm-eval looks at a task's first document while it loads it
            raise IntegrityError(f"a task has no documents to evaluate, among {', '.join(task_list)}") from error
        return loaded


def tasks_from(folders: Sequence[Path], wanted: Sequence[str]) -> CheckedTasks:
    """A manager that knows the wanted tasks. lm-eval's own thousands are read only if the folders lack one."""
    paths = [str(folder) for folder in folders]
    shipped = Path(lm_eval.tasks.__file__).parent
    few = [str(shipped / folder) for folder in dict.fromkeys(SHIPPED[task] for task in wanted if task in SHIPPED)]
    manager = CheckedTasks(include_path=[*few, *paths], include_defaults=False)
    known = set(manager.all_tasks)
    return manager if known.issuperset(wanted) else CheckedTasks(include_path=paths)


@dataclass(frozen=True)
class TaskScores:
    """metrics by `<task>/<metric>`, their 95 % intervals where lm-eval gives a standard error, and its own results.

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
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    chat: Chat = Chat(),
    max_length: int | None = None,
    journal: Path | None = None,
    identity: str = "",
    progress: Tell = lambda done, total: None,
) -> TaskScores:
    """Score lm-eval tasks through `lm_eval.simple_evaluate`.

    Args:
        limit: documents of each task, all if None. num_fewshot: the task's own if None.
        include_path: a folder with the user's own task files. max_length: tokens of a window, the model's own if None.
        journal: folder where scores are kept as batches end; what it holds is not scored again. identity: whose scores.
        progress: told (requests done, in all).

    Raises:
        IntegrityError: a score is not finite, a task is empty, or a document has no sample or more than one.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = tasks_from([OWN_TASKS, *([Path(include_path)] if include_path is not None else [])], tasks)
    kept = None if journal is None else Journal(journal / "scores.jsonl", identity)
    lm = HarnessLM(model, tokenizer, progress, max_length=max_length, journal=kept, chat=chat)
    try:
        answer: Any = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            limit=limit,
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
    check_samples(answer["samples"], manager.documents, limit)
    metrics, intervals = read_metrics(answer["results"])
    samples = {task: [sample_row(sample) for sample in rows] for task, rows in answer["samples"].items()}
    results = {
        key: answer[key] for key in ("results", "n-samples", "versions", "configs", "group_subtasks") if key in answer
    }
    return TaskScores(metrics, intervals, results, samples, lm.effort)


def check_samples(samples: dict[str, list[dict[str, Any]]], documents: dict[str, int], limit: int | None) -> None:
    """Each document, up to the limit, must have one sample (a filter)."""
    for task, count in documents.items():
        expected = count if limit is None else min(count, limit)
        rows = [(sample["doc_id"], sample["filter"]) for sample in samples.get(task, ())]
        found = len({document for document, _ in rows})
        if found != expected or len(set(rows)) != len(rows):
            raise IntegrityError(f"{task}: {len(rows)} samples of {found} documents, there should be {expected}")


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
        row["log_likelihood"], row["greedy"] = [answer[0] for answer in answers], [answer[1] for answer in answers]
    elif all(isinstance(answer, float) for answer in answers):
        row["log_likelihood"] = list(answers)
    else:
        row["text"] = list(answers)
    return row


def read_metrics(results: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values by `<task>/<metric>` (and `/<filter>`, if one is named), and 95 % intervals."""
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
                intervals[metric] = (max(0.0, low), min(1.0, high)) if name.startswith("acc") else (low, high)
    return metrics, intervals

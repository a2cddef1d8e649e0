"""Our decoder behind lm-eval's interface for models."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from q3q.errors import ConfigError
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.chat import CHATS, PLAIN_CHAT, Chat
from q3q.evaluate.encoding import LineEncoder, as_ids, encode_pair
from q3q.evaluate.generation import generate
from q3q.evaluate.harness.answers import Answer, Generation, Thought, greedy_settings
from q3q.evaluate.harness.requests import Encoded, EncodedInstance, Prompt
from q3q.evaluate.journal import Journal
from q3q.evaluate.prefixes import Ids
from q3q.evaluate.scorer import Scorer
from q3q.evaluate.scoring import Request
from q3q.models.checkpoint import end_tokens
from q3q.models.decoder import Decoder
from q3q.reporter import Steps, no_steps

LEARNT_TOGETHER = 1 << 12  # requests whose texts go to the tokenizer together


class HarnessLM(TemplateLM):
    """Our decoder behind lm-eval's interface; it answers what lm-eval's HFLM answers.

    Shared beginnings of requests run once, and only positions whose score is read go through the
    head.

    steps: receives the requests done and in all
    max_length: tokens of a window; the model's own if None
    journal: scores in it are not computed again; others are added as batches end
    max_gen_toks: most tokens of a generated text; the task's own number if None
    finished: by task, True for each generated text that ended after its thought
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        steps: Steps = no_steps,
        *,
        max_length: int | None = None,
        journal: Journal | None = None,
        chat: Chat = CHATS[PLAIN_CHAT],
        max_gen_toks: int | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.scorer = Scorer(model, steps, max_length=max_length, journal=journal, budget=budget)
        self.chat = chat
        self.max_gen_toks = max_gen_toks
        self.finished: dict[str, list[bool]] = {}
        self.batch_size = 1  # lm-eval prints it; batches here are packed by tokens
        self.encode = LineEncoder(tokenizer)

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{self.tokenizer.name_or_path}: neither the tokenizer (eos_token) nor the model "
                "(eos_token_id in generation_config.json or config.json) names the token that ends "
                "a text, which this task needs: add one of them"
            )
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a generated text: the tokenizer's and the model's own."""
        return tuple(sorted({self.eot_token_id, *end_tokens(Path(self.tokenizer.name_or_path))}))

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False  # it is there already
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.encode(string, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        thinking = {} if self.chat.thinking is None else {"enable_thinking": self.chat.thinking}
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **thinking,
        )

    def encode_all(self, instances: Sequence[Any]) -> list[Encoded]:
        """Encode requests of lm-eval's, each by its own type; one that is encoded stays as it is.

        Raises:
            ConfigError: a context or a continuation is empty, or a continuation fits no window.
        """
        # Continuations of one context follow each other; their requests share its array.
        encode = lru_cache(maxsize=64)(lambda text: as_ids(self.tok_encode(text)))
        encoded: list[Encoded] = []
        for number, instance in enumerate(instances):
            if number % LEARNT_TOGETHER == 0:
                self.encode.learn(_texts(instances[number : number + LEARNT_TOGETHER]))
            if isinstance(instance, EncodedInstance):
                encoded.append(instance.encoded)
            elif instance.request_type == "generate_until":
                prompt, settings = instance.args
                ids = as_ids(self.tok_encode(prompt) or [self.prefix_token_id])
                opens_thought = prompt.rstrip().endswith(self.chat.think_start)
                encoded.append(Prompt(ids, settings, opens_thought))
            elif instance.request_type == "loglikelihood_rolling":
                encoded.append(self._windows(instance))
            else:
                encoded.append(self._continuation(instance, encode))
        return encoded

    def _continuation(self, instance: Any, encode: Callable[[str], Ids]) -> tuple[Request]:
        context, continuation = instance.args
        if context == "":
            ids = as_ids(self.tok_encode(continuation, add_special_tokens=False))
            prefix = as_ids([self.prefix_token_id])
            pair = (ids[:1], ids[1:]) if ids[:1].tolist() == prefix.tolist() else (prefix, ids)
        else:
            pair = encode_pair(encode, context, continuation)
        return (self.scorer.request(*pair, task=_task_of(instance)),)

    def _windows(self, instance: Any) -> tuple[Request, ...]:
        """Encode a whole text: each token is predicted once, with one token of context at least."""
        [text] = instance.args
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return tuple(
            self.scorer.request(as_ids(context), as_ids(target), _task_of(instance))
            for context, target in map(make_disjoint_window, windows)
        )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._log_likelihoods([part for [part] in self._continuations(requests)])

    def _continuations(self, instances: Sequence[Any]) -> list[tuple[Request, ...]]:
        return [
            request for request in self.encode_all(instances) if not isinstance(request, Prompt)
        ]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._log_likelihoods(
            [
                self.scorer.request(as_ids(context), as_ids(target), "a task")
                for _, context, target in requests
            ]
        )

    def _log_likelihoods(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        return [(score.log_likelihood, score.greedy) for score in self.scorer.score(requests)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihoods of whole texts, each the sum over its windows."""
        texts = self._continuations(requests)
        owners = [number for number, windows in enumerate(texts) for _ in windows]
        scores = self.scorer.score([window for windows in texts for window in windows])
        totals = [0.0] * len(texts)
        for number, score in zip(owners, scores, strict=True):
            totals[number] += score.log_likelihood
        return totals

    def _generation(self, prompt: Prompt, task: str) -> Generation:
        """Return what lm-eval's settings of a request mean for this model."""
        kwargs = greedy_settings(prompt.settings, task, self.max_gen_toks, self.max_length)
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = tuple(handle_stop_sequences(list(kwargs["until"]), eos=end))
        thought = None
        if self.chat.thinks:
            # enable_thinking, or the template or the model itself begins a thought
            begun = bool(self.chat.thinking) or prompt.opens_thought
            thought = Thought(self.chat.think_start, self.chat.think_end, begun)
        return Generation(until, kwargs["max_gen_toks"], self.end_tokens, thought)

    @torch.inference_mode()
    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Return greedy continuations.

        Each ends before a stop string, at an end-of-text token, or after the task's most tokens.

        Raises:
            ConfigError: a task requires sampling or beams, or the model is streamed.
        """
        if self.model.streamed:
            tasks = ", ".join(sorted({_task_of(instance) for instance in requests}))
            raise ConfigError(
                f"{tasks} generates text, and this model is read from disk block by block, all of "
                "it for each token; leave the task out, or give the trial memory for the whole "
                "model"
            )
        prompts = [request for request in self.encode_all(requests) if isinstance(request, Prompt)]
        generations = [
            self._generation(prompt, _task_of(instance))
            for instance, prompt in zip(requests, prompts, strict=True)
        ]
        steps, journal = self.scorer.steps, self.scorer.journal
        answers: dict[int, Answer] = {}
        groups: dict[Generation, dict[bytes, list[int]]] = {}
        for i, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
            tokens = prompt.ids[-(self.max_length - generation.most) :].astype(">u4").tobytes()
            stored = None if journal is None else journal.get(generation.key(tokens))
            if stored is not None:
                answers[i] = Answer(*stored)
            else:
                groups.setdefault(generation, {}).setdefault(tokens, []).append(i)
        steps(len(answers), len(requests))
        for generation, readers in groups.items():
            order = sorted(readers)
            contexts = [np.frombuffer(tokens, ">u4").astype(np.int32) for tokens in order]
            ended = partial(generation.ended, self.tokenizer)
            for number, generated in generate(
                self.model, contexts, generation.most, ended, self.scorer.budget
            ):
                answer = generation.answer(generated, self.tokenizer)
                answers.update((i, answer) for i in readers[order[number]])
                if journal is not None:
                    journal.add([(generation.key(order[number]), [answer.text, answer.finished])])
                steps(len(answers), len(requests))
        for i, instance in enumerate(requests):
            self.finished.setdefault(_task_of(instance), []).append(answers[i].finished)
        return [answers[i].text for i in range(len(requests))]


def _texts(instances: Sequence[Any]) -> Iterator[str]:
    """Yield the texts of continuations that are not encoded yet, as they will be encoded."""
    for instance in instances:
        if instance.request_type == "loglikelihood" and not isinstance(instance, EncodedInstance):
            context, continuation = instance.args
            yield context.rstrip()
            yield context + continuation


def _task_of(instance: Any) -> str:
    return instance.task_name or "a task"

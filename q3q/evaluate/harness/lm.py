"""lm-eval's tasks on our forward: the only file that imports lm_eval."""

from collections.abc import Sequence
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
from q3q.evaluate.catalogue import Chat, Tell
from q3q.evaluate.encoding import LineEncoder, as_ids, encode_pair
from q3q.evaluate.generation import generate
from q3q.evaluate.harness.answers import (
    LEARNT_TOGETHER,
    Answer,
    Generation,
    Thought,
    greedy_settings,
)
from q3q.evaluate.journal import Journal, request_key
from q3q.evaluate.prefixes import Ids
from q3q.evaluate.scoring import Effort, Request, Score, score
from q3q.models.checkpoint import end_tokens
from q3q.models.decoder import Decoder


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
    def _generation(self, prompt: str, settings: dict[str, Any], task: str) -> Generation:
        """Return what lm-eval's settings of a request mean for this model."""
        kwargs = greedy_settings(settings, task, self.max_gen_toks, self.max_length)
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = tuple(handle_stop_sequences(list(kwargs["until"]), eos=end))
        thought = None
        if (
            self.chat.thinks
        ):  # enable_thinking, or the template or the model itself begins a thought
            open_already = bool(self.chat.thinking) or prompt.rstrip().endswith(
                self.chat.think_start
            )
            thought = Thought(self.chat.think_start, self.chat.think_end, open_already)
        return Generation(until, kwargs["max_gen_toks"], self.end_tokens, thought)

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
            wanted.append(self._generation(prompt, settings, instance.task_name or "a task"))
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

"""Score continuations on a model, and keep the scores in a journal."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from q3q.errors import ConfigError
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.journal import Journal, begin_key, end_key
from q3q.evaluate.prefixes import Ids
from q3q.evaluate.scoring import Effort, Request, Score, score
from q3q.models.decoder import Decoder
from q3q.reporter import Steps, no_steps


class Scorer:
    """Scores continuations on one model.

    max_length: tokens of a window, by default the model's
    journal: scores in it are not computed again; others are added as batches end
    steps: receives the requests done and in all
    budget: tokens of a batch
    effort: the cost so far
    """

    def __init__(
        self,
        model: Decoder,
        steps: Steps = no_steps,
        *,
        max_length: int | None = None,
        journal: Journal | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        self.model, self.steps, self.journal = model, steps, journal
        self.max_length = max_length or model.facts.max_positions
        self.budget = budget or TokenBudget.measured(model)
        self.effort = Effort()

    def request(self, context: Ids, continuation: Ids, task: str) -> Request:
        """Return the request; the left end of what does not fit into the window is cut, as in HFLM.

        Raises:
            ConfigError: the context is empty, or the continuation is or does not fit.
        """
        if not 0 < len(continuation) <= self.max_length:
            raise ConfigError(
                f"{task}: a continuation has {len(continuation)} tokens; a window of "
                f"{self.max_length} tokens can score 1 to {self.max_length}"
            )
        if not len(context):
            raise ConfigError(
                f"{task}: a context is nothing but spaces, so there is no token to begin with"
            )
        inputs = context if len(continuation) == 1 else np.concatenate((context, continuation[:-1]))
        if len(inputs) > self.max_length:
            inputs = inputs[-self.max_length :]
        return Request(inputs, continuation, task)

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return each request's score.

        Raises:
            IntegrityError: a log-likelihood is not finite.
        """
        scores: dict[int, Score] = {}
        keys: list[str] = []
        if self.journal is not None:
            keys = score_keys(requests)
            stored = {i: self.journal.get(key) for i, key in enumerate(keys)}
            scores = {i: Score(*entry) for i, entry in stored.items() if entry is not None}
        missing = [i for i in range(len(requests)) if i not in scores]
        before = self.effort
        self.steps(len(scores), len(requests))
        for batch, effort in score(self.model, [requests[i] for i in missing], self.budget):
            new = {missing[i]: result for i, result in batch}
            scores.update(new)
            if self.journal is not None:
                entries = ((keys[i], [s.log_likelihood, s.greedy]) for i, s in new.items())
                self.journal.add(entries)
            self.effort = before + effort
            self.steps(len(scores), len(requests))
        return [scores[i] for i in range(len(requests))]


def score_keys(requests: Sequence[Request]) -> list[str]:
    """Return each request's `request_key`; arrays that requests share are digested once."""
    begun: dict[int, Any] = {}
    ends: dict[int, bytes] = {}
    keys = []
    for request in requests:
        inputs, targets = id(request.inputs), id(request.targets)
        if inputs not in begun:
            begun[inputs] = begin_key(b"score", request.inputs.tobytes())
        if targets not in ends:
            ends[targets] = request.targets.tobytes()
        keys.append(end_key(begun[inputs], ends[targets]))
    return keys

"""Greedy continuations with cached keys and values; what contexts have in common runs once."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from q3q.errors import IntegrityError
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.prefixes import Ids, Tape
from q3q.evaluate.scoring import run_tape
from q3q.models.attention import Cached, KeysValues, Lengths, takes_ragged
from q3q.models.decoder import Decoder

# Keys and values of all rows that are continued together: see `cache_bytes`.
CACHE_BYTES, LEAST_CACHE_BYTES = 1 << 30, 1 << 26


def generate(
    model: Decoder,
    contexts: Sequence[Ids],
    most: int,
    ended: Callable[[list[int]], bool],
    budget: TokenBudget,
) -> Iterator[tuple[int, list[int]]]:
    """Each context by its number, with the most likely token after it, again and again.

    Args:
        contexts: distinct and sorted. most: tokens to generate, at least 1. ended: whether the tokens generated so far
            are enough.

    Raises:
        IntegrityError: a logit is not finite.
    """
    facts = model.facts
    token_bytes = (
        2 * facts.layers * facts.kv_heads * facts.head_dim * model.embedding_VH.element_size()
    )
    reader = _Reader(model, contexts, budget)
    first = 0
    while first < len(contexts):
        room = cache_bytes(model.device.type, model.activations, budget.tokens * token_bytes)
        longest, last = 0, first
        while last < len(contexts):
            longest = max(longest, len(contexts[last]))
            if last > first and (last + 1 - first) * (longest + most) * token_bytes > room:
                break
            last += 1
        for row, tokens in _continue(model, *reader.read(last, most), most, ended):
            yield first + row, tokens
        first = last


def cache_bytes(device: str, spare: int | None, ahead: int) -> int:
    """What keys and values of the rows that are continued together may take, in bytes.

    Half of what is free beyond the model, CACHE_BYTES at least on a GPU and at most on a CPU, less the keys and values
    of a batch that the reader holds of rows to come meanwhile, for which no more than half of that is kept.

    Args:
        spare: bytes free beyond the model, None if nobody knows. ahead: bytes of a batch's keys and values.
    """
    room = CACHE_BYTES
    if spare is not None:
        room = (max if device == "cuda" else min)(CACHE_BYTES, spare // 2)
    return max(room - min(ahead, room // 2), LEAST_CACHE_BYTES)


def _continue(
    model: Decoder,
    next_B: Tensor,
    caches: list[Cached],
    lengths: Lengths,
    most: int,
    ended: Callable[[list[int]], bool],
) -> Iterator[tuple[int, list[int]]]:
    """Rows go on together, each after its own past. See `_Reader.read`."""
    rows = list(range(len(next_B)))
    texts: list[list[int]] = [[] for _ in rows]
    unfinished = set(rows)
    while True:
        for row, token in zip(rows, next_B.tolist(), strict=True):
            if row in unfinished:
                texts[row].append(token)
                if len(texts[row]) == most or ended(texts[row]):
                    unfinished.remove(row)
                    yield row, texts[row]
        if not unfinished:
            return
        if 2 * len(unfinished) <= len(
            rows
        ):  # copying the caches costs more than a few steps of rows that have ended
            stay = [i for i, row in enumerate(rows) if row in unfinished]
            rows = [rows[i] for i in stay]
            stay_R = torch.tensor(stay, device=model.device)
            next_B, lengths = next_B[stay_R], lengths.select(stay_R)
            for k, cache in enumerate(
                caches
            ):  # one by one, so that only one block's are there twice
                caches[k] = cache.select(stay_R, lengths)
        hidden_BH = model.hidden(next_B[:, None], caches)[:, 0]
        lengths.grow()
        next_B = _most_likely(model, hidden_BH)


class _Reader:
    """The contexts as one tape, of which so much is run as the rows that are wanted next need.

    Of what has run, keys and values are held as long as a row to come begins with those tokens, or is not there yet.
    """

    def __init__(self, model: Decoder, contexts: Sequence[Ids], budget: TokenBudget) -> None:
        self._model = model
        self._tape = Tape(list(contexts), takes_ragged(model.device, model.norm_H.dtype))
        self._end_B = np.array([place[-1] for place in self._tape.places()])
        self._places = self._tape.places()
        self._row, self._ran = 0, 0
        self._next: list[
            Tensor
        ] = []  # the most likely token after each row from `_row` on, as far as the tape has run
        self._held_T = np.zeros(
            0, np.int64
        )  # places on the tape, ascending, and of each block their keys and values
        self._keys_values: list[list[KeysValues]] = [[] for _ in model.blocks]
        self._run = run_tape(model, self._tape, budget, self._end_B, self._keys_values)

    def read(self, last: int, room: int) -> tuple[Tensor, list[Cached], Lengths]:
        """Of the rows before `last` that were not read yet: the most likely token after each [B], each block's keys and
        values, with room for as many more, and how many these are."""
        until = self._tape.begin[last]
        while self._ran < until:
            first, self._ran, hidden_PH = next(self._run)
            self._held_T = np.concatenate([self._held_T, np.arange(first, self._ran)])
            if len(hidden_PH):
                self._next += _most_likely(self._model, hidden_PH).unbind()
        pasts = [np.searchsorted(self._held_T, next(self._places)) for _ in range(self._row, last)]
        lengths = Lengths(
            torch.tensor([len(past) for past in pasts], device=self._model.device),
            max(map(len, pasts)),
        )
        index_BP = torch.zeros(len(pasts), lengths.longest, dtype=torch.int64)
        for row_P, past in zip(index_BP, pasts, strict=True):
            row_P[: len(past)] = torch.from_numpy(past)
        index_BP = index_BP.to(self._model.device)
        # The tape is a tree's, depth first: of what was read, the next rows have at most the last one's beginning.
        shared = self._tape.shared[last] if last < len(self._tape.shared) else 0
        stay = np.concatenate([pasts[-1][:shared], np.flatnonzero(self._held_T >= until)])
        stay_T = torch.from_numpy(stay).to(self._model.device)
        caches = []
        for block in self._keys_values:
            key_KTD, value_KTD = (torch.cat(states, dim=1) for states in zip(*block, strict=True))
            block[:] = [(key_KTD[:, stay_T], value_KTD[:, stay_T])]
            caches.append(Cached.gathered(key_KTD, value_KTD, index_BP, lengths, room))
        self._held_T = self._held_T[stay]
        next_B, self._next = torch.stack(self._next[: len(pasts)]), self._next[len(pasts) :]
        self._row = last
        return next_B, caches, lengths


def _most_likely(model: Decoder, hidden_PH: Tensor) -> Tensor:
    found = []
    for _, logits_CV in model.logits(hidden_PH):
        best = logits_CV.max(dim=1)
        if not torch.isfinite(best.values).all():
            raise IntegrityError("a logit of the generation is not finite")
        found.append(best.indices)
    return torch.cat(found)

"""Greedy continuations, each after its cached past; shared prefixes of the contexts run once."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from q3q.errors import IntegrityError
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.prefixes import Ids, PackedTree
from q3q.evaluate.tree_pass import run_tree
from q3q.models.cache import Cached, Lengths, Past
from q3q.models.decoder import Decoder
from q3q.models.footprint import recurrent_bytes, recurrent_rows
from q3q.models.recurrence import join

# Bounds of the pasts of all rows that are continued together: see `cache_bytes`.
CACHE_BYTES, LEAST_CACHE_BYTES = 1 << 30, 1 << 26


def generate(
    model: Decoder,
    contexts: Sequence[Ids],
    most: int,
    ended: Callable[[list[int]], bool],
    budget: TokenBudget,
) -> Iterator[tuple[int, list[int]]]:
    """Yield each context's number and its greedy continuation, as they end.

    Args:
        contexts: token ids, distinct and sorted.
        most: tokens to generate, at least 1.
        ended: returns True if the tokens generated so far are enough.

    Raises:
        IntegrityError: a logit is not finite.
    """
    facts, item_bytes = model.facts, model.norm_H.element_size()
    widths = (facts.family.state_width(facts, k) for k in range(facts.layers))
    token_bytes, row_bytes = sum(widths) * item_bytes, sum(recurrent_bytes(facts))
    free = partial(cache_bytes, model.device.type, model.activations)
    ends = max(1, free(budget.tokens * token_bytes) // (4 * row_bytes)) if row_bytes else 0
    reader, first = _Reader(model, contexts, budget, ends), 0
    while first < len(contexts):
        room = free(budget.tokens * token_bytes + ends * row_bytes)
        longest, last = 0, first
        while last < len(contexts):
            longest = max(longest, len(contexts[last]))
            each = (longest + most) * token_bytes + row_bytes
            if last > first and (last + 1 - first) * each > room:
                break
            last += 1
        for row, tokens in _continue(model, *reader.read(last, most), most, ended):
            yield first + row, tokens
        first = last


def cache_bytes(device: str, spare: int | None, ahead: int) -> int:
    """Return the bytes that the pasts of rows continued together may take.

    This is half of what is free beyond the model, at least CACHE_BYTES on a GPU and at most
    CACHE_BYTES on a CPU, less what the reader holds of the later rows of its last batch. At most
    half is set aside for that batch.

    Args:
        spare: bytes free beyond the model, None if unknown.
        ahead: bytes of a batch's keys and values, and of its rows' states.
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
    """Continue rows together, each after its own past; yield those that end."""
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
        # Copying the caches costs more than a few steps of rows that have ended.
        if 2 * len(unfinished) <= len(rows):
            stay = [i for i, row in enumerate(rows) if row in unfinished]
            rows = [rows[i] for i in stay]
            stay_R = torch.tensor(stay, device=model.device)
            next_B, lengths = next_B[stay_R], lengths.select(stay_R)
            for k, cache in enumerate(caches):  # only one block's cache exists twice at a time
                caches[k] = cache.select(stay_R, lengths)
        hidden_BH = model.hidden(next_B[:, None], caches)[:, 0]
        lengths.grow()
        next_B = _most_likely(model, hidden_BH)


class _Reader:
    """The contexts as one tree, which runs as far as the next rows need.

    Keys and values of tokens that have run are held as long as a later row may begin with them, and
    the state of a recurrence behind a row's last token until the row is read.

    Args:
        ends: most rows that end in a batch, 0 for any number.
    """

    def __init__(
        self, model: Decoder, contexts: Sequence[Ids], budget: TokenBudget, ends: int
    ) -> None:
        self._model = model
        self._tree = PackedTree(
            list(contexts),
            model.varlen,
            recurrent_rows(model.facts, model.device.type),
            ends,
            model.chunk,
        )
        last_B = np.array([positions[-1] for positions in self._tree.positions()])
        self._positions = self._tree.positions()
        self._row, self._ran = 0, 0
        # The most likely token after each row from `_row` on, as far as the tree has run.
        self._next: list[Tensor] = []
        # Positions in the tree, ascending, whose keys and values are held; what is held, by block.
        self._held_T = np.zeros(0, np.int64)
        self._held: list[list[Past]] = [[] for _ in model.blocks]
        self._run = run_tree(model, self._tree, budget, last_B, self._held)

    def read(self, last: int, room: int) -> tuple[Tensor, list[Cached], Lengths]:
        """Read the next rows, up to row `last` - 1.

        Returns:
            The most likely token after each row [B], each block's cache with room for `room` more
            tokens, and the rows' lengths.
        """
        until = self._tree.begin[last]
        while self._ran < until:
            first, self._ran, hidden_PH = next(self._run)
            self._held_T = np.concatenate([self._held_T, np.arange(first, self._ran)])
            if len(hidden_PH):
                self._next += _most_likely(self._model, hidden_PH).unbind()
        rows = range(self._row, last)
        pasts = [np.searchsorted(self._held_T, next(self._positions)) for _ in rows]
        counts = [len(past) for past in pasts]
        lengths = Lengths(torch.tensor(counts, device=self._model.device), max(counts))
        index_BP = torch.zeros(len(pasts), lengths.longest, dtype=torch.int64)
        for row_P, past in zip(index_BP, pasts, strict=True):
            row_P[: len(past)] = torch.from_numpy(past)
        index_BP = index_BP.to(self._model.device)
        # Depth first, a later row shares with earlier ones only what it shares with the last.
        shared = self._tree.shared[last] if last < len(self._tree.shared) else 0
        stay = np.concatenate([pasts[-1][:shared], np.flatnonzero(self._held_T >= until)])
        stay_T = torch.from_numpy(stay).to(self._model.device)
        caches = []
        for block in self._held:
            read, block[:] = _divided(block, len(pasts), stay_T)
            caches.append(Cached.gathered(read, index_BP, lengths, room))
        self._held_T = self._held_T[stay]
        next_B, self._next = torch.stack(self._next[: len(pasts)]), self._next[len(pasts) :]
        self._row = last
        return next_B, caches, lengths


def _divided(held: Sequence[Past], rows: int, stay_T: Tensor) -> tuple[Past, list[Past]]:
    """Return what the next rows read of a block's past, and what is held after them."""
    keys_values, later, state, rest = None, None, join([p.state for p in held if p.state]), None
    if all(past.keys_values for past in held):
        key_KTD, value_KTD = (
            torch.cat(states, dim=1)
            for states in zip(*(past.keys_values or () for past in held), strict=True)
        )
        keys_values, later = (key_KTD, value_KTD), (key_KTD[:, stay_T], value_KTD[:, stay_T])
    if state is not None:
        # Copied, as a part of a tensor would keep all of it.
        rest = tuple(x[rows:].clone() for x in state)
        state = tuple(x[:rows].clone() for x in state)
    return Past(keys_values, state), [Past(later, rest)]


def _most_likely(model: Decoder, hidden_PH: Tensor) -> Tensor:
    tokens = []
    for _, logits_CV in model.logits(hidden_PH):
        best = logits_CV.max(dim=1)
        if not torch.isfinite(best.values).all():
            raise IntegrityError("a logit of the generation is not finite")
        tokens.append(best.indices)
    return torch.cat(tokens)

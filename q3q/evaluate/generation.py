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

# Keys and values of all rows that are continued together, at least; on a GPU half of what is free beyond the model.
CACHE_BYTES = 1 << 30


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
    token_bytes = 2 * facts.layers * facts.kv_heads * facts.head_dim * model.embedding_VH.element_size()
    room = CACHE_BYTES
    if model.device.type == "cuda" and model.activations is not None:
        room = max(room, model.activations // 2)
    first = 0
    while first < len(contexts):
        longest, last = 0, first
        while last < len(contexts):
            longest = max(longest, len(contexts[last]))
            if last > first and (last + 1 - first) * (longest + most) * token_bytes > room:
                break
            last += 1
        for row, tokens in _generate_together(model, contexts[first:last], most, ended, budget):
            yield first + row, tokens
        first = last


def _generate_together(
    model: Decoder, contexts: Sequence[Ids], most: int, ended: Callable[[list[int]], bool], budget: TokenBudget
) -> Iterator[tuple[int, list[int]]]:
    next_B, caches, lengths = _read(model, contexts, most, budget)
    rows = list(range(len(contexts)))
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
        if 2 * len(unfinished) <= len(rows):  # copying the caches costs more than a few steps of rows that have ended
            stay = [i for i, row in enumerate(rows) if row in unfinished]
            rows = [rows[i] for i in stay]
            stay_R = torch.tensor(stay, device=model.device)
            next_B, lengths = next_B[stay_R], lengths.select(stay_R)
            caches = [cache.select(stay_R, lengths) for cache in caches]
        hidden_BH = model.hidden(next_B[:, None], caches)[:, 0]
        lengths.grow()
        next_B = _most_likely(model, hidden_BH)


def _read(
    model: Decoder, contexts: Sequence[Ids], room: int, budget: TokenBudget
) -> tuple[Tensor, list[Cached], Lengths]:
    """The most likely token after each context [B], each block's keys and values of them, and how many these are."""
    tape = Tape(list(contexts), takes_ragged(model.device, model.norm_H.dtype))
    places = [np.array(place) for place in tape.places()]
    ends_B = torch.tensor([int(place[-1]) for place in places])
    next_B = torch.zeros(len(contexts), dtype=torch.int64, device=model.device)
    keys_values: list[list[KeysValues]] = [[] for _ in model.blocks]
    wanted_P = ends_B.unique()
    for first, stop, hidden_PH in run_tape(model, tape, budget, wanted_P.numpy(), keys_values):
        here = (ends_B >= first) & (ends_B < stop)
        if here.any():
            rows_P = ends_B[here].unique(return_inverse=True)[1].to(model.device)
            next_B[here.to(model.device)] = _most_likely(model, hidden_PH)[rows_P]
    counts = [len(place) for place in places]
    lengths = Lengths(torch.tensor(counts, device=model.device), max(counts))
    index_BP = torch.zeros(len(places), lengths.longest, dtype=torch.int64)
    for row, place in zip(index_BP, places, strict=True):
        row[: len(place)] = torch.from_numpy(place)
    index_BP = index_BP.to(model.device)
    caches = []
    for block in keys_values:
        key_KTD, value_KTD = (torch.cat(states, dim=1) for states in zip(*block, strict=True))
        block.clear()
        caches.append(Cached.gathered(key_KTD, value_KTD, index_BP, lengths, room))
    return next_B, caches, lengths


def _most_likely(model: Decoder, hidden_PH: Tensor) -> Tensor:
    found = []
    for _, logits_CV in model.logits(hidden_PH):
        best = logits_CV.max(dim=1)
        if not torch.isfinite(best.values).all():
            raise IntegrityError("a logit of the generation is not finite")
        found.append(best.indices)
    return torch.cat(found)

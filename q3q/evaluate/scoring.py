"""Log-likelihoods of continuations: each token of their prefix tree runs once, each position asked is read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from q3q.errors import IntegrityError
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.prefixes import Batch, Ids, Tape
from q3q.models.attention import KeysValues, Tree
from q3q.models.decoder import Decoder


@dataclass(frozen=True)
class Request:
    """inputs: the tokens that run, context and all but the last of the continuation. targets: the continuation.

    task: whose request it is, for messages.
    """

    inputs: Ids
    targets: Ids
    task: str


@dataclass(frozen=True)
class Score:
    """log_likelihood: natural, of the whole continuation. greedy: each of its tokens is the most likely one."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Effort:
    """What scoring cost, in tokens. asked: of all requests' inputs. unique: of their prefix tree. computed: run.

    logits: positions that went through the head. attended, padded: query slots of attention, and the empty ones among
    them; elsewhere nothing is padded.
    """

    asked: int = 0
    unique: int = 0
    computed: int = 0
    logits: int = 0
    attended: int = 0
    padded: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def score(
    model: Decoder, requests: Sequence[Request], budget: TokenBudget
) -> Iterator[tuple[list[tuple[int, Score]], Effort]]:
    """As each batch ends, the requests (by number) that it completed, and the effort so far.

    Raises:
        IntegrityError: a log-likelihood is not finite.
    """
    tape, readers = lay_out(requests)
    reads = Reads.of(tape, readers, requests)
    total_R, greedy_R = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
    left_R = np.array([len(request.targets) for request in requests])
    effort = Effort(sum(len(request.inputs) for request in requests), len(tape))
    for batch, hidden_TH in run_tape(model, tape, budget):
        part = reads.within(batch.first, batch.stop)
        position_P, row_R = np.unique(part.position, return_inverse=True)
        effort = replace(
            effort,
            computed=effort.computed + batch.stop - batch.first,
            logits=effort.logits + len(position_P),
            attended=tape.attended,
            padded=tape.padded,
        )
        ended: list[tuple[int, Score]] = []
        if len(part.owner):
            rows_P = torch.from_numpy(position_P - batch.first).to(hidden_TH.device)
            found, best = model.log_likelihoods(
                hidden_TH[rows_P], torch.from_numpy(part.target), torch.from_numpy(row_R)
            )
            likelihood = found.double().cpu().numpy()
            if not np.isfinite(likelihood).all():
                task = requests[part.owner[np.flatnonzero(~np.isfinite(likelihood))[0]]].task
                raise IntegrityError(f"{task}: a log-likelihood is not finite")
            np.add.at(total_R, part.owner, likelihood)
            np.logical_and.at(greedy_R, part.owner, best.cpu().numpy())
            np.subtract.at(left_R, part.owner, 1)
            for owner in np.unique(part.owner):
                if not left_R[owner]:
                    ended.append((int(owner), Score(float(total_R[owner]), bool(greedy_R[owner]))))
        yield ended, effort


def run_tape(
    model: Decoder, tape: Tape, budget: TokenBudget, keys_values: list[list[KeysValues]] | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch of the tape and its final hidden states [T, H].

    keys_values: a list for each block that takes each batch's keys and values [K, T, D].
    """
    kept: list[KeysValues | None] = [None] * len(model.blocks)

    def attempt(most: int) -> tuple[int, tuple[Batch, Tensor, list[Tree]]]:
        batch = tape.next_batch(most).to(model.device)
        attentions = [batch.attention(before, None if keys_values is None else []) for before in kept]
        ids_1T = torch.from_numpy(tape.ids[batch.first : batch.stop].astype(np.int64))[None]
        return batch.stop - batch.first, (batch, model.hidden(ids_1T, attentions)[0], attentions)

    while not tape.done:
        batch, hidden_TH, attentions = budget.run(attempt)
        tape.advance()
        kept = [attention.kept for attention in attentions]
        for block, attention in zip(keys_values or (), attentions, strict=False):
            block.extend(attention.fresh or ())
        yield batch, hidden_TH


@dataclass(frozen=True)
class Reads:
    """Which targets are asked where: places on the tape (ascending), target tokens, and the requests that ask; [R]."""

    position: np.ndarray
    target: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, tape: Tape, readers: Sequence[Sequence[int]], requests: Sequence[Request]) -> "Reads":
        """readers: for each text of the tape, the requests whose inputs it is."""
        positions, targets, owners = [], [], []
        for places, numbers in zip(tape.places(), readers, strict=True):
            for number in numbers:
                target = requests[number].targets
                positions.append(places[-len(target) :].copy())
                targets.append(target.astype(np.int64))
                owners.append(np.full(len(target), number))
        if not positions:
            return cls(*(np.zeros(0, np.int64) for _ in range(3)))
        position, target, owner = map(np.concatenate, (positions, targets, owners))
        order = np.argsort(position, kind="stable")
        return cls(position[order], target[order], owner[order])

    def within(self, first: int, stop: int) -> "Reads":
        """Those of tokens first .. stop - 1."""
        low, high = np.searchsorted(self.position, [first, stop])
        return Reads(self.position[low:high], self.target[low:high], self.owner[low:high])


def lay_out(requests: Sequence[Request]) -> tuple[Tape, list[list[int]]]:
    """The tape of all distinct inputs, and the requests that each of its texts serves."""
    readers: dict[bytes, list[int]] = {}
    for number, request in enumerate(requests):
        # Big-endian bytes sort as the tokens do.
        readers.setdefault(request.inputs.astype(">u4").tobytes(), []).append(number)
    order = sorted(readers)
    return Tape([requests[readers[key][0]].inputs for key in order]), [readers[key] for key in order]

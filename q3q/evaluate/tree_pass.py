"""A prefix tree's batches on their way through the model, and what each block keeps between them.

Shapes: T tokens of a batch, P of its tokens that are read, K key-value heads, D head_dim, H hidden.
"""

from collections.abc import Iterator
from copy import copy
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from q3q.evaluate.budget import TokenBudget, pass_tokens
from q3q.evaluate.prefixes import PackedTree, Positions, TreeBatch
from q3q.models.attention import TreeAttention
from q3q.models.cache import NOTHING, Past
from q3q.models.decoder import Decoder
from q3q.models.spool import Spool
from q3q.models.transfer import to_device


def run_tree(
    model: Decoder,
    tree: PackedTree,
    budget: TokenBudget,
    read_P: Positions | None = None,
    left: list[list[Past]] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield each batch's range of tokens in the tree (first, stop), and its final states [P, H].

    A model in memory runs batch by batch, a streamed one many batches in one pass, block by block.

    Args:
        read_P: positions in the tree, ascending, whose states are read; all if None. Only these go
            through the last block beyond its attention.
        left: a list for each block, to which is appended what each batch leaves in it: keys and
            values [K, T, D], and states behind texts' ends if the tree keeps them. Not of a
            streamed model.
    """
    path: Paths | None = None

    def attempt(batch_tokens: int) -> tuple[int, tuple[TreePass, Iterator[Tensor]]]:
        keep = left is not None
        tree_pass = TreePass(model, tree, batch_tokens, read_P, path, keep=keep)
        states = model.states(tree_pass.ids, tree_pass.attend)
        # Whatever could take too much memory has run when the first states are there.
        states = chain([next(states)], states)
        tree_pass.end_block()
        return 0 if model.streamed else len(tree_pass.ids[0][0]), (tree_pass, states)

    while not tree.done:
        tree_pass, states = budget.run(attempt)
        tree.follow(tree_pass.tree)
        path = tree_pass.path
        for block, batch in zip(left or (), tree_pass.left, strict=False):
            block.append(batch)
        for (first, stop), hidden_1PH in zip(tree_pass.bounds, states, strict=True):
            yield first, stop, hidden_1PH[0]


class Paths:
    """What each block keeps of the path on which the next pass begins, in a spool."""

    def __init__(self, memory: int | None) -> None:
        self._spool = Spool(memory)
        self._blocks: list[tuple[range, range]] = []  # of keys and values, and of states

    def append(self, path: Past) -> None:
        """Add the next block's."""
        places = []
        for tensors in path:
            begin = len(self._spool)
            self._spool.extend(tensors or ())
            places.append(range(begin, len(self._spool)))
        self._blocks.append((places[0], places[1]))

    def __getitem__(self, k: int) -> Past:
        keys_values, state = (tuple(self._spool[i] for i in place) for place in self._blocks[k])
        return Past((keys_values[0], keys_values[1]) if keys_values else None, state or None)


class TreePass:
    """Batches of a tree that go through the model together, block by block.

    tree: a copy of the tree that has gone past them.
    bounds: each batch's first token, and the one behind its last.
    ids: each batch's tokens [1, T].
    path: what the next pass needs.
    left: what a pass of a single batch leaves in each block, if asked for.
    """

    def __init__(
        self,
        model: Decoder,
        tree: PackedTree,
        batch_tokens: int,
        read_P: Positions | None,
        past: Paths | None,
        *,
        keep: bool = False,
    ) -> None:
        """Plan the batches.

        Args:
            batch_tokens: most tokens of a batch.
            read_P: see `run_tree`.
            past: `path` of the pass before this one.
            keep: keep `left`.
        """
        self.tree, self.path = copy(tree), Paths(model.activations)
        self.bounds: list[tuple[int, int]] = []
        self.left: list[Past] = []
        self._keep = keep
        room = pass_tokens(model)
        tokens = 0
        while not self.tree.done and (not self.bounds or tokens < room):
            self._batch = self.tree.next_batch(batch_tokens)
            self.tree.advance()
            self.bounds.append((self._batch.first, self._batch.stop))
            tokens = self._batch.stop - self.bounds[0][0]
        self.ids = [torch.from_numpy(tree.ids[a:b].astype(np.int64))[None] for a, b in self.bounds]
        self._model, self._start, self._batch_tokens = model, copy(tree), batch_tokens
        self._read_P, self._past = read_P, past
        self._replanned: PackedTree | None = None
        self._attention: TreeAttention | None = None

    def attend(self, k: int, b: int) -> TreeAttention:
        """Return batch b's attention in block k, for `Decoder.states`."""
        if b:
            assert self._attention is not None
            path = Past(self._attention.path, self._attention.state)
        else:
            self.end_block()
            path = NOTHING if self._past is None else self._past[k]
        last = k == len(self._model.blocks) - 1
        read_index = self._read_index(*self.bounds[b]) if last else None
        self._attention = self._planned(b).attention(path, read_index)
        return self._attention

    def end_block(self) -> None:
        """Keep what the last batch left in a block, if one has run."""
        attention = self._attention
        if attention is not None:
            self.path.append(Past(attention.path, attention.state))
            if self._keep:
                self.left.append(Past(attention.batch_keys_values, attention.ends))
        self._attention = None

    def _planned(self, b: int) -> TreeBatch:
        """Plan batch b, of several anew for each block: all masks could take too much memory."""
        if len(self.bounds) > 1:
            if not b or self._replanned is None:
                self._replanned = copy(self._start)
            self._batch = self._replanned.next_batch(self._batch_tokens)
            self._replanned.advance()
        self._batch = self._batch.to(self._model.device, self._model.norm_H.dtype)
        return self._batch

    def _read_index(self, first: int, stop: int) -> Tensor | None:
        if self._read_P is None:
            return None
        low, high = np.searchsorted(self._read_P, [first, stop])
        return to_device(torch.from_numpy(self._read_P[low:high] - first), self._model.device)

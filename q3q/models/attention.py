"""Attention over one window, or over a tree of shared prefixes.

Shapes: B rows, N query heads, K key-value heads, T tokens, D head_dim; S spans of a batch, Q and P
their padded queries and keys. A block computes its tokens' queries, keys and values and leaves the
rest to an `Attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from q3q.models.flow import Flow
from q3q.models.kv_cache import KvRounding, Stored
from q3q.models.recurrence import Recurrence, State
from q3q.models.softmax import (
    VarlenLayout,
    attend,
    attend_masked,
    attend_stored,
    attend_varlen,
    attend_varlen_plain,
    supports_varlen,
)

Index = slice | Tensor
KeysValues = tuple[Tensor, Tensor]
# The query tokens, their context [T, N, D], and the log of their softmax denominator [T, N].
SliceOutput = tuple[Index, Tensor, Tensor]


class Attention(Protocol):
    """One block's attention."""

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Return each token's position in its text, [T] or [B, T]."""

    def __call__(
        self,
        query_BNTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        kv: KvRounding | None = None,
    ) -> Tensor:
        """Return each query's context [B, N, T, D]; the rotary embedding is applied already.

        Args:
            kv: how keys and values are rounded once they are not recent; None if they are as they
                are stored already.
        """

    def read(self, states_BTX: Tensor) -> Tensor:
        """Select the tokens that go on after this block; of the others only keys are needed."""

    def recur(self, recurrence: Recurrence, inputs_BTX: Tensor) -> Tensor:
        """Return a recurrence's output for each token [B, T, Y], each behind its own past."""


class Causal:
    """Causal attention: each row is one text from its beginning."""

    def __init__(self) -> None:
        self._positions = torch.empty(0, dtype=torch.int64)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Return the tensor that the last call returned if it has as many: `Rope` knows it."""
        if len(self._positions) != tokens or self._positions.device != device:
            self._positions = torch.arange(tokens, device=device)
        return self._positions

    def __call__(
        self,
        query_BNTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        kv: KvRounding | None = None,
    ) -> Tensor:
        if kv is None:
            return scaled_dot_product_attention(
                query_BNTD, key_BKTD, value_BKTD, is_causal=True, enable_gqa=True
            )
        position_T = self.positions(query_BNTD.shape[2], query_BNTD.device)
        stored = Stored.of(key_BKTD, value_BKTD, position_T, kv)
        return attend_masked(
            query_BNTD,
            stored.key_xPD,
            stored.value_xPD,
            stored.seen(position_T <= position_T[:, None], position_T),
        )

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX

    def recur(self, recurrence: Recurrence, inputs_BTX: Tensor) -> Tensor:
        return recurrence(inputs_BTX)[0]


CAUSAL = Causal()


@dataclass(frozen=True)
class AttentionSlice:
    """A set of a batch's queries and the keys that they attend to, padded to equal lengths.

    A slice as an index stands for one span, a tensor [S, Q] or [S, P] for several.

    query: tokens of the batch.
    key: indices into the keys of earlier batches followed by those of this batch.
    causal: query i attends to keys 0 .. i.
    bias_SQP: added to the scores in the model's dtype: 0 where a query sees a key, else minus
        infinity. None if every query sees every key, or if `causal`.
    real: for a padded index, the flat positions in [S, Q] that are not padding, and their tokens.
    """

    query: Index
    key: Index
    causal: bool = False
    bias_SQP: Tensor | None = None
    real: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        query_NTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        delayed: "DelayedRounding | None" = None,
    ) -> SliceOutput:
        query_SNQD = _spans(query_NTD, self.query)
        key_SKPD, value_SKPD = _spans(key_KTD, self.key), _spans(value_KTD, self.key)
        if delayed is None:
            context_SNQD, logsum_SNQ = attend(
                query_SNQD, key_SKPD, value_SKPD, self.bias_SQP, self.causal
            )
        else:
            stored = Stored.of(
                key_SKPD, value_SKPD, _depths(delayed.key_depth_P, self.key), delayed.kv
            )
            query_depth_SQ = _depths(delayed.query_depth_T, self.query)
            context_SNQD, logsum_SNQ = attend_stored(
                query_SNQD, stored, self._sees(query_SNQD, key_SKPD), query_depth_SQ
            )
        context_TND = context_SNQD.transpose(1, 2).flatten(0, 1)
        logsum_TN = logsum_SNQ.transpose(1, 2).flatten(0, 1)
        if self.real is None:
            return self.query, context_TND, logsum_TN
        flat_T, token_T = self.real
        return token_T, context_TND[flat_T], logsum_TN[flat_T]

    def _sees(self, query_SNQD: Tensor, key_SKPD: Tensor) -> Tensor:
        """Return the keys that each query attends to [S, Q, P], as truth values."""
        if self.bias_SQP is not None:
            return self.bias_SQP == 0
        shape = 1, query_SNQD.shape[2], key_SKPD.shape[2]
        every = torch.ones(shape, dtype=torch.bool, device=query_SNQD.device)
        return every.tril() if self.causal else every


@dataclass(frozen=True)
class VarlenSlice:
    """Consecutive spans of a batch, each with its own keys, without padding.

    query: the spans' tokens. key: their keys, span after span, indexed as an `AttentionSlice`'s.
    """

    query: slice
    key: Index
    layout: VarlenLayout

    def __call__(
        self,
        query_NTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        delayed: "DelayedRounding | None" = None,
    ) -> SliceOutput:
        if delayed is not None:
            raise RuntimeError(
                "a tree whose cache keeps recent tokens in 16 bits has no such slice"
            )
        fast = supports_varlen(query_NTD.device, query_NTD.dtype)
        context_TND, logsum_TN = (attend_varlen if fast else attend_varlen_plain)(
            query_NTD.transpose(0, 1)[self.query],
            key_KTD.transpose(0, 1)[self.key],
            value_KTD.transpose(0, 1)[self.key],
            self.layout,
        )
        return self.query, context_TND, logsum_TN


@dataclass(frozen=True)
class DelayedRounding:
    """Cache rounding that leaves the most recent tokens exact.

    query_depth_T, key_depth_P: positions of a batch's queries and keys in their texts. A key index
        of several spans lists each span's keys in the order of its text, from a chunk's first
        token on.
    """

    kv: KvRounding
    query_depth_T: Tensor
    key_depth_P: Tensor


@dataclass
class TreeAttention:
    """One block's attention over one batch of a `PackedTree`: each token attends to its ancestors.

    Softmax over several slices of keys is combined from each one's output and its denominator's
    logarithm (Hydragen, arXiv 2402.05099, section 3.1), so that shared keys are read once.

    own: slices that together contain each token exactly once.
    shared: slices of further keys that several spans share.
    depth_T: each token's position in its text.
    path_index: indices of the next batch's path among the keys of `path`, then of the batch.
    path: keys and values [K, P, D] of earlier batches; when this one runs, the next batch's.
    batch_keys_values: the batch's own keys and values [K, T, D], set when it runs.
    flow: how a recurrence goes through the batch; None if the model has none.
    state: a recurrence's states on the path of earlier batches; when this one runs, the next
        batch's.
    ends: its states behind the last tokens of texts, set when it runs, if `flow` keeps them.
    read_index: tokens of the batch that are read after this block, None for all.
    """

    own: Sequence[AttentionSlice | VarlenSlice]
    shared: Sequence[AttentionSlice | VarlenSlice]
    depth_T: Tensor
    path_index: Tensor
    path: KeysValues | None = None
    batch_keys_values: KeysValues | None = None
    flow: Flow | None = None
    state: State | None = None
    ends: State | None = None
    read_index: Tensor | None = None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.depth_T

    def __call__(
        self,
        query_BNTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        kv: KvRounding | None = None,
    ) -> Tensor:
        query_NTD, key_KTD, value_KTD = query_BNTD[0], key_BKTD[0], value_BKTD[0]
        delayed = None if kv is None else self._delayed(kv)
        self.batch_keys_values = key_KTD, value_KTD
        if self.path is not None:
            key_KTD = torch.cat((self.path[0], key_KTD), dim=1)
            value_KTD = torch.cat((self.path[1], value_KTD), dim=1)
        self.path = key_KTD[:, self.path_index], value_KTD[:, self.path_index]
        heads, tokens, size = query_NTD.shape
        dtype = torch.float32 if self.shared else None
        context_TND = query_NTD.new_empty(tokens, heads, size, dtype=dtype)
        total_TN = query_NTD.new_empty(tokens, heads, dtype=torch.float32)
        for part in self.own:
            where, part_TND, logsum_TN = part(query_NTD, key_KTD, value_KTD, delayed)
            context_TND[where] = part_TND.to(context_TND.dtype)
            total_TN[where] = logsum_TN.to(total_TN.dtype)
        for part in self.shared:
            where, part_TND, logsum_TN = part(query_NTD, key_KTD, value_KTD, delayed)
            combined_TN = torch.logaddexp(total_TN[where], logsum_TN)
            context_TND[where] *= (total_TN[where] - combined_TN).exp()[..., None]
            context_TND[where] += part_TND * (logsum_TN - combined_TN).exp()[..., None]
            total_TN[where] = combined_TN
        return context_TND.to(query_NTD.dtype).transpose(0, 1)[None]

    def _delayed(self, kv: KvRounding) -> DelayedRounding:
        """Return where the keys lie: those of the path by depth, then the batch's."""
        before = 0 if self.path is None else self.path[0].shape[1]
        depth_P = torch.arange(before, device=self.depth_T.device)
        return DelayedRounding(kv, self.depth_T, torch.cat((depth_P, self.depth_T)))

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX if self.read_index is None else states_BTX[:, self.read_index]

    def recur(self, recurrence: Recurrence, inputs_BTX: Tensor) -> Tensor:
        if self.flow is None:
            raise RuntimeError(
                "a block has a recurrence that its family's recurrent_width does not count, or a "
                "second one"
            )
        flow, self.flow = self.flow, None
        outputs_TY, self.state, self.ends = flow.run(recurrence, inputs_BTX[0], self.state)
        return outputs_TY[None]


def _spans(states_KTD: Tensor, index: Index) -> Tensor:
    """Return [S, K, Q, D]: one span as a view, several gathered, all of a token's heads at once."""
    if isinstance(index, slice):
        return states_KTD[None, :, index]
    return states_KTD.transpose(0, 1)[index].transpose(1, 2)


def _depths(depth_T: Tensor, index: Index) -> Tensor:
    """Return the depths [S, Q] of what `_spans` returns."""
    return depth_T[None, index] if isinstance(index, slice) else depth_T[index]

"""Attention over one window, or over a tree of shared prefixes.

Shapes: B rows, N query heads, K key-value heads, T tokens, D head_dim; S spans of a batch, Q and P
their padded queries and keys. A block computes its tokens' queries, keys and values and leaves the
rest to an `Attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from q3q.models.flow import Flow
from q3q.models.kv_cache import KvRounding, Stored
from q3q.models.recurrence import Recurrence, State
from q3q.models.transfer import to_device

Index = slice | Tensor
KeysValues = tuple[Tensor, Tensor]
# Most scores (spans x queries x keys, exact and rounded) of `attend_stored` at one time.
STORED_SCORES = 1 << 22
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

    def to(self, device: torch.device, dtype: torch.dtype) -> "AttentionSlice":
        query, key = (
            index if isinstance(index, slice) else to_device(index, device)
            for index in (self.query, self.key)
        )
        bias = None if self.bias_SQP is None else to_device(self.bias_SQP, device).to(dtype)
        real = self.real and (to_device(self.real[0], device), to_device(self.real[1], device))
        return AttentionSlice(query, key, self.causal, bias, real)

    def __call__(
        self,
        query_NTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        late: "Late | None" = None,
    ) -> SliceOutput:
        query_SNQD = _spans(query_NTD, self.query)
        key_SKPD, value_SKPD = _spans(key_KTD, self.key), _spans(value_KTD, self.key)
        if late is None:
            context_SNQD, logsum_SNQ = attend(
                query_SNQD, key_SKPD, value_SKPD, self.bias_SQP, self.causal
            )
        else:
            stored = Stored.of(key_SKPD, value_SKPD, _depths(late.key_depth_P, self.key), late.kv)
            query_depth_SQ = _depths(late.query_depth_T, self.query)
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
class VarlenLayout:
    """Boundaries of spans that lie one behind the other, for attention without padding or masks.

    query_ends_S, key_ends_S: int32, cumulative lengths of the spans' queries and keys, from 0 on.
    longest: the largest number of queries, and of keys, of any span.
    causal: a span's last keys are its own tokens, and each token sees none behind itself; otherwise
        a query sees all keys of its span.
    """

    query_ends_S: Tensor
    key_ends_S: Tensor
    longest: tuple[int, int]
    causal: bool


@dataclass(frozen=True)
class VarlenSlice:
    """Consecutive spans of a batch, each with its own keys, without padding.

    query: the spans' tokens. key: their keys, span after span, indexed as an `AttentionSlice`'s.
    """

    query: slice
    key: Index
    layout: VarlenLayout

    def to(self, device: torch.device, dtype: torch.dtype) -> "VarlenSlice":
        key = self.key if isinstance(self.key, slice) else to_device(self.key, device)
        layout = replace(
            self.layout,
            query_ends_S=to_device(self.layout.query_ends_S, device),
            key_ends_S=to_device(self.layout.key_ends_S, device),
        )
        return VarlenSlice(self.query, key, layout)

    def __call__(
        self,
        query_NTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        late: "Late | None" = None,
    ) -> SliceOutput:
        if late is not None:
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
class Late:
    """A rounding that recent tokens escape, and where a batch's queries and keys lie in their text.

    Of several spans, a key index lists each one's keys in the order of its text, from the first
    token of a chunk on.
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
        late = None if kv is None else self._late(kv)
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
            where, part_TND, logsum_TN = part(query_NTD, key_KTD, value_KTD, late)
            context_TND[where] = part_TND.to(context_TND.dtype)
            total_TN[where] = logsum_TN.to(total_TN.dtype)
        for part in self.shared:
            where, part_TND, logsum_TN = part(query_NTD, key_KTD, value_KTD, late)
            combined_TN = torch.logaddexp(total_TN[where], logsum_TN)
            context_TND[where] *= (total_TN[where] - combined_TN).exp()[..., None]
            context_TND[where] += part_TND * (logsum_TN - combined_TN).exp()[..., None]
            total_TN[where] = combined_TN
        return context_TND.to(query_NTD.dtype).transpose(0, 1)[None]

    def _late(self, kv: KvRounding) -> Late:
        """Return where the keys lie: those of the path by depth, then the batch's."""
        before = 0 if self.path is None else self.path[0].shape[1]
        depth_P = torch.arange(before, device=self.depth_T.device)
        return Late(kv, self.depth_T, torch.cat((depth_P, self.depth_T)))

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


def attend_masked(
    query_BNTD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor, sees_xTP: Tensor
) -> Tensor:
    """Return each query's context [B, N, T, D] of the keys that it sees, at least one."""
    cpu = query_BNTD.device.type == "cpu"
    if not cpu:  # no kernel of a GPU takes both a mask and fewer key heads
        repeats = query_BNTD.shape[1] // key_BKPD.shape[1]
        key_BKPD = key_BKPD.repeat_interleave(repeats, dim=1)
        value_BKPD = value_BKPD.repeat_interleave(repeats, dim=1)
    return scaled_dot_product_attention(
        query_BNTD, key_BKPD, value_BKPD, attn_mask=sees_xTP, enable_gqa=cpu
    )


def attend_stored(
    query_SNQD: Tensor, stored: Stored, sees_SQP: Tensor, query_depth_SQ: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `attend` over keys of which a query sees the exact or the rounded form.

    Args:
        sees_SQP: the keys that each query sees, as truth values; S may be 1 for all spans.
    """
    spans, _, queries, _ = query_SNQD.shape
    at_once = max(1, STORED_SCORES // (spans * stored.key_xPD.shape[-2]))
    contexts, logsums = [], []
    for start in range(0, queries, at_once):
        piece = slice(start, start + at_once)
        seen_SQP = stored.seen(sees_SQP[:, piece], query_depth_SQ[:, piece])
        bias_SQP = torch.zeros(seen_SQP.shape, dtype=query_SNQD.dtype, device=seen_SQP.device)
        bias_SQP = bias_SQP.masked_fill_(~seen_SQP, -torch.inf)
        context, logsum = attend(
            query_SNQD[:, :, piece], stored.key_xPD, stored.value_xPD, bias_SQP
        )
        contexts.append(context)
        logsums.append(logsum)
    return torch.cat(contexts, dim=2), torch.cat(logsums, dim=2)


def attend(
    query_SNQD: Tensor,
    key_SKPD: Tensor,
    value_SKPD: Tensor,
    bias_SQP: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the context [S, N, Q, D], and the log of the softmax denominator [S, N, Q], float32.

    Args:
        bias_SQP: 0 where a query sees a key, else minus infinity; each query sees at least one.
        causal: query i sees keys 0 .. i.
    """
    if query_SNQD.device.type != "cpu":
        if bias_SQP is not None:  # of few scores: larger slices have no bias
            return attend_plain(query_SNQD, key_SKPD, value_SKPD, bias_SQP)
        repeats = query_SNQD.shape[1] // key_SKPD.shape[1]
        key_SNPD = key_SKPD.repeat_interleave(repeats, dim=1)
        value_SNPD = value_SKPD.repeat_interleave(repeats, dim=1)
        context, logsum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query_SNQD, key_SNPD, value_SNPD, None, True, 0.0, causal
        )
        return context, logsum[..., : query_SNQD.shape[2]]  # the kernel pads logsum's rows
    bias = None if bias_SQP is None else bias_SQP[:, None]
    # scaled_dot_product_attention calls this kernel on a CPU, and drops the denominator.
    context, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_SNQD, key_SKPD, value_SKPD, 0.0, causal, attn_mask=bias
    )
    return context, logsum


def attend_plain(
    query_SNQD: Tensor,
    key_SKPD: Tensor,
    value_SKPD: Tensor,
    bias_SQP: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `attend` by the formula, in float32, with all scores in memory: its plain twin."""
    grouped = query_SNQD.float().unflatten(1, (key_SKPD.shape[1], -1))
    scores = grouped @ key_SKPD.float()[:, :, None].transpose(-1, -2) / query_SNQD.shape[-1] ** 0.5
    if causal:
        bias_SQP = scores.new_full(scores.shape[-2:], -torch.inf).triu(1)[None]
    if bias_SQP is not None:
        scores = scores + bias_SQP[:, None, None]
    logsum = scores.logsumexp(-1)
    context = (scores - logsum[..., None]).exp() @ value_SKPD.float()[:, :, None]
    return context.flatten(1, 2).to(query_SNQD.dtype), logsum.flatten(1, 2)


def supports_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if `attend_varlen` runs there: 16-bit numbers, NVIDIA's Ampere or newer."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend_varlen(
    query_TND: Tensor, key_PKD: Tensor, value_PKD: Tensor, layout: VarlenLayout
) -> tuple[Tensor, Tensor]:
    """Compute the context [T, N, D] and, in float32, the log of the softmax denominator [T, N].

    Runs PyTorch's kernel of FlashAttention (arXiv 2307.08691) for sequences of different lengths.
    """
    ends = layout.query_ends_S, layout.key_ends_S
    context_TND, logsum_NT, *_ = torch.ops.aten._flash_attention_forward(
        query_TND, key_PKD, value_PKD, *ends, *layout.longest, 0.0, layout.causal, False
    )
    return context_TND, logsum_NT.transpose(0, 1)


def attend_varlen_plain(
    query_TND: Tensor, key_PKD: Tensor, value_PKD: Tensor, layout: VarlenLayout
) -> tuple[Tensor, Tensor]:
    """Compute `attend_varlen` span by span through `attend_plain`: its plain twin."""
    contexts, logsums = [], []
    queries, keys = layout.query_ends_S.diff().tolist(), layout.key_ends_S.diff().tolist()
    parts = query_TND.split(queries), key_PKD.split(keys), value_PKD.split(keys)
    for query_QND, key_QKD, value_QKD in zip(*parts, strict=True):
        wide, tall = len(query_QND), len(key_QKD)
        bias = query_QND.new_full((1, wide, tall), -torch.inf, dtype=torch.float32)
        bias = bias.triu(tall - wide + 1) if layout.causal else None
        states = query_QND, key_QKD, value_QKD
        query_1NQD, key_1KQD, value_1KQD = (x.transpose(0, 1)[None] for x in states)
        context_1NQD, logsum_1NQ = attend_plain(query_1NQD, key_1KQD, value_1KQD, bias)
        contexts.append(context_1NQD[0].transpose(0, 1))
        logsums.append(logsum_1NQ[0].transpose(0, 1))
    return torch.cat(contexts), torch.cat(logsums)

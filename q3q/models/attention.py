"""How tokens look back at others: along one window, along a tree of shared prefixes, or at a cache of their own past.

Shapes: B rows, N query heads, K key-value heads, T tokens, D head_dim; S pieces of a batch, Q and P their padded
queries and keys. A block computes queries, keys and values of its tokens and leaves the rest to an `Attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

Index = slice | Tensor
KeysValues = tuple[Tensor, Tensor]


class Attention(Protocol):
    """What one block's tokens attend to."""

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Position of each token in its text, [T] or [B, T]."""
        ...

    def __call__(self, query_BNTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        """Context [B, N, T, D] of each query; queries and keys carry their rotary embedding already."""
        ...

    def read(self, states_BTX: Tensor) -> Tensor:
        """Of the batch's tokens those that somebody reads after this block; others go no further than their keys."""
        ...


class Causal:
    """Each row is one text from its beginning."""

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return torch.arange(tokens, device=device)

    def __call__(self, query_BNTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query_BNTD, key_BKTD, value_BKTD, is_causal=True, enable_gqa=True
        )

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX


CAUSAL = Causal()


@dataclass(frozen=True)
class Look:
    """Which tokens of a batch look at which keys. A slice stands for one piece, an index [S, Q] or [S, P] for several.

    query: tokens of the batch. key: what was kept of earlier batches comes first, then the batch's own tokens.
    bias_SQP: added to the scores, 0 where a query sees a key and else minus infinity, in the model's dtype; None if
    every query sees every key, or exactly the keys up to its own where `causal`.
    real: where a padded index is used, the flat positions in [S, Q] that are no padding, and the tokens they are.
    """

    query: Index
    key: Index
    causal: bool = False
    bias_SQP: Tensor | None = None
    real: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Look":
        query, key = (
            index if isinstance(index, slice) else sent(index, device)
            for index in (self.query, self.key)
        )
        bias = None if self.bias_SQP is None else sent(self.bias_SQP, device).to(dtype)
        real = (
            None if self.real is None else (sent(self.real[0], device), sent(self.real[1], device))
        )
        return Look(query, key, self.causal, bias, real)

    def __call__(self, query_NTD: Tensor, key_KTD: Tensor, value_KTD: Tensor) -> "Seen":
        part_SNQD, logsum_SNQ = attend(
            _pieces(query_NTD, self.query),
            _pieces(key_KTD, self.key),
            _pieces(value_KTD, self.key),
            self.bias_SQP,
            self.causal,
        )
        part_TND, logsum_TN = (
            part_SNQD.transpose(1, 2).flatten(0, 1),
            logsum_SNQ.transpose(1, 2).flatten(0, 1),
        )
        if self.real is None:
            return self.query, part_TND, logsum_TN
        place_T, token_T = self.real
        return token_T, part_TND[place_T], logsum_TN[place_T]


@dataclass(frozen=True)
class RaggedLook:
    """Pieces of a batch that stand one behind the other, each at keys of its own: nothing is padded or masked.

    query: all their tokens. key: their keys, piece after piece, numbered as a `Look`'s. query_ends_S, key_ends_S:
    int32, 0 and how far each piece reaches among them. longest: of any piece, queries and keys. causal: a piece's last
    keys are its own tokens, and each token sees none behind itself; otherwise it sees all of its piece's.
    """

    query: slice
    key: Index
    query_ends_S: Tensor
    key_ends_S: Tensor
    longest: tuple[int, int]
    causal: bool

    def to(self, device: torch.device, dtype: torch.dtype) -> "RaggedLook":
        key = self.key if isinstance(self.key, slice) else sent(self.key, device)
        return replace(
            self,
            key=key,
            query_ends_S=sent(self.query_ends_S, device),
            key_ends_S=sent(self.key_ends_S, device),
        )

    def __call__(self, query_NTD: Tensor, key_KTD: Tensor, value_KTD: Tensor) -> "Seen":
        query_TND, key_PKD, value_PKD = (
            states_NTD.transpose(0, 1)[index]
            for states_NTD, index in (
                (query_NTD, self.query),
                (key_KTD, self.key),
                (value_KTD, self.key),
            )
        )
        attend = (
            attend_ragged
            if takes_ragged(query_NTD.device, query_NTD.dtype)
            else attend_ragged_plainly
        )
        part_TND, logsum_TN = attend(
            query_TND,
            key_PKD,
            value_PKD,
            self.query_ends_S,
            self.key_ends_S,
            self.longest,
            self.causal,
        )
        return self.query, part_TND, logsum_TN


# The tokens that looked, their context [T, N, D], and its denominator's logarithm [T, N].
Seen = tuple[Index, Tensor, Tensor]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device. To a GPU from pinned memory: only then does nobody wait for what the GPU is busy with."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class Tree:
    """Attention of one block over one batch of a tape: each token to its ancestors in the tree of prefixes.

    Softmax over keys that come in several looks is put together from each look's own and the logarithm of its
    denominator, as in Hydragen (arXiv 2402.05099, section 3.1), so that keys shared by many are read once.

    own: every token in exactly one. shared: what tokens see beyond that. depth_T: position of each token in its text.
    kept: keys and values [K, P, D] of earlier batches; replaced by what the next batch needs, `keep` of all keys.
    fresh: the batch's own keys and values [K, T, D], once it has run.
    wanted: tokens of the batch that are read after this block, None for all.
    """

    own: Sequence[Look | RaggedLook]
    shared: Sequence[Look | RaggedLook]
    depth_T: Tensor
    keep: Tensor
    kept: KeysValues | None = None
    fresh: KeysValues | None = None
    wanted: Tensor | None = None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.depth_T

    def __call__(self, query_BNTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        query_NTD, key_KTD, value_KTD = query_BNTD[0], key_BKTD[0], value_BKTD[0]
        self.fresh = key_KTD, value_KTD
        if self.kept is not None:
            key_KTD = torch.cat((self.kept[0], key_KTD), dim=1)
            value_KTD = torch.cat((self.kept[1], value_KTD), dim=1)
        self.kept = key_KTD[:, self.keep], value_KTD[:, self.keep]
        heads, tokens, size = query_NTD.shape
        context_TND = query_NTD.new_empty(
            tokens, heads, size, dtype=torch.float32 if self.shared else None
        )
        total_TN = query_NTD.new_empty(tokens, heads, dtype=torch.float32)
        for look in self.own:
            where, part_TND, logsum_TN = look(query_NTD, key_KTD, value_KTD)
            context_TND[where] = part_TND.to(context_TND.dtype)
            total_TN[where] = logsum_TN
        for look in self.shared:
            where, part_TND, logsum_TN = look(query_NTD, key_KTD, value_KTD)
            after_TN = torch.logaddexp(total_TN[where], logsum_TN)
            context_TND[where] *= (total_TN[where] - after_TN).exp()[..., None]
            context_TND[where] += part_TND * (logsum_TN - after_TN).exp()[..., None]
            total_TN[where] = after_TN
        return context_TND.to(query_NTD.dtype).transpose(0, 1)[None]

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX if self.wanted is None else states_BTX[:, self.wanted]


def _pieces(states_KTD: Tensor, index: Index) -> Tensor:
    """[S, K, Q, D]: one piece as a view, several gathered, each token's heads at once."""
    if isinstance(index, slice):
        return states_KTD[None, :, index]
    return states_KTD.transpose(0, 1)[index].transpose(1, 2)


def attend(
    query_SNQD: Tensor,
    key_SKPD: Tensor,
    value_SKPD: Tensor,
    bias_SQP: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Context [S, N, Q, D] and, in float32, the log of the softmax's denominator [S, N, Q].

    bias_SQP: minus infinity where a query sees no key, else 0; each sees one. causal: query i sees keys 0 .. i.
    """
    if query_SNQD.device.type != "cpu":
        if bias_SQP is not None:  # of few scores: larger looks have no bias
            return attend_plainly(query_SNQD, key_SKPD, value_SKPD, bias_SQP)
        repeats = query_SNQD.shape[1] // key_SKPD.shape[1]
        key_SNPD, value_SNPD = (
            states.repeat_interleave(repeats, dim=1) for states in (key_SKPD, value_SKPD)
        )
        context, logsum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query_SNQD, key_SNPD, value_SNPD, None, True, 0.0, causal
        )
        return context, logsum[..., : query_SNQD.shape[2]]  # its rows are padded
    bias = None if bias_SQP is None else bias_SQP[:, None]
    # What scaled_dot_product_attention calls on a CPU; it alone also tells the denominator.
    context, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_SNQD, key_SKPD, value_SKPD, 0.0, causal, attn_mask=bias
    )
    return context, logsum


def attend_plainly(
    query_SNQD: Tensor,
    key_SKPD: Tensor,
    value_SKPD: Tensor,
    bias_SQP: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The plain twin of `attend`: the formula, in float32, with all scores in memory."""
    grouped = query_SNQD.float().unflatten(1, (key_SKPD.shape[1], -1))
    scores = grouped @ key_SKPD.float()[:, :, None].transpose(-1, -2) / query_SNQD.shape[-1] ** 0.5
    if causal:
        bias_SQP = scores.new_full(scores.shape[-2:], -torch.inf).triu(1)[None]
    if bias_SQP is not None:
        scores = scores + bias_SQP[:, None, None]
    logsum = scores.logsumexp(-1)
    context = (scores - logsum[..., None]).exp() @ value_SKPD.float()[:, :, None]
    return context.flatten(1, 2).to(query_SNQD.dtype), logsum.flatten(1, 2)


def takes_ragged(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_ragged` runs there: FlashAttention, of 16-bit numbers, from NVIDIA's Ampere on."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend_ragged(
    query_TND: Tensor,
    key_PKD: Tensor,
    value_PKD: Tensor,
    query_ends_S: Tensor,
    key_ends_S: Tensor,
    longest: tuple[int, int],
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Context [T, N, D] and, in float32, the log of the softmax's denominator [T, N]; arguments as of `RaggedLook`.

    The kernel of FlashAttention (arXiv 2307.08691) for sequences of different lengths, as PyTorch ships it.
    """
    context_TND, logsum_NT, *_ = torch.ops.aten._flash_attention_forward(
        query_TND, key_PKD, value_PKD, query_ends_S, key_ends_S, *longest, 0.0, causal, False
    )
    return context_TND, logsum_NT.transpose(0, 1)


def attend_ragged_plainly(
    query_TND: Tensor,
    key_PKD: Tensor,
    value_PKD: Tensor,
    query_ends_S: Tensor,
    key_ends_S: Tensor,
    longest: tuple[int, int],
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The plain twin of `attend_ragged`: piece by piece through `attend_plainly`."""
    contexts, logsums = [], []
    queries, keys = (ends_S.diff().tolist() for ends_S in (query_ends_S, key_ends_S))
    for query_QND, key_QKD, value_QKD in zip(
        query_TND.split(queries), key_PKD.split(keys), value_PKD.split(keys), strict=True
    ):
        wide, tall = len(query_QND), len(key_QKD)
        bias = query_QND.new_full((1, wide, tall), -torch.inf, dtype=torch.float32).triu(
            tall - wide + 1
        )
        query_1NQD, key_1KQD, value_1KQD = (
            states.transpose(0, 1)[None] for states in (query_QND, key_QKD, value_QKD)
        )
        context_1NQD, logsum_1NQ = attend_plainly(
            query_1NQD, key_1KQD, value_1KQD, bias if causal else None
        )
        contexts.append(context_1NQD[0].transpose(0, 1))
        logsums.append(logsum_1NQ[0].transpose(0, 1))
    return torch.cat(contexts), torch.cat(logsums)


@dataclass
class Lengths:
    """How many tokens the rows of a cache have so far: each one's, where the model is, and here the most of any."""

    each_B: Tensor
    longest: int

    def grow(self) -> None:
        """By a token each, when all blocks have it."""
        self.each_B += 1
        self.longest += 1

    def select(self, rows_R: Tensor) -> "Lengths":
        each_R = self.each_B[rows_R]
        return Lengths(each_R, int(each_R.max()))


@dataclass
class Cached:
    """Attention of one new token a row to the row's own past, which it joins.

    key_BKPD, value_BKPD: room for all tokens to come. lengths: so far, shared by all blocks.
    """

    key_BKPD: Tensor
    value_BKPD: Tensor
    lengths: Lengths

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.lengths.each_B[:, None]

    def __call__(self, query_BNTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        length_B, longest = self.lengths.each_B, self.lengths.longest + 1
        rows_B = torch.arange(len(length_B), device=query_BNTD.device)
        self.key_BKPD[rows_B, :, length_B] = key_BKTD[:, :, 0]
        self.value_BKPD[rows_B, :, length_B] = value_BKTD[:, :, 0]
        sees_BP = torch.arange(longest, device=query_BNTD.device) <= length_B[:, None]
        return scaled_dot_product_attention(
            query_BNTD,
            self.key_BKPD[:, :, :longest],
            self.value_BKPD[:, :, :longest],
            attn_mask=sees_BP[:, None, None],
            enable_gqa=True,
        )

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX

    def select(self, rows_R: Tensor, lengths: Lengths) -> "Cached":
        """The cache of some of the rows, and their lengths."""
        return Cached(self.key_BKPD[rows_R], self.value_BKPD[rows_R], lengths)

    @classmethod
    def gathered(
        cls, key_KTD: Tensor, value_KTD: Tensor, index_BP: Tensor, lengths: Lengths, room: int
    ) -> "Cached":
        """From the keys and values of a whole tape: row b's past is the first of its tokens `index_BP[b]`."""

        def past(states_KTD: Tensor) -> Tensor:
            return pad(states_KTD[:, index_BP].transpose(0, 1), (0, 0, 0, room))

        return cls(past(key_KTD), past(value_KTD), lengths)

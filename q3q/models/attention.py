"""How tokens look back at others: along one window, along a tree of shared prefixes, or at a cache of their own past.

Shapes: B rows, N query heads, K key-value heads, T tokens, D head_dim; S pieces of a batch, Q and P their padded
queries and keys. A block computes queries, keys and values of its tokens and leaves the rest to an `Attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
        return scaled_dot_product_attention(query_BNTD, key_BKTD, value_BKTD, is_causal=True, enable_gqa=True)

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
        query, key = (index if isinstance(index, slice) else index.to(device) for index in (self.query, self.key))
        bias = None if self.bias_SQP is None else self.bias_SQP.to(device, dtype)
        real = None if self.real is None else (self.real[0].to(device), self.real[1].to(device))
        return Look(query, key, self.causal, bias, real)


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

    own: Sequence[Look]
    shared: Sequence[Look]
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
        context_TND = query_NTD.new_empty(tokens, heads, size, dtype=torch.float32 if self.shared else None)
        total_TN = query_NTD.new_empty(tokens, heads, dtype=torch.float32)
        for look in self.own:
            where, part_TND, logsum_TN = _look(look, query_NTD, key_KTD, value_KTD)
            context_TND[where] = part_TND.to(context_TND.dtype)
            total_TN[where] = logsum_TN
        for look in self.shared:
            where, part_TND, logsum_TN = _look(look, query_NTD, key_KTD, value_KTD)
            after_TN = torch.logaddexp(total_TN[where], logsum_TN)
            context_TND[where] *= (total_TN[where] - after_TN).exp()[..., None]
            context_TND[where] += part_TND * (logsum_TN - after_TN).exp()[..., None]
            total_TN[where] = after_TN
        return context_TND.to(query_NTD.dtype).transpose(0, 1)[None]

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX if self.wanted is None else states_BTX[:, self.wanted]


def _look(look: Look, query_NTD: Tensor, key_KTD: Tensor, value_KTD: Tensor) -> tuple[Index, Tensor, Tensor]:
    """The batch's tokens that look, their context [T, N, D] and its denominator's logarithm [T, N]."""
    part_SNQD, logsum_SNQ = attend(
        _pieces(query_NTD, look.query),
        _pieces(key_KTD, look.key),
        _pieces(value_KTD, look.key),
        look.bias_SQP,
        look.causal,
    )
    part_TND, logsum_TN = part_SNQD.transpose(1, 2).flatten(0, 1), logsum_SNQ.transpose(1, 2).flatten(0, 1)
    if look.real is None:
        return look.query, part_TND, logsum_TN
    place_T, token_T = look.real
    return token_T, part_TND[place_T], logsum_TN[place_T]


def _pieces(states_KTD: Tensor, index: Index) -> Tensor:
    """[S, K, Q, D]: one piece as a view, several gathered, each token's heads at once."""
    if isinstance(index, slice):
        return states_KTD[None, :, index]
    return states_KTD.transpose(0, 1)[index].transpose(1, 2)


def attend(
    query_SNQD: Tensor, key_SKPD: Tensor, value_SKPD: Tensor, bias_SQP: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Context [S, N, Q, D] and, in float32, the log of the softmax's denominator [S, N, Q].

    bias_SQP: minus infinity where a query sees no key, else 0; each sees one. causal: query i sees keys 0 .. i.
    """
    if query_SNQD.device.type != "cpu":
        return attend_plainly(query_SNQD, key_SKPD, value_SKPD, bias_SQP, causal)
    bias = None if bias_SQP is None else bias_SQP[:, None]
    # What scaled_dot_product_attention calls on a CPU; it alone also tells the denominator.
    context, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_SNQD, key_SKPD, value_SKPD, 0.0, causal, attn_mask=bias
    )
    return context, logsum


def attend_plainly(
    query_SNQD: Tensor, key_SKPD: Tensor, value_SKPD: Tensor, bias_SQP: Tensor | None = None, causal: bool = False
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


@dataclass
class Cached:
    """Attention of one new token a row to the row's own past, which it joins.

    key_BKPD, value_BKPD: room for all tokens to come. length_B: tokens of each row so far; who advances all blocks by
    a token raises it.
    """

    key_BKPD: Tensor
    value_BKPD: Tensor
    length_B: Tensor

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.length_B[:, None]

    def __call__(self, query_BNTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        rows_B = torch.arange(len(self.length_B), device=query_BNTD.device)
        self.key_BKPD[rows_B, :, self.length_B] = key_BKTD[:, :, 0]
        self.value_BKPD[rows_B, :, self.length_B] = value_BKTD[:, :, 0]
        longest = int(self.length_B.max()) + 1
        sees_BP = torch.arange(longest, device=query_BNTD.device) <= self.length_B[:, None]
        return scaled_dot_product_attention(
            query_BNTD,
            self.key_BKPD[:, :, :longest],
            self.value_BKPD[:, :, :longest],
            attn_mask=sees_BP[:, None, None],
            enable_gqa=True,
        )

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX

    def select(self, rows_R: Tensor, length_R: Tensor) -> "Cached":
        """The cache of some of the rows."""
        return Cached(self.key_BKPD[rows_R], self.value_BKPD[rows_R], length_R)

    @classmethod
    def gathered(cls, key_KTD: Tensor, value_KTD: Tensor, index_BP: Tensor, length_B: Tensor, room: int) -> "Cached":
        """From the keys and values of a whole tape: row b's past is its tokens `index_BP[b, : length_B[b]]`."""

        def past(states_KTD: Tensor) -> Tensor:
            return pad(states_KTD[:, index_BP].transpose(0, 1), (0, 0, 0, room))

        return cls(past(key_KTD), past(value_KTD), length_B)

"""Keys and values as a cache stores them: in codes, but for the most recent ones.

The rule is defined token by token, so it does not depend on how prompts are cut into batches: a
token at position t reads the token at position p as it is stored when t's own key and value have
been written. Without a window and chunks, everything is stored rounded at once, and t reads even
itself so. Otherwise p is stored in 16 bits until its chunk is complete and outside the window.

Shapes: S spans, N query heads, K key-value heads, Q queries, P keys, D head_dim, G chunks of C
tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from q3q.kv_scheme import CHANNEL, FIXED, KvScheme
from q3q.number_formats import FLOATS, INT
from q3q.numerics.floats import floats_at, floats_per_token
from q3q.numerics.grid import absmax_per_token, range_per_token


@dataclass(frozen=True)
class KvRounding:
    """How one block's cache stores keys and values.

    key_scale, value_scale: of a checkpoint with fixed ones.
    """

    scheme: KvScheme
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def late(self) -> bool:
        """True if the most recent tokens are not rounded yet: see `KvScheme.late`."""
        return self.scheme.late

    def keys(self, key_xPD: Tensor) -> Tensor:
        """Return keys as they are stored in codes.

        Args:
            key_xPD: after the rotary embedding; of chunks, from the beginning of one on. What is
                returned of an unfinished chunk means nothing.
        """
        if self.scheme.scales != CHANNEL:
            return self._rounded(key_xPD, self.key_scale)
        tokens, chunk = key_xPD.shape[-2], self.scheme.chunk
        whole_xPD = pad(key_xPD, (0, 0, 0, -tokens % chunk))
        channels_xGDC = whole_xPD.unflatten(-2, (-1, chunk)).transpose(-1, -2)
        rounded_xGDC = _in_groups(channels_xGDC, self.scheme, -1)
        return rounded_xGDC.transpose(-1, -2).flatten(-3, -2)[..., :tokens, :]

    def values(self, value_xPD: Tensor) -> Tensor:
        """Return values as they are stored in codes."""
        return self._rounded(value_xPD, self.value_scale)

    def reader(self, position: Tensor) -> Tensor:
        """Return the first position whose token reads each position's key and value rounded."""
        chunk = self.scheme.chunk
        return position - position % chunk + (chunk - 1 + self.scheme.window)

    def _rounded(self, states_xPD: Tensor, scale: float) -> Tensor:
        if self.scheme.scales == FIXED:
            return floats_at(states_xPD, FLOATS[self.scheme.format], scale)
        return _in_groups(states_xPD, self.scheme, self.scheme.group_size)


def _in_groups(states_xI: Tensor, scheme: KvScheme, group_size: int) -> Tensor:
    """Round numbers with a scale for each run of `group_size` neighbours on the last axis."""
    if scheme.format != INT:
        return floats_per_token(states_xI, FLOATS[scheme.format], group_size)
    rounded = absmax_per_token if scheme.symmetric else range_per_token
    return rounded(states_xI, scheme.bits, group_size)


@dataclass(frozen=True)
class Stored:
    """Keys and values beside their rounded forms, and which of the two a query reads.

    Both forms lie one behind the other: a query sees exactly one form of each token that it sees.

    key_xPD, value_xPD: [.., 2P, D], exact ones first.
    reader_xP: see `KvRounding.reader`.
    """

    key_xPD: Tensor
    value_xPD: Tensor
    reader_xP: Tensor

    @classmethod
    def of(
        cls, key_xPD: Tensor, value_xPD: Tensor, position_xP: Tensor, kv: KvRounding
    ) -> "Stored":
        """Store keys and values of tokens in the order of their text, from a chunk's first one."""
        return cls(
            torch.cat((key_xPD, kv.keys(key_xPD)), dim=-2),
            torch.cat((value_xPD, kv.values(value_xPD)), dim=-2),
            kv.reader(position_xP),
        )

    def seen(self, sees_xQP: Tensor, position_xQ: Tensor) -> Tensor:
        """Return the form that each query sees of each key [.., Q, 2P], as truth values.

        Args:
            sees_xQP: the keys that it sees at all.
        """
        rounded_xQP = position_xQ[..., :, None] >= self.reader_xP[..., None, :]
        return torch.cat((sees_xQP & ~rounded_xQP, sees_xQP & rounded_xQP), dim=-1)


def store_due_(key_BKPD: Tensor, value_BKPD: Tensor, length_B: Tensor, kv: KvRounding) -> None:
    """Round in place what each row of a cache stores in codes when its last token is in place.

    Args:
        length_B: the row's tokens. What a row had stored with fewer is rounded again.
    """
    position_P = torch.arange(key_BKPD.shape[2], device=key_BKPD.device)
    due_BP = kv.reader(position_P) < length_B[:, None]
    due_B1P1 = due_BP[:, None, :, None]
    key_BKPD.copy_(torch.where(due_B1P1, kv.keys(key_BKPD), key_BKPD))
    value_BKPD.copy_(torch.where(due_B1P1, kv.values(value_BKPD), value_BKPD))


def store_newest_(key_BKPD: Tensor, value_BKPD: Tensor, length_B: Tensor, kv: KvRounding) -> None:
    """Round in place the chunk, if there is one, that the last token of a row completes.

    Chunks that earlier tokens completed are stored already. Nothing waits for a GPU.

    Args:
        length_B: the row's tokens, the last one included.
    """
    chunk = kv.scheme.chunk
    stop_B = length_B - kv.scheme.window
    due_B = (stop_B > 0) & (stop_B % chunk == 0)
    first_B = (stop_B - chunk).clamp(min=0)
    index_BC = first_B[:, None] + torch.arange(chunk, device=length_B.device)
    # A row without such a chunk may end before one does: it writes back what is there.
    index_BC = index_BC.clamp(max=key_BKPD.shape[2] - 1)
    rows_B1 = torch.arange(len(length_B), device=length_B.device)[:, None]
    for states_BKPD, rounded in ((key_BKPD, kv.keys), (value_BKPD, kv.values)):
        exact_BKCD = states_BKPD[rows_B1, :, index_BC].transpose(1, 2)
        stored_BKCD = torch.where(due_B[:, None, None, None], rounded(exact_BKCD), exact_BKCD)
        states_BKPD[rows_B1, :, index_BC] = stored_BKCD.transpose(1, 2)

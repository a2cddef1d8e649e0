"""What tokens leave in a block for those after them, and generation's attention to it.

Shapes: B rows, N query heads, K key-value heads, P tokens of a row's past, T tokens, D head_dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from q3q.models.attention import KeysValues
from q3q.models.kv_cache import KvRounding, store_due_, store_newest_
from q3q.models.recurrence import Recurrence, State, select


class Past(NamedTuple):
    """What tokens left in a block: an attention's keys and values, a recurrence's state, or both.

    keys_values: [K, T, D] each. state: a row for each text, or for each place in a text, that is
    asked for.
    """

    keys_values: KeysValues | None = None
    state: State | None = None


NOTHING = Past()


@dataclass
class Lengths:
    """Numbers of tokens in a cache's rows, which all blocks share.

    each_B: each row's, on the model's device. longest: the most, known without a synchronization.
    """

    each_B: Tensor
    longest: int

    def grow(self) -> None:
        """Count one more token in each row, once every block has cached it."""
        self.each_B += 1
        self.longest += 1

    def select(self, rows_R: Tensor) -> "Lengths":
        each_R = self.each_B[rows_R]
        return Lengths(each_R, int(each_R.max()))


@dataclass
class Cached:
    """Attention of one new token a row to the row's own past, which takes in what it leaves.

    lengths: tokens in the past so far. keys_values: [B, K, P, D] each, with room for all tokens to
    come; None if the block does not attend. state: [B, ...]; None if it has no recurrence.
    stored: the past is rounded as far as it is no longer recent, where the cache rounds so.
    """

    lengths: Lengths
    keys_values: KeysValues | None
    state: State | None = None
    stored: bool = False

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return self.lengths.each_B[:, None]

    def __call__(
        self,
        query_BNTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        kv: KvRounding | None = None,
    ) -> Tensor:
        assert self.keys_values is not None
        past_key_BKPD, past_value_BKPD = self.keys_values
        length_B, longest = self.lengths.each_B, self.lengths.longest + 1
        rows_B = torch.arange(len(length_B), device=query_BNTD.device)
        if kv is not None and not self.stored:
            store_due_(*self.keys_values, length_B, kv)
            self.stored = True
        past_key_BKPD[rows_B, :, length_B] = key_BKTD[:, :, 0]
        past_value_BKPD[rows_B, :, length_B] = value_BKTD[:, :, 0]
        if kv is not None:
            store_newest_(past_key_BKPD, past_value_BKPD, length_B + 1, kv)
        sees_BP = torch.arange(longest, device=query_BNTD.device) <= length_B[:, None]
        return scaled_dot_product_attention(
            query_BNTD,
            past_key_BKPD[:, :, :longest],
            past_value_BKPD[:, :, :longest],
            attn_mask=sees_BP[:, None, None],
            enable_gqa=True,
        )

    def read(self, states_BTX: Tensor) -> Tensor:
        return states_BTX

    def recur(self, recurrence: Recurrence, inputs_BTX: Tensor) -> Tensor:
        assert self.state is not None
        outputs_BTY, self.state = recurrence(inputs_BTX, self.state)
        return outputs_BTY

    def select(self, rows_R: Tensor, lengths: Lengths) -> "Cached":
        """Return the cache of the rows `rows_R`, whose lengths are `lengths`."""
        keys_values = self.keys_values and select(self.keys_values, rows_R)
        state = self.state and select(self.state, rows_R)
        return Cached(lengths, keys_values, state, self.stored)

    @classmethod
    def gathered(cls, past: Past, index_BP: Tensor, lengths: Lengths, room: int) -> "Cached":
        """Gather row b's past, tokens `index_BP[b]` of a tree, with `room` for as many more.

        Args:
            past: of the tree's tokens, with the rows' own states.
        """
        if past.keys_values is None:
            return cls(lengths, None, past.state)
        key_BKPD, value_BKPD = (
            pad(states_KTD[:, index_BP].transpose(0, 1), (0, 0, 0, room))
            for states_KTD in past.keys_values
        )
        return cls(lengths, (key_BKPD, value_BKPD), past.state)

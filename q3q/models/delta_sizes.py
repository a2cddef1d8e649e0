"""Sizes of a gated delta rule, and what it takes: arithmetic, without torch."""

from dataclasses import dataclass

CHUNK = 64  # tokens whose updates of the matrix are condensed into products of matrices
# Tokens of all rows that are computed at one time, at least a chunk of each row: what they take in
# float32 is bounded by it.
PIECE_TOKENS = 1024


@dataclass(frozen=True)
class DeltaSizes:
    """Sizes of a gated delta rule and of the convolution before it (`q3q.models.delta`).

    key_heads, value_heads: each key head serves as many value heads
    key_dim, value_dim: of a head
    width: tokens that the convolution sees
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int

    @property
    def channels(self) -> int:
        """The convolution's channels: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        """Numbers of a token's values, and of what it reads."""
        return self.value_heads * self.value_dim

    @property
    def state(self) -> int:
        """Numbers that a row carries from token to token."""
        return (self.width - 1) * self.channels + self.values * self.key_dim

    @property
    def operations(self) -> float:
        """Operations of a token, in chunks: a multiplication and an addition are two."""
        within = CHUNK * (3.0 * self.key_dim + 2.0 * self.value_dim)
        across = 6.0 * self.key_dim * self.value_dim
        return self.value_heads * (within + across) + 2.0 * self.width * self.channels

    @property
    def piece_bytes(self) -> int:
        """Bytes of what is computed at one time, in float32: about as many tensors as are named."""
        each = 9 * self.key_dim + 5 * self.value_dim + 4 * CHUNK
        return 4 * PIECE_TOKENS * self.value_heads * each

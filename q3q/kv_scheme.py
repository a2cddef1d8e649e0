"""How keys and values are stored in the cache that later tokens read, and what that takes.

A server stores a key after its rotary embedding, and a value as it is. Blocks whose tokens are
mixed by a recurrence have no such cache.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

from q3q.canonical import Json
from q3q.errors import ConfigError, IncompatibleError
from q3q.number_formats import FLOATS, FORMATS, GLOBAL_SCALE_BITS, INT, SCALE_BITS, short_name

KV_BITS = (2, 3, 4, 8)
UNTOUCHED_KV_BITS = 16  # the cache stays in 16 bits, even if a published checkpoint rounds it
# What shares a scale: each head of a token; of keys, each channel of neighbouring tokens; a layer.
TOKEN, CHANNEL, FIXED = KV_SCALES = ("token", "channel", "fixed")
KV_CHUNK = 32  # tokens of keys that share a scale by default: KIVI's
FLOAT_BITS = SCALE_BITS["float"]


@dataclass(frozen=True, kw_only=True)
class KvScheme:
    """How a cache stores keys and values.

    bits: of a code; 16 for numbers that stay as they are
    format: of codes, a name of `number_formats`
    scales: what shares one. token: a head of a token, or `group_size` channels of it. channel: of
        keys, each channel of `chunk` neighbouring tokens (KIVI, arXiv 2402.02750); of values, as
        token. fixed: all of a layer, 1 unless a checkpoint says otherwise (fp8)
    group_size: neighbouring channels of a head that share a scale, -1 for all
    chunk: tokens, counted from the text's first one, that are stored together; in 16 bits until
        the last of them is there. 1 unless `scales` is channel
    window: most recent tokens that stay in 16 bits; the token that reads is one of them
    symmetric: whole numbers lie evenly around zero; else from the smallest to the largest number
    """

    bits: int
    format: str = INT
    scales: str = TOKEN
    group_size: int = -1
    chunk: int = 1
    window: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"kv_format={self.format} is not known. Choose from: {', '.join(FORMATS)}"
            )
        if self.scales not in KV_SCALES:
            raise ConfigError(
                f"kv_scales={self.scales} is not known. Choose from: {', '.join(KV_SCALES)}"
            )
        if self.format == INT and self.bits not in (*KV_BITS, UNTOUCHED_KV_BITS):
            raise ConfigError(
                f"kv_bits={self.bits} does not exist: give {', '.join(map(str, KV_BITS))}, or null "
                "for 16"
            )
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(
                f"kv_group_size={self.group_size}: give a positive number of channels, or null"
            )
        if self.chunk < 1:
            raise ConfigError(f"kv_chunk={self.chunk}: give a positive number of tokens, or null")
        if self.window < 0:
            raise ConfigError(f"kv_window={self.window}: give a number of tokens, 0 or more")
        for misfit in self._misfits():
            raise IncompatibleError(misfit)

    def _misfits(self) -> Iterator[str]:
        """Yield in a line each why these settings make no sense together."""
        form = FLOATS.get(self.format)
        if not self.rounds and self.to_json().keys() - {"bits"}:
            yield f"kv_bits={self.bits} leaves the cache as it is: drop the other kv_ settings"
        if form is not None:
            if self.bits != form.bits:
                yield f"kv_bits={self.bits}: numbers of kv_format={form.name} have {form.bits} bits"
            if form.group_size not in (None, self.group_size):
                yield (
                    f"kv_group_size={self.group_size}: groups of kv_format={form.name} have "
                    f"{form.group_size}"
                )
            if self.symmetric:
                yield f"kv_symmetric=true is for kv_format=int; {form.name} is always symmetric"
            if self.scales == CHANNEL and form.group_size is not None:
                yield f"kv_scales=channel: groups of kv_format={form.name} lie in one token"
        if self.scales == FIXED:
            if form is None or form.group_size is not None:
                yield f"kv_scales=fixed is for kv_format=fp8_e4m3 or fp8_e5m2, not {self.format}"
            if self.group_size != -1:
                yield f"kv_group_size={self.group_size} has no effect with kv_scales=fixed"
        if self.chunk == 1 and self.scales == CHANNEL:
            yield "kv_chunk=1: with kv_scales=channel at least 2 tokens share a scale"
        if self.chunk != 1 and self.scales != CHANNEL:
            yield f"kv_chunk={self.chunk} is for kv_scales=channel, not {self.scales}"

    def misfit(self, head_dim: int) -> str | None:
        """Return in a line why these groups do not fit a model's heads; None if they do."""
        size = self.group_size
        if size == -1 or head_dim % size == 0:
            return None
        form = FLOATS.get(self.format)
        if form is not None and form.group_size is not None:
            return (
                f"kv_format={self.format} has groups of {size} channels, which do not divide a "
                f"head of {head_dim}"
            )
        usable = [each for each in (16, 32, 64, 128, 256) if head_dim % each == 0]
        return (
            f"kv_group_size={size} does not divide a head of {head_dim} channels; sizes that do: "
            f"{usable} or null"
        )

    @property
    def rounds(self) -> bool:
        """False if keys and values stay in 16 bits."""
        return self.bits != UNTOUCHED_KV_BITS

    @property
    def late(self) -> bool:
        """True if recent tokens are in 16 bits, so that what a token reads depends on its place."""
        return self.chunk > 1 or self.window > 0

    def rounded(self, tokens: int) -> int:
        """Return how many of a text's first tokens are stored in codes when it has `tokens`."""
        due = max(0, tokens - self.window)
        return due - due % self.chunk

    @property
    def name(self) -> str:
        """Name it for people: `kv4`, `kv8 g32`, `kvfp8`, `kv2 channel/32 window 128`."""
        codes = str(self.bits) if self.format == INT else short_name(self.format)
        form = FLOATS.get(self.format)
        words = [f"kv{codes}{'sym' if self.symmetric else ''}"]
        if self.scales == CHANNEL:
            words.append(f"channel/{self.chunk}")
        elif self.scales == FIXED:
            words.append(FIXED)
        if self.group_size != -1 and (form is None or form.group_size is None):
            words.append(f"g{self.group_size}")
        return " ".join([*words, *([f"window {self.window}"] if self.window else [])])

    @property
    def about(self) -> str:
        """Say what the name means: `keys and values of 4 bits, a scale for a head of a token`."""
        if not self.rounds:
            return "keys and values in 16 bits, which the checkpoint's own config rounds"
        form = FLOATS.get(self.format)
        codes = f"of {self.bits} bits" if form is None else f"in {form.name}"
        size = self.group_size
        own = "a head" if size == -1 else f"{size} channels of a head"
        shared = f"a scale for {own} of a token"
        if self.scales == CHANNEL:
            shared = (
                f"a scale for each channel of {self.chunk} tokens of keys and for {own} of values"
            )
        elif self.scales == FIXED:
            shared = "with one fixed scale"
        recent = f", the last {self.window} tokens in 16 bits" if self.window else ""
        return f"keys and values {codes}, {shared}{recent}"

    def to_json(self) -> Json:
        """Return plain JSON: the bits, and what differs from its default."""
        own = {part.name: part.default for part in fields(self)}
        return {key: value for key, value in asdict(self).items() if value != own[key]}

    def bits_of_key(self, head_dim: int) -> float:
        """Return the bits of one number of a key, its part of the scales included."""
        if self.scales != CHANNEL:
            return self.bits_of_value(head_dim)
        return self.bits + self._scale_bits / self.chunk

    def bits_of_value(self, head_dim: int) -> float:
        """Return the bits of one number of a value, its part of the scales included."""
        if self.scales == FIXED or not self.rounds:
            return self.bits
        form = FLOATS.get(self.format)
        shared = GLOBAL_SCALE_BITS / head_dim if form is not None and form.scale == "e4m3" else 0
        size = head_dim if self.group_size == -1 else self.group_size
        return self.bits + self._scale_bits / size + shared

    @property
    def _scale_bits(self) -> int:
        """Return the bits of a group's scale; of whole numbers, also of its smallest number."""
        form = FLOATS.get(self.format)
        if form is not None:
            return SCALE_BITS[form.scale]
        return FLOAT_BITS if self.symmetric else 2 * FLOAT_BITS


@dataclass(frozen=True)
class CacheShape:
    """What one token leaves in a model's cache.

    numbers: of keys and values, as many of each, in all blocks that attend
    head_dim: of them in one head
    """

    numbers: int
    head_dim: int

    def token_bytes(self, kv: KvScheme | None) -> float:
        """Return the bytes of a token that is stored in codes; without a scheme, in 16 bits."""
        if kv is None:
            return self.numbers * FLOAT_BITS / 8
        bits = kv.bits_of_key(self.head_dim) + kv.bits_of_value(self.head_dim)
        return self.numbers / 2 * bits / 8

    def bytes_at(self, kv: KvScheme | None, tokens: int) -> float:
        """Return the bytes of the cache of a text with this many tokens."""
        rounded = tokens if kv is None else kv.rounded(tokens)
        return rounded * self.token_bytes(kv) + (tokens - rounded) * self.token_bytes(None)

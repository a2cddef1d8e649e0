"""A trial's memory need, from the model's facts alone: arithmetic, without torch, in milliseconds.

The estimates are upper bounds of what benchmarks/streaming.py measures. On a CPU the bytes are the
process's resident ones, on a GPU those that torch allocates.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from q3q.errors import ConfigError
from q3q.formatting import enough_gb, in_gb
from q3q.kv_scheme import CacheShape, KvScheme
from q3q.models.facts import ModelFacts
from q3q.spec import OWN_TEXT

AUTO, LOADERS = "auto", ("resident", "streamed", "sharded")
Device = Literal["cpu", "cuda"]

# Python with torch, transformers, a tokenizer, lm-eval's tasks, and freed tensors that its heap
# keeps; on a GPU the reserves of its libraries.
PROCESS_BYTES = {"cpu": 764 * 2**20, "cuda": 600 * 2**20}
# Calibration tokens that run through a dense block at the same time (`batch_tokens`). A CPU's
# caches hold the activations of so few between two sites.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
# A GPU takes more where experts divide them, as each expert's products are small: up to so many
# times as many, while a block's forward takes at most so many bytes.
MORE_TOKENS, MORE_TOKENS_BYTES = 4, 4 * 10**9
# Bytes of float32 logits.
LOGIT_BYTES = {"cpu": 400 * 2**20, "cuda": 1300 * 2**20}
# Bytes of a recurrence's states in one block that evaluation takes at a time, and the most rows.
# There are up to so many copies: those with which rows begin and end, and those that are kept.
RECURRENT_BYTES, RECURRENT_ROWS = {"cpu": 1 << 26, "cuda": 1 << 28}, 1 << 10
RECURRENT_COPIES = 5
# Bytes of the float32 weights, or of the Hessians, of a chunk of experts (`quantize.sites`).
CHUNK_BYTES = 2**28
# Bytes of experts' Hessians that a method takes in one pass over the windows, where it observes a
# block's sites together: several chunks, as each pass runs the whole block anew.
OBSERVED_BYTES = 2**30
# Copies of (the Hessian, the float32 weights) during factoring, and during rounding.
COPIES = ((3.25, 1), (2, 5))
# Parts in which sums over calibration windows are taken: the most ranks that can share a sum. A
# rank of a gang keeps its own parts apart.
LANES = 8
# On disk, beside codes and groups' numbers: norms, headers, facts, a file that is being written.
STORED_MARGIN = 1.05
BINARY_BITS, BINARY_NUMBERS = 3, 8  # of a 1-bit weight's code, and of a group: BiLLM's
GRID_NUMBERS = 2  # of a group: scale and zero point


@dataclass(frozen=True)
class MethodMemory:
    """The memory that a method takes while it quantizes a block.

    hessian: it keeps a float32 [I, I] of each site's inputs
    chunks_experts: it takes a site's experts in chunks; else all of them at the same time
    together: it observes all sites of a block before it quantizes one; else site by site
    block_copies: copies of the block
    """

    hessian: bool = True
    chunks_experts: bool = True
    together: bool = False
    block_copies: float = 2.5


def need(
    facts: ModelFacts,
    dtype: str,
    *,
    method: MethodMemory | None,
    loader: str,
    ranks: int = 1,
    device: Device = "cpu",
    heads: int = 1,
) -> int:
    """Return the peak bytes of a process (each rank) that quantizes and evaluates this model.

    Python and its libraries are included, a streamed model's prefetched block (`ahead_bytes`) is
    not.

    Args:
        method: None to evaluate the model as it is.
        loader: one of `LOADERS`.
        ranks: number of ranks that share a sharded model.
        heads: 2 if the quantized model's outputs are compared with the original's, else 1.

    Raises:
        ConfigError: the loader is unknown.
    """
    block = ahead_bytes(facts, dtype)
    ends = _ends_bytes(facts, dtype)
    more = (heads - 1) * ends
    running = _running(facts, dtype, device)
    states = RECURRENT_COPIES * recurrent_rows(facts, device) * max(recurrent_bytes(facts))
    work = 0 if method is None else _quantizing(facts, method, running, ranks)
    changing = 0.0 if method is None else method.block_copies
    if loader == "resident":
        peak = (
            facts.weight_bytes(dtype)
            + more
            + max(running + states + LOGIT_BYTES[device], work and int(changing * block) + work)
        )
    elif loader == "streamed":
        # The block and its quantized form; after all blocks, the head.
        quantizing = work and int(changing * block) + work
        peak = max(
            block + running,
            quantizing,
            ends + more + max(LOGIT_BYTES[device], block + running + states),
        )
    elif loader == "sharded":
        shares = (facts.weight_bytes(dtype) - ends) // ranks + ends + more
        peak = shares + max(2 * block + work, running + states + LOGIT_BYTES[device])
    else:
        raise ConfigError(
            f"loader={loader} is not known. Choose from: {AUTO}, {', '.join(LOADERS)}"
        )
    return PROCESS_BYTES[device] + peak


def ahead_bytes(facts: ModelFacts, dtype: str) -> int:
    """Return the bytes of the largest block, which a streamed model may prefetch."""
    return max(facts.block_bytes(k, dtype) for k in range(facts.layers))


def choose(
    facts: ModelFacts,
    dtype: str,
    *,
    method: MethodMemory | None,
    memory: int,
    device: Device = "cpu",
    heads: int = 1,
) -> str:
    """Return resident or streamed, the first that fits into `memory` bytes. See `need`.

    Raises:
        ConfigError: neither fits; the message says how much would.
    """
    needs = {
        loader: need(facts, dtype, method=method, loader=loader, device=device, heads=heads)
        for loader in ("resident", "streamed")
    }
    for loader, bytes_needed in needs.items():
        if bytes_needed <= memory:
            return loader
    raise ConfigError(
        f"this model with {'no method' if method is None else 'this method'} in {dtype} "
        f"does not fit into {in_gb(memory)}: streamed it needs {enough_gb(needs['streamed'])}, "
        f"resident {enough_gb(needs['resident'])}"
    )


def bytes_of(size: int | str, key: str = "memory") -> int:
    """Return the bytes of `2.5GB` (10^9), `8GiB` (2^30), likewise K, M and T, or a number of bytes.

    Args:
        key: the setting that an error message names.

    Raises:
        ConfigError: the size is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    count = 0
    if match and (match[2] or not match[3]):
        exponent = " KMGT".index(match[2].upper() or " ")
        count = int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)
    if count < 1:
        raise ConfigError(
            f"{key}={size} is not a size: give bytes such as 2.5GB (10^9) or 8GiB (2^30)"
        )
    return count


def stored_bytes(
    facts: ModelFacts, bits: int, group_size: int, *, group_bytes: float | None = None
) -> int:
    """Return the bytes that a model's quantized blocks take in a block store, at most.

    Codes are packed to their bits; the numbers of a group are float32. A block store counts as
    `numerics.weights` makes tensors.

    Args:
        bits: of a code; 1 stands for BiLLM's, which take 3.
        group_size: columns of a group; -1 for whole rows.
        group_bytes: of a group's numbers, where they are no float32 scale and zero point.
    """
    numbers = GRID_NUMBERS
    if bits == 1:
        bits, numbers = BINARY_BITS, BINARY_NUMBERS
    group_bytes = 4 * numbers if group_bytes is None else group_bytes
    weights = facts.linear_parameters
    columns = min(min(widths) for widths in facts.columns.values())
    groups = weights / (columns if group_size == -1 else min(group_size, columns))
    return math.ceil(STORED_MARGIN * (weights * bits / 8 + group_bytes * groups))


def _ends_bytes(facts: ModelFacts, dtype: str) -> int:
    """Return the bytes of the head, the largest tensor outside the blocks besides the embedding,
    which a streamed model reads by rows.
    """
    return facts.weight_bytes(dtype) // facts.parameters * facts.vocab * facts.hidden


def token_bytes(facts: ModelFacts, dtype: str) -> int:
    """Return the bytes of one token in a block's forward: the activations between two sites, twice,
    and a norm's float32.
    """
    item = facts.weight_bytes(dtype) // facts.parameters
    inner = max(facts.intermediate, facts.top_k * (facts.moe_intermediate + facts.hidden))
    inner = max(inner, facts.shared_intermediate)
    mixing = 2 * facts.heads * facts.head_dim
    if facts.delta is not None:  # attention has a gate, a delta rule its convolution's channels
        mixing = max(2 * mixing, 3 * facts.delta.channels + 4 * facts.delta.values)
    widest = 3 * inner + mixing + 4 * facts.hidden
    return widest * item + 2 * 4 * facts.hidden


def cache_shape(facts: ModelFacts) -> CacheShape:
    """Return what a token leaves in the cache of all blocks that attend.

    A recurrence's state is not in it: it is of one size, whatever the text's length.
    """
    widths = (facts.family.state_width(facts, k) for k in range(facts.layers))
    return CacheShape(sum(widths), facts.head_dim)


def cache_scheme(facts: ModelFacts, asked: KvScheme | None) -> KvScheme | None:
    """Return how the cache is rounded: as asked for, else as the checkpoint says, if it is."""
    if asked is not None:
        return asked if asked.rounds else None
    return None if facts.packing is None else facts.packing.kv


def recurrent_bytes(facts: ModelFacts) -> list[int]:
    """Return the bytes of the state that a text carries through each block."""
    return [4 * facts.family.recurrent_width(facts, k) for k in range(facts.layers)]


def recurrent_rows(facts: ModelFacts, device: str) -> int:
    """Return the most texts whose states evaluation takes at a time; 0 if the model has none."""
    widest = max(recurrent_bytes(facts))
    return widest and max(1, min(RECURRENT_ROWS, RECURRENT_BYTES[device] // widest))


def batch_tokens(facts: ModelFacts, dtype: str, device: Device) -> int:
    """Return how many calibration tokens run through a block at the same time."""
    tokens = BATCH_TOKENS[device]
    if device == "cuda" and facts.experts:
        most, each = MORE_TOKENS * tokens, token_bytes(facts, dtype)
        while 2 * tokens <= most and 2 * tokens * each <= MORE_TOKENS_BYTES:
            tokens *= 2
    return tokens


def _running(facts: ModelFacts, dtype: str, device: Device) -> int:
    """Return the bytes of a block's forward over one batch of tokens."""
    piece = 0 if facts.delta is None else facts.delta.piece_bytes
    return batch_tokens(facts, dtype, device) * token_bytes(facts, dtype) + piece


def _quantizing(facts: ModelFacts, method: MethodMemory, running: int, ranks: int) -> int:
    """Return the bytes that quantizing the largest site takes on top of the block.

    Experts come in chunks, unless the method treats all at once.
    """
    # One process keeps a total and the current lane; a rank its lanes, and the total that it adds
    # a chunk of them to.
    lanes = -(-LANES // ranks) if ranks > 1 else 2
    most = 0
    kinds = {tuple(facts.block_shapes(k).items()): k for k in range(facts.layers)}
    for kind, k in kinds.items():
        shapes = dict(kind)
        for each in facts.sites(k):
            site = [shapes[name] for name in each.weights]
            weights = 4 * sum(map(math.prod, site))
            experts = site[0][0] if len(site[0]) == 3 else 1
            hessians = 0 if not method.hessian else 4 * experts * site[0][-1] ** 2
            seen = hessians
            if experts > 1 and method.chunks_experts:
                at_once = max(OBSERVED_BYTES, ranks * CHUNK_BYTES)
                seen = min(hessians, at_once if method.together else CHUNK_BYTES)
                weights, hessians = min(weights, CHUNK_BYTES), min(hessians, CHUNK_BYTES)
            observed = running + lanes * seen + (hessians if ranks > 1 else 0)
            most = max(most, observed, *(int(h * hessians + w * weights) for h, w in COPIES))
    return most


def refuse_generation(generates: Collection[str], loader: str) -> None:
    """Refuse to generate text with a model that is not resident.

    Each token takes a pass through all blocks.

    Args:
        generates: what has the model write text, see `TrialSpec.generates`.

    Raises:
        ConfigError: something does, and the loader does not hold the whole model.
    """
    if generates and loader != "resident":
        tasks = "" if generates == (OWN_TEXT,) else ", or leave such tasks out of evaluation.tasks"
        if OWN_TEXT in generates:
            tasks += ", or calibrate on another text"
        raise ConfigError(
            f"{', '.join(generates)}: text is generated token by token, and a {loader} model would "
            f"be read again for each token; give more memory (loader=resident){tasks}"
        )

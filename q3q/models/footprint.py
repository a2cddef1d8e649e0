"""What a trial needs in memory, from the model's facts alone: arithmetic, without torch, in milliseconds.

Estimates from above of what benchmarks/streaming.py measures. On a CPU the bytes are the process's resident ones; on a
GPU those that torch allocates there.
"""

import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from q3q.errors import ConfigError
from q3q.models.facts import ModelFacts
from q3q.spec import Json

if TYPE_CHECKING:
    pass

AUTO, LOADERS = "auto", ("resident", "streamed", "sharded")
Device = Literal["cpu", "cuda"]
# Python with torch, transformers, a tokenizer and lm-eval's tasks, and what its heap keeps of tensors that are gone; on
# a GPU what its libraries reserve for themselves.
PROCESS_BYTES = {"cpu": 764 * 2**20, "cuda": 600 * 2**20}
# Tokens that go through a block together (`quantize.walk`), and bytes of float32 logits that exist at one time.
TOKENS = {"cpu": 2048, "cuda": 8192}
LOGIT_BYTES = {"cpu": 400 * 2**20, "cuda": 1300 * 2**20}
# Experts are treated in chunks of about so many bytes, of weights as float32 or of their Hessians (`quantize.walk`).
CHUNK_BYTES = 2**28
# Copies of a site's Hessian that exist while it is observed; of it and of the float32 weights while it is factored, and
# while columns or groups are rounded.
OBSERVED, COPIES = 2, ((3.25, 1), (2, 5))
# Methods that keep no Hessian. One that is not known here is taken to keep one.
WITHOUT_HESSIAN = ("none", "rtn", "smoothquant")
SEQUENTIAL, CHUNKED = ("gptq",), ("rtn", "gptq", "billm")


def need(
    facts: ModelFacts,
    dtype: str,
    *,
    method: str | None,
    loader: str,
    ranks: int = 1,
    device: Device = "cpu",
    heads: int = 1,
) -> int:
    """Peak bytes of one process (of each rank) that quantizes and evaluates this model, the process itself included;
    of a streamed one without what it may read ahead (`ahead_bytes`).

    Args:
        dtype: that it runs in. method: by name; None to evaluate the model as it is. loader: one of `LOADERS`.
        ranks: how many share a sharded model. heads: 2 where what a quantized one says is compared with the original's.
    """
    block = ahead_bytes(facts, dtype)
    ends = _ends_bytes(facts, dtype)
    more = (heads - 1) * ends
    running = _running(facts, dtype, device)
    work = 0 if method in (None, "none") else _quantizing(facts, method, running)
    # A method that goes from site to site lets go of what it replaces; others keep the block as it was.
    changing = 1.5 if method in SEQUENTIAL else 2.5
    if loader == "resident":
        peak = (
            facts.weight_bytes(dtype)
            + more
            + max(running + LOGIT_BYTES[device], work and int(changing * block) + work)
        )
    elif loader == "streamed":
        # The block and what becomes of it; when all have run, the head.
        quantizing = work and int(changing * block) + work
        peak = max(
            block + running, quantizing, ends + more + max(LOGIT_BYTES[device], block + running)
        )
    elif loader == "sharded":
        shares = (facts.weight_bytes(dtype) - ends) // ranks + ends + more
        peak = shares + max(2 * block + work, running + LOGIT_BYTES[device])
    else:
        raise ConfigError(
            f"loader={loader} is not known. Choose from: {AUTO}, {', '.join(LOADERS)}"
        )
    return PROCESS_BYTES[device] + peak


def ahead_bytes(facts: ModelFacts, dtype: str) -> int:
    """Of the largest block: what a streamed model holds besides while it reads one ahead of the one that is at work."""
    return max(facts.block_bytes(k, dtype) for k in range(facts.layers))


def choose(
    facts: ModelFacts,
    dtype: str,
    *,
    method: str | None,
    memory: int,
    device: Device = "cpu",
    heads: int = 1,
) -> str:
    """The first of resident, streamed that fits into `memory` bytes. See `need`.

    Raises:
        ConfigError: neither does; it says what would.
    """
    needs = {
        loader: need(facts, dtype, method=method, loader=loader, device=device, heads=heads)
        for loader in ("resident", "streamed")
    }
    for loader, bytes_needed in needs.items():
        if bytes_needed <= memory:
            return loader
    raise ConfigError(
        f"this model with {'no method' if method is None else f'method={method}'} in {dtype} does not fit into "
        f"{in_gb(memory)}: streamed it needs {in_gb(needs['streamed'])}, resident {in_gb(needs['resident'])}"
    )


def bytes_of(size: int | str, key: str = "memory") -> int:
    """`2.5GB` (10^9), `8GiB` (2^30), likewise M and T, or a number of bytes.

    Raises:
        ConfigError: it is none of these. key: what it was given for.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    count = 0
    if found and (found[2] or not found[3]):
        count = int(
            float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
        )
    if count < 1:
        raise ConfigError(
            f"{key}={size} is no size: give bytes such as 2.5GB (10^9) or 8GiB (2^30)"
        )
    return count


def free_memory() -> int:
    """Bytes of main memory that this process could take now, what it has already included; Linux and containers on it.

    Raises:
        ConfigError: this system does not say.
    """
    unclaimed = unclaimed_memory()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return unclaimed + pages * os.sysconf("SC_PAGE_SIZE")


def unclaimed_memory() -> int:
    """Bytes of main memory that no process has. Raises ConfigError as `free_memory` does."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration) as error:
        raise ConfigError(
            "this system does not say how much memory is free: give memory=8GB"
        ) from error
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # not in a container of that kind, or without a limit
            control = Path("/sys/fs/cgroup")
            free = min(free, int((control / limit).read_text()) - int((control / used).read_text()))
    return free


def in_gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _ends_bytes(facts: ModelFacts, dtype: str) -> int:
    """Of the head, the largest thing outside the blocks. A streamed embedding is read by rows."""
    return facts.weight_bytes(dtype) // facts.parameters * facts.vocab * facts.hidden


def token_bytes(facts: ModelFacts, dtype: str) -> int:
    """Of one token in a block's forward: what lies between two sites, twice, and the float32 of a norm."""
    item = facts.weight_bytes(dtype) // facts.parameters
    inner = max(facts.intermediate, facts.top_k * (facts.moe_intermediate + facts.hidden))
    widest = 3 * inner + 2 * facts.heads * facts.head_dim + 4 * facts.hidden
    return widest * item + 2 * 4 * facts.hidden


def _running(facts: ModelFacts, dtype: str, device: Device) -> int:
    """A block's forward over one batch of tokens."""
    return TOKENS[device] * token_bytes(facts, dtype)


def _quantizing(facts: ModelFacts, method: str | None, running: int) -> int:
    """What the largest site takes on top of the block. Experts come in chunks, unless a method looks at all at once."""
    most = 0
    for k in {facts.sparse(k): k for k in range(facts.layers)}.values():
        shapes = facts.block_shapes(k)
        for kinds in (
            ("q_proj", "k_proj", "v_proj"),
            ("o_proj",),
            ("gate_proj", "up_proj"),
            ("down_proj",),
        ):
            site = [shape for name, shape in shapes.items() if name.split(".")[-2] in kinds]
            weights = 4 * sum(map(math.prod, site))
            experts = site[0][0] if len(site[0]) == 3 else 1
            hessians = 0 if method in WITHOUT_HESSIAN else 4 * experts * site[0][-1] ** 2
            if experts > 1 and method in CHUNKED:
                weights, hessians = min(weights, CHUNK_BYTES), min(hessians, CHUNK_BYTES)
            observed = running + OBSERVED * hessians
            most = max(most, observed, *(int(h * hessians + w * weights) for h, w in COPIES))
    return most


def refuse_generation(evaluation: Json, loader: str) -> None:
    """Generated text takes a pass through all blocks for each token: only a resident model does it.

    Raises:
        ConfigError: a task generates, and the loader does not hold the whole model.
    """
    found = evaluation.get("generates")
    if found and loader != "resident":
        raise ConfigError(
            f"{', '.join(found)}: text is generated token by token, and a {loader} model would be read anew for each; "
            "give more memory (loader=resident), or leave such tasks out of evaluation.tasks"
        )

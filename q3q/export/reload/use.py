"""What it takes to generate with a loaded model: memory and speed."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PROMPT, GENERATED, GENERATION_SECONDS = 8, 32, 30.0  # tokens, and when to stop before that
MESSAGE_LENGTH = 200  # characters of a loader's message


def peak_resident_bytes() -> int | None:
    """Return the peak of this process's resident memory; None where the system does not say."""
    try:  # unlike getrusage, it does not count what the parent had before this program began
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else None


def generate(model: Any, ids: "Tensor", idle_bytes: int | None) -> dict[str, Any]:
    """Generate a few tokens greedily, and return what that took on the model's device."""
    import torch

    device = model.device
    prompt = ids[:1, :PROMPT].to(device)
    count = min(GENERATED, model.config.max_position_embeddings - prompt.shape[1])
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=1, **settings)  # what is unpacked, is unpacked now
    started = time.perf_counter()
    out = model.generate(
        prompt,
        max_new_tokens=count,
        min_new_tokens=count,
        max_time=GENERATION_SECONDS,
        **settings,
    )
    tokens = int(out.cpu().shape[1]) - prompt.shape[1]
    seconds = time.perf_counter() - started
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": 0 if gpu else torch.get_num_threads(),
        "idle_bytes": None if gpu else idle_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else peak_resident_bytes(),
        "prompt": prompt.shape[1],
        "tokens": tokens,
        "seconds": round(seconds, 4),
    }


def measured(call: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a measurement, or nothing where there is none: a proof does not depend on it."""
    try:
        return [call()]
    except Exception as error:  # of any kind: the loader's, CUDA's, memory
        reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
        print(f"not measured: {type(error).__name__}: {reason}", file=sys.stderr)
        return []

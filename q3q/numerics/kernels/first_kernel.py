"""Compile and launch one small Triton kernel; `compiler` runs this file in a process of its own.

Importing this file needs Triton.
"""

import os

import torch
import triton
import triton.language as tl

COUNT = 64


@triton.jit
def _double(numbers, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    place = numbers + tl.arange(0, COUNT)
    tl.store(place, 2 * tl.load(place))


def main() -> None:
    """Raise whatever keeps Triton from compiling or launching."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    numbers = torch.arange(COUNT, dtype=torch.float32, device=device)
    _double[(1,)](numbers, COUNT=COUNT)
    if not torch.equal(numbers.cpu(), 2 * torch.arange(COUNT, dtype=torch.float32)):
        raise RuntimeError("a kernel that was to double numbers did not")


if __name__ == "__main__":
    main()

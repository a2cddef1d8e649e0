"""Copies between main memory and a device."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Held = TypeVar("Held")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor; to a GPU from pinned memory, so that nobody waits for running kernels."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def moved(held: Held, device: torch.device, dtype: torch.dtype | None = None) -> Held:
    """Return a copy of what dataclasses, lists and tuples hold, with all tensors on a device.

    Args:
        dtype: of floating-point tensors; None leaves theirs.
    """
    copy: Any = held
    if isinstance(held, Tensor):
        copy = to_device(held, device)
        copy = copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy
    elif is_dataclass(held) and not isinstance(held, type):
        parts = {part.name: getattr(held, part.name) for part in fields(held)}
        copy = replace(held, **{name: moved(part, device, dtype) for name, part in parts.items()})
    elif isinstance(held, list | tuple):
        copy = type(held)(moved(part, device, dtype) for part in held)
    return copy

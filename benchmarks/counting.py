"""Count what a computation asks of torch: operator calls, and waits for the device.

Both can be counted on a CPU. On a GPU each operator call takes some microseconds of a processor
core, and each wait lets the queue of kernels run dry.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators whose result's value or shape the host must know, so that it waits for the device.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.equal.default,
}


@dataclass
class Calls:
    """What was asked of torch.

    operators: calls that are no views
    waits: calls that wait for the device
    """

    operators: int = 0
    waits: int = 0


class _Operators(TorchDispatchMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._calls.operators += not func.is_view
        self._calls.waits += func in WAITING
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """On a CPU `tolist` reads memory without an operator; on a GPU it waits and copies."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._calls.waits += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Calls]:
    """Count the calls inside the context."""
    calls = Calls()
    with _Operators(calls), _Lists(calls):
        yield calls

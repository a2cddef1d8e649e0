"""Who shares a trial: the ranks of a gang, one process each, in one torch.distributed group.

Rank 0 runs the trial, as if it were alone; the others `follow`. Where work is worth dividing, rank 0 has all ranks call
the same function at the same time (`together`), and in there they exchange what they must, in the same order. So what
only one rank can know (what lies on its disk, what lm-eval asks) is decided in one place, and code that divides nothing
needs not know of ranks at all.

Imports torch when a gang comes together, not before.
"""

import gc
import io
import os
import pickle
import socket
import struct
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from q3q.errors import ConfigError, Q3QError

if TYPE_CHECKING:
    from torch import Tensor

LOOPBACK = "127.0.0.1"
# Followers wait for as long as rank 0 works alone. Whoever started the gang ends it if a rank dies, so no timeout does.
PATIENCE = timedelta(days=30)
HEED_SECONDS = 1.0
MEETING = timedelta(
    minutes=10
)  # for all ranks to be there: a machine of many may still be loading libraries


class PeerLostError(Q3QError):
    """Another rank of the gang is gone, or failed: what ended the gang is told there, not here."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One rank's place in a gang. host, port: where rank 0 listens; own_host: this rank's address (if all ranks are on
    one machine, loopback). listener: rank 0's listening socket, to which nobody has connected yet."""

    rank: int
    size: int
    host: str
    port: int
    own_host: str
    listener: socket.socket | None = None


class Team:
    """A rank among the ranks of its gang. Costs nothing, and exchanges nothing, where it is the only one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.held: MutableMapping[
            int, Any
        ] = {}  # what this rank keeps between two calls of `together`
        self._together = 0
        self._broken: BaseException | None = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0 of several, working alone: `together` would share the work."""
        return self.size > 1 and self.rank == 0 and not self._together

    def share(self, costs: Sequence[float]) -> list[list[int]]:
        """Which of the items each rank takes, by their costs: the dearest first, each to whoever has least to do.

        The same on every rank. Within a rank in ascending order.
        """
        load, taken = [0.0] * self.size, [list[int]() for _ in range(self.size)]
        for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
            rank = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[rank] += costs[item]
            taken[rank].append(item)
        return [sorted(items) for items in taken]

    def together(self, call: Callable[..., Any], *arguments: Any, **own: Any) -> Any:
        """Have every rank call `call(team, *arguments)`, a function of a module; returns rank 0's result.

        own: keyword arguments for rank 0 alone. Called by rank 0; from within such a call it is an ordinary one. After
        an error here nothing can be done together any more: the others are where they were.
        """
        if self._together or self.size == 1:
            return call(self, *arguments, **own)
        if self._broken is not None:
            raise self._broken
        self.broadcast((call, arguments))
        try:
            with self._in_step():
                return call(self, *arguments, **own)
        except BaseException as error:
            self._broken = error
            raise

    def follow(self, heed: Callable[[], None] = lambda: None) -> None:
        """Of any rank but 0: do what rank 0 has all do together, until it dismisses them.

        heed: called between two such things, about once a second at most; what it raises ends this rank.
        """
        heeded = time.monotonic()
        while (work := self.broadcast(None)) is not None:
            call, arguments = work
            with self._in_step():
                call(self, *arguments)
            del work, call, arguments
            if time.monotonic() - heeded > HEED_SECONDS:
                heed()
                heeded = time.monotonic()

    def dismiss(self) -> None:
        """Rank 0's last word."""
        if self.size > 1:
            self.broadcast(None)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        self._together += 1
        try:
            yield
        finally:
            self._together -= 1

    # ------------------------------------------------------------------------------------------ in step

    def broadcast(self, content: Any, source: int = 0) -> Any:
        """What rank `source` has, on every rank. Anything that can be pickled; its tensors travel as they are."""
        if self.size == 1:
            return content
        import torch.distributed as dist

        if self.rank == source:
            self._transfer(content, lambda tensor: dist.broadcast(tensor, source))
            return content
        return self._take(lambda tensor: dist.broadcast(tensor, source))

    def gather(self, content: Any) -> list[Any]:
        """What each rank has, in the order of ranks, on every rank."""
        return [
            self.broadcast(content if source == self.rank else None, source)
            for source in range(self.size)
        ]

    def along(self, content: Any, join: Callable[[Any, Any], Any], to: int | None = None) -> Any:
        """join(... join(join(None, rank 0's), rank 1's) ..., the last one's), on rank `to`, or on every rank.

        Each rank joins its own to what the one before it sends: between two ranks goes one, whatever their number.
        """
        if self.size == 1:
            return join(None, content)
        import torch.distributed as dist

        joined = None
        if self.rank > 0:
            joined = self._take(lambda tensor: dist.recv(tensor, self.rank - 1))
        joined = join(joined, content)
        if self.rank + 1 < self.size:
            self._transfer(joined, lambda tensor: dist.send(tensor, self.rank + 1))
        if to is None:
            return self.broadcast(joined, self.size - 1)
        return self.sent(joined if self.rank == self.size - 1 else None, self.size - 1, to)

    def sent(self, content: Any, source: int, to: int = 0) -> Any:
        """What rank `source` has, on rank `to`; None on the others."""
        import torch.distributed as dist

        if source == to:
            return content if self.rank == to else None
        if self.rank == source:
            self._transfer(content, lambda tensor: dist.send(tensor, to))
        return self._take(lambda tensor: dist.recv(tensor, source)) if self.rank == to else None

    def barrier(self) -> None:
        self.gather(None)

    def _transfer(self, content: Any, give: Callable[["Tensor"], Any]) -> None:
        """Say what comes, then its tensors one by one."""
        import torch

        message = _Message()
        message.dump(content)
        words = torch.frombuffer(bytearray(message.buffer.getvalue()), dtype=torch.uint8)
        with reaching_others():
            give(torch.tensor([len(words)]))
            give(words)
            for tensor in message.tensors:
                if tensor.numel():
                    give(_bytes(tensor.detach().contiguous()))

    def _take(self, receive: Callable[["Tensor"], Any]) -> Any:
        import torch

        with reaching_others():
            length = torch.zeros(1, dtype=torch.int64)
            receive(length)
            words = torch.empty(int(length), dtype=torch.uint8)
            receive(words)
            return _Received(words.numpy().tobytes(), receive).load()


SOLO = Team()


class _Message(pickle.Pickler):
    """Pickles anything; its tensors are left out, and listed, each once."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, one: Any) -> Any:
        """What stands for a tensor: its number and what it is made like."""
        import torch

        if type(one) is not torch.Tensor:
            return None
        if id(one) not in self._numbers:
            self._numbers[id(one)] = len(self.tensors)
            self.tensors.append(one)
        return self._numbers[id(one)], one.shape, one.dtype, one.device.type


class _Received(pickle.Unpickler):
    """Receives each tensor when the message first speaks of it."""

    def __init__(self, words: bytes, receive: "Callable[[Tensor], Any]") -> None:
        super().__init__(io.BytesIO(words))
        self._receive = receive
        self._tensors: list[Tensor] = []

    def persistent_load(self, tag: Any) -> "Tensor":
        import torch

        number, shape, dtype, device = tag
        if number == len(self._tensors):
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if tensor.numel():
                self._receive(_bytes(tensor))
            self._tensors.append(tensor)
        return self._tensors[number]


def _bytes(tensor: "Tensor") -> "Tensor":
    """A contiguous tensor's memory: gloo does not know all types of numbers."""
    import torch

    return tensor.view(-1).view(torch.uint8)


@contextmanager
def reaching_others() -> Iterator[None]:
    """What torch.distributed says of a connection that broke becomes a PeerLostError."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:  # gloo's own are nothing more special
        words = str(error)
        if not isinstance(error, dist.DistError) and not any(
            name in words for name in ("gloo", "NCCL", "Connection")
        ):
            raise
        raise PeerLostError("another rank of the gang is gone, or cannot be reached") from error


@contextmanager
def joined(seat: Seat) -> Iterator[Team]:
    """Meet the other ranks of the gang in one torch.distributed group: gloo, and NCCL where there are GPUs.

    Nothing listens on any address but `own_host`, and rank 0's `host`: on one machine that is loopback.

    Raises:
        PeerLostError: they did not all come.
    """
    import torch
    import torch.distributed as dist

    interface = interface_of(seat.own_host)
    os.environ.update({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"})
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # torch's own server would listen on every address, so it gets a socket that listens on ours; it will close it.
    listening = None if seat.listener is None else seat.listener.detach()
    with reaching_others():
        store = dist.TCPStore(  # type: ignore[attr-defined]
            seat.host,
            seat.port,
            seat.size,
            seat.rank == 0,
            timeout=MEETING,
            wait_for_workers=False,
            master_listen_fd=listening,
        )
        dist.init_process_group(
            backend, store=store, rank=seat.rank, world_size=seat.size, timeout=PATIENCE
        )
    team = Team(seat.rank, seat.size)
    try:
        yield team
    finally:
        team.held.clear()
        gc.collect()  # DeepSpeed's parameters know the group, which must not outlive the interpreter with its threads
        dist.destroy_process_group()


def interface_of(address: str) -> str:
    """The name of this machine's network interface that has the address.

    Raises:
        ConfigError: none has.
    """
    if address == LOOPBACK:
        return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking, 0x8915, request)  # SIOCGIFADDR
            except OSError:  # no IPv4 address on it
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise ConfigError(
        f"no network interface of this machine has the address {address}, by which Ray knows it"
    )

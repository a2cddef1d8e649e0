"""Ranks that share a trial: a gang of processes in one torch.distributed group.

Rank 0 runs the trial as if it were alone, and the others `follow`. Where dividing the work pays,
rank 0 has all ranks call the same function at the same time (`run_on_all`); inside it they exchange
tensors and objects in the same order. So one rank decides what only it can know (the files on its
disk, lm-eval's questions), and code that divides nothing need not know about ranks.

torch is imported when a gang meets, not before.
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
# Followers wait while rank 0 works alone; if a rank dies, whoever started the gang ends it.
PATIENCE = timedelta(days=30)
CHECK_SECONDS = 1.0
# For all ranks to arrive: a machine may still be loading libraries for many of them.
MEETING = timedelta(minutes=10)
# An exchange between GPUs may take so long, or NCCL ends the process. All ranks are in one step
# then, and only as far apart as their parts of it are unequal; followers wait for rank 0 by gloo.
NCCL_PATIENCE = timedelta(minutes=10)


class PeerLostError(Q3QError):
    """Another rank of the gang failed or disappeared; that rank reports the cause, not this one."""


@dataclass
class Pulse:
    """Whether this process, a rank of a gang, gets on: what its heartbeats tell the driver.

    exchanges: parts of exchanges with other ranks that have begun or ended; it only grows
    depth: exchanges that it is inside, and waits in; 0 while it works
    """

    exchanges: int = 0
    depth: int = 0

    @property
    def waits(self) -> bool:
        return self.depth > 0

    def beat(self) -> None:
        self.exchanges += 1


_PULSE = Pulse()


def own_pulse() -> Pulse:
    """Return this process's pulse: it is one rank."""
    return _PULSE


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """A rank, and the address at which its gang meets."""

    rank: int
    size: int
    host: str  # where rank 0 listens
    port: int
    own_host: str  # this rank's address: loopback if all ranks are on one machine
    listener: socket.socket | None = None  # rank 0's listening socket, without a connection yet


class Team:
    """A rank of a gang. If it is the only one, it exchanges nothing, and costs nothing.

    together: seconds so far in which all ranks worked
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size, self.together = rank, size, 0.0
        self.models: MutableMapping[int, Any] = {}  # kept between two calls of `run_on_all`
        self._depth = 0  # of nested calls of `run_on_all`
        self._broken: BaseException | None = None

    @property
    def leads(self) -> bool:
        """True if this is rank 0 of several and works alone: `run_on_all` would share the work."""
        return self.size > 1 and self.rank == 0 and not self._depth

    def divide(self, costs: Sequence[float]) -> list[list[int]]:
        """Return each rank's items in ascending order, the same lists on every rank.

        The most expensive item goes first, each to the rank with the least cost so far.
        """
        load, taken = [0.0] * self.size, [list[int]() for _ in range(self.size)]
        for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
            rank = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[rank] += costs[item]
            taken[rank].append(item)
        return [sorted(items) for items in taken]

    def run_on_all(self, call: Callable[..., Any], *arguments: Any, **own: Any) -> Any:
        """Have every rank call `call(team, *arguments)`; return rank 0's result.

        Rank 0 calls this. Within such a call, or in a gang of one, it is an ordinary call. After an
        error the gang can run nothing more: the other ranks are still inside the failed call.

        Args:
            call: a module's function, which can be pickled.
            own: keyword arguments for rank 0 alone.
        """
        if self._depth or self.size == 1:
            return call(self, *arguments, **own)
        if self._broken is not None:
            raise self._broken
        begin = time.perf_counter()
        self.broadcast((call, arguments))
        try:
            with self._in_step():
                return call(self, *arguments, **own)
        except BaseException as error:
            self._broken = error
            raise
        finally:
            self.together += time.perf_counter() - begin

    def follow(self, check: Callable[[], None] = lambda: None) -> None:
        """Run rank 0's calls on a rank other than 0, until rank 0 dismisses it.

        Args:
            check: called between two calls, about once a second; may raise to end this rank.
        """
        checked = time.monotonic()
        while (work := self.broadcast(None)) is not None:
            call, arguments = work
            with self._in_step():
                call(self, *arguments)
            del work, call, arguments
            if time.monotonic() - checked > CHECK_SECONDS:
                check()
                checked = time.monotonic()

    def dismiss(self) -> None:
        """End the other ranks' `follow`."""
        if self.size > 1:
            self.broadcast(None)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    # All ranks call each of the following at the same time.

    def broadcast(self, content: Any, source: int = 0) -> Any:
        """Return rank `source`'s content on every rank.

        The content can be anything that can be pickled. Its tensors are sent one by one as raw
        bytes: torch's own object lists would hold another copy of every Hessian.
        """
        if self.size == 1:
            return content
        import torch.distributed as dist

        if self.rank == source:
            self._give(content, lambda tensor: dist.broadcast(tensor, source))
            return content
        return self._take(lambda tensor: dist.broadcast(tensor, source))

    def gather(self, content: Any) -> list[Any]:
        """Return all ranks' contents, in the order of ranks, on every rank."""
        ranks = range(self.size)
        return [self.broadcast(content if rank == self.rank else None, rank) for rank in ranks]

    def fold(self, content: Any, join: Callable[[Any, Any], Any], to: int | None = None) -> Any:
        """Return join(... join(join(None, rank 0's), rank 1's) ..., the last rank's).

        Each rank joins its content to what the rank before it sends, so one joined content travels
        between two ranks, however many there are.

        Args:
            to: the rank that receives the result; every rank if None.
        """
        if self.size == 1:
            return join(None, content)
        import torch.distributed as dist

        before = self._take(lambda tensor: dist.recv(tensor, self.rank - 1)) if self.rank else None
        joined = join(before, content)
        if self.rank + 1 < self.size:
            self._give(joined, lambda tensor: dist.send(tensor, self.rank + 1))
        if to is None:
            return self.broadcast(joined, self.size - 1)
        return self.send(joined if self.rank == self.size - 1 else None, self.size - 1, to)

    def send(self, content: Any, source: int, to: int = 0) -> Any:
        """Return rank `source`'s content on rank `to`, None on the others."""
        import torch.distributed as dist

        if source == to:
            return content if self.rank == to else None
        if self.rank == source:
            self._give(content, lambda tensor: dist.send(tensor, to))
        return self._take(lambda tensor: dist.recv(tensor, source)) if self.rank == to else None

    def _give(self, content: Any, give: Callable[["Tensor"], Any]) -> None:
        """Send the pickled content without its tensors, then the tensors one by one."""
        import torch

        pickler = _TensorPickler()
        pickler.dump(content)
        pickled = torch.frombuffer(bytearray(pickler.buffer.getvalue()), dtype=torch.uint8)
        with exchanging():
            give(torch.tensor([len(pickled)]))
            give(pickled)
            for tensor in pickler.tensors:
                _PULSE.beat()
                if tensor.numel():
                    give(_bytes(tensor.detach().contiguous()))

    def _take(self, receive: Callable[["Tensor"], Any]) -> Any:
        import torch

        with exchanging():
            length = torch.zeros(1, dtype=torch.int64)
            receive(length)
            pickled = torch.empty(int(length), dtype=torch.uint8)
            receive(pickled)
            return _TensorUnpickler(pickled.numpy().tobytes(), receive).load()


SOLO = Team()


class _TensorPickler(pickle.Pickler):
    """A pickler that leaves tensors out of the pickle and lists them, each once."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, item: Any) -> Any:
        """Return a tensor's number, shape, dtype and device, which stand for it in the pickle."""
        import torch

        if type(item) is not torch.Tensor:
            return None
        if id(item) not in self._numbers:
            self._numbers[id(item)] = len(self.tensors)
            self.tensors.append(item)
        return self._numbers[id(item)], item.shape, item.dtype, item.device.type


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that receives each tensor where the pickle first refers to it."""

    def __init__(self, pickled: bytes, receive: "Callable[[Tensor], Any]") -> None:
        super().__init__(io.BytesIO(pickled))
        self._receive = receive
        self._tensors: list[Tensor] = []

    def persistent_load(self, tag: Any) -> "Tensor":
        import torch

        number, shape, dtype, device = tag
        if number == len(self._tensors):
            _PULSE.beat()
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if tensor.numel():
                self._receive(_bytes(tensor))
            self._tensors.append(tensor)
        return self._tensors[number]


def _bytes(tensor: "Tensor") -> "Tensor":
    """View a contiguous tensor as bytes, as gloo does not support all dtypes."""
    import torch

    return tensor.view(-1).view(torch.uint8)


@contextmanager
def exchanging() -> Iterator[None]:
    """Let this process's heartbeats say that it waits for other ranks, and whether that goes on.

    Raise PeerLostError for torch.distributed's errors about a broken connection.
    """
    import torch.distributed as dist

    _PULSE.beat()
    _PULSE.depth += 1
    try:
        yield
    except RuntimeError as error:  # gloo raises no more specific type
        is_connection = any(name in str(error) for name in ("gloo", "NCCL", "Connection"))
        if not is_connection and not isinstance(error, dist.DistError):
            raise
        raise PeerLostError("another rank of the gang is gone, or cannot be reached") from error
    finally:
        _PULSE.depth -= 1
        _PULSE.beat()


@contextmanager
def join_gang(rendezvous: Rendezvous) -> Iterator[Team]:
    """Meet the gang's other ranks in one torch.distributed group: gloo, and NCCL with GPUs.

    Nothing listens on any address but `own_host` and rank 0's `host`, loopback on one machine,
    unless GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME name other interfaces.

    Raises:
        PeerLostError: not all ranks came.
    """
    import torch
    import torch.distributed as dist

    rank, size = rendezvous.rank, rendezvous.size
    choose_interfaces(rendezvous.own_host)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # torch's own server would listen on every address. It takes over, and closes, our socket.
    listening = None if rendezvous.listener is None else rendezvous.listener.detach()
    with exchanging():
        store = dist.TCPStore(  # type: ignore[attr-defined]
            rendezvous.host,
            rendezvous.port,
            size,
            rank == 0,
            timeout=MEETING,
            wait_for_workers=False,
            master_listen_fd=listening,
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        if torch.cuda.is_available():
            whole = dist.distributed_c10d._get_default_group()
            whole._get_backend(torch.device("cuda"))._set_default_timeout(NCCL_PATIENCE)
    team = Team(rank, size)
    try:
        yield team
    finally:
        team.models.clear()
        gc.collect()  # DeepSpeed's parameters hold the group, whose threads must end before Python
        dist.destroy_process_group()


_CHOSEN: dict[str, str] = {}  # interfaces in this process's environment that are not the user's


def choose_interfaces(own_host: str) -> None:
    """Have gloo and NCCL use the interface with this rank's address.

    What the user or the cluster has set stays: they may know a faster network. What an earlier gang
    of this process had does not.

    Raises:
        ConfigError: no interface has the address.
    """
    interface = interface_of(own_host)
    for name, value in (
        ("GLOO_SOCKET_IFNAME", interface),
        ("NCCL_SOCKET_IFNAME", f"={interface}"),
    ):
        if os.environ.get(name) in (None, _CHOSEN.get(name)):
            os.environ[name] = _CHOSEN[name] = value


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface with the address.

    Raises:
        ConfigError: no interface has it.
    """
    if address == LOOPBACK:
        return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
            except OSError:  # no IPv4 address on it
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise ConfigError(
        f"no network interface of this machine has the address {address}, under which Ray knows it"
    )

"""Quantized blocks on disk: packed, the same bits again, and written behind the walk."""

import errno
import hashlib
import os
import signal
import threading
from dataclasses import asdict

import pytest
import torch

from q3q.errors import NumericsError
from q3q.models.tensor_files import encode_tensors
from q3q.numerics.binary_weights import BinarizedWeight
from q3q.numerics.weights import QuantizedWeight
from q3q.quantize import block_store
from q3q.quantize.behind import MOST
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.block_file import encode
from q3q.quantize.block_store import BlockStore
from q3q.record import SiteError
from q3q.storage import files
from q3q.storage.claim import ClaimLostError
from q3q.storage.files import sealed, write_atomically
from tests.chaos.faults import end_of, in_child

Q, DOWN, EXPERTS = "self_attn.q_proj.weight", "mlp.down_proj.weight", "mlp.experts.up_proj.weight"
EXPERT_COUNT, ROWS, COLUMNS, GROUPS = 3, 6, 48, 6


def uniform(bits, seed=0, *, experts=1, group=None, fraction=0.0):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (experts, ROWS, COLUMNS), generator=draw).to(torch.uint8)
    scale = torch.rand(experts, ROWS, GROUPS, generator=draw)
    zero = torch.randint(2**bits, (experts, ROWS, GROUPS), generator=draw) + fraction
    return QuantizedWeight(codes, scale, zero.float(), bits, symmetric=False, group_EI=group)


def signs(seed=0):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(8, (1, ROWS, COLUMNS), generator=draw).to(torch.uint8)
    return BinarizedWeight(
        codes, *(torch.randn(1, ROWS, GROUPS, 4, generator=draw) for _ in range(2))
    )


def block(index=0, bits=3, **quantized):
    quantized = quantized or {"q": uniform(bits, index)}
    names = {"q": Q, "down": DOWN, "experts": EXPERTS}
    return QuantizedBlock(
        index,
        {names[name]: weight for name, weight in quantized.items()},
        {
            "input_layernorm.weight": torch.randn(
                COLUMNS, generator=torch.Generator().manual_seed(index)
            )
        },
        [SiteError(block=index, site="qkv", linear="q", weight_error=0.25, output_error=None)],
        {f"blocks.{index}": index},
    )


def same(one, other):
    assert one is not None
    assert other is not None
    assert one.quantized.keys() == other.quantized.keys()
    for name, weight in one.quantized.items():
        ours, theirs = weight.to_tensors(), other.quantized[name].to_tensors()
        assert weight.facts() == other.quantized[name].facts()
        assert ours.keys() == theirs.keys()
        for part, tensor in ours.items():
            assert tensor.dtype == theirs[part].dtype
            assert torch.equal(tensor, theirs[part])
    assert one.changed.keys() == other.changed.keys()
    assert all(torch.equal(one.changed[name], other.changed[name]) for name in one.changed)
    assert (one.index, one.errors, one.notes) == (other.index, other.errors, other.notes)


KINDS = {
    **{f"{bits} bits": {"q": uniform(bits), "down": uniform(bits, 1)} for bits in range(1, 9)},
    "experts": {"experts": uniform(3, experts=EXPERT_COUNT)},
    "act-order": {"q": uniform(4, group=torch.arange(COLUMNS, dtype=torch.int32)[None] % GROUPS)},
    "zero points between codes": {"q": uniform(4, fraction=0.5)},
    "signs": {"q": signs(), "down": signs(1)},
    "codes too wide for their bits": {
        "q": QuantizedWeight(
            uniform(8).codes_EOI,
            torch.ones(1, ROWS, GROUPS),
            torch.ones(1, ROWS, GROUPS),
            2,
            symmetric=False,
        )
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_block_is_the_same_again_bit_by_bit(tmp_path, kind):
    written = block(**KINDS[kind])
    with BlockStore(tmp_path, identity="one") as store:
        store.store(written)
    same(written, BlockStore(tmp_path, identity="one").load(0))
    assert BlockStore(tmp_path, identity="other").load(0) is None


@pytest.mark.parametrize("weight", [*(uniform(bits) for bits in (2, 3, 4, 8)), signs()])
def test_a_file_holds_as_many_bits_of_a_code_as_it_has(tmp_path, weight):
    """A scale and a zero point, or BiLLM's means and scales, are float32 besides."""
    written = block(q=weight)
    with BlockStore(tmp_path) as store:
        store.store(written)
    size = (tmp_path / "block_000.safetensors").stat().st_size
    others = [*weight.to_tensors().values(), *written.changed.values()]
    numbers = sum(tensor.nbytes for tensor in others if tensor.dtype != torch.uint8)
    content = encode_tensors(encode(written).tensors)
    header = len(next(content))
    bits = 3 if isinstance(weight, BinarizedWeight) else weight.bits
    assert size - header - numbers == ROWS * COLUMNS * bits / 8
    assert size == header + sum(map(len, content))


def write_as_before(folder, written):
    """Write a block as q3q did when a code took a byte."""
    tensors = {f"changed/{name}": tensor for name, tensor in written.changed.items()}
    for name, weight in written.quantized.items():
        parts = weight.to_tensors()
        tensors |= {f"quantized/{name}/{part}": tensor for part, tensor in parts.items()}
    content = b"".join(map(bytes, encode_tensors(tensors)))
    facts = {
        "owner": f"block {written.index} of ",
        "tensors": hashlib.sha256(content).hexdigest(),
        "quantized": {name: weight.facts() for name, weight in written.quantized.items()},
        "errors": [asdict(error) for error in written.errors],
        "notes": written.notes,
    }
    write_atomically(folder / f"block_{written.index:03d}.safetensors", content)
    write_atomically(folder / f"block_{written.index:03d}.json", sealed(facts))


@pytest.mark.parametrize("kind", ["3 bits", "act-order", "signs"])
def test_a_block_of_an_older_version_is_read(tmp_path, kind):
    written = block(**KINDS[kind])
    write_as_before(tmp_path, written)
    same(written, BlockStore(tmp_path).load(0))


class Gate(threading.Event):
    """Blocks are written when it is set. written: names of files, in order."""

    def __init__(self):
        super().__init__()
        self.written: list[str] = []


def write_by(monkeypatch, write):
    """Have a block's tensors and its facts written by another function."""
    for module in (block_store, files):
        monkeypatch.setattr(module, "write_atomically", write)


@pytest.fixture
def gate(monkeypatch):
    opened = Gate()

    def write(path, content, **options):
        assert opened.wait(60)
        write_atomically(path, content, **options)
        opened.written.append(path.name)

    write_by(monkeypatch, write)
    yield opened
    opened.set()


def test_blocks_are_written_behind_the_walk_and_at_most_two(tmp_path, gate):
    store = BlockStore(tmp_path)
    for k in range(MOST):
        store.store(block(k))  # does not wait for the disk
    assert not gate.written
    same(block(0), store.load(0))  # from memory
    assert store.load(MOST) is None
    walk = threading.Thread(target=store.store, args=[block(MOST)])
    walk.start()
    walk.join(0.05)
    assert walk.is_alive()  # it waits for the first one
    gate.set()
    walk.join()
    assert gate.written[:2] == ["block_000.safetensors", "block_000.json"]
    store.settle()
    files = [f"block_{k:03d}.{kind}" for k in range(MOST + 1) for kind in ("safetensors", "json")]
    assert gate.written == files
    for k in range(MOST + 1):
        same(block(k), store.load(k))
        same(block(k), BlockStore(tmp_path).load(k))


def test_a_kill_loses_at_most_two_blocks(tmp_path, monkeypatch):
    def work():
        def slow(path, content, **options):
            if path.name.startswith("block_002"):
                os.kill(os.getpid(), signal.SIGKILL)
            write_atomically(path, content, **options)

        write_by(monkeypatch, slow)
        store = BlockStore(tmp_path)
        for k in range(9):
            (tmp_path / "reached").write_text(str(k))
            store.store(block(k))

    assert end_of(in_child(work)) == -signal.SIGKILL
    assert int((tmp_path / "reached").read_text()) <= 2 + MOST
    again = BlockStore(tmp_path)
    same(block(1), again.load(1))
    assert again.load(2) is None


def fail_at(monkeypatch, name):
    def write(path, content, **options):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, content, **options)

    write_by(monkeypatch, write)


@pytest.mark.parametrize("name", ["block_001.safetensors", "block_001.json"])
def test_an_error_of_the_thread_is_raised_in_the_walk_and_loses_that_block_alone(
    tmp_path, monkeypatch, name
):
    fail_at(monkeypatch, name)

    def walk():
        with BlockStore(tmp_path) as store:
            for k in range(2 + MOST):
                store.store(block(k))

    with pytest.raises(OSError, match="No space left") as caught:
        walk()
    assert caught.value.filename == str(tmp_path / name)
    again = BlockStore(tmp_path)
    assert [again.load(k) is not None for k in range(2)] == [True, False]


def test_an_error_of_the_last_block_is_raised_at_the_end(tmp_path, monkeypatch):
    fail_at(monkeypatch, "block_000.json")
    store = BlockStore(tmp_path)
    store.store(block(0))
    with pytest.raises(OSError, match="No space left"):
        store.settle()
    store.settle()  # it was said


def test_the_walks_own_error_comes_first_and_what_was_stored_is_written(tmp_path, monkeypatch):
    opened = threading.Event()

    def write(path, content, **options):
        assert opened.wait(60)  # else the walk may meet the error where it stores the next block
        if path.name == "block_000.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content, **options)

    write_by(monkeypatch, write)

    def walk():
        with BlockStore(tmp_path) as store:
            for k in range(MOST):
                store.store(block(k))
            opened.set()
            raise NumericsError("the walk's")

    with pytest.raises(NumericsError, match="the walk's"):
        walk()
    assert [BlockStore(tmp_path).load(k) is not None for k in range(MOST)] == [False, True]


def test_nothing_more_is_written_where_another_process_has_the_trial(tmp_path, gate):
    store = BlockStore(tmp_path)
    for k in range(MOST):
        store.store(block(k))
    _, last = store._behind._waiting[MOST - 1]
    last.add_done_callback(lambda cancelled: gate.set())  # the first goes on once the last may not
    store.__exit__(ClaimLostError, ClaimLostError("gone"), None)
    assert gate.written == ["block_000.safetensors", "block_000.json"]

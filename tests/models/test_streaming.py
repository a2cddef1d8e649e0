"""Streamed models: the resident model's numbers, one block at a time."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch

from q3q.errors import CheckpointError, NumericsError
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.spool import Spool
from q3q.models.streaming import StreamedBlocks, StreamedDecoder
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.weights import round_to_grid
from q3q.scheme import InputRounding

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


def batches(count=5):
    return [
        torch.randint(61, (2, 9 + i), generator=torch.Generator().manual_seed(i))
        for i in range(count)
    ]


def rounded(matrix):
    grid = minmax_grid(into_groups(matrix.float()[None], 16), 3, symmetric=False)
    return round_to_grid(matrix.float()[None], grid, 3, 16, symmetric=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dense", "moe", "fused"])
def test_a_streamed_model_says_what_the_resident_one_says(random_checkpoint, kind, tied, dtype):
    fused = kind == "fused"
    folder = random_checkpoint(
        "moe" if fused else kind, fused=fused, tie_word_embeddings=tied, torch_dtype=dtype
    )
    resident = load_decoder(Checkpoint(folder), torch.float32)
    streamed = StreamedDecoder(Checkpoint(folder), torch.float32)
    assert streamed.streamed
    assert not resident.streamed
    for ours, theirs in zip(streamed.states(batches()), resident.states(batches()), strict=True):
        assert torch.equal(ours, theirs)
        chosen = [
            model.log_likelihoods(ours[0], torch.arange(len(ours[0])))[0]
            for model in (streamed, resident)
        ]
        assert torch.equal(*chosen)
    for end in ("embedding", "head"):
        assert torch.equal(torch.cat(list(streamed.rows(end))), torch.cat(list(resident.rows(end))))
    assert torch.equal(streamed.embedding_VH, resident.embedding_VH)
    assert torch.equal(streamed.hidden(batches()[0]), resident.hidden(batches()[0]))
    assert streamed.tied == resident.tied == tied


def test_each_block_runs_once_over_all_batches_and_none_is_kept(random_checkpoint, monkeypatch):
    model = StreamedDecoder(Checkpoint(random_checkpoint()), torch.float32)
    made, alive, most = [], [], 0
    plain = StreamedBlocks._read

    def read(self, k, source):
        nonlocal most
        block = plain(self, k, source)
        made.append(k)
        alive.append(weakref.ref(block))
        most = max(most, sum(one() is not None for one in alive))
        return block

    monkeypatch.setattr(StreamedBlocks, "_read", read)
    list(model.states(batches()))
    assert made == [0, 1, 2]
    assert most <= 2  # the one that runs, and the one that is read meanwhile
    gc.collect()
    assert not any(one() is not None for one in alive)


def test_the_next_block_is_read_by_a_thread_and_without_reading_ahead_by_none(
    random_checkpoint, monkeypatch
):
    readers = []
    plain = StreamedBlocks._read

    def recording(self, k, source):
        readers.append((k, threading.current_thread().name))
        return plain(self, k, source)

    monkeypatch.setattr(StreamedBlocks, "_read", recording)
    checkpoint = Checkpoint(random_checkpoint())
    for ahead in (True, False):
        blocks = StreamedBlocks(checkpoint, torch.float32, ahead=ahead)
        assert len([block for block in blocks]) == 3  # noqa: C416  (each is let go of before the next)
    main = threading.current_thread().name
    assert [k for k, _ in readers] == [0, 1, 2] * 2
    assert [name != main for _, name in readers] == [False, True, True, False, False, False]


def test_activations_beyond_their_memory_lie_on_disk_and_change_no_bit(random_checkpoint, tmp_path):
    folder = random_checkpoint("moe")
    unbounded, few = (StreamedDecoder(Checkpoint(folder), torch.float32) for _ in range(2))
    spool = Spool(3000, tmp_path)
    states = list(few.states(batches(), spool=spool))
    assert all(torch.equal(*both) for both in zip(states, unbounded.states(batches()), strict=True))
    few.activations = 0
    assert all(torch.equal(*both) for both in zip(states, few.states(batches()), strict=True))


def test_a_blocks_attention_is_asked_for_batch_after_batch(random_checkpoint):
    from q3q.models.attention import CAUSAL

    folder = random_checkpoint()

    def attend_and_record(calls, k, b):
        calls.append((k, b))
        return CAUSAL

    for model, first in (
        (load_decoder(Checkpoint(folder), torch.float32), [(0, 0), (1, 0), (2, 0)]),
        (StreamedDecoder(Checkpoint(folder), torch.float32), [(0, 0), (0, 1), (1, 0)]),
    ):
        calls: list[tuple[int, int]] = []
        list(model.states(batches(2), partial(attend_and_record, calls)))
        assert calls[:3] == first
        assert sorted(calls) == [(k, b) for k in range(3) for b in range(2)]


def test_changes_reach_blocks_that_are_still_to_be_read(random_checkpoint):
    folder = random_checkpoint()
    resident, streamed = (
        load_decoder(Checkpoint(folder), torch.float32),
        StreamedDecoder(Checkpoint(folder), torch.float32),
    )
    before = streamed.hidden(batches()[0])
    first = streamed.blocks[0]  # the second one is being read already
    for model in (resident, streamed):
        model.adjust(lambda k, block: setattr(block, "rounding", InputRounding(4 + k)))
    assert [block.rounding for block in streamed.blocks] == [InputRounding(4 + k) for k in range(3)]
    after = streamed.hidden(batches()[0])
    assert torch.equal(after, resident.hidden(batches()[0]))
    assert not torch.equal(after, before)
    assert first.rounding is None


def test_exchanged_weights_come_from_their_source_and_the_others_from_the_checkpoint(
    random_checkpoint,
):
    folder = random_checkpoint()
    resident, streamed = (
        load_decoder(Checkpoint(folder), torch.float32),
        StreamedDecoder(Checkpoint(folder), torch.float32),
    )
    name = "mlp.up_proj.weight"
    calls = []

    def source():
        calls.append(1)
        return {name: torch.full((48, 32), 0.01)}

    untouched = streamed.copy()
    streamed.blocks[0]  # the second one is being read already
    for model in (resident, streamed):
        model.exchange(1, None, source)
    assert torch.equal(streamed.hidden(batches()[0]), resident.hidden(batches()[0]))
    assert len(calls) == 2
    assert not torch.equal(untouched.blocks[1].weights[name], streamed.blocks[1].weights[name])


@pytest.mark.parametrize("tied", [True, False])
def test_ends_that_were_exchanged(random_checkpoint, tied):
    folder = random_checkpoint(tie_word_embeddings=tied)
    resident, streamed = (
        load_decoder(Checkpoint(folder), torch.float32),
        StreamedDecoder(Checkpoint(folder), torch.float32),
    )
    before = streamed.head_VH
    codes = {"embedding": rounded(resident.embedding_VH)} | (
        {} if tied else {"head": rounded(resident.head_VH)}
    )
    for model in (resident, streamed):
        model.exchange_ends(codes)
    assert torch.equal(streamed.head_VH, resident.head_VH)
    assert not torch.equal(streamed.head_VH, before)
    assert torch.equal(streamed.original_head(), before)
    ids = torch.tensor([[3, 60, 3, 0]])
    assert torch.equal(streamed.embed(ids), resident.embed(ids))
    assert torch.equal(streamed.hidden(ids), resident.hidden(ids))


def test_the_head_is_read_when_it_is_needed_and_freed(random_checkpoint, monkeypatch):
    model = StreamedDecoder(Checkpoint(random_checkpoint()), torch.float32)
    seen = weakref.ref(model.head_VH)
    assert seen() is model.head_VH
    first = model.head_VH
    list(model.states(batches(1)))
    assert model.head_VH is first  # still referenced, so it is not read again
    del first
    model.release_head()
    assert seen() is None


@pytest.mark.parametrize("ahead", [True, False])
def test_a_shard_that_is_cut_off_midway_is_an_error_by_name(random_checkpoint, ahead):
    folder = random_checkpoint()
    model = StreamedDecoder(Checkpoint(folder), torch.float32, ahead=ahead)
    shard = folder / "model-00003-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(
        CheckpointError, match=r"model-00003-of-00003\.safetensors is damaged: it ends too early"
    ):
        model.hidden(batches()[0])


def test_weights_that_are_not_finite_are_refused_by_name(random_checkpoint):
    folder = random_checkpoint()
    shard = folder / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # the last float32 of the shard is not a number
    shard.write_bytes(content)
    model = StreamedDecoder(Checkpoint(folder), torch.float32)
    with pytest.raises(NumericsError, match=r"blocks\.1\..* are not finite"):
        model.hidden(batches()[0])

"""The walk over a streamed model gives the resident walk's codes, whatever the memory, the chunks
and the kills.
"""

from collections.abc import Generator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch

from q3q.errors import IntegrityError
from q3q.evaluate.integrity import check_weights
from q3q.models import footprint
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.spool import Spool
from q3q.models.streaming import StreamedBlocks, StreamedDecoder
from q3q.numerics.weights import QuantizedWeight
from q3q.quantize import runs, sites
from q3q.quantize.block_store import BlockStore
from q3q.quantize.ends import quantize_ends
from q3q.quantize.search import search_variants
from q3q.quantize.walk import quantize_model, quantized_blocks
from q3q.scheme import InputRounding
from q3q.spec import Scheme, Schemes
from tests.methods import built

METHODS = {
    "rtn": lambda: built("rtn"),
    "gptq": lambda: built("gptq"),
    "gptq_at_once": lambda: built("gptq", true_sequential=False),
    "awq": lambda: built("awq"),
    "smoothquant": lambda: built("smoothquant"),
    "billm": lambda: built("billm"),
}
SCHEME = Scheme(
    bits=3,
    group_size=16,
    symmetric=False,
    act_bits=4,
    act_format="nvfp4",
    act_group_size=16,
    act_scales="calibrated",
)
ACTIVATIONS = [40_000, 0]  # bytes, for some batches and for none


@pytest.fixture(autouse=True)
def _no_gradients(monkeypatch):
    monkeypatch.setattr(footprint, "BATCH_TOKENS", {"cpu": 80})  # six batches
    with torch.inference_mode():
        yield


def scheme_for(name):
    return replace(SCHEME, bits=1) if name == "billm" else SCHEME


def same_codes(ours, theirs):
    assert [block.index for block in ours] == [block.index for block in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.quantized.keys() == b.quantized.keys()
        assert a.changed.keys() == b.changed.keys()
        for name in a.quantized:
            first, second = a.quantized[name].to_tensors(), b.quantized[name].to_tensors()
            assert all(torch.equal(first[part], second[part]) for part in first), name
        assert all(torch.equal(a.changed[name], b.changed[name]) for name in a.changed)
        assert a.errors == b.errors
        assert a.notes == b.notes
        assert a.peaks == b.peaks
        assert all(peak > 0 for peak in a.peaks.values())


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "dense") for name in METHODS), ("gptq", "moe"), ("awq", "moe")]
)
def test_a_streamed_walk_gives_the_resident_ones_bits(
    random_checkpoint, tmp_path, windows, kind, name
):
    folder, ids = random_checkpoint(kind), torch.arange(60).view(2, 30)
    resident = load_decoder(Checkpoint(folder), torch.float32)
    expected = quantize_model(
        resident,
        METHODS[name](),
        scheme_for(name),
        windows,
        BlockStore(tmp_path / "r"),
    )
    for memory in ACTIVATIONS:
        streamed = StreamedDecoder(Checkpoint(folder), torch.float32, activations=memory)
        streamed.pinned = 20_000  # some go to main memory, as a GPU's would, and some to files
        store = BlockStore(tmp_path / f"s{memory}")
        results = quantize_model(streamed, METHODS[name](), scheme_for(name), windows, store)
        same_codes(results, expected)
        assert store.reused == 0
        assert torch.equal(streamed.hidden(ids), resident.hidden(ids))
        checks = check_weights(streamed, [block.quantized for block in results])
        assert all(check.passed for check in checks), checks
    assert not torch.equal(
        load_decoder(Checkpoint(folder), torch.float32).hidden(ids), resident.hidden(ids)
    )


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_inputs_that_awq_stores_stay_within_the_memory_for_activations(
    random_checkpoint, tmp_path, windows, kind, monkeypatch
):
    spools: WeakSet[Spool] = WeakSet()
    most, spilled = [], []
    keep, write = Spool._keep, Spool._write

    def counted_keep(self, i, tensor):
        spools.add(self)
        item = keep(self, i, tensor)
        most.append(sum(spool._in_memory for spool in spools))
        return item

    def counted_write(self, i, tensor):
        spilled.append(tensor.shape)
        return write(self, i, tensor)

    monkeypatch.setattr(Spool, "_keep", counted_keep)
    monkeypatch.setattr(Spool, "_write", counted_write)
    folder, peaks = random_checkpoint(kind), {}
    for memory in (40_000, 1_000_000):
        streamed = StreamedDecoder(Checkpoint(folder), torch.float32, activations=memory)
        del most[:], spilled[:]
        store = BlockStore(tmp_path / f"{memory}")
        quantize_model(streamed, METHODS["awq"](), SCHEME, windows, store)
        peaks[memory] = max(most)
        # 2-D tensors are inputs of a site; those between two blocks are 3-D.
        assert any(len(shape) == 2 for shape in spilled) == (memory == 40_000)
    assert peaks[40_000] <= 40_000 < peaks[1_000_000]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    "name", ["gptq", "smoothquant"]
)  # which pass activations on as they go, and afterwards
def test_a_streamed_walk_that_was_killed_goes_on_and_ends_with_the_same_bits(
    random_checkpoint, tmp_path, windows, kind, name
):
    folder = random_checkpoint(kind)
    whole = quantize_model(
        StreamedDecoder(Checkpoint(folder), torch.float32),
        METHODS[name](),
        scheme_for(name),
        windows,
        BlockStore(tmp_path / "whole"),
    )
    broken = quantized_blocks(
        StreamedDecoder(Checkpoint(folder), torch.float32),
        METHODS[name](),
        scheme_for(name),
        windows,
        left := BlockStore(tmp_path / "broken"),
    )
    assert isinstance(broken, Generator)
    next(broken)
    broken.close()
    left.settle()
    for loader in (StreamedDecoder, load_decoder):
        store = BlockStore(tmp_path / "again", finished=tmp_path / "broken")
        results = quantize_model(
            loader(Checkpoint(folder), torch.float32),
            METHODS[name](),
            scheme_for(name),
            windows,
            store,
        )
        same_codes(results, whole)
        assert store.reused == 1
        store.delete()


@pytest.mark.parametrize(
    ("name", "route"),
    [("rtn", "top_k"), ("gptq", "top_k"), ("gptq", "all"), ("gptq_at_once", "top_k")],
)
def test_chunks_of_experts_change_no_bit(
    random_checkpoint, tmp_path, windows, name, route, monkeypatch
):
    folder = random_checkpoint("moe", num_experts=7)
    results = []
    for size in (2**28, 3 * 4 * 32 * 32, 1):  # all seven at once, three, and as few as can be
        monkeypatch.setattr(sites, "CHUNK_BYTES", size)
        model = StreamedDecoder(
            Checkpoint(folder), torch.float32, activations=None if size > 1 else 30_000
        )
        model.adjust(lambda k, block: setattr(block, "every_expert", route == "all"))
        store = BlockStore(tmp_path / str(size))
        results.append(quantize_model(model, METHODS[name](), scheme_for(name), windows, store))
    for chunked in results[1:]:
        same_codes(chunked, results[0])
    if name != "rtn":
        notes = results[0][0].notes["blocks.0.gate_up"]
        assert len(notes["tokens_per_expert"]) == 7


def test_starved_experts_are_numbered_among_all(random_checkpoint, tmp_path, windows, monkeypatch):
    folder = random_checkpoint("moe", num_experts=7)
    model = load_decoder(Checkpoint(folder), torch.float32)
    monkeypatch.setattr(sites, "CHUNK_BYTES", 1)
    [first, *_] = quantize_model(
        model, METHODS["gptq"](), SCHEME, windows[:6], BlockStore(tmp_path)
    )
    note = first.notes["blocks.0.gate_up"]
    starved = [e for e, tokens in enumerate(note["tokens_per_expert"]) if tokens < 128]
    assert any(e > 2 for e in starved)
    assert note["starved_experts"] == starved


@pytest.mark.parametrize("name", ["gptq", "billm"])
def test_only_a_chunk_of_experts_is_observed_and_widened_at_one_time(
    random_checkpoint, tmp_path, windows, name, monkeypatch
):
    monkeypatch.setattr(sites, "CHUNK_BYTES", 1)
    method, seen = METHODS[name](), []
    plain = method.quantize

    def quantize(task, scheme):
        seen.append((task.site, len(task.weight_EOI), len(task.statistics.tokens_E)))
        return plain(task, scheme)

    monkeypatch.setattr(method, "quantize", quantize)
    model = StreamedDecoder(Checkpoint(random_checkpoint("moe")), torch.float32)
    quantize_model(model, method, scheme_for(name), windows, BlockStore(tmp_path))
    for site in ("gate_up", "down"):
        assert [sizes for where, *sizes in seen if where == site] == [[2, 2], [3, 3]] * 3


def test_no_more_runs_are_halted_than_there_is_room_for(random_checkpoint, windows):
    block = load_decoder(Checkpoint(random_checkpoint()), torch.float32)
    hidden = [block.embed(part) for part in windows.split(2)]
    first = block.blocks[0]
    size = 2 * 40 * first.halted_width * 4
    for room, count in ((None, 6), (size * 3 + 1, 3), (0, 0)):
        activations: Any = SimpleNamespace(hidden=hidden, room=room)
        assert len(runs.Runs(first, activations, block.rope)._halted) == count
    # A halted run holds no more than `halted_width` says.
    run = first.stages(hidden[0], block.rope)
    for _ in first.sites:
        next(run)
        held: dict[int, int] = {}
        frame: Any = run
        while frame is not None:
            for value in frame.gi_frame.f_locals.values():
                if isinstance(value, torch.Tensor):
                    held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            frame = frame.gi_yieldfrom
        rotary = 2 * 40 * 8 * 4
        assert sum(held.values()) <= size + rotary


def test_the_walk_holds_one_block_of_codes(random_checkpoint, tmp_path, windows):
    import gc
    import weakref

    model = StreamedDecoder(Checkpoint(random_checkpoint()), torch.float32)
    alive: list[weakref.ref[torch.Tensor]] = []
    for block in quantized_blocks(model, METHODS["gptq"](), SCHEME, windows, BlockStore(tmp_path)):
        gc.collect()
        assert sum(one() is not None for one in alive) == 0
        for weight in block.quantized.values():
            assert isinstance(weight, QuantizedWeight)
            alive.append(weakref.ref(weight.codes_EOI))
        del block, weight
    assert len(alive) == 3 * 7


def test_a_block_that_is_gone_is_an_error_and_not_the_original(random_checkpoint, tmp_path):
    model = StreamedDecoder(Checkpoint(random_checkpoint()), torch.float32)
    with BlockStore(tmp_path) as store:
        quantize_model(model, METHODS["rtn"](), SCHEME, torch.arange(20)[None], store)
    (tmp_path / "block_001.safetensors").unlink()
    with pytest.raises(IntegrityError, match="block 1, which was quantized and stored"):
        model.hidden(torch.arange(10)[None])


@pytest.mark.parametrize("tied", [True, False])
def test_ends_of_a_streamed_model(random_checkpoint, tied, monkeypatch):
    folder = random_checkpoint(tie_word_embeddings=tied)
    schemes = Schemes(SCHEME, head=SCHEME, embedding=SCHEME)
    models = (
        load_decoder(Checkpoint(folder), torch.float32),
        StreamedDecoder(Checkpoint(folder), torch.float32),
    )
    codes = [quantize_ends(model, schemes) for model in models]
    assert codes[0].keys() == codes[1].keys() == ({"embedding"} if tied else {"embedding", "head"})
    for end in codes[0]:
        one, other = codes[0][end], codes[1][end]
        assert isinstance(one, QuantizedWeight)
        assert isinstance(other, QuantizedWeight)
        assert torch.equal(one.codes_EOI, other.codes_EOI)
    ids = torch.arange(60).view(2, 30)
    hidden = [model.hidden(ids) for model in models]
    assert torch.equal(*hidden)
    results = [model.log_likelihoods(hidden[0][0], ids[0])[0] for model in models]
    assert torch.equal(*results)


def test_variants_are_tried_on_a_streamed_model_too(random_checkpoint, windows):
    folder = random_checkpoint()
    variants = {f"alpha={a}": built("smoothquant", alpha=a) for a in (0.3, 0.7)}
    results = [
        search_variants(
            model,
            variants,
            replace(SCHEME, bits=8, group_size=-1),
            windows[:2],
            lambda copy, peaks: copy.adjust(
                lambda k, block: setattr(block, "rounding", InputRounding(8))
            ),
        )
        for model in (
            load_decoder(Checkpoint(folder), torch.float32),
            StreamedDecoder(Checkpoint(folder), torch.float32),
        )
    ]
    assert results[0] == results[1]


def test_reading_ahead_or_not_is_the_same(random_checkpoint, tmp_path, windows):
    folder = random_checkpoint()
    results = []
    for ahead in (True, False):
        model = StreamedDecoder(Checkpoint(folder), torch.float32, ahead=ahead)
        assert isinstance(model.blocks, StreamedBlocks)
        results.append(
            quantize_model(
                model, METHODS["gptq"](), SCHEME, windows, BlockStore(tmp_path / str(ahead))
            )
        )
    same_codes(*results)

"""Written block by block: whole or not at all, resumed without rewriting, and in memory never more than a block."""

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file

from q3q.errors import CheckpointError, ExportError
from q3q.export.card import licence_lines, model_card
from q3q.export.writer import ExportingSink, open_exporter
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder

FORMATS = ["hf", "compressed_tensors", "gptq", "awq"]


class Shelf:
    """A block store in memory."""

    def __init__(self):
        self.blocks = {}

    def load(self, index):
        return self.blocks.get(index)

    def store(self, block):
        self.blocks[block.index] = block


def test_until_it_is_published_nothing_loads(checkpoint, spec_of, quantized_blocks, tmp_path):
    original = checkpoint()
    spec = spec_of(original, "gptq", tmp_path / "out")
    blocks, model = quantized_blocks(original, spec)
    exporter = open_exporter(spec, original)
    for block in blocks:
        exporter.store(block)
        with pytest.raises(CheckpointError):
            Checkpoint(exporter.partial)
        assert not exporter.path.exists()
    exporter.finish(model)
    assert not exporter.path.exists()
    exporter.publish("# card\n")
    assert not exporter.partial.exists()
    Checkpoint(exporter.path)


def test_a_killed_export_goes_on_after_the_blocks_that_are_there(checkpoint, spec_of, quantized_blocks, tmp_path):
    original = checkpoint()
    spec = spec_of(original, "gptq", tmp_path / "out")
    blocks, model = quantized_blocks(original, spec)
    shelf = Shelf()
    ExportingSink(shelf, open_exporter(spec, original)).store(blocks[0])
    shelf.store(blocks[1])  # killed between the store and the export
    first = tmp_path / "out.partial" / "model-00001-of-00003.safetensors"
    before = first.stat()
    (tmp_path / "out.partial" / "model-00002-of-00003.safetensors").write_bytes(b"half")  # without facts

    exporter = open_exporter(spec, original)
    sink = ExportingSink(shelf, exporter)
    assert [exporter.holds(k) for k in (0, 1)] == [True, False]
    assert [sink.load(k).index for k in (0, 1)] == [0, 1]
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert exporter.holds(1)
    exporter.finish(model)
    exporter.publish("# card\n")
    whole = Checkpoint(exporter.path)
    for k, block in enumerate(model.blocks):
        assert all(torch.equal(block.weights[name], tensor) for name, tensor in whole.block(k).items())


def test_a_shard_that_was_cut_is_written_again(checkpoint, spec_of, quantized_blocks, tmp_path):
    original = checkpoint()
    spec = spec_of(original, "awq", tmp_path / "out")
    blocks, model = quantized_blocks(original, spec)
    exporter = open_exporter(spec, original)
    for block in blocks:
        exporter.store(block)
    shard = exporter.partial / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not exporter.holds(0)
    with pytest.raises(ExportError, match=r"model-00001-of-00003\.safetensors is not there whole"):
        exporter.finish(model)


def test_another_trials_folder_is_refused(checkpoint, spec_of, tmp_path):
    original = checkpoint()
    open_exporter(spec_of(original, "gptq", tmp_path / "out"), original)
    with pytest.raises(ExportError, match="another trial's unfinished export"):
        open_exporter(spec_of(original, "gptq", tmp_path / "out", bits=8), original)
    open_exporter(spec_of(original, "gptq", tmp_path / "out"), original)  # its own is not


def test_what_is_finished_is_taken_as_it_is(checkpoint, spec_of, export, quantized_blocks, tmp_path):
    original = checkpoint()
    spec = spec_of(original, "gptq", tmp_path / "out")
    made, model = export(original, spec)
    before = {path.name: path.stat().st_mtime_ns for path in made.path.iterdir()}
    again = open_exporter(spec, original)
    assert again.finished
    assert again.holds(0)
    again.finish(model)
    assert {path.name: path.stat().st_mtime_ns for path in made.path.iterdir()} == before
    assert again.sizes() == made.sizes()


def test_scales_that_were_not_rounded_before_are_not_rounded_now(checkpoint, spec_of, quantized_blocks, tmp_path):
    original = checkpoint()
    spec = spec_of(original, "gptq", tmp_path / "out", scales=None)
    blocks, _ = quantized_blocks(original, spec)
    with pytest.raises(ExportError, match="what was measured is not stored"):
        open_exporter(spec, original).store(blocks[0])


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_reading_it_back_gives_the_numbers_that_were_evaluated(checkpoint, spec_of, export, tmp_path, name, moe):
    pytest.importorskip("compressed_tensors")
    original = checkpoint(moe=moe, tied=not moe)
    made, model = export(original, spec_of(original, name, tmp_path / "out"))
    read = load_decoder(Checkpoint(made.path), torch.bfloat16)
    ids = torch.arange(20)[None]
    assert torch.equal(read.hidden(ids), model.hidden(ids))
    assert torch.equal(read.head_VH, model.head_VH)


def test_activations_come_back_with_the_checkpoint(checkpoint, spec_of, export, tmp_path):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    scheme = {"bits": 8, "group_size": -1, "symmetric": True, "act_bits": 8}
    made, model = export(original, spec_of(original, "compressed_tensors", tmp_path / "out", **scheme))
    read = load_decoder(Checkpoint(made.path), torch.bfloat16)
    assert [block.act_bits for block in read.blocks] == [8, 8]
    ids = torch.arange(20)[None]
    assert torch.equal(read.hidden(ids), model.hidden(ids))


def test_memory_does_not_grow_with_blocks(checkpoint, spec_of, quantized_blocks, tmp_path):
    original = checkpoint()
    spec = spec_of(original, "gptq", tmp_path / "out")
    (block, _), _ = quantized_blocks(original, spec)
    exporter = open_exporter(spec, original)
    exporter.store(block)
    tracemalloc.start()
    exporter.store(block)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50_000  # of Python's own; tensors are freed with the block
    assert not [value for value in vars(exporter).values() if isinstance(value, torch.Tensor)]


def test_the_card_says_what_was_done_and_under_which_licence(checkpoint, spec_of, tmp_path):
    original = checkpoint()
    (original.folder / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: https://x/LICENSE\na: b\n---\n")
    spec = spec_of(original, "gptq", tmp_path / "out")
    spec = spec.with_places({**spec.places, "command": "python launch.py method=rtn export=gptq"})
    metrics = {"perplexity/stories": 1.7, "seconds/load": 3.0}
    card = model_card(spec, metrics, {"perplexity/stories": (1.6, 1.8)}, {"torch": "2.13"}, original.folder, "somebody")
    assert licence_lines(original.folder) == ["license: apache-2.0", "license_link: https://x/LICENSE"]
    assert card.startswith("---\nlicense: apache-2.0\nlicense_link: https://x/LICENSE\n")
    for words in ("`rtn`, 4 bits", "groups of 16", "| perplexity/stories | 1.7 | 1.6 to 1.8 |", spec.places["command"]):
        assert words in card
    assert "seconds" not in card


def test_shards_are_whole_tensors_of_one_block(checkpoint, spec_of, export, tmp_path):
    original = checkpoint()
    made, _ = export(original, spec_of(original, "hf", tmp_path / "out"))
    index = json.loads((made.path / "model.safetensors.index.json").read_text())
    total = 0
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(made.path / shard)
        assert sorted(tensors) == sorted(name for name, place in index["weight_map"].items() if place == shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total

"""Written block by block: whole or not at all, resumed without rewriting, one block in memory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from q3q.errors import CheckpointError, ExportError
from q3q.export.card import licence_lines, model_card
from q3q.export.measured import Measured
from q3q.export.proof import PASSED, Proof
from q3q.export.writer import ExportingSink
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.record import Check
from q3q.scheme import InputRounding
from tests.commands import python
from tests.damage import cut, flipped
from tests.specs import exporter_of, respecified

FORMATS = ["hf", "compressed_tensors", "gptq", "awq"]


class Shelf:
    """A block store in memory."""

    def __init__(self):
        self.blocks = {}

    def load(self, index):
        return self.blocks.get(index)

    def store(self, block):
        self.blocks[block.index] = block


def test_until_it_is_published_nothing_loads(checkpoint, trial_of, quantized_blocks, tmp_path):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    blocks, model = quantized_blocks(original, trial)
    exporter = exporter_of(trial, original)
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


def test_a_killed_export_goes_on_after_the_blocks_that_are_there(
    checkpoint, trial_of, quantized_blocks, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    blocks, model = quantized_blocks(original, trial)
    shelf = Shelf()
    ExportingSink(shelf, exporter_of(trial, original)).store(blocks[0])
    shelf.store(blocks[1])  # killed between the store and the export
    first = tmp_path / "out.partial" / "model-00001-of-00003.safetensors"
    before = first.stat()
    (tmp_path / "out.partial" / "model-00002-of-00003.safetensors").write_bytes(
        b"half"
    )  # without facts

    exporter = exporter_of(trial, original)
    sink = ExportingSink(shelf, exporter)
    assert [exporter.holds(block) for block in blocks] == [True, False]
    loaded = [sink.load(k) for k in (0, 1)]
    assert [block.index for block in loaded if block is not None] == [0, 1]
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert exporter.holds(blocks[1])
    exporter.finish(model)
    exporter.publish("# card\n")
    whole = Checkpoint(exporter.path)
    for k, block in enumerate(model.blocks):
        assert all(
            torch.equal(block.weights[name], tensor) for name, tensor in whole.block(k).items()
        )


@pytest.mark.parametrize("damage", [cut, flipped])
def test_a_shard_that_was_damaged_is_written_again(
    checkpoint, trial_of, quantized_blocks, tmp_path, damage
):
    original = checkpoint()
    trial = trial_of(original, "awq", tmp_path / "out")
    blocks, model = quantized_blocks(original, trial)
    exporter = exporter_of(trial, original)
    for block in blocks:
        exporter.store(block)
    damage(exporter.partial / "model-00001-of-00003.safetensors")
    assert not exporter.holds(blocks[0])
    with pytest.raises(ExportError, match=r"model-00001-of-00003\.safetensors is missing or"):
        exporter.finish(model)


@pytest.mark.parametrize("computed", ["again", "elsewhere"])
def test_a_shard_of_other_codes_is_written_again(
    checkpoint, trial_of, quantized_blocks, tmp_path, computed
):
    """As left by an attempt whose blocks were lost; quantized anew, codes may differ."""
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    blocks, _ = quantized_blocks(original, trial)
    name = "mlp.up_proj.weight"
    weight = blocks[0].quantized[name]
    other = replace(
        blocks[0],
        quantized={**blocks[0].quantized, name: replace(weight, codes_EOI=15 - weight.codes_EOI)},
    )
    ExportingSink(Shelf(), exporter_of(trial, original)).store(other)
    shelf = Shelf()
    sink = ExportingSink(shelf, exporter_of(trial, original))
    if computed == "again":
        sink.store(blocks[0])
    else:
        shelf.store(blocks[0])  # and the process died before it was exported
        sink.load(0)
    words = load_file(tmp_path / "out.partial" / "model-00001-of-00003.safetensors")
    fresh = exporter_of(trial.placed(export=tmp_path / "fresh"), original)
    fresh.store(blocks[0])
    expected = load_file(fresh.partial / "model-00001-of-00003.safetensors")
    assert all(torch.equal(words[key], tensor) for key, tensor in expected.items())


def test_while_files_are_exchanged_no_loader_takes_the_folder(
    checkpoint, trial_of, quantized_blocks, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    blocks, model = quantized_blocks(original, trial)
    exporter = exporter_of(trial, original)
    for block in blocks:
        exporter.store(block)
    exporter.finish(model)
    Checkpoint(exporter.partial)
    with pytest.raises(CheckpointError):
        Checkpoint(exporter_of(trial, original).partial)


def test_what_is_withdrawn_goes_but_not_what_another_run_published(
    checkpoint, trial_of, export, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    exporter_of(trial, original).withdraw()
    assert not list(tmp_path.glob("*out*"))
    export(original, trial)
    again = exporter_of(trial, original)
    assert again.finished
    again.withdraw()
    Checkpoint(tmp_path / "out")


def test_another_trials_folder_is_refused(checkpoint, trial_of, tmp_path):
    original = checkpoint()
    exporter_of(trial_of(original, "gptq", tmp_path / "out"), original)
    with pytest.raises(ExportError, match="another trial's unfinished export"):
        exporter_of(trial_of(original, "gptq", tmp_path / "out", bits=8), original)
    exporter_of(trial_of(original, "gptq", tmp_path / "out"), original)  # its own is not


def test_what_is_finished_is_taken_as_it_is(
    checkpoint, trial_of, export, quantized_blocks, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    made, model = export(original, trial)
    before = {path.name: path.stat().st_mtime_ns for path in made.path.iterdir()}
    again = exporter_of(trial, original)
    assert again.finished
    again.finish(model)
    assert {path.name: path.stat().st_mtime_ns for path in made.path.iterdir()} == before
    assert again.sizes() == made.sizes()


def test_scales_that_were_not_rounded_before_are_not_rounded_now(
    checkpoint, trial_of, quantized_blocks, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out", scales=None)
    blocks, _ = quantized_blocks(original, trial)
    with pytest.raises(ExportError, match="storing them would change"):
        exporter_of(trial, original).store(blocks[0])


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_reading_it_back_gives_the_numbers_that_were_evaluated(exported, name, moe):
    pytest.importorskip("compressed_tensors")
    made, model = exported(name, kind={"moe": moe, "tied": not moe})
    read = load_decoder(Checkpoint(made.path), torch.bfloat16)
    ids = torch.arange(20)[None]
    assert torch.equal(read.hidden(ids), model.hidden(ids))
    assert torch.equal(read.head_VH, model.head_VH)


def test_activations_come_back_with_the_checkpoint(checkpoint, trial_of, export, tmp_path):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    scheme = {"bits": 8, "group_size": -1, "symmetric": True, "act_bits": 8}
    made, model = export(
        original, trial_of(original, "compressed_tensors", tmp_path / "out", **scheme)
    )
    read = load_decoder(Checkpoint(made.path), torch.bfloat16)
    assert [block.rounding for block in read.blocks] == [InputRounding(8)] * 2
    ids = torch.arange(20)[None]
    assert torch.equal(read.hidden(ids), model.hidden(ids))


LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "vocab_size": 64}
PEAK = """
import resource, sys, torch
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {here!r})
import conftest

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

original = conftest.Checkpoint(Path({original!r}))
trial = conftest.trial_of(original, {name!r}, Path({out!r}))
exporter = conftest.exporter_of(trial, original)
block = conftest.one_block(original, trial)
with torch.inference_mode():
    for k in range(24):
        exporter.store(replace(block, index=k))
        before = peak() if k == 1 else before if k else 0
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["hf", "gptq"])
def test_memory_does_not_grow_with_blocks(checkpoint, tmp_path, name):
    """By the kernel's account, in its own process: 22 blocks of 8 MB as numbers, 2 MB packed."""
    original, here = checkpoint(**LARGE), Path(__file__).parent
    code = PEAK.format(
        here=str(here), original=str(original.folder), out=str(tmp_path / "out"), name=name
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10e6


def card_of(original, trial, **how):
    proof = Proof(Check(name=PASSED, passed=True, detail=""), "somebody", 1e-7)
    proof = how.pop("proof", proof)
    metrics = {"perplexity/stories": 1.7, "seconds/load": 3.0}
    known = {"metrics": metrics, "intervals": {"perplexity/stories": (1.6, 1.8)}}
    measured = Measured(**{**known, **how})
    packages, base = {"torch": "2.13"}, original.folder
    return model_card(trial, original.facts, proof, measured, packages=packages, base=base)


def test_the_card_says_what_was_done_and_under_which_licence(checkpoint, trial_of, tmp_path):
    original = checkpoint()
    (original.folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlicense_link: https://x/LICENSE\na: b\n---\n"
    )
    trial = trial_of(original, "gptq", tmp_path / "out")
    card = card_of(original, trial)
    assert licence_lines(original.folder) == [
        "license: apache-2.0",
        "license_link: https://x/LICENSE",
    ]
    assert card.startswith("---\nlicense: apache-2.0\nlicense_link: https://x/LICENSE\n")
    for words in (
        "`rtn`, 4 bits",
        "groups of 16",
        "| perplexity, stories | 1.700 (1.600 to 1.800) |",
        trial.placement.command,
    ):
        assert words in card
    assert "seconds/" not in card
    assert "bit for bit, and the same logits." in card


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license:\n- mit\n- apache-2.0\ntags:\n- x\n", ["license:", "- mit", "- apache-2.0"]),
        ("a: b\nlicense: other\nlicense_name: >-\n  a long\n  name\n", None),
        ("license:\ntags:\n- x\n", []),
        ("a: b\n", []),
    ],
)
def test_licences_are_taken_over_whole_or_said_to_be_unknown(
    checkpoint, trial_of, tmp_path, front, said
):
    original = checkpoint()
    (original.folder / "README.md").write_text(f"---\n{front}---\n# Model\n")
    said = front.splitlines()[1:] if said is None else said
    assert licence_lines(original.folder) == said
    trial = trial_of(original, "gptq", tmp_path / "out")
    card = card_of(
        original, respecified(trial, model=replace(trial.spec.model, source="Qwen/Qwen3-8B"))
    )
    lines = ["---", *(said or ["license: unknown"]), "base_model: Qwen/Qwen3-8B"]
    assert card.startswith("\n".join(lines))


def test_the_card_says_what_differs_what_diverged_and_what_was_not_compared(
    checkpoint, trial_of, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "hf", tmp_path / "out")
    trial = respecified(
        trial,
        head_bits=8,
        embedding_bits=8,
        skip=("blocks.0.mlp.down_proj",),
        overrides={"blocks.1.self_attn.o_proj": {"bits": 8}},
    )
    trial = trial.placed(command="python launch.py data.path=s3://ada:lovelace@host/x")
    proof = Proof(Check(name=PASSED, passed=True, detail=""), "a plain unpacker", None)
    card = card_of(original, trial, proof=proof, metrics={}, diverged=["perplexity/library"])
    for words in (
        '- overrides: `{"blocks.1.self_attn.o_proj": {"bits": 8}}`',
        '- skip: `["blocks.0.mlp.down_proj"]`',
        "- head_bits: `8`",
        "- embedding_bits: `8`",
        "| perplexity, library | diverged: not a finite number |",
        "bit for bit; logits were not compared.",
        "s3://***@host",
    ):
        assert words in card
    assert "lovelace" not in card
    assert "| none |" not in card


@pytest.mark.parametrize(
    ("name", "scheme", "moe", "served"),
    [
        ("hf", {"bits": 3}, True, True),
        ("gptq", {"symmetric": True, "group_size": 32}, True, True),
        ("gptq", {"group_size": 32}, False, False),
        ("gptq", {"symmetric": True, "bits": 3, "group_size": 32}, False, False),
        ("gptq", {"symmetric": True, "group_size": 16}, False, False),
        ("awq", {"group_size": 32}, True, True),
        ("compressed_tensors", {"group_size": 32}, False, True),
        ("compressed_tensors", {"group_size": 32}, True, False),
        ("compressed_tensors", {"group_size": 32, "bits": 8}, False, False),
        ("compressed_tensors", {"group_size": 32, "bits": 8, "symmetric": True}, False, True),
        (
            "compressed_tensors",
            {"bits": 8, "group_size": -1, "symmetric": True, "act_bits": 8},
            True,
            True,
        ),
    ],
)
def test_the_card_sends_to_vllm_what_vllm_takes(
    checkpoint, trial_of, tmp_path, name, scheme, moe, served
):
    original = checkpoint(moe=moe)
    card = card_of(original, trial_of(original, name, tmp_path / "out", **scheme))
    assert ("vllm serve" in card) is served
    assert ("vLLM does not load" in card) is not served


def test_shards_are_whole_tensors_of_one_block(exported):
    made, _ = exported("hf")
    index = json.loads((made.path / "model.safetensors.index.json").read_text())
    total = 0
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(made.path / shard)
        assert sorted(tensors) == sorted(
            name for name, place in index["weight_map"].items() if place == shard
        )
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total

"""A finished export is looked at again: sizes whenever it is met, digests when it is asked for."""

import json
import shutil

import pytest

from q3q.export.destination import export_fault, is_finished
from q3q.export.marker import digest_faults, published_files
from q3q.models.checkpoint import EXPORT_MARKER, Checkpoint
from tests.damage import a_folder, a_link, cut, emptied, flipped, gone
from tests.specs import exporter_of

SHARD = "model-00002-of-00003.safetensors"


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


SIZE_DAMAGES = [cut, emptied, longer, gone, a_folder, a_link]


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [*SIZE_DAMAGES, flipped])
def test_what_was_damaged_is_named_and_made_again(
    checkpoint, trial_of, export, quantized_blocks, tmp_path, damage, name
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    made, model = export(original, trial)
    assert is_finished(trial)
    assert list(digest_faults(made.path)) == []
    before = {path.name: path.read_bytes() for path in made.path.iterdir()}
    (made.path / "my notes.txt").write_text("mine")

    damage(made.path / name)
    [fault] = digest_faults(made.path)
    assert fault.startswith(f"{name} ")
    assert is_finished(trial) is (damage is flipped)  # sizes fit, so only reading finds it
    if damage is flipped:
        return
    assert name in str(export_fault(trial))
    again = exporter_of(trial, original)
    assert not again.finished
    for block in quantized_blocks(original, trial)[0]:
        again.store(block)
    again.finish(model)
    assert (made.path / "my notes.txt").exists()  # until the new one is complete
    again.publish("# card\n")
    assert is_finished(trial)
    assert list(digest_faults(made.path)) == []
    after = {path.name: path.read_bytes() for path in made.path.iterdir()}
    assert after == before | {"my notes.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "out"]


@pytest.mark.parametrize("damage", [cut, emptied, gone, a_folder])
def test_without_its_marker_an_export_is_not_finished_but_known_by_its_config(
    checkpoint, trial_of, export, quantized_blocks, tmp_path, damage
):
    original = checkpoint()
    trial = trial_of(original, "hf", tmp_path / "out")
    made, model = export(original, trial)
    damage(made.path / EXPORT_MARKER)
    assert "has no marker of this trial" in str(export_fault(trial))
    again = exporter_of(trial, original)  # not refused as somebody else's folder
    for block in quantized_blocks(original, trial)[0]:
        again.store(block)
    again.finish(model)
    again.publish("# card\n")
    assert is_finished(trial)


def test_the_marker_lists_each_file_that_a_loader_reads_and_leaves_people_the_card(
    checkpoint, trial_of, export, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    made, _ = export(original, trial)
    files = published_files(made.path)
    assert files is not None
    names = {path.name for path in made.path.iterdir()} - {EXPORT_MARKER, "README.md"}
    assert set(files) == names >= {"config.json", "tokenizer.json", "quantize_config.json", SHARD}
    (made.path / "README.md").write_text("# What I want to say about it")
    assert is_finished(trial)
    assert list(digest_faults(made.path)) == []


def test_an_export_of_before_still_counts_and_gets_its_digests_when_it_is_proved_again(
    checkpoint, trial_of, export, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    made, model = export(original, trial)
    marker = json.loads((made.path / EXPORT_MARKER).read_text())
    files = marker.pop("files")
    (made.path / EXPORT_MARKER).write_text(json.dumps(marker))
    cut(made.path / SHARD)  # which nobody can know
    assert published_files(made.path) is None
    assert is_finished(trial)
    assert list(digest_faults(made.path)) == []

    shutil.rmtree(made.path)
    made, model = export(original, trial)
    (made.path / EXPORT_MARKER).write_text(json.dumps(marker))
    again = exporter_of(trial, original)
    assert again.finished
    again.finish(model)
    again.publish("# card\n")
    assert json.loads((made.path / EXPORT_MARKER).read_text())["files"] == files
    Checkpoint(made.path)


def test_of_an_export_in_an_object_store_files_may_be_elsewhere(
    checkpoint, trial_of, export, tmp_path
):
    """A driver fetches the markers alone; a file that is here must be whole all the same."""
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out").placed(store="file:///bucket")
    made, _ = export(original, trial)
    (made.path / SHARD).unlink()
    assert is_finished(trial)
    cut(made.path / "tokenizer.json")
    assert not is_finished(trial)

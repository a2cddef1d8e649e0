"""An exporting trial killed wherever it writes, renames or removes, and its disk full.

It survived if there is a whole checkpoint or none that loads, and the same command ends with the
files of one that was left in peace.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from q3q.errors import CheckpointError
from q3q.export import destination, proof, publish
from q3q.models.checkpoint import Checkpoint
from q3q.record import Check, TrialRecord
from q3q.trial import attempt_trial
from tests.chaos.faults import SMALL, end_of, fill_disk, in_child, log_of, numbers
from tests.composed import composed_trial
from tests.reloading import reload_here


@pytest.fixture
def trial_of(tiny):
    def make(storage, export):
        always = [*SMALL, f"model.path={tiny}", "method=gptq", "bits=4", "export=gptq"]
        return composed_trial(*always, f"storage={storage}", f"export.path={export}")

    return make


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    monkeypatch.setattr(proof, "_reload", reload_here)


@pytest.fixture(scope="module")
def undisturbed():
    """The files' digest and the numbers of a trial that nothing befell, once it was run."""
    return {}


@pytest.fixture
def reference(undisturbed, trial_of, tmp_path):
    if not undisturbed:
        record = attempt_trial(trial_of(tmp_path / "reference", tmp_path / "reference" / "out"))
        assert record.completed, record.reason
        undisturbed |= {
            "digest": Checkpoint(tmp_path / "reference" / "out").digest(),
            "numbers": plain(record),
        }
    return undisturbed


def plain(record):
    return numbers(json.loads(json.dumps(record.to_json())))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def while_writing(beginning):
    """With half of a file there."""

    def set_up():
        replace = Path.replace

        def watched(self, target):
            if self.name.startswith(beginning):
                os.truncate(self, self.stat().st_size // 2)
                die()
            return replace(self, target)

        Path.replace = watched  # type: ignore[method-assign]

    return set_up


def as_the_machine_dies(beginning):
    """Die when only half of a completely written file has reached the disk."""

    def set_up():
        def fsync(file):
            path = Path(os.readlink(f"/proc/self/fd/{file}"))
            if path.name.startswith(beginning):
                os.truncate(path, path.stat().st_size // 2)
                die()

        os.fsync = fsync

    return set_up


def before_renaming(name):
    def set_up():
        replace = Path.replace

        def watched(self, target):
            if self.name == name:
                die()
            return replace(self, target)

        Path.replace = watched  # type: ignore[method-assign]

    return set_up


def while_removing_what_is_wrong():
    """The proof failed, and one of the files is gone already."""

    def rmtree(folder, **how):
        if Path(folder).name == ".out.partial.aside" and Path(folder).exists():
            next(Path(folder).glob("*.safetensors")).unlink()
            die()

    failed = proof.Proof(Check(name=proof.PASSED, passed=False, detail="a test"))
    publish.prove = lambda *where, **how: failed  # type: ignore[attr-defined]
    shutil.rmtree = rmtree  # type: ignore[assignment]


def before_the_record():
    TrialRecord.save = lambda self: die()  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("set_up", "left"),
    [
        (while_writing(".q3q.json"), "nothing"),
        (before_renaming(".out.partial.aside"), "nothing"),
        (while_writing(".model-00002"), "part"),
        (while_writing(".001.json"), "part"),
        (while_writing(".model-00004"), "part"),
        (while_writing(".tokenizer.json"), "part"),
        (while_writing(".config.json"), "part"),
        (while_writing(".README.md"), "unproved"),
        (as_the_machine_dies("model-00002"), "torn"),
        (before_renaming("out.partial"), "unproved"),
        (before_the_record, "whole"),
        (while_removing_what_is_wrong, "nothing"),
    ],
)
def test_killed_anywhere_it_leaves_a_whole_checkpoint_or_none_that_loads(
    trial_of, reference, set_up, left, tmp_path
):
    trial, out, partial = (
        trial_of(tmp_path / "s", tmp_path / "out"),
        tmp_path / "out",
        tmp_path / "out.partial",
    )

    def work():
        set_up()
        attempt_trial(trial)

    assert end_of(in_child(work)) == -signal.SIGKILL
    assert out.exists() is (left == "whole")
    assert partial.exists() is (left in ("part", "unproved", "torn"))
    if left == "part":
        with pytest.raises(CheckpointError):
            Checkpoint(partial)
    elif left not in ("nothing", "torn"):
        Checkpoint(out if left == "whole" else partial)

    assert end_of(in_child(lambda: attempt_trial(trial))) == 0
    record = TrialRecord.load(trial.folder / "record.json")
    assert plain(record) == reference["numbers"]
    assert Checkpoint(out).digest() == reference["digest"]
    assert not [path.name for path in tmp_path.glob("*out*") if path != out]
    assert not list(out.glob(".*"))


def test_a_disk_that_fills_while_it_exports_is_said_and_with_room_it_goes_on(
    trial_of, reference, small_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(destination, "SPARE_BYTES", 0)
    trial = trial_of(tmp_path / "s", small_disk / "out")

    def fill(event):
        if log_of(trial.folder)[-1].words == "quantize 1 of 3 blocks":
            fill_disk(small_disk)

    def work():
        record = attempt_trial(trial, fill)
        assert "the disk is full" in record.reason
        assert str(small_disk) in record.reason

    assert end_of(in_child(work)) == 0
    assert [path.name for path in small_disk.glob("out*")] == ["out.partial"]
    with pytest.raises(CheckpointError):
        Checkpoint(small_disk / "out.partial")
    (small_disk / "filler").unlink()
    record = attempt_trial(trial)
    assert record.completed, record.reason
    assert record.notes["blocks_from_disk"] == 2  # the second was stored, and could not be exported
    assert Checkpoint(small_disk / "out").digest() == reference["digest"]

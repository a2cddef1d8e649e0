"""Destinations: no two trials share one, and a fresh start forgets only its own."""

import pytest

from q3q.errors import ExportError
from q3q.export import destination
from q3q.export.destination import (
    check_room,
    default_path,
    forget_export,
    is_finished,
    refuse_shared,
)
from tests.specs import exporter_of, respecified


def test_two_trials_cannot_write_to_one_place(checkpoint, trial_of, tmp_path):
    original = checkpoint()
    first, second = (trial_of(original, "gptq", tmp_path / "out", bits=bits) for bits in (4, 8))
    refuse_shared(
        [
            first,
            respecified(second, export=None),
            trial_of(original, "gptq", tmp_path / "elsewhere"),
        ]
    )
    with pytest.raises(ExportError, match=r"out is given to 2 trials.*method.name"):
        refuse_shared([first, second])


def test_a_name_of_many_words_is_cut_and_leaves_room_for_what_is_beside_it(
    checkpoint, trial_of, tmp_path
):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    rules = {"skip": [f"blocks.{k}.self_attn.q_proj" for k in range(40)]}
    long, other = (respecified(trial, rules=rules, seed=seed) for seed in (0, 1))
    assert len(long.spec.name) > 255
    path = default_path(long.spec, str(tmp_path))
    assert path != default_path(other.spec, str(tmp_path))
    assert path.name.endswith(f"-{long.id}")
    path.parent.mkdir()
    long = long.placed(export=path)
    assert exporter_of(long, original).partial.is_dir()
    forget_export(long)
    assert not list(path.parent.iterdir())
    assert default_path(trial.spec, str(tmp_path)).name == f"tiny-rtn-w4-g16-export-gptq-{trial.id}"


def test_a_fresh_start_removes_its_own_export_and_no_other(checkpoint, trial_of, export, tmp_path):
    original = checkpoint()
    trial = trial_of(original, "hf", tmp_path / "out")
    made, _ = export(original, trial)
    assert is_finished(trial)
    forget_export(trial_of(original, "hf", tmp_path / "out", bits=3))
    assert made.path.exists()
    forget_export(trial)
    assert not made.path.exists()
    exporter_of(trial, original)
    forget_export(trial)
    assert not made.partial.exists()


def test_exports_of_a_sweep_must_fit_together(checkpoint, trial_of, export, tmp_path, monkeypatch):
    original = checkpoint()
    trials = [trial_of(original, "gptq", tmp_path / f"out{bits}", bits=bits) for bits in (2, 4, 8)]
    monkeypatch.setattr(destination, "SPARE_BYTES", 0)
    each = [destination._needed_bytes(trial, original.facts) for trial in trials]

    def room(free):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free})())
        check_room((trial, original.facts) for trial in trials)

    room(sum(each))
    with pytest.raises(ExportError, match=r"the sweep's 3 exports need .* together"):
        room(sum(each) - 1)
    monkeypatch.undo()
    export(original, trials[0])  # what is there needs no more room
    monkeypatch.setattr(destination, "SPARE_BYTES", 0)
    room(each[1] + each[2])


def test_what_a_killed_process_left_aside_is_in_nobodys_way(checkpoint, trial_of, tmp_path):
    """Between making a folder and naming it, and between taking its name away and removing it."""
    original = checkpoint()
    for name in (".out.aside", ".out.partial.aside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torn").touch()
    trial = trial_of(original, "gptq", tmp_path / "out")
    assert exporter_of(trial, original).partial.is_dir()
    forget_export(trial)
    assert not list(tmp_path.glob("*out.partial*"))

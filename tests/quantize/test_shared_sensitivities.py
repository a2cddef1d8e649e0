"""Of trials that need the same sensitivities one measures, and the next goes on where it died."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from shutil import copytree

import pytest
import torch

from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.quantize.budget import stage
from q3q.quantize.budget.sensitivities import SENSING, Sensitivities, file_of, identity_of
from q3q.quantize.budget.units import units_of
from q3q.reporter import Reporter
from q3q.storage import uploader
from q3q.storage.mirror import Mirror
from tests.composed import composed_trial

SMALL = (
    *("method=rtn", "group_size=32", "evaluation=none", "budget.samples=1", "budget.length=32"),
    *("budget.unit=block", "budget.widths=[2,8]"),
)
PATIENCE = 60  # seconds; what is waited for takes less than one


class Killed(BaseException):
    """As a process that is killed: nothing catches it."""


@torch.inference_mode()
def sensed(trial, send=lambda event: None):
    """Return the trial's sensitivities, found or measured, as the stage of a trial does."""
    checkpoint = Checkpoint(trial.placement.model)
    model, units = load_decoder(checkpoint, torch.float32), units_of(trial.spec, checkpoint.facts)
    tokenizer = load_tokenizer(checkpoint.folder)
    return stage._sensitivities(trial, model, tokenizer, units, Reporter(trial.id, send))


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_of_two_trials_one_measures_and_the_other_waits_and_reads(tmp_path, monkeypatch, kind):
    """The first goes on when the second is seen to wait; each has a thread, and claims are real."""
    monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / "mirrors"))
    storage = tmp_path if kind == "folder" else f"file://{tmp_path}/store"
    first, second = (
        composed_trial(*SMALL, f"storage={storage}", limit)
        for limit in ("bits=4.1", "budget.uniform=4")
    )
    assert first.id != second.id
    begun, waits, waited = threading.Event(), threading.Event(), []
    add = Sensitivities.add

    def watched(self, unit, row):
        add(self, unit, row)
        begun.set()
        assert waits.wait(PATIENCE), "the second trial does not wait"

    def send(event):
        if event.phase == "wait":
            waited.append(event.note)
            waits.set()

    monkeypatch.setattr(Sensitivities, "add", watched)
    with ThreadPoolExecutor(2) as threads:
        measuring = threads.submit(sensed, first)
        assert begun.wait(PATIENCE)
        waiting = threads.submit(sensed, second, send)
        one, other = measuring.result(), waiting.result()
    assert (one.measured, other.measured) == (6, 0)
    assert one.table() == other.table()
    assert f"process {os.getpid()} on " in waited[0]
    assert one.path == other.path


def test_a_folder_that_was_copied_to_another_machine_is_read_there(tmp_path, monkeypatch):
    here, there = (
        composed_trial(*SMALL, f"storage={tmp_path / name}", "bits=4.1") for name in ("here", "b")
    )
    assert here.placement.model is not None
    units = units_of(here.spec, Checkpoint(here.placement.model).facts)
    identity = identity_of(here.spec, units)
    written = Sensitivities(file_of(here.placement.storage, identity), identity)
    for number, unit in enumerate(units, 1):
        written.add(unit.name, [1 / number, 0.1 / number])
    copytree(here.placement.storage / SENSING, there.placement.storage / SENSING)
    monkeypatch.setattr(Sensitivities, "add", None)
    found = sensed(there)
    assert (found.measured, found.table()) == (0, written.table())
    assert found.path != written.path


def test_on_a_store_another_machine_goes_on_at_the_next_unit(tmp_path, monkeypatch):
    """The first machine dies after two of six units; both are sent before, while it measures."""
    url, add, added = f"file://{tmp_path}/store", Sensitivities.add, list[str]()
    monkeypatch.setattr(uploader, "EVERY_SECONDS", 0.05)

    def trial_on(machine):
        monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / machine))
        return composed_trial(*SMALL, f"storage={url}", "bits=4.1")

    def dies(self, unit, row):
        add(self, unit, row)
        added.append(unit)
        if len(added) < 2:
            return
        store, deadline = Mirror(url).store, time.monotonic() + PATIENCE
        name, content = f"{SENSING}/{self.path.name}", self.path.read_bytes()
        while not store.find(name) or store.read(name) != content:
            assert time.monotonic() < deadline, "nothing is sent before all is measured"
            time.sleep(0.01)
        raise Killed

    monkeypatch.setattr(Sensitivities, "add", dies)
    with pytest.raises(Killed):
        sensed(trial_on("a"))
    monkeypatch.setattr(Sensitivities, "add", add)
    found = sensed(trial_on("b"))
    assert found.complete
    assert found.measured == 4
    assert sensed(trial_on("c")).measured == 0

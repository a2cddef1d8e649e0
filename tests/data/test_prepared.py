"""Prepared input is made once, by one process, and what is not whole is made anew."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from q3q.config.model import DEMO_MODELS
from q3q.data import calibration as calibrating
from q3q.data import windows
from q3q.data.calibration import calibration_windows
from q3q.data.prepared import FOLDER, Arrays, Shelf, kept_identity, prepared, tokenizer_digest
from q3q.data.texts import Text
from q3q.data.windows import evaluation_windows
from q3q.errors import ConfigError
from q3q.models.checkpoint import load_tokenizer
from q3q.placement import Placement, Trial
from q3q.storage import claim
from tests.specs import calibration_of, evaluation_of, make_spec, text_of

ARRAYS: Arrays = {
    "ids": np.arange(12, dtype=np.int32).reshape(3, 4),
    "none": np.zeros((0, 2), np.uint8),
}
TEXT = Text("garden", tuple(f"In bed {k} grow {k} rows of beans. " * 30 for k in range(40)), " ")


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path / FOLDER, "a tokenizer")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODELS / "dense")


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array)
        for name, array in expected.items()
    )


def never():
    pytest.fail("made again")


def test_arrays_are_made_once_and_found_by_their_identity_and_tokenizer(shelf):
    identity = {"text": "garden", "samples": 3}
    assert same(prepared(shelf, identity, lambda: ARRAYS), ARRAYS)
    assert same(prepared(shelf, identity, never), ARRAYS)
    assert shelf.find({**identity, "samples": 4}) is None
    assert replace(shelf, tokenizer="another").find(identity) is None
    assert [kept_identity(path) for path in shelf.folder.glob("*.safetensors")] == [
        {"tokenizer": "a tokenizer", **identity}
    ]
    assert same(prepared(None, identity, lambda: ARRAYS), ARRAYS)


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def flipped_in_a_number(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def with_another_checksum(content: bytes) -> bytes:
    return content.replace(b'"sha256":"', b'"sha256":"0', 1)


@pytest.mark.parametrize("damage", [torn, emptied, flipped_in_a_number, with_another_checksum])
def test_a_damaged_file_is_put_aside_with_a_line_and_made_anew(shelf, damage, capfd):
    prepared(shelf, {"text": "garden"}, lambda: ARRAYS)
    [path] = shelf.folder.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert kept_identity(path) in (None, {"tokenizer": "a tokenizer", "text": "garden"})
    assert same(prepared(shelf, {"text": "garden"}, lambda: ARRAYS), ARRAYS)
    assert f"{path} cannot be read" in capfd.readouterr().err
    assert path.with_name(f"{path.name}.damaged").is_file()
    assert same(prepared(shelf, {"text": "garden"}, never), ARRAYS)


def test_a_whole_file_of_another_identity_is_not_taken(shelf):
    """Even one whose checksum fits its own identity, under another's name."""
    for text in ("garden", "house"):
        prepared(shelf, {"text": text}, lambda: ARRAYS)
    first, second = shelf.folder.glob("*.safetensors")
    second.write_bytes(first.read_bytes())
    made: list[int] = []

    def make() -> Arrays:
        made.append(1)
        return ARRAYS

    for text in ("garden", "house"):
        prepared(shelf, {"text": text}, make)
    assert len(made) == 1


def test_two_at_once_make_it_once(shelf, monkeypatch):
    monkeypatch.setattr(claim.FolderClaimStore, "poll", 0.01)
    begun, waited, made, found = threading.Event(), threading.Event(), [], []

    def make():
        made.append(1)
        begun.set()
        assert waited.wait(20)
        return ARRAYS

    first = threading.Thread(target=lambda: found.append(prepared(shelf, {}, make)))
    first.start()
    assert begun.wait(20)
    found.append(prepared(shelf, {}, never, waited.set))
    first.join()
    assert all(same(arrays, ARRAYS) for arrays in found)
    assert made == [1]


def test_where_nothing_can_be_written_each_trial_prepares_for_itself(shelf, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("q3q.data.prepared.write_atomically", full)
    assert same(prepared(shelf, {}, lambda: ARRAYS), ARRAYS)
    assert "No space left on device" in capfd.readouterr().err
    monkeypatch.setattr("q3q.data.prepared.claimed", full)
    assert same(prepared(shelf, {}, lambda: ARRAYS), ARRAYS)


def test_whatever_decides_on_ids_or_prompts_is_in_a_tokenizers_digest(tokenizer):
    assert tokenizer_digest(tokenizer) == tokenizer_digest(load_tokenizer(DEMO_MODELS / "dense"))
    assert tokenizer_digest(object()) is None

    def changed(change):
        other = load_tokenizer(DEMO_MODELS / "dense")
        change(other)
        return tokenizer_digest(other)

    digests = {
        tokenizer_digest(tokenizer),
        changed(lambda one: one.add_tokens(["a new one"])),
        changed(lambda one: setattr(one, "chat_template", "{{ messages }}")),
        changed(lambda one: setattr(one, "eos_token", "a")),
    }
    assert len(digests) == 4


def trial_of(storage, calibration=None, text=None) -> Trial:
    evaluation = evaluation_of() if text is None else evaluation_of(text)
    spec = make_spec("gptq", calibration=calibration or calibration_of(), evaluation=evaluation)
    return Trial(spec, Placement(trials=storage / "trials"))


@pytest.mark.parametrize("draw", ["first", "random", "documents"])
def test_calibration_windows_are_drawn_once_and_are_those_that_are_drawn(
    tokenizer, tmp_path, monkeypatch, draw
):
    length = 400 if draw == "documents" else 64
    calibration = calibration_of(digest=TEXT.digest, draw=draw, samples=4, length=length)
    monkeypatch.setattr(calibrating, "load_text", lambda *_, **__: TEXT)
    trial = trial_of(tmp_path, calibration)
    plain = windows.draw_windows(
        TEXT,
        windows.encoder(tokenizer),
        samples=4,
        length=length,
        draw=draw,
        seed=42 if draw == "documents" else 0,
    )
    drawn = [calibration_windows(trial, tokenizer)]
    monkeypatch.setattr(calibrating, "load_text", lambda *_, **__: pytest.fail("the text is read"))
    drawn.append(calibration_windows(trial, tokenizer))
    for found in drawn:
        assert found is not None
        assert found.dtype == torch.int64
        assert torch.equal(found, plain)
    other = Trial(replace(trial.spec, seed=1), trial.placement)
    if draw == "first":  # no seed decides on them
        found = calibration_windows(other, tokenizer)
        assert found is not None
        assert torch.equal(found, plain)
    else:
        with pytest.raises(pytest.fail.Exception, match="the text is read"):
            calibration_windows(other, tokenizer)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("draw", ["first", "random"])
def test_evaluation_windows_are_cut_once_and_are_those_that_are_cut(
    tokenizer, tmp_path, monkeypatch, draw, quick
):
    samples = 5 if draw == "random" else None
    text = text_of("garden", 64, 3, digest=TEXT.digest, draw=draw, samples=samples)
    read: list[int] = []

    def reading(*_, **__) -> Text:
        read.append(1)
        return TEXT

    monkeypatch.setattr(windows, "load_text", reading)
    trial = trial_of(tmp_path, text=text)
    evaluation = replace(trial.spec.evaluation, quick=quick)
    trial = Trial(replace(trial.spec, evaluation=evaluation), trial.placement)
    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "of", lambda *_: None)
        plain = evaluation_windows(tokenizer, trial, text)
    first, later = (evaluation_windows(tokenizer, trial, text) for _ in range(2))
    assert torch.equal(first, plain)
    assert torch.equal(later, plain)
    assert len(read) == 2  # for the plain ones, and for the first


def test_a_text_that_changed_since_the_plan_is_refused_and_not_kept(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "load_text", lambda *_, **__: TEXT)
    text = text_of("garden", 64, digest="another")
    with pytest.raises(ConfigError, match="the text garden changed since the trial was planned"):
        evaluation_windows(tokenizer, trial_of(tmp_path, text=text), text)
    assert not [*(tmp_path / FOLDER).glob("*.safetensors")]

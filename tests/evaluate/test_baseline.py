"""The baseline's entry is bit for bit what the model said, whole or not used, and computed once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import q3q.evaluate.baseline as baseline_module
from q3q.errors import IntegrityError
from q3q.evaluate.baseline import (
    BaselineIdentity,
    baseline_bytes,
    baseline_for,
    find_baseline,
    kept_rows,
    kept_windows,
    rounding_of,
    windows_digest,
)
from q3q.evaluate.perplexity import perplexity
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.spec import digest
from q3q.storage.claim import FREE, claimed
from tests.damage import flipped

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "q3q" / "models" / "demo" / "dense"
MODEL = {"name": "demo", "digest": "d1", "dtype": "float32"}


class Counted:
    """A decoder that counts the windows it runs."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.windows = 0

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def states(self, batches):
        for ids, states in zip(batches, self.decoder.states(batches), strict=True):
            self.windows += len(ids)
            yield states


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(Checkpoint(DEMO), torch.float32)


@pytest.fixture
def model(decoder):
    return Counted(decoder)


@pytest.fixture
def windows():
    return torch.randint(200, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def identity(windows):
    return BaselineIdentity.of(MODEL, "t1", windows, kept=3, device="cpu")


def same(one, other):
    return (
        one.rows == other.rows
        and torch.equal(one.nll_N, other.nll_N)
        and all(torch.equal(one.hidden(row), other.hidden(row)) for row in one.rows)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_come_back_bit_for_bit(tmp_path, windows, identity, dtype):
    model = load_decoder(Checkpoint(DEMO), dtype)
    entry = baseline_for(tmp_path, identity, model, windows)
    assert entry.rows == (0, 1, 3)
    hidden_BTH = model.hidden(windows)
    for row in entry.rows:
        found = entry.hidden(row)
        assert found.dtype == dtype
        assert torch.equal(found, hidden_BTH[row, :-1])
    assert len(entry.nll_N) == 5  # of all windows, also those whose states are not kept
    expected = perplexity(model, windows)
    assert float(entry.nll_N.mean()) == pytest.approx(
        expected.nll, rel=1e-6 if dtype == torch.float32 else 1e-3
    )


def test_it_is_computed_once(tmp_path, model, windows, identity):
    told = []
    first = baseline_for(tmp_path, identity, model, windows, lambda *step: told.append(step))
    assert told == [(k, 5) for k in range(1, 6)]
    second = baseline_for(tmp_path, identity, model, windows)
    assert model.windows == 5
    assert same(first, second)
    assert {path.name for path in tmp_path.iterdir()} == {identity.key, f"{identity.key}.claim.1"}


def test_all_that_changes_numbers_changes_the_key(windows, identity):
    of = BaselineIdentity.of
    others = [
        of({**MODEL, "digest": "d2"}, "t1", windows, 3, "cpu"),
        of({**MODEL, "dtype": "bfloat16"}, "t1", windows, 3, "cpu"),
        of({"source": "d1", "revision": "r", "dtype": "float32"}, "t1", windows, 3, "cpu"),
        of(MODEL, "t2", windows, 3, "cpu"),
        of(MODEL, "t1", windows + 1, 3, "cpu"),
        of(MODEL, "t1", windows[:, :11], 3, "cpu"),
        of(MODEL, "t1", windows.view(10, 6), 3, "cpu"),
        of(MODEL, "t1", windows, 2, "cpu"),
        of(MODEL, "t1", windows, 3, "cuda"),
        replace(identity, version=identity.version + 1),
    ]
    assert len({identity.key, *(other.key for other in others)}) == len(others) + 1
    assert of({**MODEL, "name": "another name"}, "t1", windows, 3, "cpu").key == identity.key


def test_a_baseline_is_of_the_kernels_that_round(monkeypatch):
    """In float32 on a processor, entries of earlier versions stay those of any processor."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert rounding_of(cpu, torch.float32) == "cpu"
    seen = {"cpu"}
    for release in ("2.13.0", "2.14.0"):
        monkeypatch.setattr(torch, "__version__", release)
        for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"):
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
            monkeypatch.setattr(baseline_module, "processor", lambda name=name: f"a host of {name}")
            seen |= {rounding_of(gpu, torch.bfloat16), rounding_of(cpu, torch.bfloat16)}
            assert rounding_of(gpu, torch.bfloat16) == f"cuda: {name}, torch {release}"
    assert len(seen) == 9


def test_what_it_takes_on_disk(tmp_path, model, windows, identity):
    entry = baseline_for(tmp_path, identity, model, windows)
    states = sum(
        (entry.folder / f"window_{row:05d}.safetensors").stat().st_size for row in entry.rows
    )
    expected = baseline_bytes(3, 12, model.facts.hidden, "float32")
    assert expected <= states <= expected + 3 * 200  # the rest are safetensors' headers
    assert baseline_bytes(256, 2048, 4096, "bfloat16") == 256 * 2047 * 4096 * 2


def test_large_texts_of_wide_models_are_thinned():
    assert kept_windows(256, 2048, 1024, "bfloat16") == 256
    assert kept_windows(256, 2048, 4096, "bfloat16") == 32
    assert kept_windows(256, 2048, 4096, "bfloat16", most=100) == 100
    assert kept_windows(20, 2048, 8192, "float32", most=None) == 20
    assert kept_windows(20, 2048, 1024, "bfloat16", most=100) == 20
    assert kept_rows(8, 8) == tuple(range(8))
    assert kept_rows(146, 4) == (0, 36, 73, 109)


def test_a_plan_can_ask_without_torch():
    code = (
        "import sys, q3q.evaluate.baseline as b; b.kept_windows(9, 9, 9, 'float32'); "
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "False"


def edit(path, change):
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def reseal(path, change):
    """A manifest that says something else, and vouches for it."""
    edit(path, lambda m: (change(m["body"]), m.update(sha256=digest(m["body"]))))


WINDOW, MANIFEST = "window_00001.safetensors", "manifest.json"
DAMAGE = {
    "a byte of the states": lambda entry: flipped(entry / WINDOW, -1),
    "a byte of their header": lambda entry: flipped(entry / WINDOW, 12),
    "cut short": lambda entry: os.truncate(entry / WINDOW, (entry / WINDOW).stat().st_size - 4),
    "emptied": lambda entry: (entry / WINDOW).write_bytes(b""),
    "a window lost": lambda entry: (entry / WINDOW).unlink(),
    "windows exchanged": lambda entry: (entry / WINDOW).write_bytes(
        (entry / "window_00000.safetensors").read_bytes()
    ),
    "no manifest": lambda entry: (entry / MANIFEST).unlink(),
    "half a manifest": lambda entry: os.truncate(entry / MANIFEST, 100),
    "a list for a manifest": lambda entry: (entry / MANIFEST).write_text("[1]"),
    "another likelihood": lambda entry: edit(
        entry / MANIFEST, lambda m: m["body"]["nll"].__setitem__(0, 1.0)
    ),
    "another model": lambda entry: reseal(
        entry / MANIFEST, lambda b: b["identity"]["model"].update(digest="d2")
    ),
    "an older version": lambda entry: reseal(
        entry / MANIFEST, lambda b: b["identity"].update(version=0)
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_computed_again(tmp_path, model, windows, identity, damage):
    good = baseline_for(tmp_path / "good", identity, model, windows)
    entry = baseline_for(tmp_path / "bad", identity, model, windows)
    damage(entry.folder)
    assert find_baseline(tmp_path / "bad", identity) is None
    model.windows = 0
    assert same(baseline_for(tmp_path / "bad", identity, model, windows), good)
    assert model.windows == 5


@pytest.mark.parametrize(
    ("damage", "computed"), [(lambda path: None, 3), (lambda path: flipped(path, -1), 4)]
)
def test_what_a_killed_writer_left_is_gone_on_with_as_far_as_it_is_whole(
    tmp_path, model, windows, identity, monkeypatch, damage, computed
):
    monkeypatch.setattr("q3q.evaluate.budget.SET_TOKENS", {"cpu": windows.shape[1]})

    def killed(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        baseline_for(tmp_path, identity, model, windows, killed)
    damage(tmp_path / f"{identity.key}.partial" / WINDOW)
    model.windows = 0
    entry = baseline_for(tmp_path, identity, model, windows)
    assert model.windows == computed
    assert same(entry, baseline_for(tmp_path / "other", identity, model, windows))
    assert sorted(path.name for path in entry.folder.iterdir()) == [
        MANIFEST,
        *map(baseline_module._file, entry.rows),
    ]


def test_another_models_entry_under_this_name_is_not_used(tmp_path, model, windows, identity):
    other = BaselineIdentity.of({**MODEL, "digest": "d2"}, "t1", windows, 3, "cpu")
    baseline_for(tmp_path, other, model, windows).folder.rename(tmp_path / identity.key)
    assert find_baseline(tmp_path, identity) is None


def test_damage_while_in_use_is_noticed(tmp_path, model, windows, identity):
    entry = baseline_for(tmp_path, identity, model, windows)
    flipped(entry.folder / WINDOW, -1)
    entry.hidden(0)
    with pytest.raises(IntegrityError, match="changed while it was in use"):
        entry.hidden(1)


def test_another_vocabulary_is_refused(tmp_path, model, windows, identity):
    entry = baseline_for(tmp_path, identity, model, windows)
    reseal(entry.folder / MANIFEST, lambda body: body.update(vocab=body["vocab"] - 1))
    with pytest.raises(IntegrityError, match="not this model's"):
        baseline_for(tmp_path, identity, model, windows)


def test_tokens_of_another_tokenizer_are_refused(tmp_path, model, windows, identity):
    entry = baseline_for(tmp_path, identity, model, windows)
    with pytest.raises(IntegrityError, match="another tokenizer"):
        entry.check_fits(model, windows + 1)
    with pytest.raises(IntegrityError, match="another tokenizer"):
        entry.check_fits(model, windows + model.facts.vocab)
    with pytest.raises(IntegrityError, match="not those"):
        baseline_for(tmp_path, identity, model, windows + 1)


def test_an_unquantized_model_that_is_broken_leaves_no_entry(tmp_path, decoder, windows, identity):
    broken = replace(decoder, head_VH=decoder.head_VH * float("inf"))
    with pytest.raises(IntegrityError, match="not finite"):
        baseline_for(tmp_path, identity, broken, windows)
    assert [path.name for path in tmp_path.iterdir()] == [f"{identity.key}.claim.1"]


class Slow(Counted):
    """A decoder that takes its time over each window, and forever over the one it stops at."""

    def __init__(self, decoder, stop_at):
        super().__init__(decoder)
        self.stop_at = stop_at

    def states(self, batches):
        time.sleep(300 if self.windows == self.stop_at else 0.05)
        return super().states(batches)


@pytest.fixture
def worker(tmp_path, decoder, windows, identity, monkeypatch):
    """Start a process that computes the entry window by window and sends how many it ran."""
    monkeypatch.setattr("q3q.evaluate.budget.SET_TOKENS", {"cpu": windows.shape[1]})
    context, started = multiprocessing.get_context("fork"), []

    def work(model, answer):
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        baseline_for(tmp_path, identity, model, windows)
        answer.send(model.windows)

    def start(stop_at=None):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(Slow(decoder, stop_at), sender))
        process.start()
        started.append(process)
        return process, receiver

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_writer_killed_midway_leaves_nothing_that_is_used(
    tmp_path, model, windows, identity, worker
):
    process, _ = worker(stop_at=2)
    partial, deadline = tmp_path / f"{identity.key}.partial", time.monotonic() + 60
    while not (partial / WINDOW).exists():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    assert find_baseline(tmp_path, identity) is None  # under way is not there
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert partial.exists()
    assert find_baseline(tmp_path, identity) is None
    steps = []
    entry = baseline_for(tmp_path, identity, model, windows, lambda done, _: steps.append(done))
    assert 0 not in steps  # it reports 0 while it waits, and it waits for no dead process
    # It goes on with what was left, which may lack the line of the second window.
    assert model.windows in (3, 4)
    assert not partial.exists()
    assert same(entry, baseline_for(tmp_path / "other", identity, model, windows))


def test_processes_at_once_share_one_computation(tmp_path, model, windows, identity, worker):
    processes = [worker() for _ in range(3)]
    ran = []
    for process, receiver in processes:
        assert receiver.poll(60)
        ran.append(receiver.recv())
        process.join(60)
        assert process.exitcode == 0
    assert sorted(ran) == [0, 0, 5]
    assert same(
        find_baseline(tmp_path, identity),
        baseline_for(tmp_path / "other", identity, model, windows),
    )


def test_a_process_that_holds_the_claim_is_waited_for(tmp_path, model, windows, identity):
    entries, steps = [], []

    def progress(done, total):
        steps.append(done)

    thread = threading.Thread(
        target=lambda: entries.append(baseline_for(tmp_path, identity, model, windows, progress))
    )
    with claimed(tmp_path, identity.key):
        thread.start()
        deadline = time.monotonic() + 60
        while len(steps) < 3 and thread.is_alive():  # it has looked at the claim three times
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert set(steps) == {0}
        assert model.windows == 0
    thread.join(60)
    [entry] = entries
    assert same(entry, find_baseline(tmp_path, identity))
    assert model.windows == 5


def test_a_process_that_lost_its_claim_writes_no_more_and_waits_for_the_other(
    tmp_path, model, windows, identity
):
    partial, others = tmp_path / f"{identity.key}.partial", tmp_path / f"{identity.key}.claim.2"
    steps = []

    def progress(done, total):
        steps.append(done)
        if steps == [1, 2]:
            others.write_text("")  # another process took this one for dead
        if done == 0:
            assert (partial / "journal.jsonl").read_text().count("\n") == 3  # identity, 2 windows
            others.write_text(FREE)

    entry = baseline_for(tmp_path, identity, model, windows, progress)
    assert steps[:3] == [1, 2, 0]
    assert steps[-3:] == [3, 4, 5]
    assert same(entry, baseline_for(tmp_path / "other", identity, model, windows))


def test_who_waits_says_so_and_may_be_asked_to_end(tmp_path, model, windows, identity):
    class AskedToEnd(BaseException):
        pass

    steps = []

    def progress(done, total):
        steps.append((done, total))
        if len(steps) == 2:
            raise AskedToEnd

    with claimed(tmp_path, identity.key), pytest.raises(AskedToEnd):
        baseline_for(tmp_path, identity, model, windows, progress)
    assert steps == [(0, len(windows))] * 2
    assert model.windows == 0


def test_windows_are_told_apart_by_their_tokens_alone(windows):
    assert windows_digest(windows) == windows_digest(windows.to(torch.int32))
    assert windows_digest(windows) == windows_digest(windows.T.contiguous().T)
    assert windows_digest(windows) != windows_digest(windows.T)

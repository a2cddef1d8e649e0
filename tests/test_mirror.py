"""Mirrors: what one pushes another pulls, no file is half there, one of many gets a claim."""

import os
import re
import secrets
import signal
import time
from pathlib import Path

import pytest

from q3q.errors import ConfigError
from q3q.placement import Trial
from q3q.storage import claim as claim_module
from q3q.storage import stores as stores_module
from q3q.storage.claim import WIDTH, Claim, ClaimLostError
from q3q.storage.mirror import Mirror, refreshed
from q3q.storage.stores import (
    StoreError,
    folder_of,
    mirror_of,
    open_store,
    refuse_unusable,
    with_retries,
)
from q3q.storage.uploader import uploading
from tests.specs import make_trial
from tests.stores import make_bucket, s3_server


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        yield make_bucket("laws")


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue('s3')}/{secrets.token_hex(4)}"


@pytest.fixture
def node(url, tmp_path, monkeypatch):
    """node(name): the URL's mirror on a machine of that name."""

    def make(name, of=url):
        monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / name))
        return Mirror(of)

    return make


def write(mirror, **files):
    for name, content in files.items():
        path = mirror.folder / "trials/x" / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def held(mirror):
    return {
        str(path.relative_to(mirror.folder / "trials/x")): path.read_text()
        for path in (mirror.folder / "trials").rglob("*")
        if path.is_file()
    }


def in_store(mirror):
    return sorted(mirror.store.find("trials"))


def test_what_one_pushes_another_pulls_and_nothing_travels_twice(node):
    a, b = node("a"), node("b")
    write(a, record_json="1", blocks__block_json="2", empty_txt="")
    assert a.push("trials") == 3
    b.pull("trials")
    assert held(b) == held(a) == {"record.json": "1", "blocks/block.json": "2", "empty.txt": ""}
    before = {path: path.stat().st_mtime_ns for path in b.folder.rglob("*") if path.is_file()}
    b.pull("trials")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (a.push("trials"), b.push("trials"), b.push("trials/x/record.json")) == (0, 0, 0)


def test_the_side_that_changed_counts_and_of_both_the_store(node):
    a, b = node("a"), node("b")
    write(a, one="old", two="old", three="old")
    a.push("trials")
    b.pull("trials")
    write(b, one="b's", three="b's longer")
    assert b.push("trials") == 2
    write(a, two="a's", three="a's")
    a.pull("trials")
    assert held(a) == {"one": "b's", "two": "a's", "three": "b's longer"}
    assert a.push("trials") == 1


def test_what_one_deletes_goes_everywhere_but_not_what_nobody_sent(node):
    a, b = node("a"), node("b")
    write(a, one="1", two="2", three="3")
    a.push("trials")
    b.pull("trials")
    (b.folder / "trials/x/one").unlink()
    (b.folder / "trials/x/two").unlink()
    assert b.push("trials") == 2
    assert in_store(b) == ["trials/x/three"]
    write(a, two="changed since", four="never sent")
    a.pull("trials")
    assert held(a) == {"two": "changed since", "three": "3", "four": "never sent"}
    stranger = node("c")  # has none of these, and never had
    assert stranger.push("trials") == 0
    assert in_store(stranger) == ["trials/x/three"]
    (a.folder / "trials/x/three").unlink()
    a.pull("trials")  # missing here, so it is brought: only a push says that it was deleted
    assert held(a)["three"] == "3"


def test_what_another_process_here_sends_while_a_pull_lists_the_store_stays(node, monkeypatch):
    a, neighbour, elsewhere = node("a"), node("a"), node("b")
    write(a, again="1", gone="2")
    a.push("trials")
    for name in ("again", "gone"):
        elsewhere.store.remove(f"trials/x/{name}")
    find = a.store.find

    def busy(prefix):
        found = find(prefix)
        write(neighbour, new="3", again="made again")
        neighbour.push("trials")
        return found

    monkeypatch.setattr(a.store, "find", busy)
    a.pull("trials")
    assert held(a) == {"again": "made again", "new": "3"}
    assert in_store(a) == ["trials/x/again", "trials/x/new"]


def test_a_file_is_whole_or_absent_however_its_download_ends(node):
    a, b = node("a"), node("b")
    write(a, one="a whole file")
    a.push("trials")

    def half(name, path):
        path.write_text("a wh")
        raise KeyboardInterrupt

    whole, b.store.get = b.store.get, half
    with pytest.raises(KeyboardInterrupt):
        b.pull("trials")
    assert held(b) == {}
    b.store.get = whole
    b.pull("trials")
    assert held(b) == {"one": "a whole file"}


def test_a_fetch_that_was_killed_deletes_nothing_in_the_store(node):
    a, b = node("a"), node("b")
    write(a, record_json="1")
    a.push("trials")
    child = os.fork()
    if child == 0:
        b.store.get = lambda name, path: os.kill(os.getpid(), signal.SIGKILL)
        b.pull("trials")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert b.push("trials") == 0
    assert in_store(a) == ["trials/x/record.json"]
    b.pull("trials")
    assert held(b) == {"record.json": "1"}


def test_what_is_under_way_stays_and_the_record_goes_last(node):
    a = node("a")
    write(a, record_json="1", a="2", z="3", q3q_json="4")
    aside = ("a.damaged", "a.damaged2", "a.damaged.2", "a.db.damaged2-wal", "b.damaged3/file")
    for name in (".a.partial", "lock.lock", "trial.claim.3", "out.partial/file", *aside):
        (a.folder / "trials/x" / name).parent.mkdir(exist_ok=True)
        (a.folder / "trials/x" / name).write_text("under way")
    sent, put = [], a.store.put

    def recording(name, path):
        sent.append(path.name)
        put(name, path)

    a.store.put = recording
    assert a.push("trials") == 4
    assert sent[2:] == ["q3q.json", "record.json"]
    assert len(in_store(a)) == 4


def test_a_courier_brings_what_changes_and_stops_when_it_may_no_more(node):
    a = node("a")
    may = True

    def check_claim():
        if not may:
            raise ClaimLostError("lost")

    with uploading(a, "trials", every=0.05, check_claim=check_claim):
        write(a, one="1")
        deadline = time.monotonic() + 20
        while not in_store(a):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    write(a, two="2")
    with uploading(a, "trials", every=60, check_claim=check_claim):
        pass  # at the end all is sent
    assert in_store(a) == ["trials/x/one", "trials/x/two"]
    may = False
    write(a, three="3")
    with pytest.raises(ClaimLostError), uploading(a, "trials", every=0.05, check_claim=check_claim):
        time.sleep(0.2)
    assert in_store(a) == ["trials/x/one", "trials/x/two"]


def test_refreshed_brings_what_is_read_and_leaves_the_tensors(node):
    a = node("a")
    write(a, record_json="1", blocks__block_safetensors="2", evaluations__1_json="3")
    a.push("trials")
    b = node("b")
    assert refreshed(b.url) == b.folder
    assert held(b) == {"record.json": "1"}
    assert b.push("trials") == 0  # what it does not have it does not delete
    assert len(in_store(b)) == 3


def quick(mirror, **settings):
    return Claim(
        mirror.claim_store("running"), "it", **{"heartbeat": 0.05, "silence": 0.6, **settings}
    )


def test_one_has_it_until_it_is_released(node):
    first, second = quick(node("a")), quick(node("b"))
    assert first.take() is None
    assert second.take().pid == os.getpid()
    assert second.holder_lives
    first.confirm()
    first.release()
    assert second.take() is None
    second.release()
    assert len(node("a").store.names("running")) == 1


def test_a_holder_elsewhere_keeps_it_while_it_beats_and_loses_it_by_silence(node, monkeypatch):
    holder = quick(node("a"))
    holder.take()
    monkeypatch.setattr(claim_module, "_place", lambda: "another machine")
    waiting, began = quick(node("b"), silence=1.0), time.monotonic()
    while time.monotonic() - began < 1.5:
        assert waiting.take() is not None
        time.sleep(0.05)
    assert waiting.holder_lives
    holder._closing.set()  # as if its machine slept
    holder._thread.join()
    deadline = time.monotonic() + 10
    while waiting.take() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ClaimLostError, match="another took over"):
        holder.confirm()
    holder.release()
    waiting.confirm()
    waiting.release()


def test_of_many_processes_one_gets_it(node, tmp_path):
    """Each fork opens the store anew; the winner lives until all have tried."""
    a = node("a")
    url, gate, children = a.url, tmp_path / "gate", []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                mine = quick(Mirror(url), silence=60)
                while not gate.exists():
                    time.sleep(0.001)
                won = mine.take() is None
                (tmp_path / f"{'won' if won else 'lost'} {os.getpid()}").touch()
                deadline = time.monotonic() + 60
                while won and len(list(tmp_path.glob("*o* *"))) < 4 and time.monotonic() < deadline:
                    time.sleep(0.01)
            finally:
                os._exit(0)
        children.append(pid)
    gate.touch()
    for child in children:
        os.waitpid(child, 0)
    assert len(list(tmp_path.glob("won *"))) == 1


def test_a_holder_killed_on_this_machine_is_seen_to_be_at_once(node, tmp_path):
    a = node("a")
    url = a.url
    pid = os.fork()
    if pid == 0:
        try:
            quick(Mirror(url)).take()
            (tmp_path / "has it").touch()
            time.sleep(60)
        finally:
            os._exit(0)
    while not (tmp_path / "has it").exists():
        time.sleep(0.01)
    waiting = quick(node("b"), silence=60)
    assert waiting.take().pid == pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert waiting.take() is None
    waiting.release()


def test_an_answer_that_was_lost_does_not_turn_a_claim_against_its_holder(s3):
    """A request that succeeded unheard is sent again, and is told "exists" of its own file."""
    store, name = open_store(f"{s3}/{secrets.token_hex(4)}"), "running/it.claim.1"
    assert store.create(name, b"mine")
    assert store.create(name, b"mine")
    assert not store.create(name, b"another's")


def test_a_beat_replaces_the_counter_alone(node):
    a = node("a")
    claim = quick(a, heartbeat=60)
    claim.take()
    before = a.claim_store("running").read("it.claim.1")
    claim._file.write(f"{7:0{WIDTH}d}")
    after = a.claim_store("running").read("it.claim.1")
    assert after == f"{7:0{WIDTH}d}".encode() + before[WIDTH:]
    claim.release()


def test_a_store_that_can_be_used_is_left_as_it_was(node):
    a = node("a")
    refuse_unusable.cache_clear()
    refuse_unusable(a.url)
    assert a.store.find("") == {}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("nowhere://x/y", "of no kind that fsspec knows"),
        ("memory://x", "only one of two processes gets"),
        ("file://x/y", "three slashes"),
        ("s3://ada:lovelace99@bucket/x", "credentials come from the environment"),
        ("s3://bucket/x?key=secret99", "credentials come from the environment"),
    ],
)
def test_a_url_that_cannot_be_storage_is_refused_in_one_line(bad, reason):
    refuse_unusable.cache_clear()
    with pytest.raises(ConfigError, match=reason) as refused:
        refuse_unusable(bad)
    assert "\n" not in str(refused.value)
    assert not re.search("lovelace99|secret99", str(refused.value))


def test_a_bucket_that_is_not_there_is_refused(s3):
    refuse_unusable.cache_clear()
    with pytest.raises(ConfigError, match="there is no such bucket"):
        refuse_unusable("s3://no-such-bucket/x")


def test_a_missing_package_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(stores_module, "open_store", missing)
    refuse_unusable.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'q3q\[s3\]'"):
        refuse_unusable("s3://bucket/x")


def test_a_store_that_lets_two_create_the_same_file_is_refused(tmp_path, monkeypatch):
    store = open_store(f"file://{tmp_path}")

    def overwrite(name, content):
        store.write(name, content)
        return True

    monkeypatch.setattr(store, "create", overwrite)
    monkeypatch.setattr(stores_module, "open_store", lambda url: store)
    refuse_unusable.cache_clear()
    with pytest.raises(ConfigError, match="lets two processes create the same file"):
        refuse_unusable("s3://bucket/x")
    assert not list(tmp_path.iterdir())


def test_what_may_pass_is_tried_again_and_what_lasts_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(stores_module, "LONGEST_PAUSE", 0.01)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    answers = iter([TimeoutError("slow"), OSError("reset"), "there"])

    def call():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert with_retries("s3://bucket/x", call) == "there"
    assert len(pauses) == 2

    def refuse():
        raise PermissionError("key=AKIAABCDEFGHIJKLMNOP may not")

    with pytest.raises(StoreError, match="cannot be used any more") as refused:
        with_retries("s3://bucket/x", refuse)
    assert "AKIA" not in str(refused.value)
    assert len(pauses) == 2
    monkeypatch.setattr(stores_module, "PATIENCE", 0.0)
    with pytest.raises(StoreError, match="slow"):
        with_retries("s3://bucket/x", lambda: (_ for _ in ()).throw(TimeoutError("slow")))


def test_places_are_those_of_the_machine_that_reads_them(monkeypatch, tmp_path):
    url = "s3://bucket/x"
    monkeypatch.setenv("Q3Q_MIRRORS", "/home/ada/mirrors")
    there = mirror_of(url)
    trial = make_trial(storage=there, placement={"export": there / "exports/x", "store": url})
    written = trial.to_json()
    monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path))
    here = Trial.from_json(written)
    assert here == trial
    assert here.placement.trials == mirror_of(url) / "trials"
    assert here.placement.export == mirror_of(url) / "exports/x"
    outside = trial.placed(export=Path("/data/out")).placement.here()
    assert outside.export == Path("/data/out")
    shared = trial.placed(store=None, trials=Path("/storage/trials")).placement
    assert shared.here() is shared
    assert folder_of("mlruns").name == "mlruns"
    assert mirror_of(url + "/") == mirror_of(url) != mirror_of("s3://bucket/y")

"""What `python -m q3q.trials` says of a storage folder, and what it does there."""

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from q3q import trial as trial_module
from q3q.calibration import WRITTEN
from q3q.data.prepared import Shelf, kept_identity, prepared
from q3q.data.traces import FOLDER, part_identity
from q3q.evaluate.identities import prepared_identities
from q3q.evaluate.samples import write_samples
from q3q.export import destination
from q3q.export.marker import write_marker
from q3q.models import demo
from q3q.models.checkpoint import EXPORT_MARKER
from q3q.placement import Grant, Trial
from q3q.record import Progress, Sweep, TrialRecord, load_trial
from q3q.report.records import all_sweeps
from q3q.spec import TRACES, Json
from q3q.storage import claim
from q3q.storage import status as bulletin
from q3q.storage.claim import Holder
from q3q.storage.files import write_atomically
from q3q.storage.mirror import Mirror
from q3q.storage.status import (
    RunningTrial,
    StatusWriter,
    SweepStatus,
    View,
    at_work,
    sweep_statuses,
)
from q3q.sweep.progress import Display
from q3q.trials import attach as attach_module
from q3q.trials.__main__ import main
from q3q.trials.stored import find_trials
from tests.specs import calibration_of, evaluation_of, make_trial, model_of, respecified, text_of


@pytest.fixture
def storage(tmp_path):
    (tmp_path / "trials").mkdir()
    return tmp_path


DEMO = Path(demo.__file__).parent / "dense"


def trial(storage, bits, *texts, **asked):
    evaluation = evaluation_of(*texts, **asked)
    return make_trial(
        "rtn", bits, evaluation=evaluation, storage=storage, placement={"model": DEMO}
    )


def begin(one, blocks=0):
    """Leave what a trial leaves that was killed after so many blocks."""
    write_atomically(one.folder / "spec.json", json.dumps(one.to_json()).encode())
    for k in range(blocks):
        write_atomically(one.folder / "blocks" / f"block_{k:03d}.safetensors", bytes(1000))
        write_atomically(one.folder / "blocks" / f"block_{k:03d}.json", b"{}")
    return one


def complete(one):
    begin(one)
    TrialRecord(spec=one.spec, placement=one.placement, status="COMPLETED").save()
    return one


def fail(one, reason):
    TrialRecord.failed(begin(one), reason).save()
    return one


def sweep(storage, *specs, command="python launch.py -m method=rtn"):
    Sweep(id="0" * 10, name="study", command=command, config="", trials=specs).save(storage)


def view(*running, total=4, ended=1):
    works = tuple(
        RunningTrial(
            trial=one.id,
            name=one.spec.name,
            doing="quantize, block 2 of 6",
            share=0.2,
            seconds=3.0,
            left=12.0,
        )
        for one in running
    )
    return View(total=total, ended=ended, failed=0, seconds=10.0, left=50.0, running=works)


def post(storage, host=None, holder=None, **facts):
    """Write a running sweep's status file, as this process or a `host`'s would."""
    here = holder or Holder.here()
    holder = replace(here, host=host, place=host) if host else here
    known = dict(name="study", command="python launch.py -m method=rtn", holder=holder)
    one = SweepStatus(**{**known, "view": view(), "updated": time.time(), **facts})
    write_atomically(storage / "running" / f"{one.key}.json", json.dumps(one.to_json()).encode())
    return one


def states(storage):
    return {trial.id: (trial.state, trial.waits) for trial in find_trials(storage)}


def test_each_trial_has_a_state_and_says_what_it_waits_for(storage):
    done, failed, stopped, waiting = (trial(storage, bits) for bits in (2, 3, 4, 5))
    complete(done)
    fail(failed, "the text is\ntoo short")
    begin(stopped, blocks=3)
    (storage / "trials" / "0123456789").mkdir()
    sweep(storage, done, failed, stopped, waiting)
    found = states(storage)
    again = "python launch.py -m method=rtn"
    assert found == {
        done.id: ("completed", ""),
        failed.id: ("failed", f"the text is too short; then {again}"),
        stopped.id: ("stopped", f"to go on at block 3: {again}"),
        waiting.id: ("waiting", again),
        "0123456789": found["0123456789"],
    }
    assert found["0123456789"][0] == "unknown"


FOREIGN = ("", "[1", "[1]", '"a"', "null", "3", '{"spec": "x"}', "[" * 100_000)


@pytest.mark.parametrize("name", ["spec.json", "record.json"])
@pytest.mark.parametrize("content", FOREIGN, ids=[text[:9] for text in FOREIGN])
def test_a_torn_or_foreign_file_of_a_trial_makes_it_unknown(storage, name, content):
    write_atomically(storage / "trials" / "abc" / name, content.encode())
    assert states(storage)["abc"][0] == "unknown"


def test_while_its_sweep_runs_a_trial_is_at_work_or_waits_for_its_turn(storage):
    works, waits = begin(trial(storage, 2), blocks=1), trial(storage, 3)
    sweep(storage, works, waits)
    post(storage, view=view(works))
    assert states(storage) == {
        works.id: ("running", "quantize, block 2 of 6"),
        waits.id: ("waiting", "its turn in the running sweep"),
    }
    post(storage, view=view(works), over=True)
    assert states(storage)[works.id][0] == "stopped"


def test_a_failure_after_a_success_hides_nothing(storage):
    one = complete(trial(storage, 2))
    TrialRecord.failed(one, "later").save()
    assert states(storage)[one.id] == ("completed", "")


def test_a_trial_without_its_baseline_waits_for_it(storage):
    base = trial(storage, 8)
    one = trial(storage, 2)
    one = complete(one.placed(baseline=base.id))
    assert states(storage)[one.id] == ("completed", f"method=none ({base.id}), to be compared with")
    complete(base)
    assert states(storage)[one.id] == ("completed", "")


def test_sizes_are_those_on_disk_kept_blocks_included(storage):
    one = begin(trial(storage, 2), blocks=2)
    [found] = find_trials(storage)
    assert (
        found.size
        == sum(path.stat().st_size for path in one.folder.rglob("*") if path.is_file())
        > 2000
    )
    write_atomically(
        storage / "trials" / "blocks" / one.spec.quantization_id / "block_000.safetensors",
        bytes(5000),
    )
    assert find_trials(storage)[0].size == found.size + 5000


def test_the_list_is_a_line_a_trial_and_can_be_narrowed(storage, capsys):
    complete(trial(storage, 2))
    stopped = begin(trial(storage, 3))
    stopped.placement.block_cache.use(stopped.spec.quantization_id)
    assert main(["--storage", str(storage)]) == 0
    *lines, kept = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert kept.startswith("blocks of 1 quantization kept for later evaluations (keep=auto): ")
    assert lines[1].split()[:1] == [stopped.id]
    assert lines[-1].startswith("1 completed, 1 stopped. ")
    assert main(["--storage", str(storage), "list", "completed"]) == 0
    assert stopped.id not in capsys.readouterr().out


def test_deleting_frees_what_no_other_trial_has_use_for(storage, capsys):
    first, second = (trial(storage, 2, text_of("stories", limit=limit)) for limit in (1, 2))
    assert first.spec.quantization_id == second.spec.quantization_id
    kept = storage / "trials" / "blocks" / first.spec.quantization_id / "block_000.safetensors"
    write_atomically(kept, b"x")
    complete(first), complete(second)
    assert main(["--storage", str(storage), "delete", first.id]) == 0
    assert not first.folder.exists()
    assert kept.exists()
    assert main(["--storage", str(storage), "delete", second.id]) == 0
    assert not kept.parent.exists()
    assert (storage / "trials").exists()
    assert "deleted" in capsys.readouterr().out


def test_deleting_takes_exports_and_baselines_that_no_other_trial_has_use_for(storage):
    first, second = (trial(storage, bits, "stories", drift="auto") for bits in (2, 3))
    export = storage / "exports" / "first"
    first = complete(respecified(first, export="hf").placed(export=export))
    write_atomically(export / "model.safetensors", bytes(5000))
    marker = {"trial": first.id, "version": destination.VERSION}
    write_atomically(export / EXPORT_MARKER, json.dumps(marker).encode())
    complete(second)
    mine, others = (storage / "baselines" / name for name in ("mine", "others"))
    for entry, dtype in ((mine, "float32"), (others, "float16")):
        identity = {"model": model_of("demo", dtype).identity, "text": text_of("stories").digest}
        write_atomically(
            entry / "manifest.json", json.dumps({"body": {"identity": identity}}).encode()
        )
    assert next(one for one in find_trials(storage) if one.id == first.id).size > 5000
    assert main(["--storage", str(storage), "delete", first.id]) == 0
    assert (export.exists(), mine.exists(), others.exists()) == (False, True, True)
    assert main(["--storage", str(storage), "delete", second.id]) == 0
    assert (mine.exists(), others.exists()) == (False, True)


def test_deleting_takes_prepared_input_that_no_other_trial_reads(storage):
    """Windows of the text that only the first has, requests of the task that only it has."""
    first, second = (
        respecified(trial(storage, bits, *texts, tasks=tasks), seed=seed)
        for bits, texts, tasks, seed in (
            (2, ("stories", "library"), ("piqa", "boolq"), 0),
            (3, ("stories",), ("boolq",), 1),
        )
    )
    first, second = complete(first), complete(second)
    shelf = Shelf(storage / "prepared", "a tokenizer")
    for one in (first, second):
        for identity in prepared_identities(one.spec):
            prepared(shelf, {**identity, "more": 1}, lambda: {"x": np.zeros(3)})
    write_atomically(shelf.folder / "another.safetensors", b"not a whole file")

    def left() -> list[Json]:
        files = [*shelf.folder.glob("*.safetensors")]
        return [identity for path in files if (identity := kept_identity(path)) is not None]

    # Both read the stories; the requests of several tasks are in one file.
    assert len(left()) == 4
    assert main(["--storage", str(storage), "delete", first.id]) == 0
    assert {json.dumps(one.get("text", one.get("requests"))) for one in left()} == {
        json.dumps(text_of("stories").digest),
        json.dumps(["boolq"]),
    }
    assert main(["--storage", str(storage), "delete", second.id]) == 0
    assert left() == []
    assert (shelf.folder / "another.safetensors").is_file()


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_deleting_takes_traces_that_no_other_trial_reads_from_the_store_too(
    tmp_path, monkeypatch, temperature
):
    """Seeds write traces of their own, and share greedy ones; another machine has written them."""
    url = f"file://{tmp_path}/store"
    calibration = calibration_of(TRACES, draw=WRITTEN, temperature=temperature)

    def mirror_on(machine):
        monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / machine))
        return Mirror(url)

    writer = mirror_on("a")
    first, second = (
        make_trial("gptq", calibration=calibration, seed=seed, storage=writer.folder)
        for seed in (0, 1)
    )
    shelf = Shelf(writer.folder / FOLDER, "a tokenizer")
    for one in (first, second):
        complete(one)
        for rows in (range(4), range(4, 8)):
            shelf.keep(part_identity(one.spec, calibration, rows), {"windows": np.zeros(3)})
    writer.push("trials", FOLDER)
    assert len(writer.store.find(FOLDER)) == (4 if temperature else 2)
    here = mirror_on("b")
    assert main(["--storage", url, "delete", first.id]) == 0
    left = [kept_identity(here.folder / name) for name in here.store.find(FOLDER)]
    assert len(left) == 2
    assert {one and one["seed"] for one in left} == ({1} if temperature else {None})
    assert main(["--storage", url, "delete", second.id]) == 0
    assert here.store.find(FOLDER) == {}
    assert not [*(here.folder / FOLDER).glob("*.safetensors")]


def test_what_runs_is_not_deleted_and_what_is_not_there_is_named(storage, capsys):
    one = begin(trial(storage, 2))
    post(storage, view=view(one))
    assert main(["--storage", str(storage), "delete", one.id]) == 2
    assert "runs in a sweep" in capsys.readouterr().err
    assert main(["--storage", str(storage), "delete", "../../etc"]) == 2
    assert "is no trial's id" in capsys.readouterr().err
    assert main(["--storage", str(storage), "delete", "stopped"]) == 0
    assert one.folder.exists()
    assert main(["--storage", str(storage / "no"), "list"]) == 2


def test_resuming_runs_what_stopped_or_failed_and_nothing_that_is_done(
    storage, monkeypatch, capsys
):
    done, failed, stopped = (trial(storage, bits) for bits in (2, 3, 4))
    complete(done), fail(failed, "out of memory"), begin(stopped, blocks=1)
    ran = []

    def attempt(one, report):
        ran.append(one)
        record = TrialRecord(spec=one.spec, placement=one.placement, status="COMPLETED")
        record.save()
        return record

    monkeypatch.setattr(trial_module, "attempt_trial", attempt)
    assert main(["--storage", str(storage), "resume", "stopped", failed.id, done.id]) == 0
    assert ran == [stopped, failed]
    assert ran[0].placement.trials == storage / "trials"
    assert {state for state, _ in states(storage).values()} == {"completed"}
    assert f"{done.id} rtn w2 g128 · demo: is done already" in capsys.readouterr().out
    monkeypatch.setattr(
        trial_module, "attempt_trial", lambda one, report: TrialRecord.failed(one, "again")
    )
    begin(trial(storage, 5))
    assert main(["--storage", str(storage), "resume", "stopped"]) == 1


def recorded_attempts(monkeypatch):
    """Let all attempts fail; return the list that they are recorded in."""
    ran: list[Trial] = []

    def attempt(trial, report):
        ran.append(trial)
        return TrialRecord.failed(trial, "x")

    monkeypatch.setattr(trial_module, "attempt_trial", attempt)
    return ran


def test_a_storage_folder_that_moved_is_resumed_where_it_lies(
    storage, tmp_path_factory, monkeypatch
):
    begin(trial(storage, 2))
    moved = tmp_path_factory.mktemp("elsewhere") / "mlruns"
    storage.rename(moved)
    ran = recorded_attempts(monkeypatch)
    main(["--storage", str(moved), "resume", "stopped"])
    assert ran[0].placement.trials == moved / "trials"


def test_a_gangs_trial_is_resumed_by_one_process_alone(storage, monkeypatch):
    one = trial(storage, 2)
    grant = Grant(gpus=1, loader="sharded", memory=10**9)
    begin(one.placed(loader="sharded", memory=2 * 10**9, grant=grant))
    ran = recorded_attempts(monkeypatch)
    main(["--storage", str(storage), "resume", "stopped"])
    placement = ran[0].placement
    assert (placement.loader, placement.memory) == (None, 2 * 10**9)
    assert placement.grant.loader == "resident"


def test_a_storage_folder_that_was_copied_is_read_and_written_where_it_lies(
    storage, tmp_path_factory
):
    export = trial(storage, 2)
    export = export.placed(export=storage / "exports" / "x", store="file:///gone")
    done = complete(export)
    sweep(storage, done)
    copied = tmp_path_factory.mktemp("elsewhere") / "mlruns"
    shutil.copytree(storage, copied)
    record = TrialRecord.load(copied / "trials" / done.id / "record.json")
    [loaded], _ = all_sweeps(copied)
    for placement in (
        record.placement,
        load_trial(copied / "trials" / done.id / "spec.json").placement,
        loaded.trials[0].placement,
    ):
        assert placement.trials == copied / "trials"
        assert placement.export == copied / "exports" / "x"
        assert placement.store is None
    before = (storage / "trials" / done.id / "record.json").stat().st_mtime_ns
    replace(record, notes={"seen": "there"}).save()
    assert (storage / "trials" / done.id / "record.json").stat().st_mtime_ns == before
    assert TrialRecord.load(copied / "trials" / done.id / "record.json").notes == {"seen": "there"}


def test_a_bulletin_comes_back_as_it_was(storage):
    one = post(storage, view=view(trial(storage, 2)), lines=((1, "a line"),))
    assert sweep_statuses(storage) == [one]
    (storage / "running" / "damaged.json").write_text('{"name": 1}')
    assert sweep_statuses(storage) == [one]


def test_a_sweep_is_gone_when_its_process_is(storage):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    here = post(storage)
    assert here.lives()
    assert not replace(here, holder=replace(here.holder, pid=process.pid)).lives()
    assert not replace(
        here, holder=replace(here.holder, born="0")
    ).lives()  # its number was given anew
    elsewhere = replace(here.holder, place="another", host="another")
    assert replace(here, holder=elsewhere).lives() is None
    assert replace(here, holder=elsewhere, over=True).lives() is False


@contextmanager
def speaking(storage, updated=0.0, **facts):
    """A sweep on another machine that rewrites its status file, with a clock of its own."""
    over = threading.Event()
    post(storage, updated=updated, **facts)

    def speak():
        for number in itertools.count():
            if over.wait(0.05):
                return
            post(storage, updated=updated - number, **facts)

    speaker = threading.Thread(target=speak)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


class Clock:
    """A clock that moves only while somebody sleeps; `between` is called in each sleep."""

    time = staticmethod(time.time)

    def __init__(self):
        self.now = 0.0
        self.between = lambda: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.between()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bulletin, "time", clock)
    monkeypatch.setattr(attach_module, "time", clock)
    return clock


def test_of_another_machine_a_sweep_is_at_work_if_it_is_heard_whatever_the_clocks_say(
    storage, clock
):
    post(storage, host="silent")
    post(storage, host="heard", updated=-1e9)
    clock.between = lambda: post(storage, host="heard", updated=-1e9 - clock.now)
    assert [one.holder.host for one in at_work(storage)] == ["heard"]
    clock.between = lambda: None
    assert at_work(storage) == []


@pytest.mark.parametrize("end", ["falls silent", "its file goes"])
def test_a_sweep_elsewhere_that_falls_silent_or_whose_file_goes_is_said_to_have_died(
    storage, clock, capsys, end
):
    post(storage, host="another", updated=0.0)
    alive = 3 * bulletin.SILENT_SECONDS

    def speak():
        if clock.now < alive:
            post(storage, host="another", updated=clock.now)
        elif end == "its file goes":
            for path in (storage / "running").glob("*.json"):
                path.unlink()

    clock.between = speak
    assert main(["--storage", str(storage), "attach"]) == 1
    silent = clock.now - alive
    assert abs(silent - bulletin.SILENT_SECONDS) < 2 * bulletin.POLL_SECONDS
    assert "it died; the same command continues" in capsys.readouterr().out


def between_polls(monkeypatch, do):
    """Call `do` between a watcher's reads of a sweep's file, first after the first read."""

    def sleep(seconds):
        do()
        time.sleep(seconds)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(attach_module, "time", clock)


def test_a_second_terminal_sees_a_sweep_to_its_end(storage, monkeypatch, capsys):
    monkeypatch.setattr(bulletin, "EVERY_SECONDS", 0.05)
    one = trial(storage, 2)
    attached = threading.Event()

    def run():
        secret = "http://ada:lovelace@tracker"
        publisher = StatusWriter(
            storage, "study", f"python launch.py -m method=rtn track.uri={secret}"
        )
        with (
            open(os.devnull, "w") as nowhere,
            Display(total=1, stream=nowhere, publisher=publisher) as display,
        ):
            display.started(one.id, one.spec.label)
            display.event(Progress(trial=one.id, phase="quantize", done=1, total=6))
            attached.wait(60)
            display.finished(TrialRecord(spec=one.spec, status="COMPLETED"), 3.0)

    sweeping = threading.Thread(target=run)
    sweeping.start()
    while not (sweep_statuses(storage) and sweep_statuses(storage)[0].view.running):
        assert sweeping.is_alive()
        time.sleep(0.01)
    assert sweep_statuses(storage)[0].view.running[0].doing == "quantize, block 2 of 6"
    between_polls(monkeypatch, attached.set)
    assert main(["--storage", str(storage), "attach"]) == 0
    sweeping.join()
    shown = capsys.readouterr().out
    assert "track.uri=http://***@tracker" in shown
    assert "rtn w2 g128 · demo: quantize, block 2 of 6" in shown
    assert shown.count("rtn w2 g128 · demo: 3.0 s (1 of 1 done)") == 1
    assert shown.endswith("study: 1 of 1 done; it has ended\n")
    assert main(["--storage", str(storage), "attach"]) == 2
    assert "The last one, study, has ended" in capsys.readouterr().err


def test_a_sweep_that_is_killed_is_seen_to_be(storage, monkeypatch, capsys):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        post(
            storage,
            holder=replace(Holder.here(), pid=process.pid, born=claim._start_time(process.pid)),
        )

        def kill():
            process.kill()
            process.wait()  # a zombie would still be there

        between_polls(monkeypatch, kill)
        assert main(["--storage", str(storage), "attach"]) == 1
    assert "it died; the same command continues" in capsys.readouterr().out


def test_of_several_sweeps_one_is_named(storage, capsys):
    with speaking(storage, name="one", host="a"), speaking(storage, name="two", host="b"):
        assert main(["--storage", str(storage), "attach"]) == 2
        assert "name one: one, two" in capsys.readouterr().err
        assert main(["--storage", str(storage), "attach", "three"]) == 2


def test_a_disk_that_takes_no_bulletin_stops_no_sweep(storage, caplog):
    (storage / "running").write_text("a file where a folder should be")
    with Display(total=1, publisher=StatusWriter(storage, "study", "")) as display:
        display.finished(TrialRecord(spec=trial(storage, 2).spec, status="COMPLETED"), 1.0)
    assert "the progress display has failed" in caplog.text


def test_old_bulletins_are_swept_away_by_the_next_sweep(storage):
    old = post(storage, host="another", over=True, updated=time.time() - bulletin.KEPT_SECONDS - 60)
    new = post(storage, host="yet another", over=True)
    with Display(total=0, publisher=StatusWriter(storage, "study", "")):
        pass
    assert {one.holder.host for one in sweep_statuses(storage)} == {
        new.holder.host,
        platform.node(),
    }
    assert old.holder.host not in {one.holder.host for one in sweep_statuses(storage)}


def exporting(storage, bits=2):
    """A finished trial with an export of two files."""
    one = trial(storage, bits)
    export = storage / "exports" / f"w{bits}"
    one = respecified(one, export="hf").placed(export=export)
    complete(one)
    write_atomically(export / "model.safetensors", bytes(5000))
    write_atomically(export / "config.json", b"{}")
    write_marker(export, {"trial": one.id, "version": destination.VERSION}, {})
    return one


def verify(storage, capsys, *which):
    code = main(["--storage", str(storage), "verify", *which])
    return code, capsys.readouterr().out.splitlines()


def test_verify_says_that_there_are_no_faults_or_each_in_a_line(storage, capsys):
    first, second = exporting(storage, 2), exporting(storage, 3)
    assert verify(storage, capsys) == (0, ["2 records and 2 exports checked: no faults."])

    weights = first.placement.export / "model.safetensors"
    weights.write_bytes(bytes(4999) + b"1")
    assert states(storage)[first.id] == ("completed", "")  # sizes fit
    code, lines = verify(storage, capsys)
    assert code == 1
    assert len(lines) == 2
    assert lines[0].startswith(f"the export {first.placement.export}: model.safetensors has ")
    assert lines[0].endswith(
        "; to make it again, remove the folder, then run its sweep's command or "
        f"python -m q3q.trials resume {first.id}"
    )
    assert verify(storage, capsys, second.id) == (0, ["1 record and 1 export checked: no faults."])

    shutil.rmtree(first.placement.export)
    torn = second.folder / "record.json"
    torn.write_bytes(torn.read_bytes()[:-20])
    code, lines = verify(storage, capsys)
    assert code == 1
    assert f"the export {first.placement.export} is missing; to make it again, run " in lines[0]
    assert f"{torn} cannot be read (" in lines[1]
    assert verify(storage, capsys, "nothing")[0] == 2


def test_verify_misses_no_file_of_a_record_and_guesses_no_digest(storage, capsys):
    one = exporting(storage)
    record = TrialRecord.load(one.folder / "record.json")
    digest = write_samples(one.folder / "samples.parquet", [])
    replace(record, files={"samples.parquet": None}).save()
    (one.placement.export / EXPORT_MARKER).write_text(
        json.dumps({"trial": one.id, "version": destination.VERSION})
    )
    code, lines = verify(storage, capsys)
    assert code == 0
    assert "sizes and digests are not recorded" in lines[0]
    replace(record, files={"samples.parquet": f"{digest[:-1]}x"}).save()
    code, lines = verify(storage, capsys)
    assert code == 1
    assert f"{one.folder}/samples.parquet cannot be read: it is damaged" in lines[0]
    (one.folder / "samples.parquet").unlink()
    (one.folder / "samples.parquet").mkdir()
    code, lines = verify(storage, capsys)
    assert code == 1
    assert f"{one.folder}/samples.parquet cannot be read" in lines[0]


def test_verify_reads_exports_that_no_trial_here_made(storage, capsys):
    one = exporting(storage)
    shutil.rmtree(one.folder)
    complete(trial(storage, 8))
    (one.placement.export / "config.json").write_bytes(b"")
    code, lines = verify(storage, capsys)
    assert code == 1
    assert "config.json has 0 bytes instead of 2" in lines[0]


def test_the_list_names_checkpoints_and_those_that_must_be_made_again(storage, capsys):
    whole, damaged = exporting(storage, 2), exporting(storage, 3)
    (damaged.placement.export / "model.safetensors").write_bytes(b"")
    assert main(["--storage", str(storage)]) == 0
    text = capsys.readouterr().out
    assert f" KB: {whole.placement.export}\n" in text
    assert f"KB: {damaged.placement.export}" not in text
    state, waits = states(storage)[damaged.id]
    assert state == "stopped"
    assert "its export to be made again" in waits
    assert "model.safetensors has 0 bytes instead of 5000" in waits

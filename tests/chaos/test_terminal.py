"""A terminal that is closed, and a job whose processes are all told to end, with real ones."""

import os
import pty
import select
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.chaos.faults import ROOT, SMALL, log_of, records, wait_until
from tests.commands import python

TWO = ("method=rtn", "bits=3,4", "calibration.samples=32")
LONG = "evaluation.limit=100000"  # a trial that does not end before it is told to

# Makes standard input the terminal that controls the session, then runs a command.
TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)


class OnTerminal:
    """A command that runs on a pseudo-terminal of its own, of which it is the session's leader.

    shown: all that it wrote
    """

    def __init__(self, *command: str) -> None:
        self._master, terminal = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, sys.executable, *command],
            cwd=ROOT,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.pid, self.shown = self._process.pid, b""
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the command has ended
            while not self._closing.is_set():
                if select.select([self._master], [], [], 0.05)[0]:
                    self.shown += os.read(self._master, 65536)
        os.close(self._master)

    def close_terminal(self) -> None:
        """Close it as a window or an ssh would: the kernel sends SIGHUP, and writing fails."""
        self._closing.set()
        self._reader.join()

    def end(self) -> int:
        """Wait for the command; return its exit code."""
        return self._process.wait(timeout=120)


def members(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def statuses(storage: Path) -> list[str]:
    """Return the states of all runs of a storage's MLflow."""
    with closing(sqlite3.connect(storage / "mlflow.db")) as database:
        return [row[0] for row in database.execute("select status from runs")]


def at_work(storage: Path) -> bool:
    logs = [log_of(path.parent) for path in storage.glob("trials/*/trial.log")]
    return any(step.words.startswith("evaluate") for log in logs for step in log)


def settings(storage: Path, tiny: Path, *more: str) -> list[str]:
    chosen = {one.partition("=")[0]: one for one in (*SMALL, *more)}
    return [*chosen.values(), f"model.path={tiny}", f"storage={storage}"]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("sweep", marks=pytest.mark.slow),
        pytest.param("one process", marks=pytest.mark.slow),
        pytest.param("resume", marks=pytest.mark.slow),
    ],
)
def test_a_closed_terminal_ends_a_command_with_its_farewell(kind, tiny, tmp_path):
    storage = tmp_path / "storage"
    if kind == "sweep":
        command = ["launch.py", "-m", *settings(storage, tiny, *TWO, LONG)]
    elif kind == "one process":
        command = ["launch.py", *settings(storage, tiny, "method=rtn", "bits=3", LONG)]
    else:
        before = OnTerminal("launch.py", *settings(storage, tiny, "method=rtn", "bits=3", LONG))
        wait_until(lambda: at_work(storage), "a trial at work")
        os.kill(before.pid, signal.SIGKILL)
        before.end()
        [trial] = storage.glob("trials/*/trial.log")
        trial.unlink()
        command = ["-m", "q3q.trials", "--storage", str(storage), "resume", trial.parent.name]
    process = OnTerminal(*command)
    wait_until(lambda: at_work(storage), "a trial at work")
    process.close_terminal()
    assert process.end() == 128 + signal.SIGHUP, process.shown.decode()
    wait_until(lambda: not members(process.pid), "the end of all its processes", 60)
    assert "RUNNING" not in statuses(storage)
    assert list(storage.glob("reports/*/report.html"))
    assert not list(storage.glob("trials/*/failed.json"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_job_ends_it_with_its_farewell(number, tiny, tmp_path):
    """A shell sends SIGHUP so, systemd and Slurm SIGTERM; Ray's own processes receive it too."""
    storage = tmp_path / "storage"
    with job("-m", *settings(storage, tiny, *TWO, LONG)) as process:
        wait_until(lambda: at_work(storage), "a trial at work")
        os.killpg(process.pid, number)
        os.killpg(process.pid, signal.SIGHUP)  # a second one, as systemd and shells send
        output, _ = process.communicate(timeout=120)
    # Of two signals that wait, Python hears the one of the lower number first.
    assert process.returncode in (128 + number, 128 + signal.SIGHUP), output
    assert "the same command continues" in output
    assert "Traceback" not in output
    wait_until(lambda: not members(process.pid), "the end of all its processes", 60)
    assert "RUNNING" not in statuses(storage)
    assert not list(storage.glob("trials/*/failed.json"))


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_ends_nothing(tiny, tmp_path):
    storage = tmp_path / "storage"
    arguments = settings(storage, tiny, *TWO, "evaluation.limit=64")
    with job("-m", *arguments, inside=["nohup"]) as process:
        wait_until(lambda: at_work(storage), "a trial at work")
        os.killpg(process.pid, signal.SIGHUP)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert len(records(storage)) == 2


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_nothing(tiny, tmp_path):
    """`python launch.py ... | head`: the sweep goes on, and ends as if somebody read on."""
    storage = tmp_path / "storage"
    with job("-m", *settings(storage, tiny, *TWO, "evaluation.limit=64")) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=240) == 0
    assert len(records(storage)) == 2
    assert statuses(storage) == ["FINISHED"] * 3


def job(*arguments: str, inside: list[str] | None = None) -> "subprocess.Popen[str]":
    """Start a sweep as a job of its own, whose output is read from a pipe."""
    return subprocess.Popen(
        ["env", "--default-signal=HUP", *(inside or []), sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_what_is_written_to_a_terminal_that_is_gone_raises_nothing():
    code = (
        "import os, sys\n"
        "from q3q.ending import end_well\n"
        "end_well()\n"
        "print('before', flush=True)\n"
        "try:\n"
        "    sys.stdin.readline()\n"
        "except OSError:\n"  # a terminal that is gone can no more be read than written
        "    pass\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    for _ in range(3):\n"
        "        print('after', file=stream, flush=True)\n"
        "os._exit(7)\n"
    )
    process = OnTerminal(
        "-c", f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}"
    )
    wait_until(lambda: b"before" in process.shown, "its first line", 30)
    process.close_terminal()
    assert process.end() == 7
    piped = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for stream in (piped.stdout, piped.stderr):
        assert stream is not None
        stream.close()
    assert piped.stdin is not None
    piped.stdin.close()
    assert piped.wait(timeout=60) == 7


def test_a_signal_that_python_swallows_is_heard_all_the_same():
    """Python drops what a handler raises in a callback of a weak reference, say."""
    code = (
        "import os, signal, weakref\n"
        "from q3q.ending import end_well, raise_again\n"
        "class Thing: pass\n"
        "end_well()\n"
        "thing = Thing()\n"
        "told = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))\n"
        "del thing\n"
        "print('swallowed', flush=True)\n"
        "raise_again()\n"
        "print('not heard')\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (143, "")
    assert done.stdout == "swallowed\n"

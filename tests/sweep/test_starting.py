"""Ray that dies, hangs or cannot start is named, whatever Ray's own core does then."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from q3q.errors import ConfigError
from q3q.sweep.ray.cluster import STARTS, Cluster
from q3q.sweep.ray.starting import refuse_long_folder

PROGRAM = """
import sys
from q3q.errors import Q3QError
from q3q.sweep.ray.cluster import Cluster
try:
    with Cluster(cpus=1) as cluster:
        print(cluster.total())
except Q3QError as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def program(**environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


def strike(process: "subprocess.Popen[str]", server: str, number: signal.Signals) -> None:
    """Send a signal to one of the program's servers as soon as it is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for child in psutil.Process(process.pid).children():
            if child.name() == server:
                child.send_signal(number)
                return
        time.sleep(0.005)
    raise AssertionError(f"{server} never came")


@pytest.mark.slow
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_a_server_that_dies_while_ray_starts_is_named(server):
    with program() as process:
        strike(process, server, signal.SIGKILL)
        begin = time.monotonic()
        output, errors = process.communicate(timeout=120)
    assert time.monotonic() - begin < 45  # Ray itself waits for a minute
    said = output if process.returncode == 3 else errors
    assert "Run the same command to try again" in said, (output, errors)
    assert f"_{process.pid}/logs" in said
    if process.returncode == 3:
        assert output.startswith(f"StartError Ray's {server} died while Ray was starting")


@pytest.mark.slow
def test_a_start_that_hangs_ends_and_says_what_hangs():
    with program(Q3Q_RAY_START_SECONDS="6") as process:
        strike(process, "gcs_server", signal.SIGSTOP)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 3, (output, errors)
    assert output.startswith("StartError Ray did not start within ")
    assert "its gcs_server is stopped" in output
    assert "Q3Q_RAY_START_SECONDS=" in output


@pytest.mark.parametrize(
    ("failures", "address", "starts"),
    [(2, None, 3), (STARTS, None, STARTS), (1, "host:1", 1)],
)
def test_a_start_that_ray_gives_up_on_a_busy_machine_is_made_again(
    monkeypatch, failures, address, starts
):
    import ray

    made = []

    def init(**_: object) -> None:
        made.append(1)
        if len(made) <= failures:
            raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray._private.worker, "_worker_logs_enabled", False)
    monkeypatch.setenv("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    cluster = Cluster(address=address)
    if failures < starts:
        cluster._init()
    else:
        with pytest.raises(ConfigError, match=r"cannot (start|join) .*timed out"):
            cluster._init()
    assert len(made) == starts


def test_an_end_inside_the_block_is_witnessed_and_no_other(tmp_path):
    code = (
        "import os, sys\n"
        "from q3q.sweep.ray.starting import witness\n"
        "with witness('these words'):\n"
        "    if sys.argv[1] == 'sudden':\n"
        "        os._exit(9)\n"
    )
    for how, words in (("sudden", "these words\n"), ("well", "")):
        command = [sys.executable, "-c", code, how]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (9 if words else 0, words)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_is_too_long_for_sockets_is_named_before_ray_starts(variable, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    with program(**{variable: str(long)}) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 3, (output, errors)
    assert output.startswith(f"ConfigError {variable}={long} is ")
    assert "RAY_TMPDIR=/tmp" in output
    assert not list(long.iterdir())


def test_a_folder_that_just_fits_is_taken(monkeypatch):
    """The bound is Ray's own: it makes a session's name of the time and the process's number."""
    from ray._private.utils import validate_socket_filepath

    for length in range(20, 80):
        folder = "/" + "x" * length
        monkeypatch.setenv("RAY_TMPDIR", folder)
        session = f"session_2026-01-02_03-04-05_678901_{os.getpid()}"
        try:
            validate_socket_filepath(f"{folder}/ray/{session}/sockets/plasma_store")
        except OSError:
            with pytest.raises(ConfigError, match=r"bytes too long for Ray"):
                refuse_long_folder()
        else:
            refuse_long_folder()

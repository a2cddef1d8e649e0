"""A real MLflow server on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from q3q.track.mlflow import MlflowTracker


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def serve(
    folder: Path, port: int, *artifacts: str, store: str | None = None
) -> "subprocess.Popen[bytes]":
    """Start a server; return it once it answers.

    Args:
        store: a database's address, by default of `mlflow.db` in the folder.
        artifacts: options that say where files go, by default to `served` in the folder.
    """
    if store is None:
        store = f"sqlite:///{folder}/mlflow.db"
        MlflowTracker(store).check()  # its migrations take the server many seconds
    options = [*f"--host 127.0.0.1 --port {port} --workers 1".split(), "--backend-store-uri", store]
    options += artifacts or ("--artifacts-destination", str(folder / "served"))
    # The server's job runners are not needed here, and take long to start.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            cwd=folder,
            env={**os.environ, **quiet},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    # A server is up when it has answered from its store, which takes long on a busy machine.
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    deadline = time.monotonic() + 180
    try:
        while True:
            try:
                with urllib.request.urlopen(url, timeout=30):
                    return server
            except OSError:
                output = (folder / "server.log").read_text()
                assert server.poll() is None, output
                assert time.monotonic() < deadline, output
                time.sleep(0.1)
    except BaseException:
        kill(server)
        raise


def kill(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server, unless it has ended, and its workers: its session has no other process."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(timeout=10)

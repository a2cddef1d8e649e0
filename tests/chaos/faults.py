"""Real processes, what a trial's log says of them, and how to stop them in a given phase."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from q3q.record import load_trial

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "eos_token_id": 0,
}
SMALL = [
    "model=local",
    "group_size=32",
    "calibration.samples=4",
    "calibration.length=64",
    "evaluation.texts=[demo]",
    "evaluation.window=64",
    "evaluation.limit=4",
    "evaluation.tasks=[]",
    "evaluation.drift=false",
    "evaluation.baseline=false",
]


def start(
    storage: Path | str, tiny: Path, *arguments: str, inside: Sequence[str] = (), **environment: str
) -> "subprocess.Popen[str]":
    """The real command, in a session of its own. inside: a command that runs it somewhere else."""
    settings = {one.partition("=")[0]: one for one in (*SMALL, *arguments)}  # the later one counts
    command = [
        sys.executable,
        "launch.py",
        "-m",
        *settings.values(),
        f"model.path={tiny}",
        f"storage={storage}",
    ]
    # The kernel wakes stopped orphans with SIGHUP; under nohup a worker would outlive its driver.
    command = [*inside, "env", "--default-signal=HUP", *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def launch(
    storage: Path | str, tiny: Path, *arguments: str, inside: Sequence[str] = (), **environment: str
) -> tuple[int, str]:
    process = start(storage, tiny, *arguments, inside=inside, **environment)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def wait_until(true: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Step:
    """One line of a trial's log."""

    host: str
    pid: int
    words: str


def log_of(folder: Path) -> list[Step]:
    """A trial's log, as far as it is written."""
    try:
        lines = (folder / "trial.log").read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    steps = []
    for line in lines:
        if line.endswith("\n"):
            _when, host, pid, words = line.rstrip("\n").split(" ", 3)
            steps.append(Step(host, int(pid), words))
    return steps


def last_words(folder: Path, pid: int) -> str:
    """The last that a process said in a trial's log: where it was when it died."""
    return [step.words for step in log_of(folder) if step.pid == pid][-1]


def numbers(record: dict) -> dict:
    """Return what a record says that must not depend on what befell the trial."""
    passing = ("seconds/", "peak_bytes/", "gpu_peak_bytes/")
    metrics = {
        name: value for name, value in record["metrics"].items() if not name.startswith(passing)
    }
    return {
        "metrics": metrics,
        "intervals": record["intervals"],
        "sites": record["sites"],
        "status": record["status"],
    }


def records(storage: Path) -> dict[str, dict]:
    """Records by trial."""
    found = storage.glob("trials/*/record.json")
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@dataclass
class Hit:
    """The place where a process was stopped.

    whole: its trial's blocks on disk then, and when each was written
    """

    folder: Path
    pid: int
    words: str
    whole: dict[str, int]


def freeze(storage: Path, phase: str, avoid: set[str], mine: Callable[[int], bool] = runs) -> Hit:
    """Stop (SIGSTOP) a process of this machine that is in a phase, by its trial's last log line.

    Once it stands still its last line is read again, so that there is no doubt about where it is.
    Writing the record takes milliseconds: a process that nears it is stopped and continued again
    and again until it is there.
    """
    found: list[Hit] = []
    near = (phase, "evaluate") if phase == "record" else (phase,)

    def look() -> bool:
        for path in storage.glob("trials/*/trial.log"):
            folder = path.parent
            steps = log_of(folder) if folder.name not in avoid else []
            if not steps or not steps[-1].words.startswith(near) or not mine(steps[-1].pid):
                continue
            pid = steps[-1].pid
            os.kill(pid, signal.SIGSTOP)
            wait_until(partial(_stopped, pid), "a process that stands still", 10)
            last = log_of(folder)[-1]
            if (
                last.pid == pid
                and last.words.startswith(phase)
                and not (folder / "record.json").exists()
            ):
                found.append(Hit(folder, pid, last.words, blocks_of(folder)))
                return True
            os.kill(pid, signal.SIGCONT)
        return False

    wait_until(look, f"a process in {phase}")
    return found[0]


def _stopped(pid: int) -> bool:
    """Return True if all its threads stand still."""
    states = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.append(path.read_text().rpartition(")")[2].split()[0])
        except OSError:
            continue
    return bool(states) and set(states) <= set("TtZX")


def blocks_of(folder: Path) -> dict[str, int]:
    """Return the whole blocks of a trial's quantization, and when each was written."""
    trial = load_trial(folder / "spec.json")
    return {
        path.name: path.stat().st_mtime_ns
        for place in (trial.blocks_folder, trial.kept_blocks_folder)
        for path in place.glob("block_*.json")
    }


def fill_disk(disk: Path) -> None:
    """Write a file `filler` until there is no byte left."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1000))
    assert shutil.disk_usage(disk).free == 0


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own, which has all that this one imported; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return pid


def end_of(pid: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

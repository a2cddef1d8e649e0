"""Other quantizers, each in a virtual environment of its own, and one turn of one of them.

`methods.py`, `real_peers.py` and `judge.py` compare q3q with them.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers.job import Job
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "peers"
DEMO = ROOT / "q3q/models/demo/dense"
BITS, GROUP_SIZE, DAMPING, GRID = 4, 128, 0.01, 20
RUN_LIMIT, INSTALL_LIMIT = 1200, 1800  # seconds
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


class ContenderError(Exception):
    """A contender that cannot be installed or does not finish; the message is one line."""


@dataclass(frozen=True)
class Peer:
    """A package from PyPI.

    alone: installed without its declared dependencies; `requirements` lists them instead
    """

    name: str
    script: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()


LLM_COMPRESSOR = Peer(
    name="llm-compressor",
    script="run_llmcompressor.py",
    requirements=(
        "llmcompressor==0.14.0.1",
        "compressed-tensors==0.19.0",
        "transformers==5.17.0",
        "datasets==5.2.0",
    ),
)
# It requires torch 2.14.1 or newer, but runs on 2.13: on the CPU it uses nothing newer.
GPTQMODEL = Peer(
    name="GPTQModel",
    script="run_gptqmodel.py",
    requirements=(
        "transformers==5.20.2",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "defuser==0.0.28",
        "device-smi==0.5.7",
        "logbar==0.4.15",
        "ninja==1.13.2",
        "pillow",
        "protobuf",
        "pypcre==0.6.4",
        "requests",
        "threadpoolctl==3.8.0",
        "tokenicer==0.0.14",
        "torchao==0.18.0",
    ),
    alone=("gptqmodel==7.7.0",),
)


@dataclass(frozen=True)
class Contender:
    """A quantizer: a peer, or what runs in this process's own environment (None).

    script: in `peers/`, of a quantizer without a peer
    aside: outside the contest, shown for comparison; run once
    """

    name: str
    peer: Peer | None = None
    script: str = "run_q3q.py"
    options: dict[str, Any] = field(default_factory=dict)
    aside: bool = False


PEER_LC, PEER_GM = Contender("llm-compressor", LLM_COMPRESSOR), Contender("GPTQModel", GPTQMODEL)
Q3Q = Contender("q3q")


def environment_of(peer: Peer, cache: Path) -> Path:
    """The Python of the peer's environment, made anew if it is not there whole.

    Raises:
        ContenderError: pip could not install it.
    """
    suffix = "+cpu" if sys.platform == "linux" else ""
    torch_pin = f"torch=={torch.__version__.partition('+')[0]}{suffix}"
    wanted = json.dumps([sys.version, torch_pin, peer.requirements, peer.alone])
    folder = cache / f"{peer.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:10]}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / ".ready").exists():
        print(f"making an environment for {peer.name} in {folder}: some minutes")
        shutil.rmtree(folder, ignore_errors=True)
        _command([sys.executable, "-m", "venv", str(folder)])
        options = "--quiet --retries 1 --disable-pip-version-check".split()
        pip = [str(python), "-m", "pip", "install", *options]
        try:
            _command([*pip, torch_pin])
        except ContenderError:  # PyPI itself has no CPU build for Linux
            _command([*pip, torch_pin, "--extra-index-url", CPU_WHEELS])
        _command([*pip, torch_pin, *peer.requirements])
        if peer.alone:
            _command([*pip, "--no-deps", *peer.alone])
        (folder / ".ready").write_text(wanted, encoding="utf-8")
    return python


def _command(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, text=True, capture_output=True, timeout=INSTALL_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise ContenderError(f"not installed: pip took more than {INSTALL_LIMIT} s") from None
    if done.returncode:
        silent = "NewConnectionError|NameResolutionError|ConnectTimeoutError|Connection refused"
        if re.search(silent, done.stderr):
            raise ContenderError(
                "not installed: the package index cannot be reached; connect once, or give a "
                "--cache that has it"
            )
        raise ContenderError(f"not installed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line that says something; of pip, its last error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])[:300]


@dataclass
class Turn:
    """A process's wall and processor seconds of quantizing, its own seconds, and its folder."""

    seconds: float
    cpu: float
    process: float
    knobs: dict[str, Any]
    phases: dict[str, float] | None
    folder: Path


def take_turn(
    contender: Contender, python: Path, job: Job, cache: Path, limit: float = RUN_LIMIT
) -> Turn:
    """Run the contender's script on the job, for at most `limit` seconds.

    Raises:
        ContenderError: it crashed, or took too long.
    """
    folder = Path(job.output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    script = SCRIPTS / (contender.peer.script if contender.peer else contender.script)
    environment = {
        **os.environ,
        "PYTHONPATH": "" if contender.peer else str(ROOT),
        "OMP_NUM_THREADS": str(job.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "GPTQMODEL_CPU_WORKERS": str(max(2, job.threads)),  # it does not start with fewer than two
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(cache / "extensions"),
    }
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [str(python), str(script), str(folder / "job.json")],
            env=environment,
            text=True,
            errors="replace",
            capture_output=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ContenderError(f"stopped after {limit:g} s") from None
    process = time.perf_counter() - started
    if done.returncode:
        raise ContenderError(last_line(done.stderr or done.stdout))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Turn(process=process, folder=folder, **result)


def warm_up(contender: Contender, python: Path, cache: Path, threads: int) -> None:
    """Quantize a tiny model once, so that what a peer compiles and keeps is not counted."""
    mark = python.parent.parent / ".warm"
    if mark.exists():
        return
    print(f"warming {contender.name} up")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.safetensors"
        save_file({"calibration": torch.arange(1024).view(4, 256)}, tokens)
        output = str(Path(scratch) / "out")
        job = Job(
            str(DEMO), str(tokens), output, "gptq", BITS, GROUP_SIZE, DAMPING, GRID, threads, {}
        )
        take_turn(contender, python, job, cache)
    mark.touch()

"""Compare q3q's GPTQ and AWQ with llm-compressor's and GPTQModel's.

`python benchmarks/methods.py [--cache DIR]` makes a virtual environment for each of the two
(pinned, on the CPU build of the torch release that runs this; kept in the cache folder and reused),
gives all contenders the same checkpoint, calibration tokens and settings (4 bits, groups of 128,
asymmetric), and prints each one's seconds and the perplexity of the model it made.

Seconds are those of quantizing alone, from a float32 model in memory to a quantized one in memory,
without starting the process, loading, saving or evaluating. Contenders take turns, each in its own
process; the shortest time counts. The same code judges every model: q3q's decoder receives its
dequantized weights, as the contender's own code gives them. A model that was not quantized
everywhere to 4 bits is an error, not a result.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peers.job import Job
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from trial import make_model

from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, draw_windows, encoder
from q3q.limits import cores
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import Decoder, load_decoder

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "peers"
DEMO = ROOT / "q3q/models/demo/dense"
BITS, GROUP_SIZE, DAMPING, GRID, LENGTH = 4, 128, 0.01, 20, 512
CHECKED_ROWS = 64  # of each linear, for their number of levels
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


@dataclass(frozen=True)
class Case:
    """A model and its data.

    windows, evaluated: windows of `LENGTH` tokens to calibrate and to evaluate on
    rounds: of turns, at most
    """

    name: str
    method: str
    model: str
    windows: int
    evaluated: int
    rounds: int
    contenders: tuple[Contender, ...]


PEER_LC, PEER_GM = Contender("llm-compressor", LLM_COMPRESSOR), Contender("GPTQModel", GPTQMODEL)
Q3Q = Contender("q3q")
SEQUENTIAL = Contender("q3q, true-sequential", options={"true_sequential": True}, aside=True)
CLIPPED = Contender("q3q, with clip search", options={"clip": True}, aside=True)
CASES = (
    Case("demo-gptq", "gptq", "demo", 64, 48, 9, (Q3Q, PEER_LC, PEER_GM, SEQUENTIAL)),
    Case("demo-awq", "awq", "demo", 64, 48, 1, (Q3Q, PEER_LC, CLIPPED)),
    Case("shaped-gptq", "gptq", "shaped", 32, 2, 9, (Q3Q, PEER_LC, PEER_GM)),
    Case("shaped-awq", "awq", "shaped", 8, 2, 1, (Q3Q, PEER_LC)),
)
TITLES = {
    "demo": "demo model (6 blocks)",
    "shaped": "random model with Qwen3-0.6B's widths (2 blocks, its vocabulary)",
}


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
        pip = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--retries",
            "1",
            "--disable-pip-version-check",
        ]
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
        silent = (
            "NewConnectionError",
            "NameResolutionError",
            "ConnectTimeoutError",
            "Connection refused",
        )
        if any(word in done.stderr for word in silent):
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


@dataclass(frozen=True)
class Scores:
    """A model's perplexity, and its mean KL divergence from the unquantized model in each window.

    The divergence is in nats per token.
    """

    perplexity: float
    divergences: list[float]

    @property
    def divergence(self) -> float:
        return sum(self.divergences) / len(self.divergences)


@dataclass(frozen=True)
class Judge:
    """The unquantized model, and the token windows that every quantized one is measured on."""

    model: Decoder
    windows_NT: Tensor

    def scores(
        self, weights: dict[str, Tensor] | None = None, bits: int = BITS, group: int = GROUP_SIZE
    ) -> Scores:
        """Measure a model.

        Args:
            weights: of a quantized model's blocks, by checkpoint name; what is absent is as it was.
            bits: of its linears.
            group: columns of a group.

        Raises:
            ContenderError: a linear has more levels in a group than its bits can tell apart.
        """
        model = self.model
        if weights is not None:
            blocks = []
            for k, block in enumerate(model.blocks):
                prefix = f"model.layers.{k}."
                new = {
                    name: weights[prefix + name]
                    for name in block.weights
                    if prefix + name in weights
                }
                linears = [name for site in block.sites for name in site.weights]
                for name in linears:
                    check_levels(prefix + name, new.get(name), bits, group)
                blocks.append(block.with_weights(new))
            model = Decoder(model.facts, model.embedding_VH, model.norm_H, model.head_VH, blocks)
        found = [self._score(model, *window) for window in self._windows]
        return Scores(
            perplexity=math.exp(statistics.fmean(loss for loss, _ in found)),
            divergences=[divergence for _, divergence in found],
        )

    @cached_property
    def _windows(self) -> list[tuple[Tensor, Tensor]]:
        """Token ids [1, T] and the unquantized model's last hidden states [1, T, H]."""
        return [(ids_1T, self.model.hidden(ids_1T)) for ids_1T in self.windows_NT.split(1)]

    def _score(self, model: Decoder, ids_1T: Tensor, old_1TH: Tensor) -> tuple[float, float]:
        """Return a window's mean loss of the next token and its mean divergence, in nats."""
        loss, divergence = 0.0, 0.0
        new_1TH = old_1TH if model is self.model else model.hidden(ids_1T)
        next_T = ids_1T[0].roll(-1)  # the last one has no next token
        last = len(next_T) - 1
        pairs = zip(
            model.logits(new_1TH.flatten(0, 1)),
            self.model.logits(old_1TH.flatten(0, 1)),
            strict=True,
        )
        for (rows, new_logits_CV), (_, old_logits_CV) in pairs:
            new_CV, old_CV = new_logits_CV.log_softmax(1), old_logits_CV.log_softmax(1)
            losses = nll_loss(new_CV, next_T[rows], reduction="none")
            loss += float(losses[: max(0, last - rows.start)].sum())
            divergence += float(kl_div(new_CV, old_CV, reduction="sum", log_target=True))
        return loss / last, divergence / len(next_T)


def check_levels(name: str, weight_OI: Tensor | None, bits: int, group: int) -> None:
    """Refuse a linear that is missing, or not of these bits in each group of its first rows."""
    if weight_OI is None:
        raise ContenderError(f"left {name} unquantized")
    groups = weight_OI[:CHECKED_ROWS].unflatten(1, (-1, group)).sort(-1).values
    levels = 1 + int((groups.diff(dim=-1) != 0).sum(-1).max())
    if levels > 2**bits:
        raise ContenderError(
            f"{name} has {levels} levels in a group, {2**bits} at most are possible"
        )


def checkpoint_of(case: Case, cache: Path) -> Path:
    """The folder of the case's model; the random one is made once."""
    if case.model == "demo":
        return DEMO
    shaped = cache / "shaped-2"
    if not (shaped / "tokenizer.json").exists():
        shaped.mkdir(parents=True, exist_ok=True)
        make_model(shaped, blocks=2)
    return shaped


def make_tokens(path: Path, case: Case, windows: int | None) -> tuple[Path, Tensor]:
    """Write the calibration windows; return their file and the evaluation windows (demo text)."""
    encode = encoder(load_tokenizer(DEMO))
    samples = min(case.windows, windows or case.windows)
    text = load_text("demo", split="calibration")
    calibration = draw_windows(text, encode, samples=samples, length=LENGTH, draw="random", seed=0)
    save_file({"calibration": calibration}, path)
    held_out = encode(load_text("demo", split="evaluation").joined)
    return path, consecutive_windows(held_out, LENGTH, case.evaluated)


def run_case(
    case: Case,
    checkpoint: Path,
    pythons: dict[str, Path | ContenderError],
    args: argparse.Namespace,
) -> None:
    """Take turns, judge each contender's model, print the table."""
    print(f"\n{case.method.upper()}, {TITLES[case.model]}")
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in case.contenders}
    failures: dict[str, str] = {}
    scores: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        tokens, held_out = make_tokens(Path(scratch) / "tokens.safetensors", case, args.windows)
        judge = Judge(load_decoder(Checkpoint(checkpoint), torch.float32), held_out)
        base = judge.scores()
        samples = len(load_file(tokens)["calibration"])
        print(
            f"{samples} x {LENGTH} tokens to calibrate on, {len(held_out)} x {LENGTH} to evaluate "
            "on, float32"
        )
        for number in range(min(case.rounds, args.repeats)):
            for contender in case.contenders:
                if contender.name in failures or (contender.aside and number):
                    continue
                job = Job(
                    model=str(checkpoint),
                    tokens=str(tokens),
                    output=str(Path(scratch) / "out"),
                    method=case.method,
                    bits=BITS,
                    group_size=GROUP_SIZE,
                    damping=DAMPING,
                    grid=GRID,
                    threads=args.threads,
                    options=contender.options,
                )
                try:
                    python = pythons[contender.name]
                    if isinstance(python, ContenderError):
                        raise python
                    turn = take_turn(contender, python, job, args.cache)
                    if not number:
                        scores[contender.name] = judge.scores(
                            load_file(turn.folder / "weights.safetensors")
                        )
                    turns[contender.name].append(turn)
                    print(
                        f"  {contender.name}: {turn.seconds:.1f} s of {turn.process:.1f} s",
                        file=sys.stderr,
                    )
                except ContenderError as failure:
                    failures[contender.name] = str(failure)
    print_table(case, turns, failures, scores, base)


def print_table(
    case: Case,
    turns: dict[str, list[Turn]],
    failures: dict[str, str],
    scores: dict[str, Scores],
    base: Scores,
) -> None:
    best = {
        name: min(taken, key=lambda turn: turn.seconds) for name, taken in turns.items() if taken
    }
    rivals = [
        best[c.name].seconds
        for c in case.contenders
        if c.peer and c.name in best and c.name not in failures
    ]
    fastest = min(rivals, default=None)
    print(
        f"\n{'':22} {'seconds':>8} {'cpu s':>7} {'process':>8} {'speed':>6} {'perplexity':>12} "
        f"{'KL, nats':>10}"
    )
    print(f"{'unquantized':22} {'':8} {'':7} {'':8} {'':6} {base.perplexity:12.5f}")
    for contender in case.contenders:
        name = contender.name
        if name in failures:
            print(f"{name:22} FAILED: {failures[name]}")
            continue
        turn, found = best[name], scores[name]
        speed = f"{fastest / turn.seconds:.2f}x" if fastest else "-"
        times = f"{turn.seconds:8.2f} {turn.cpu:7.1f} {turn.process:8.1f}"
        print(f"{name:22} {times} {speed:>6} {found.perplexity:12.5f} {found.divergence:10.3g}")
    print("\nspeed: seconds of the fastest peer over these. Where q3q's time went, and every knob:")
    for name, turn in best.items():
        if turn.phases:
            parts = ", ".join(
                f"{phase} {share * turn.seconds:.2f}" for phase, share in turn.phases.items()
            )
            print(f"  {name}, seconds: {parts}")
    for name, turn in best.items():
        print(f"  {name}: " + ", ".join(f"{knob}={value}" for knob, value in turn.knobs.items()))


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


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "q3q-peers",
        help="kept between runs",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="turns of each contender; AWQ, which is slow, takes one",
    )
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--windows", type=int, help="fewer calibration windows, for a quick look")
    args = parser.parse_args()
    if min(args.repeats, args.threads, args.windows or 1) < 1:
        parser.error("--repeats, --threads and --windows must be 1 or more")
    args.cache = args.cache.resolve()
    args.cache.mkdir(parents=True, exist_ok=True)

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(args.threads)
    pythons: dict[str, Path | ContenderError] = {}
    cases = [case for case in CASES if case.name in args.cases]
    for contender in {
        contender.name: contender for case in cases for contender in case.contenders
    }.values():
        try:
            python = Path(sys.executable)
            if contender.peer:
                python = environment_of(contender.peer, args.cache)
                warm_up(contender, python, args.cache, args.threads)
            pythons[contender.name] = python
        except ContenderError as failure:
            print(f"{contender.name}: {failure}")
            pythons[contender.name] = failure
    started = time.perf_counter()
    pins = (*LLM_COMPRESSOR.requirements[:1], *GPTQMODEL.alone)
    print(f"{args.threads} threads, torch {torch.__version__}, {', '.join(pins)}")
    print(f"{BITS} bits, groups of {GROUP_SIZE}, asymmetric")
    for case in cases:
        run_case(case, checkpoint_of(case, args.cache), pythons, args)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()

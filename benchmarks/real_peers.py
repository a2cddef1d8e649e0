"""Put other quantizers beside q3q on SmolLM2-135M-Instruct: perplexity, KL and seconds of each.

`python benchmarks/real_peers.py MODEL STORAGE --test FILE --calibration FILE [--cache DIR]` gives
the same checkpoint, calibration tokens and settings (4, 3 and 2 bits, groups of 64, asymmetric;
GPTQ with act-order and static groups, AWQ without clipping) to q3q, to the plain transcriptions of
the official drivers (tests/fidelity/plain.py), to llm-compressor and, for GPTQ, to GPTQModel. All
compute in float32. The same code judges every model, as in `benchmarks/methods.py`, which also says
how the environments of the peers are made and what the seconds are.

MODEL and the two texts are those of `benchmarks/real_model.py`. Each finished turn is a line of
STORAGE/peers.jsonl, and is not taken again. SIGTERM or Ctrl-C stops after the running turn.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import fidelity
import torch
from contenders import (
    DAMPING,
    GRID,
    PEER_GM,
    PEER_LC,
    Q3Q,
    Contender,
    ContenderError,
    environment_of,
    take_turn,
    warm_up,
)
from methods import Judge
from peers.job import Job
from real_model import GROUP_SIZE, LENGTH, Stop
from safetensors.torch import load_file, save_file
from scipy.stats import t
from torch import Tensor

from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, draw_windows, encoder
from q3q.limits import cores
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder

OFFICIAL = Contender("official driver", script="run_plain.py")
CONTENDERS = {"gptq": (Q3Q, OFFICIAL, PEER_LC, PEER_GM), "awq": (Q3Q, OFFICIAL, PEER_LC)}
BITS = (4, 2, 3)
TURN_LIMIT = 4 * 3600  # seconds


@dataclass(frozen=True)
class Turn:
    """A contender's model and what it measured: a line of peers.jsonl.

    seconds: of quantizing alone; cpu: processor seconds of the same
    divergences: KL from the unquantized model in each window, nats a token
    """

    method: str
    bits: int
    name: str
    perplexity: float
    divergences: list[float]
    seconds: float
    cpu: float

    @property
    def kl(self) -> float:
        return statistics.fmean(self.divergences)


def tokens_of(options: argparse.Namespace, path: Path) -> Tensor:
    """Write the calibration windows to a file; return the windows to judge on."""
    encode = encoder(load_tokenizer(options.model))
    text = load_text("file", split="calibration", path=options.calibration)
    samples, length = options.samples, options.length
    windows = draw_windows(text, encode, samples=samples, length=length, draw="random", seed=0)
    save_file({"calibration": windows}, path)
    test = load_text("file", split="evaluation", path=options.test)
    return consecutive_windows(encode(test.joined), LENGTH, options.windows)


def contest(options: argparse.Namespace) -> None:
    """Take the turns that are missing."""
    options.cache.mkdir(parents=True, exist_ok=True)
    taken = {(turn.method, turn.bits, turn.name) for turn in read(options.storage)}
    work = [
        (method, bits, contender)
        for method, contenders in CONTENDERS.items()
        for bits in BITS
        for contender in contenders
        if (method, bits, contender.name) not in taken
    ]
    stop = Stop()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        tokens = Path(scratch) / "tokens.safetensors"
        windows = tokens_of(options, tokens)
        judge = Judge(load_decoder(Checkpoint(options.model), torch.float32), windows)
        if not any(turn.name == "unquantized" for turn in read(options.storage)):
            keep(options.storage, Turn("", 0, "unquantized", judge.scores().perplexity, [0], 0, 0))
        for method, bits, contender in work:
            if stop.asked:
                print("stopped: the same command goes on", flush=True)
                return
            job = Job(
                model=str(options.model),
                tokens=str(tokens),
                output=str(Path(scratch) / "out"),
                method=method,
                bits=bits,
                group_size=GROUP_SIZE,
                damping=DAMPING,
                grid=GRID,
                threads=options.threads,
                options=contender.options,
            )
            try:
                python = Path(sys.executable)
                if contender.peer:
                    python = environment_of(contender.peer, options.cache)
                    warm_up(contender, python, options.cache, options.threads)
                turn = take_turn(contender, python, job, options.cache, TURN_LIMIT)
                weights = load_file(turn.folder / "weights.safetensors")
                scores = judge.scores(weights, bits, GROUP_SIZE)
            except ContenderError as failure:
                print(f"{method} {bits} bits, {contender.name}: {failure}", flush=True)
                continue
            found = Turn(
                method,
                bits,
                contender.name,
                scores.perplexity,
                scores.divergences,
                turn.seconds,
                turn.cpu,
            )
            keep(options.storage, found)
            print(f"{method} {bits} bits, {found.name}: KL {found.kl:.5f}", flush=True)


def read(storage: Path) -> list[Turn]:
    path = storage / "peers.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Turn(**json.loads(line)) for line in lines]


def keep(storage: Path, turn: Turn) -> None:
    with (storage / "peers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(turn)) + "\n")


def table(turns: Iterable[Turn]) -> str:
    lines = [
        "| method | bits | quantizer | perplexity | KL, nats a token | q3q's KL over it "
        "| processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    turns = list(turns)
    whole = next((one for one in turns if one.name == "unquantized"), None)
    if whole is not None:
        lines.append(f"| | | unquantized | {whole.perplexity:.3f} | | | |")
    order = {contender.name: k for k, contender in enumerate(CONTENDERS["gptq"])}
    ranked = [turn for turn in turns if turn.name in order]
    for turn in sorted(ranked, key=lambda one: (one.method != "gptq", -one.bits, order[one.name])):
        mine = turn.method, turn.bits, "q3q"
        own = [one for one in ranked if (one.method, one.bits, one.name) == mine]
        over = ratio(own[0], turn) if own and turn.name != "q3q" else ""
        lines.append(
            f"| {turn.method} | {turn.bits} | {turn.name} | {turn.perplexity:.3f} | {turn.kl:.5f} "
            f"| {over} | {turn.cpu:.0f} |"
        )
    taken = {(one.method, one.bits, one.name) for one in turns}
    missing = [
        f"{method} {bits} bits by {contender.name}"
        for method, contenders in CONTENDERS.items()
        for bits in BITS
        for contender in contenders
        if (method, bits, contender.name) not in taken
    ]
    return "\n".join([*lines, *(["", f"Not run: {'; '.join(missing)}."] if missing else [])])


def ratio(own: Turn, other: Turn) -> str:
    """Return q3q's KL over another's, in percent, with a 95 % interval of the paired windows."""
    pairs = list(zip(own.divergences, other.divergences, strict=True))
    logs = [math.log(a / b) for a, b in pairs]
    middle = math.log(own.kl / other.kl)
    n = len(logs)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(logs) / math.sqrt(n)
    low, high = (100 * math.expm1(middle + sign * half) for sign in (-1, 1))
    return f"{100 * math.expm1(middle):+.1f} % [{low:+.1f}, {high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("storage", type=Path, help="folder for peers.jsonl")
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--windows", type=int, default=8, help="of 2,048 tokens, to measure on")
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of these")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "q3q-peers",
        help="the peers' environments, kept between runs",
    )
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.cache, options.model = options.cache.resolve(), options.model.absolute()
    torch.set_num_threads(options.threads)
    if not options.tables:
        contest(options)
    page = fidelity.PAGE.read_text(encoding="utf-8")
    page = fidelity.rewrite(page, "real peers", table(read(options.storage)))
    fidelity.PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

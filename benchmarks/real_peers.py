"""Put other quantizers beside q3q on SmolLM2-135M-Instruct: perplexity, KL and seconds of each.

`python benchmarks/real_peers.py MODEL STORAGE --test FILE --calibration FILE [--cache DIR]` gives
the same checkpoint, calibration tokens and settings (4, 3 and 2 bits, groups of 64, asymmetric;
GPTQ with act-order and static groups, AWQ without clipping) to q3q, to the plain transcriptions of
the official drivers (tests/fidelity/plain.py), to llm-compressor and, for GPTQ, to GPTQModel. All
compute in float32. The same code judges every model, as in `benchmarks/methods.py`, which also says
how the environments of the peers are made and what the seconds are.

MODEL and the two texts are those of `benchmarks/real_model.py`. `--seeds 0 1 2` draws the
calibration windows three times: at few bits one draw, or the order of a sum, moves a KL by several
percent. Each finished turn is a line of STORAGE/peers.jsonl, and is not taken again; `--methods`,
`--quantizers` and `--bits` choose turns; the table keeps rows of others. SIGTERM or Ctrl-C stops
after the running turn.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
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
from real_model import GROUP_SIZE, LENGTH, Stop, markdown
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
NAMES = [contender.name for contender in CONTENDERS["gptq"]]
BITS = (4, 2, 3)
TURN_LIMIT = 4 * 3600  # seconds


@dataclass(frozen=True)
class Turn:
    """A contender's model and what it measured: a line of peers.jsonl.

    seconds: of quantizing alone; cpu: processor seconds of the same
    divergences: KL from the unquantized model in each window, nats a token
    seed: of the draw of calibration windows
    """

    method: str
    bits: int
    name: str
    perplexity: float
    divergences: list[float]
    seconds: float
    cpu: float
    seed: int = 0

    @property
    def kl(self) -> float:
        return statistics.fmean(self.divergences)


def calibration_windows(options: argparse.Namespace, seed: int) -> Tensor:
    encode = encoder(load_tokenizer(options.model))
    text = load_text("file", split="calibration", path=options.calibration)
    samples, length = options.samples, options.length
    return draw_windows(text, encode, samples=samples, length=length, draw="random", seed=seed)


def judged_windows(options: argparse.Namespace) -> Tensor:
    test = load_text("file", split="evaluation", path=options.test)
    encode = encoder(load_tokenizer(options.model))
    return consecutive_windows(encode(test.joined), LENGTH, options.windows)


def contest(options: argparse.Namespace) -> None:
    """Take the turns that are missing."""
    options.cache.mkdir(parents=True, exist_ok=True)
    taken = {(turn.method, turn.bits, turn.name, turn.seed) for turn in read(options.storage)}
    work = [
        (seed, method, bits, contender)
        for seed in options.seeds
        for method in options.methods
        for bits in options.bits
        for contender in CONTENDERS[method]
        if (method, bits, contender.name, seed) not in taken
        and contender.name in options.quantizers
    ]
    stop = Stop()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        judge = Judge(
            load_decoder(Checkpoint(options.model), torch.float32), judged_windows(options)
        )
        if not any(turn.name == "unquantized" for turn in read(options.storage)):
            keep(options.storage, Turn("", 0, "unquantized", judge.scores().perplexity, [0], 0, 0))
        for seed, method, bits, contender in work:
            if stop.asked:
                print("stopped: the same command goes on", flush=True)
                return
            tokens = Path(scratch) / f"tokens-{seed}.safetensors"
            if not tokens.exists():
                save_file({"calibration": calibration_windows(options, seed)}, tokens)
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
            words = f"{method} {bits} bits, seed {seed}, {contender.name}"
            try:
                python = Path(sys.executable)
                if contender.peer:
                    python = environment_of(contender.peer, options.cache)
                    warm_up(contender, python, options.cache, options.threads)
                turn = take_turn(contender, python, job, options.cache, TURN_LIMIT)
                weights = load_file(turn.folder / "weights.safetensors")
                scores = judge.scores(weights, bits, GROUP_SIZE)
            except ContenderError as failure:
                print(f"{words}: {failure}", flush=True)
                continue
            found = Turn(
                method,
                bits,
                contender.name,
                scores.perplexity,
                scores.divergences,
                turn.seconds,
                turn.cpu,
                seed,
            )
            keep(options.storage, found)
            print(f"{words}: KL {found.kl:.5f}", flush=True)


def read(storage: Path) -> list[Turn]:
    path = storage / "peers.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Turn(**json.loads(line)) for line in lines]


def keep(storage: Path, turn: Turn) -> None:
    with (storage / "peers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(turn)) + "\n")


def table(turns: Iterable[Turn], page: str) -> str:
    """Tabulate the turns, a row for all draws of one quantizer; keep the page's other rows."""
    head = ["method", "bits", "quantizer", "draws", "perplexity", "KL, nats a token"]
    head += ["q3q's KL over it", "processor seconds"]
    kept = fidelity.rows_on(page, "real peers", keys=3)
    turns = list(turns)
    whole = next((turn for turn in turns if turn.name == "unquantized"), None)
    if whole is not None:
        kept["", "", whole.name] = ["", "", whole.name, "", f"{whole.perplexity:.3f}", "", "", ""]
    work = [("", "", "unquantized")] + [
        (method, str(bits), contender.name)
        for method, contenders in CONTENDERS.items()
        for bits in sorted(BITS, reverse=True)
        for contender in contenders
    ]
    rows = {key: [t for t in turns if (t.method, str(t.bits), t.name) == key] for key in work[1:]}
    for (method, bits, name), some in rows.items():
        if not some:
            continue
        over = "" if name == Q3Q.name else ratio(rows[method, bits, Q3Q.name], some)
        perplexity, kl, cpu = (
            statistics.fmean(getattr(turn, key) for turn in some)
            for key in ("perplexity", "kl", "cpu")
        )
        numbers = [str(len(some)), f"{perplexity:.3f}", f"{kl:.5f}", over, f"{cpu:.0f}"]
        kept[method, bits, name] = [method, bits, name, *numbers]
    lines = markdown([head, *(kept[key] for key in work if key in kept)])
    missing = [
        f"{m} {bits} bits by {name}" for m, bits, name in work if (m, bits, name) not in kept
    ]
    words = textwrap.wrap(f"Not run: {'; '.join(missing)}.", 100) if missing else []
    return "\n".join([*lines, *(["", *words] if words else [])])


def ratio(own: Sequence[Turn], others: Sequence[Turn]) -> str:
    """Return q3q's KL over another's, in percent, with a 95 % interval.

    The interval is over the draws that both have; of a single one over windows, which leaves the
    luck of the draw out, and is then marked with an asterisk.
    """
    pairs = [(a, b) for a in own for b in others if a.seed == b.seed]
    if not pairs:
        return ""
    logs = [math.log(a.kl / b.kl) for a, b in pairs]
    middle, mark = statistics.fmean(logs), ""
    if len(pairs) == 1:
        [(a, b)] = pairs
        logs = [math.log(x / y) for x, y in zip(a.divergences, b.divergences, strict=True)]
        mark = " \\*"
    n = len(logs)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(logs) / math.sqrt(n)
    low, high = (100 * math.expm1(middle + sign * half) for sign in (-1, 1))
    return f"{100 * math.expm1(middle):+.1f} % [{low:+.1f}, {high:+.1f}]{mark}"


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of their draws")
    parser.add_argument("--methods", nargs="+", choices=[*CONTENDERS], default=[*CONTENDERS])
    parser.add_argument("--quantizers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=[*BITS])
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
    page = fidelity.rewrite(page, "real peers", table(read(options.storage), page))
    fidelity.PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

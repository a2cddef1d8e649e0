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
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from contenders import (
    BITS,
    DAMPING,
    DEMO,
    GPTQMODEL,
    GRID,
    GROUP_SIZE,
    LLM_COMPRESSOR,
    PEER_GM,
    PEER_LC,
    Q3Q,
    Contender,
    ContenderError,
    Turn,
    environment_of,
    take_turn,
    warm_up,
)
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

LENGTH = 512
CHECKED_ROWS = 64  # of each linear, for their number of levels


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

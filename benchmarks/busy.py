"""What a neighbour costs: `python benchmarks/busy.py [--policies] [--quiet]`.

Scores a HellaSwag-shaped suite with q3q (and with lm-eval's HFLM) and quantizes with GPTQ, each on
the demo model in a process of its own, with one thread and with two: once on a quiet machine, once
while another process computes on one core. It needs a machine with two free cores. Threads that
wait for a partner without a core are what a neighbour costs; how q3q has them wait is in
`q3q/sweep/ray/waiting.py`, and `--policies` compares it with fixed settings of OpenMP. `--quiet`
leaves the neighbour out.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from q3q.sweep.ray.waiting import wait_as_cores_allow

DEMO = Path(__file__).parent.parent / "q3q/models/demo/dense"
# Environment variables; None for what q3q does.
POLICIES: dict[str, dict[str, str] | None] = {
    "as q3q runs": None,
    "libgomp's own": {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 30_000)},
}
WORK = ("gptq", "ours", "hflm")


def seconds_of(work: str, threads: int, variables: dict[str, str] | None) -> float:
    """Return the seconds of one piece of work in a process of its own."""
    environment = {
        **os.environ,
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        **(variables or {}),
    }
    command = [sys.executable, __file__, "--worker", work]
    command += ["--as-q3q"] if variables is None else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{work} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def work(kind: str) -> float:
    """Do it here, and return its seconds; loading and warming up are not counted."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if kind == "gptq":
        return quantization()
    from benchmarks.evaluation import measure

    suite = {"kind": "hellaswag", "count": 100, "trial": 16, "device": "cpu", "dtype": "float32"}
    [found] = measure(kind, DEMO, [{**suite, "threads": torch.get_num_threads()}])
    return float(found["seconds"])


def quantization() -> float:
    """Quantize the demo model with GPTQ to 4 bits on 32 windows of 256 tokens."""
    import torch

    from q3q.models.checkpoint import Checkpoint
    from q3q.models.decoder import load_decoder
    from q3q.quantize.block import QuantizedBlock
    from q3q.quantize.methods.gptq import Gptq
    from q3q.quantize.methods.settings import GptqSettings
    from q3q.quantize.walk import quantize_model
    from q3q.spec import Scheme

    class Nowhere:
        """Blocks are not stored."""

        def load(self, index: int) -> QuantizedBlock | None:
            return None

        def store(self, block: QuantizedBlock) -> None:
            pass

    def run(count: int) -> float:
        method = Gptq(GptqSettings())
        scheme = Scheme(bits=4, group_size=128, symmetric=False)
        windows = torch.randint(4000, (count, 256), generator=torch.Generator().manual_seed(0))
        model = load_decoder(Checkpoint(DEMO), torch.float32)
        begin = time.perf_counter()
        quantize_model(model, method, scheme, windows, Nowhere())
        return time.perf_counter() - begin

    with torch.inference_mode():
        run(2)
        return run(32)


@contextmanager
def neighbour(present: bool) -> Iterator[None]:
    """Let another process compute on one core meanwhile."""
    process = multiprocessing.get_context("spawn").Process(target=compute, daemon=True)
    if present:
        process.start()
    try:
        yield
    finally:
        if present:
            process.kill()
            process.join()


def compute() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", action="store_true", help="compare OpenMP's settings")
    parser.add_argument("--quiet", action="store_true", help="measure without a neighbour alone")
    parser.add_argument("--runs", type=int, default=3, help="of each; the median counts")
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--worker", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--as-q3q", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        if options.as_q3q:
            wait_as_cores_allow(int(os.environ["OMP_NUM_THREADS"]))
        print(work(options.worker))
        return
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("this takes a machine with two free cores")
    names = list(POLICIES) if options.policies else list(POLICIES)[:2]
    policies = {name: POLICIES[name] for name in names}
    for kind in options.work.split(","):
        print(f"{kind}: seconds, median of {options.runs}")
        print(f"  {'':28} {'quiet':>8} {'busy':>8} {'ratio':>7}")
        rows: dict[str, tuple[int, dict[str, str] | None]] = {"one thread": (1, {})}
        rows |= {f"two threads, {name}": (2, values) for name, values in policies.items()}
        taken: dict[str, list[list[float]]] = {name: [[], []] for name in rows}
        for _ in range(options.runs):
            for is_busy in (False,) if options.quiet else (False, True):
                with neighbour(is_busy):
                    for name, (threads, values) in rows.items():
                        taken[name][is_busy].append(seconds_of(kind, threads, values))
        for name, both in taken.items():
            quiet, busy = (statistics.median(one) if one else math.nan for one in both)
            print(f"  {name:28} {quiet:8.2f} {busy:8.2f} {busy / quiet:7.2f}", flush=True)


if __name__ == "__main__":
    main()

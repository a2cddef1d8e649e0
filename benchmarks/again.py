"""What a finished command costs when it is given again: `python benchmarks/again.py`.

Runs 50 RTN trials of the demo model once; then the same command, with nothing to do, and its plan.
Prints processor time (user and system) and wall time of each, as medians of `--runs`. `--against
FOLDER` takes another checkout of q3q through the same, in the same storage folder, taking turns,
and prints the ratios.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "tests/golden/garden.txt"
FIFTY = ["method=rtn", "bits=2,3,4,5,6", "group_size=-1,16,32,64,128", "symmetric=true,false"]
QUICK = ["evaluation=file", f"evaluation.path={TEXT}", "evaluation.window=64", "evaluation.limit=8"]
KINDS = {"again": [], "plan": ["plan=true"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of q3q")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--storage", type=Path, help="keep the trials in this folder")
    options = parser.parse_args()
    codes = {"this": ROOT} | ({"other": options.against.absolute()} if options.against else {})
    with tempfile.TemporaryDirectory() as scratch:
        storage = (options.storage or Path(scratch)).absolute()
        cpu, wall = timed(ROOT, storage, [])
        print(f"first run: {cpu:.1f} s of processor time, {wall:.1f} s", flush=True)
        timed(ROOT, storage, [])  # the tracker may still be owed something
        medians: dict[tuple[str, str], float] = {}
        for kind, words in KINDS.items():
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
            for _ in range(options.runs):
                for name, code in codes.items():
                    taken[name].append(timed(code, storage, words))
            for name, pairs in taken.items():
                cpu, wall = (statistics.median(column) for column in zip(*pairs, strict=True))
                medians[name, kind] = cpu
                shown = ", ".join(f"{one:.1f}" for one, _ in pairs)
                print(
                    f"{name:6} {kind:6} {cpu:6.1f} s of processor time ({shown}), {wall:6.1f} s",
                    flush=True,
                )
    if "other" in codes:
        for kind in KINDS:
            ratio = medians["other", kind] / medians["this", kind]
            print(f"{kind}: the other takes {ratio:.1f} times the processor time")


def timed(code: Path, storage: Path, words: list[str]) -> tuple[float, float]:
    """Run the sweep with the code of a checkout; return processor and wall seconds."""
    command = [sys.executable, "launch.py", "-m", *FIFTY, *QUICK, f"storage={storage}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=code, env=environment, text=True, capture_output=True, check=False
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"the sweep failed:\n{done.stdout}{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    main()

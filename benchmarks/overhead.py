"""What a sweep costs beyond its trials: `python benchmarks/overhead.py`.

Runs the demo sweep of six trials through launch.py, and the same six through `run_trial` in one
process with a trial's own thread count; both in this run, on this machine, from empty folders.
Prints the ratio of the sweep's wall time, less its start-up, to max(longest trial, sum / trials at
once), and the start-up itself: from the command to the first trial at work.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SWEEP = ["method=rtn,gptq", "bits=2,3,4"]
BARE = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[1]))
from q3q.record import load_trial
from q3q.trial import run_trial
seconds = {}
for path in sorted(Path(sys.argv[2]).glob("*/spec.json")):
    trial = load_trial(path).placed(trials=Path(sys.argv[3]))
    started = time.perf_counter()
    run_trial(trial)
    seconds[trial.spec.name] = time.perf_counter() - started
print(json.dumps(seconds))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sweep_storage, bare_storage = Path(scratch) / "sweep", Path(scratch) / "bare"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        command = [sys.executable, "launch.py", "-m", *SWEEP, f"storage={sweep_storage}"]
        started = time.perf_counter()
        sweep = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert sweep.stdout is not None
        start_up, lines = None, []
        for line in sweep.stdout:
            lines.append(line)
            if start_up is None and re.search(r"\b(load|calibrate|quantize)\b", line):
                start_up = time.perf_counter() - started
        if sweep.wait() != 0 or start_up is None:
            raise SystemExit("the sweep failed:\n" + "".join(lines))
        whole = time.perf_counter() - started

        threads, at_once = 1, os.cpu_count() or 1
        bare_command = [
            sys.executable,
            "-c",
            BARE,
            str(threads),
            str(sweep_storage / "trials"),
            str(bare_storage),
        ]
        environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        bare = subprocess.run(
            bare_command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True
        )
        seconds = json.loads(bare.stdout.splitlines()[-1])
    ideal = max(*seconds.values(), sum(seconds.values()) / at_once)
    for name, value in seconds.items():
        print(f"bare {name:16} {value:6.1f} s")
    print(f"bare sum {sum(seconds.values()):.1f} s, {at_once} trials at once: ideal {ideal:.1f} s")
    print(f"sweep {whole:.1f} s, of which start-up {start_up:.1f} s")
    print(f"ratio of the rest to the ideal: {(whole - start_up) / ideal:.2f} (goal: at most 1.15)")


if __name__ == "__main__":
    main()

"""What a sweep costs each trial: `python benchmarks/scheduling.py [--trials 2000] [--nodes 4]`.

Trials of one millisecond go through launch.py, the sweeper, the launcher, Ray, records, progress,
tracker and report: all that a trial goes through, with a pause in place of `run_trial`
(`StudySweeper.trial`). Prints seconds, and milliseconds a trial, of each stage, and the driver's
resident memory on the way.

Then the same on Ray's fake cluster (`ray.cluster_utils.Cluster`): real raylets and workers on this
machine that say they have 8 GPUs each; and, without Ray, the plan for 64 such machines, packed in
simulation.

Stages: composing is Hydra's own composition of the jobs, with their specs; running is from the
first trial's start to the last one's record on disk. The tracker is informed meanwhile, in a thread
of its own; what it had not taken by then is a stage of its own.
"""

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT = 20.0  # milliseconds a trial, beyond composing
NODES, GPUS = 64, 8  # of the simulated cluster


def brief_work(placed: dict[str, Any], report: Callable[[Any], None]) -> dict[str, Any]:
    """Pretend a trial of one millisecond: report, write its record, and return it."""
    import time

    from q3q.placement import Trial
    from q3q.record import Progress, TrialRecord

    trial = Trial.from_json(placed)
    report(Progress(trial=trial.id, phase="evaluate", done=0, total=1))
    time.sleep(0.001)
    metrics = {
        "perplexity/stories": 2.0 + trial.spec.seed / 1e4,
        "seconds/evaluate": 0.001,
        "peak_bytes/evaluate": 1e8,
    }
    report(Progress(trial=trial.id, phase="evaluate", done=1, total=1, metrics=metrics))
    record = TrialRecord(
        spec=trial.spec, placement=trial.placement, status="COMPLETED", metrics=metrics
    )
    record.save()
    return record.to_json()


def sweep(trials: int, storage: Path, *arguments: str) -> None:
    """Run launch.py with `brief_work` in place of a trial's work, and time its stages."""
    from q3q.sweep import run, running, sweeper
    from q3q.sweep.background import BackgroundQueue
    from q3q.sweep.launcher import RayLauncher
    from q3q.sweep.study import Study

    marks: dict[str, float] = {}
    resident: list[str] = []
    ended = 0

    def timed(owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                marks[label] = marks.get(label, 0.0) + time.perf_counter() - began

        setattr(owner, name, watched)

    finished = running.RunningStudy.finished

    def counting(self: Any, *args: Any) -> None:
        nonlocal ended
        finished(self, *args)
        ended += 1
        if ended % max(1, trials // 4) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(f"{ended}: {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.0f} MiB")

    sweeper.StudySweeper.trial = staticmethod(brief_work)
    running.RunningStudy.finished = counting  # type: ignore[method-assign, assignment]
    timed(sweeper, "trials_of", "composing")
    timed(run, "plan", "planning")
    timed(RayLauncher, "run", "running")
    timed(BackgroundQueue, "settle", "tracker, what was left")
    timed(Study, "close", "closing, the tracker's rest included")
    os.chdir(ROOT)
    fixed = [
        "-m",
        "method=rtn",
        f"seed=range({trials})",
        "evaluation.baseline=false",
        "cluster.cpus_per_trial=1",
    ]
    sys.argv[:] = [str(ROOT / "launch.py"), *fixed, f"storage={storage}", *arguments]
    began = time.perf_counter()
    runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")
    marks["whole command"] = time.perf_counter() - began
    print("STAGES")
    for label, seconds in marks.items():
        print(f"{label:38} {seconds:8.1f} s {1000 * seconds / trials:8.1f} ms a trial")
    rest = marks["whole command"] - marks["composing"]
    print(f"{'all but composing':38} {rest:8.1f} s {1000 * rest / trials:8.1f} ms a trial")
    print(f"resident memory of the driver after    {', '.join(resident)}")
    verdict = "within" if 1000 * marks["running"] / trials <= LIMIT else "over"
    print(f"running is {verdict} the limit of {LIMIT:g} ms")


def shown(title: str, trials: int, *arguments: str) -> None:
    print(f"\n{title}", flush=True)
    with tempfile.TemporaryDirectory() as storage:
        command = [
            sys.executable,
            __file__,
            "--inside",
            storage,
            "--trials",
            str(trials),
            *arguments,
        ]
        inside = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert inside.stdout is not None
        tail: list[str] = []
        showing = False
        for line in inside.stdout:
            showing = showing or line.startswith("STAGES")
            tail = [*tail[-20:], line]
            if (showing and not line.startswith("STAGES")) or line.startswith("composing"):
                print(f"  {line.rstrip()}", flush=True)
        if inside.wait() != 0:
            raise SystemExit("the sweep failed:\n" + "".join(tail))


def fake_cluster(trials: int, nodes: int) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": GPUS})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1, num_gpus=GPUS)
        where = ["cluster=existing", f"cluster.address={cluster.address}"]
        named = f"{nodes} fake nodes of {GPUS} GPUs and one core each"
        shown(
            f"{trials} trials of 1 ms on {named}, on cores",
            trials,
            *where,
            "cluster.gpus_per_trial=0",
        )
        # Ray starts a new process for each task on a GPU, so Python starts as often.
        few = min(trials, 40)
        shown(
            f"{few} trials of 1 ms on {named}, a quarter of a GPU each",
            few,
            *where,
            "cluster.gpus_per_trial=0.25",
        )
    finally:
        cluster.shutdown()


def simulated(trials: int) -> None:
    from dataclasses import replace

    from q3q.models.facts import read_facts
    from q3q.placement import Trial
    from q3q.quantize.methods.registry import method_ref
    from q3q.quantize.methods.settings import SETTINGS
    from q3q.spec import (
        Calibration,
        Evaluation,
        ModelRef,
        Scheme,
        TaskRef,
        TextRef,
        TrialSpec,
    )
    from q3q.sweep.costs import CostModel
    from q3q.sweep.machines import Machine, ResourceRequest
    from q3q.sweep.plan import plan
    from q3q.sweep.plan import simulated as simulated_sweep

    shape = read_facts(ROOT / "q3q" / "models" / "demo" / "dense")
    # 0.6B, 8B and 32B, whose trials fit on a quarter of a GPU, on half of one, and a gang of two.
    sizes = {
        "0.6B": (1024, 28, 16, 3072),
        "8B": (4096, 36, 32, 12288),
        "32B": (5120, 64, 64, 25600),
    }
    scheme = Scheme(bits=4, group_size=128, symmetric=False)
    calibration = Calibration(source="c4", digest="c", samples=128, length=2048, draw="random")
    evaluation = Evaluation(
        texts=(TextRef(name="wikitext2", source="wikitext2", digest="w", window=2048),),
        tasks=(TaskRef(name="mmlu"), TaskRef(name="hellaswag")),
    )
    pending, facts = [], {}
    for seed in range(trials):
        name, method = list(sizes)[seed % 3], ("rtn", "gptq", "awq")[seed // 3 % 3]
        hidden, layers, heads, inner = sizes[name]
        settings = SETTINGS[method]()
        spec = TrialSpec(
            model=ModelRef(name=name, source=name, revision="x", dtype="bfloat16"),
            method=method_ref(settings, scheme),
            scheme=scheme,
            calibration=calibration if settings.observes() else None,
            evaluation=evaluation,
            seed=seed,
        )
        pending.append(Trial(spec))
        facts[spec.id] = replace(
            shape,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=8,
            head_dim=128,
            intermediate=inner,
            vocab=151936,
        )
    machines = [
        Machine(cpus=64, gpus=GPUS, memory=10**12, gpu_memory=80 * 10**9, name="GPU")
    ] * NODES
    began = time.perf_counter()
    ordered = plan(
        pending, {}, facts, machines=machines, request=ResourceRequest(), model=CostModel()
    )
    planned = time.perf_counter()
    sweep = simulated_sweep(ordered, machines)
    wall, at_once = sweep.seconds, sweep.at_once
    packed = time.perf_counter()
    least = sum(one.gpu_hours for one in ordered) / (NODES * GPUS)
    print(f"\n{trials} trials of three sizes on {NODES} machines of {GPUS} GPUs, in simulation")
    seconds = (planned - began, packed - planned)
    print("  planned in {:.0f} ms, packed in {:.0f} ms".format(*(1000 * one for one in seconds)))
    print(
        f"  {at_once} at once at most; {wall / 3600:.2f} h predicted, {least:.2f} h if no GPU were "
        "ever idle"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=4, help="of the fake cluster; 0 leaves it out")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    sys.path.insert(0, str(ROOT))
    if options.inside is not None:
        sweep(options.trials, options.inside, *rest)
        return
    shown(
        f"{options.trials} trials of 1 ms on this machine, {os.cpu_count()} cores", options.trials
    )
    if options.nodes:
        os.environ["RAY_AUTH_MODE"] = (
            "disabled"  # between processes of this one user, for the benchmark's length
        )
        fake_cluster(min(options.trials, 500), options.nodes)
    simulated(options.trials)


if __name__ == "__main__":
    main()

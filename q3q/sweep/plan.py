"""Which trials run, on what, in what order, and what they are predicted to take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from q3q.models.checkpoint import ModelFacts
from q3q.record import TrialRecord
from q3q.spec import Json, TrialSpec

# A rough machine: float operations per second of one core and of one GPU at work. Finished trials correct it.
CORE_FLOPS, GPU_FLOPS = 5e10, 2e14
# Passes over the calibration tokens that a method makes, in forward passes: GPTQ's Hessians and solves, AWQ's search.
CALIBRATION_PASSES = {"gptq": 3.0, "awq": 25.0}
PROCESS_BYTES = 1_000_000_000  # an interpreter with torch, lm-eval and small batches
TASK_TOKENS = 15_000  # of one task with its questions, where nothing better is known
# Questions of the study's tasks and distinct tokens of one, its answers included and shared prompts shared.
KNOWN_TASKS = {
    "piqa": (1838, 60),
    "arc_easy": (2376, 50),
    "arc_challenge": (1172, 60),
    "hellaswag": (10042, 180),
    "winogrande": (1267, 50),
    "boolq": (3270, 140),
    "mmlu": (14042, 120),
    "mmlu_paper": (14042, 120),
    "wikitext": (62, 4500),
}
SUBJECTS, SHARED = 57, 700  # of MMLU, and the tokens that a subject's questions share


@dataclass(frozen=True)
class Planned:
    """One trial, how long it should take in seconds, and how that is known."""

    spec: TrialSpec
    seconds: float
    basis: str
    done: bool


def predict(spec: TrialSpec, facts: ModelFacts, *, cpus: float, gpus: float) -> float:
    """Seconds from float operations alone: 2 per parameter and token, for calibration passes and evaluation."""
    tokens = 0.0
    if spec.calibration is not None:
        passes = CALIBRATION_PASSES.get(spec.method["name"], 3.0)
        tokens += passes * spec.calibration["samples"] * spec.calibration["length"]
    for text in spec.evaluation["texts"]:
        tokens += (text["limit"] or text["samples"] or 150) * text["window"]
    tokens += sum(task_tokens(task, spec.evaluation) for task in spec.evaluation["tasks"])
    active = facts.linear_parameters
    if facts.experts:
        active = round(active * facts.top_k / facts.experts)
    speed = gpus * GPU_FLOPS if gpus else cpus * CORE_FLOPS
    return 2 * active * tokens / speed


def task_tokens(task: str, evaluation: Json) -> float:
    """Tokens that a task runs, roughly."""
    if task not in KNOWN_TASKS:
        return TASK_TOKENS
    questions, length = KNOWN_TASKS[task]
    parts = SUBJECTS if task.startswith("mmlu") else 1
    limit = evaluation.get("limits", {}).get(task, evaluation["task_limit"])
    if limit is not None:
        questions = min(questions, limit * parts)
    return questions * length + (parts * SHARED if parts > 1 else 0)


def plan(
    specs: Sequence[TrialSpec],
    finished: dict[str, TrialRecord],
    facts: dict[str, ModelFacts],
    *,
    cpus: float,
    gpus: float,
) -> list[Planned]:
    """The trials still to run first: the unquantized models, which the others are compared with, then longest first, so
    that the last one to end is a short one.

    A finished trial of the same model and method tells better than arithmetic what another will take.
    """
    seen: dict[tuple[str, str], list[float]] = {}
    for record in finished.values():
        seconds = sum(value for name, value in record.metrics.items() if name.startswith("seconds/"))
        seen.setdefault((record.spec.model["name"], record.spec.method["name"]), []).append(seconds)
    planned = []
    for spec in specs:
        known = seen.get((spec.model["name"], spec.method["name"]))
        seconds = sum(known) / len(known) if known else predict(spec, facts[spec.id], cpus=cpus, gpus=gpus)
        planned.append(Planned(spec, seconds, "as its kin took" if known else "rough", spec.id in finished))
    return sorted(planned, key=lambda one: (one.done, one.spec.scheme is not None, -one.seconds))


def describe(planned: Sequence[Planned], *, at_once: int, where: str, storage: Path) -> str:
    """The plan for people: a line a trial, and the total."""
    lines = [f"{'trial':12} {'what':24} {'model':20} {'state':8} predicted"]
    for one in planned:
        cost = "-" if one.done else f"{_duration(one.seconds)} ({one.basis})"
        state = "done" if one.done else "to run"
        lines.append(f"{one.spec.id:12} {one.spec.name:24} {one.spec.model['name']:20} {state:8} {cost}")
    left = [one.seconds for one in planned if not one.done]
    total = max([*left, sum(left) / max(1, at_once)], default=0.0)
    lines.append(
        f"{len(left)} to run on {where}, {at_once} at a time: about {_duration(total)}. State and records: {storage}"
    )
    return "\n".join(lines)


def memory_of(facts: ModelFacts, spec: TrialSpec) -> int:
    """Bytes of main memory that a trial reserves: the weights, half as much again to work on them, and the process."""
    return round(1.5 * facts.weight_bytes(spec.model["dtype"])) + PROCESS_BYTES


def gpus_here() -> int:
    """GPUs of this machine, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() and one.strip() != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

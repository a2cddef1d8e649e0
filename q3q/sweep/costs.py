"""What a trial's phases cost: operations counted from the model's shape, and what finished trials say of their speed.

Every number that the plan guesses with stands in `CostModel`. An operation is one float multiplication or addition of a
matrix product; work of another kind is counted as the operations that would take as long. Predictions are operations
over a machine's rate; `learned` corrects the rate by what finished trials measured against that same arithmetic, so
what a small model took at 4 bits tells what a large one will take at 2.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from q3q.models.facts import ModelFacts
from q3q.record import TrialRecord
from q3q.spec import Json, TrialSpec

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
    **dict.fromkeys(("stories_who", "stories_where", "stories_order", "stories_count"), (200, 60)),
}
SUBJECTS, SHARED = 57, 700  # of MMLU, and the tokens that a subject's questions share
TASK_TOKENS = 15_000  # of one task with its questions, where nothing better is known
TEXT_WINDOWS = 150  # of a text without a limit: WikiText-2 has 146 of 2048 tokens
PHASES = ("baseline", "quantize", "evaluate")  # whose seconds follow from operations
SHORTEST = 1.0  # seconds; a phase that is predicted to take less is mostly start-up, and says nothing about a rate


@dataclass(frozen=True)
class Rate:
    """Where a trial computes. name: of its GPU or processor, "" if unknown. units: cores, or the part of a GPU."""

    name: str
    gpu: bool
    units: float


Key = tuple[str, ...]


@dataclass(frozen=True)
class CostModel:
    """Parameters of the arithmetic, and ratios of measured to predicted seconds that correct it.

    Sources: R, records of the demo models' trials on one EPYC core; B, docs/BENCHMARKS.md; D, data sheets.
    """

    core_flops: float = (
        5e10  # operations a second of one core; R, and B (22 s for GPTQ of 0.6B widths on two)
    )
    gpu_flops: float = 1.5e14  # of one GPU; D: an A100's 3.1e14 in bfloat16 at half its peak
    read_bytes: float = (
        1e9  # a second, from disk to where the model computes; D: a plain NVMe drive
    )
    start: float = 1.0  # seconds of opening a model, whatever its size; R (0.1, and 2 where libraries are loaded too)
    streamed: float = (
        1.6  # times as long as resident; benchmarks/streaming.py asks for at most 1 / 0.6
    )
    gang: float = 0.7  # share of its GPUs' speed that a gang has; a guess, corrected like all rates
    rounding: float = (
        1_000.0  # operations that rounding a weight to nearest is worth; R (0.12 s for 4.7 million)
    )
    cube: float = 0.6  # of columns^3: a site's factor and its inverse; B, "GPTQ's column loop"
    square: float = 0.8  # of rows x columns^2: its column loop; B, as above
    awq_passes: float = 14.0  # forward passes that AWQ's search is worth, with the race; R 17, B 8 (more tokens) to 20
    awq_every: float = 2.0  # times that where no candidate is dropped (race=false); B: about 8 of 20 run to the end
    smooth_passes: float = 2.0  # of SmoothQuant; R
    binarizing: float = 45_000.0  # operations that BiLLM's search is worth, a weight; R
    ratios: Mapping[Key, float] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ operations

    def operations(self, spec: TrialSpec, facts: ModelFacts) -> dict[str, float]:
        """Operations of each of `PHASES`."""
        texts = sum(self._text(facts, text, spec.evaluation) for text in spec.evaluation["texts"])
        tasks = sum(_task_tokens(task, spec.evaluation) for task in spec.evaluation["tasks"])
        tasks = forward(facts, tasks, 128)
        unquantized = spec.scheme is None
        apart = (
            unquantized and spec.evaluation.get("drift") is not None
        )  # the baseline phase then measures the texts
        return {
            "baseline": texts if apart else 0.0,
            "quantize": 0.0 if unquantized else self._quantizing(spec, facts),
            "evaluate": tasks if apart else texts + tasks,
        }

    def _text(self, facts: ModelFacts, text: Json, evaluation: Json) -> float:
        tokens = text_windows(text) * text["window"]
        heads = (
            2 if evaluation.get("drift") is not None else 1
        )  # the unquantized model's head speaks too
        return (
            forward(facts, tokens, text["window"])
            + heads * 2.0 * facts.vocab * facts.hidden * tokens
        )

    def _quantizing(self, spec: TrialSpec, facts: ModelFacts) -> float:
        method, wanted = spec.method, spec.calibration
        weights = float(facts.linear_parameters)
        if wanted is None:
            return self.rounding * weights
        tokens, length = wanted["samples"] * wanted["length"], wanted["length"]
        once = forward(facts, tokens, length)
        if method["name"] == "awq":
            passes = (
                self.awq_passes
                * method.get("grid", 20)
                / 20
                * (1 if method.get("race", True) else self.awq_every)
            )
            return once * (1 + passes) + self.rounding * weights
        if method["name"] == "smoothquant":
            tried = len(method.get("alpha_grid", ())) if method.get("search") else 0
            few = forward(facts, method.get("search_windows", 0) * length, length)
            return (
                once * self.smooth_passes
                + tried * (2 * few + self.rounding * weights)
                + self.rounding * weights
            )
        passes = 1 if method.get("true_sequential", True) else 2
        per_token, squares, cubes = _solving(facts)
        solved = passes * once + per_token * tokens + self.square * squares + self.cube * cubes
        return solved + (
            self.binarizing * weights if method["name"] == "billm" else self.rounding * weights
        )

    # ------------------------------------------------------------------------------------------ seconds

    def phases(
        self, spec: TrialSpec, facts: ModelFacts, where: Rate, *, loader: str, ranks: int = 1
    ) -> dict[str, float]:
        """Predicted seconds of each phase, loading included."""
        slower = self.streamed if loader == "streamed" else 1 / self.gang if ranks > 1 else 1.0
        rate = (self.gpu_flops if where.gpu else self.core_flops) * where.units * ranks
        read = (
            facts.weight_bytes(spec.model["dtype"]) / self.read_bytes
            if loader != "streamed"
            else 0.0
        )
        seconds = {"load": self.start + read}
        for phase, operations in self.operations(spec, facts).items():
            seconds[phase] = slower * operations / rate * self._ratio(phase, spec, where, loader)
        return seconds

    def _ratio(self, phase: str, spec: TrialSpec, where: Rate, loader: str) -> float:
        """The nearest that is known: of this kind of machine, loader, phase, method first; of anything alike last."""
        return next(
            (self.ratios[key] for key in _ladder(phase, spec, where, loader) if key in self.ratios),
            1.0,
        )

    def knows(self, spec: TrialSpec, where: Rate, loader: str) -> bool:
        """Whether any finished trial corrects the prediction."""
        return any(key in self.ratios for key in _ladder("evaluate", spec, where, loader))

    def learned(
        self, records: Iterable[TrialRecord], facts_of: Callable[[TrialSpec], ModelFacts | None]
    ) -> "CostModel":
        """The same, corrected: of each kind of machine, loader (a gang has its own), phase and method the median of
        measured over predicted.

        Medians, because a machine that was busy with other work, or a phase that was taken up halfway, says nothing.
        """
        plain = replace(self, ratios={})
        found: dict[Key, list[float]] = {}
        for record in records:
            facts = facts_of(record.spec) if record.completed else None
            if facts is None:
                continue
            where, ranks, loader = ran_on(record)
            for phase, expected in plain.phases(
                record.spec, facts, where, loader=loader, ranks=ranks
            ).items():
                took = record.metrics.get(f"seconds/{phase}", 0.0)
                if phase not in PHASES or expected < SHORTEST or took <= 0:
                    continue
                if phase == "quantize" and "blocks_from_disk" in record.notes:
                    continue
                for key in _ladder(phase, record.spec, where, loader):
                    found.setdefault(key, []).append(took / expected)
        return replace(
            self, ratios={key: statistics.median(ratios) for key, ratios in found.items()}
        )


def forward(facts: ModelFacts, tokens: float, context: float) -> float:
    """Operations of the blocks for so many tokens in windows of `context`: 2 a weight that they meet, and attention."""
    attention = 4.0 * (context / 2) * facts.heads * facts.head_dim * facts.layers
    return tokens * (2.0 * _met(facts) + attention)


@functools.cache
def _met(facts: ModelFacts) -> int:
    """Weights of linears that one token meets: of the experts, those that the router chooses."""
    met = 0
    for k in range(facts.layers):
        for name, shape in facts.block_shapes(k).items():
            if name.endswith("_proj.weight"):
                met += (
                    math.prod(shape) * facts.top_k // shape[0]
                    if len(shape) == 3
                    else math.prod(shape)
                )
    return met


@functools.cache
def _solving(facts: ModelFacts) -> tuple[float, float, float]:
    """What GPTQ adds to its forward passes: operations a token of all sites' Gram matrices, and the sums of rows x
    columns^2 and columns^3 over all that is solved."""
    grams, squares, cubes = 0.0, 0.0, 0.0
    for k in range(facts.layers):
        inner, experts, chosen = facts.intermediate, 1, 1
        if facts.sparse(k):
            inner, experts, chosen = facts.moe_intermediate, facts.experts, facts.top_k
        values = facts.heads * facts.head_dim
        for rows, columns, copies, seen in (
            (values + 2 * facts.kv_heads * facts.head_dim, facts.hidden, 1, 1),
            (facts.hidden, values, 1, 1),
            (2 * inner, facts.hidden, experts, chosen),
            (facts.hidden, inner, experts, chosen),
        ):
            grams += 2.0 * seen * columns**2
            squares += 1.0 * copies * rows * columns**2
            cubes += 1.0 * copies * columns**3
    return grams, squares, cubes


def text_windows(text: Json) -> int:
    """Windows of one of an evaluation's texts."""
    return int(text["limit"] or text["samples"] or TEXT_WINDOWS)


def ran_on(record: TrialRecord) -> tuple[Rate, int, str]:
    """Where a trial ran, on how many ranks, and with which loader, as its record says."""
    hardware, planned = (
        record.environment.get("hardware", {}),
        record.environment.get("planned", {}),
    )
    ranks, loader = int(planned.get("ranks", 1)), str(planned.get("loader", "resident"))
    if "gpu" in hardware:
        return (
            Rate(str(hardware["gpu"]), True, min(1.0, float(planned.get("gpus", 1.0)))),
            ranks,
            loader,
        )
    return (
        Rate(str(hardware.get("processor", "")), False, float(hardware.get("threads", 1))),
        ranks,
        loader,
    )


def _ladder(phase: str, spec: TrialSpec, where: Rate, loader: str) -> list[Key]:
    """What a ratio is kept under, from the very kind to the merely alike."""
    device = "gpu" if where.gpu else "cpu"
    very = (device, where.name, loader, f"{where.units:g}", spec.model["dtype"])
    kinds = [very, (device, where.name, loader), (device, where.name), (device,)]
    work = [(phase, spec.method["name"])] if phase == "quantize" else []
    return [(*kind, *one) for kind in kinds for one in [*work, (phase,), ()]]


def _task_tokens(task: str, evaluation: Json) -> float:
    """Tokens that a task runs, roughly."""
    if task not in KNOWN_TASKS:
        return TASK_TOKENS
    questions, length = KNOWN_TASKS[task]
    parts = SUBJECTS if task.startswith("mmlu") else 1
    limit = evaluation.get("limits", {}).get(task, evaluation["task_limit"])
    if limit is not None:
        questions = min(questions, limit * parts)
    return questions * length + (parts * SHARED if parts > 1 else 0)

"""Predict what a trial's phases cost, and correct the prediction by what finished trials took.

Operations are counted from the model's shape. An operation is one float multiplication or addition
of a matrix product; other work counts as the operations that would take as long. A prediction is
operations over a machine's rate; `learned` corrects the rate by what finished trials measured
against the same arithmetic, so what a small model took at 4 bits predicts what a large one will
take at 2. `CostModel` holds every number that the plan guesses with, except the methods' own
(`MethodSettings.work`).
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from q3q.evaluate.catalogue import TASKS
from q3q.models.facts import ModelFacts
from q3q.placement import Trial
from q3q.quantize.methods.registry import settings_or_default
from q3q.record import TrialRecord
from q3q.spec import Evaluation, TaskRef, TextRef, TrialSpec

TASK_TOKENS = 15_000  # of one task with its questions, where nothing better is known
TEXT_WINDOWS = 150  # of a text without a limit: WikiText-2 has 146 of 2048 tokens
PHASES = ("baseline", "quantize", "evaluate")  # whose seconds follow from operations
SHORTEST = 1.0  # seconds; a shorter predicted phase is mostly start-up and says little of the rate


@dataclass(frozen=True)
class Rate:
    """Where a trial computes.

    name: of its GPU or processor, "" if unknown
    units: cores, or the part of a GPU
    """

    name: str
    gpu: bool
    units: float


Key = tuple[str, ...]


@dataclass(frozen=True)
class CostModel:
    """Parameters of the arithmetic, and ratios of measured to predicted seconds that correct it.

    Sources: R, records of the demo models' trials on one EPYC core; B, docs/BENCHMARKS.md; D, data
    sheets.

    core_flops: operations a second of one core; R, and B (22 s for GPTQ of 0.6B widths on two)
    gpu_flops: of one GPU; D: an A100's 3.1e14 in bfloat16 at half its peak
    read_bytes: a second, from disk to where the model computes; D: a plain NVMe drive
    start: seconds of opening a model, whatever its size; R (0.1, and 2 where libraries are loaded
        too)
    streamed: times as long as resident; benchmarks/streaming.py asks for at most 1 / 0.6
    gang: share of its GPUs' speed that a gang has; a guess, corrected like all rates
    cube: of columns^3: a site's factor and its inverse; B, "GPTQ's column loop"
    square: of rows x columns^2: its column loop; B, as above
    """

    core_flops: float = 5e10
    gpu_flops: float = 1.5e14
    read_bytes: float = 1e9
    start: float = 1.0
    streamed: float = 1.6
    gang: float = 0.7
    cube: float = 0.6
    square: float = 0.8
    ratios: Mapping[Key, float] = field(default_factory=dict)

    def operations(self, spec: TrialSpec, facts: ModelFacts) -> dict[str, float]:
        """Return the operations of each of `PHASES`."""
        evaluation = spec.evaluation
        texts = sum(_text_operations(facts, text, evaluation) for text in evaluation.texts)
        tasks = forward(
            facts, sum(_task_tokens(task, evaluation) for task in evaluation.tasks), 128
        )
        # The unquantized model's texts are measured in its baseline phase.
        separate = spec.scheme is None and evaluation.drift is not None
        return {
            "baseline": texts if separate else 0.0,
            "quantize": 0.0 if spec.scheme is None else self._quantizing(spec, facts),
            "evaluate": tasks if separate else texts + tasks,
        }

    def _quantizing(self, spec: TrialSpec, facts: ModelFacts) -> float:
        work, calibration = settings_or_default(spec.method).work(), spec.calibration
        rounding = work.weight_operations * float(facts.linear_parameters)
        if calibration is None:
            return rounding
        operations = work.passes * forward(facts, calibration.tokens, calibration.length)
        if work.solves:
            per_token, squares, cubes = _solving(facts)
            operations += per_token * calibration.tokens
            operations += self.square * squares
            operations += self.cube * cubes
        few = forward(facts, work.variant_windows * calibration.length, calibration.length)
        return operations + work.variants * (2 * few + rounding) + rounding

    def phases(
        self, spec: TrialSpec, facts: ModelFacts, where: Rate, *, loader: str, ranks: int = 1
    ) -> dict[str, float]:
        """Return the predicted seconds of each phase, loading included."""
        slower = self.streamed if loader == "streamed" else 1 / self.gang if ranks > 1 else 1.0
        rate = (self.gpu_flops if where.gpu else self.core_flops) * where.units * ranks
        read = 0.0
        if loader != "streamed":
            read = facts.weight_bytes(spec.model.dtype) / self.read_bytes
        seconds = {"load": self.start + read}
        for phase, operations in self.operations(spec, facts).items():
            seconds[phase] = slower * operations / rate * self._ratio(phase, spec, where, loader)
        return seconds

    def _ratio(self, phase: str, spec: TrialSpec, where: Rate, loader: str) -> float:
        """Return the ratio of the most similar work that is known."""
        keys = _fallback_keys(phase, spec, where, loader)
        return next((self.ratios[key] for key in keys if key in self.ratios), 1.0)

    def knows(self, spec: TrialSpec, where: Rate, loader: str) -> bool:
        """Return True if any finished trial corrects the prediction."""
        return any(key in self.ratios for key in _fallback_keys("evaluate", spec, where, loader))

    def learned(
        self, records: Iterable[TrialRecord], facts_of: Callable[[Trial], ModelFacts | None]
    ) -> "CostModel":
        """Return this model with ratios from finished trials.

        A ratio is the median of measured over predicted seconds, for each kind of machine, loader
        (a gang has its own), phase and method: a machine that was busy with other work, or a phase
        that was resumed halfway, says nothing.
        """
        plain = replace(self, ratios={})
        ratios: dict[Key, list[float]] = {}
        for record in records:
            facts = facts_of(record.trial) if record.completed else None
            if facts is None:
                continue
            where, ranks, loader = ran_on(record)
            phases = plain.phases(record.spec, facts, where, loader=loader, ranks=ranks)
            for phase, predicted in phases.items():
                seconds = record.metrics.get(f"seconds/{phase}", 0.0)
                if phase not in PHASES or predicted < SHORTEST or seconds <= 0:
                    continue
                if phase == "quantize" and "blocks_from_disk" in record.notes:
                    continue
                for key in _fallback_keys(phase, record.spec, where, loader):
                    ratios.setdefault(key, []).append(seconds / predicted)
        medians = {key: statistics.median(values) for key, values in ratios.items()}
        return replace(self, ratios=medians)


def forward(facts: ModelFacts, tokens: float, context: float) -> float:
    """Return the operations of all blocks for `tokens` tokens in windows of `context`.

    Two for each weight that a token meets, and attention.
    """
    attention = 4.0 * (context / 2) * facts.heads * facts.head_dim * facts.layers
    return tokens * (2.0 * _weights_per_token(facts) + attention)


@functools.cache
def _weights_per_token(facts: ModelFacts) -> int:
    """Count the linears' weights that one token meets; of experts, the chosen ones."""
    count = 0
    for k in range(facts.layers):
        for name, shape in facts.block_shapes(k).items():
            if name.endswith("_proj.weight"):
                weights = math.prod(shape)
                count += weights * facts.top_k // shape[0] if len(shape) == 3 else weights
    return count


@functools.cache
def _solving(facts: ModelFacts) -> tuple[float, float, float]:
    """Return what GPTQ adds to its forward passes, over all sites.

    Operations a token of the Gram matrices, and the sums of rows x columns^2 and of columns^3.
    """
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


def text_windows(text: TextRef) -> int:
    """Count the windows of one of an evaluation's texts."""
    return text.limit or text.samples or TEXT_WINDOWS


def ran_on(record: TrialRecord) -> tuple[Rate, int, str]:
    """Return where a trial ran, on how many ranks, and with which loader."""
    hardware = record.environment.get("hardware", {})
    planned = record.environment.get("planned", {})
    if "gpu" in hardware:
        rate = Rate(str(hardware["gpu"]), True, min(1.0, float(planned.get("gpus", 1.0))))
    else:
        processor, threads = str(hardware.get("processor", "")), float(hardware.get("threads", 1))
        rate = Rate(processor, False, threads)
    return rate, int(planned.get("ranks", 1)), str(planned.get("loader", "resident"))


def _fallback_keys(phase: str, spec: TrialSpec, where: Rate, loader: str) -> list[Key]:
    """Return the keys to look a ratio up by, most specific first."""
    device = "gpu" if where.gpu else "cpu"
    exact = (device, where.name, loader, f"{where.units:g}", spec.model.dtype)
    machines: list[Key] = [exact, (device, where.name, loader), (device, where.name), (device,)]
    work: list[Key] = [(phase, spec.method.name)] if phase == "quantize" else []
    return [(*machine, *part) for machine in machines for part in (*work, (phase,), ())]


def _text_operations(facts: ModelFacts, text: TextRef, evaluation: Evaluation) -> float:
    tokens = text_windows(text) * text.window
    heads = 1 if evaluation.drift is None else 2  # the unquantized model's head runs too
    head = heads * 2.0 * facts.vocab * facts.hidden * tokens
    return forward(facts, tokens, text.window) + head


def _task_tokens(ref: TaskRef, evaluation: Evaluation) -> float:
    """Estimate the tokens that a task runs."""
    if ref.name not in TASKS:
        return TASK_TOKENS
    task = TASKS[ref.name]
    parts, questions = len(task.data) or 1, sum(task.questions)
    limit = evaluation.limit_of(ref)
    if limit is not None:
        questions = min(questions, limit * parts)
    return questions * task.tokens + parts * task.shared_tokens

"""Predict what a trial's phases cost, and correct the prediction by what finished trials took.

Operations are counted from the model's shape. An operation is one float multiplication or addition
of a matrix product; other work counts as the operations that would take as long. A prediction is
operations over a machine's rate; `learned` corrects the rate by what finished trials measured
against the same arithmetic, so what a small model took at 4 bits predicts what a large one will
take at 2. `CostModel` holds every number that the plan guesses with, except the methods' own
(`MethodSettings.work`).

On a GPU, three more things take time: what the processor does while the GPU waits (`prepare` and
the constants that it reads), issuing the operations of a block, which is what a small model's
forward takes, and GPTQ's factors and columns, which are far slower than matrix products.
"""

import functools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from q3q.data.calibration import drawing
from q3q.evaluate.catalogue import TASKS
from q3q.models.facts import ModelFacts
from q3q.models.footprint import batch_tokens
from q3q.placement import Trial
from q3q.quantize.budget.sensitivities import SENSING
from q3q.quantize.methods.registry import settings_or_default
from q3q.record import TrialRecord
from q3q.spec import Evaluation, TaskRef, TextRef, TrialSpec
from q3q.sweep.sensing import block_passes, calibration_passes, head_passes
from q3q.sweep.writing import steps_of_writing, written_tokens

TASK_TOKENS = 15_000  # of one task with its questions, where nothing better is known
TASK_QUESTIONS = 150  # likewise
TEXT_WINDOWS = 150  # of a text without a limit: WikiText-2 has 146 of 2048 tokens
PHASES = ("baseline", "quantize", "evaluate")  # whose seconds follow from operations
SHORTEST = 1.0  # seconds; a shorter predicted phase is mostly start-up and says little of the rate
LARGE_TEXTS = ("c4", "pile")  # hundreds of thousands of documents, read for a few windows
# Operations a second of a GPU's dense 16-bit products, by the word for its kind in its name, as its
# data sheet has them.
GPU_PEAKS = {
    "A100": 3.1e14,
    "A10G": 7e13,
    "B200": 2.2e15,
    "B300": 2.2e15,
    "GB200": 2.2e15,
    "GB300": 2.2e15,
    "H100": 9.9e14,
    "H200": 9.9e14,
    "H20": 1.5e14,
    "L4": 1.2e14,
    "L40S": 3.6e14,
    "T4": 6.5e13,
    "V100": 1.25e14,
}


@dataclass(frozen=True)
class Rate:
    """Where a trial computes.

    name: of its GPU or processor, "" if unknown
    units: cores, or the part of a GPU's time that the trial has
    """

    name: str
    gpu: bool
    units: float


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds.

    phases: of each phase
    idle: of all of them, those in which the GPU waits for the processor; 0 on cores
    """

    phases: dict[str, float]
    idle: float


@dataclass(frozen=True)
class Todo:
    """What a trial makes of what the trials of a storage folder need only once.

    blocks: part of its model's blocks that it quantizes; it finds the others
    draws: whether it draws windows of calibration, or of its budget
    questions: whose prompts it makes
    units: part of its budget's units that it measures
    writes: part of the windows of traces that its model writes
    """

    blocks: float = 1.0
    draws: bool = True
    questions: int = 0
    units: float = 1.0
    writes: float = 1.0


Key = tuple[str, ...]
ALONE = Todo()


@dataclass(frozen=True)
class CostModel:
    """Parameters of the arithmetic, and ratios of measured to predicted seconds that correct it.

    Sources: R, records of the demo models' trials on one EPYC core; B, docs/BENCHMARKS.md; D, data
    sheets.

    core_flops: operations a second of one core; R
    gpu_peak: of a GPU that `GPU_PEAKS` does not know; D: an A100's
    reached: part of its peak that a GPU reaches in a forward pass; a guess
    gpu_solving: of a GPU, of `cube` and `square`; B, the H100's seconds for factors and columns
    issue, issue_expert: seconds to have a GPU do a block's operations on one batch, and more for
        each expert; a guess from the number of calls
    block: seconds on a GPU to quantize a block, however small: codes to the host and to disk; B,
        0.6B with RTN and GPTQ
    read_bytes: a second, from disk to where the model computes; D: a plain NVMe drive
    core_memory, gpu_memory: bytes of weights a second that cores together, or a GPU, read from
        their memory; guesses
    start: seconds of opening a model, whatever its size; R (0.1, and 2 where libraries are loaded
        too)
    gpu_start: the same on a GPU, where each trial is a new process: libraries and CUDA start too
    question: seconds to load a question and to make metrics and samples of its scores; B
    prompt: seconds to make a question's prompts and encode them, of the first trial with a suite; B
    draw: seconds to read one of `LARGE_TEXTS` and draw its windows, of the first trial; R
    streamed: times as long as resident; benchmarks/streaming.py asks for at most 1 / 0.6
    gang: share of its GPUs' speed that a gang has; a guess, corrected like all rates
    cube: of columns^3: a site's factor and its inverse; B, "GPTQ's columns"
    square: of rows x columns^2: its column loop; B, as above
    """

    core_flops: float = 5e10
    gpu_peak: float = 3.1e14
    reached: float = 0.4
    gpu_solving: float = 5e12
    issue: float = 2e-3
    issue_expert: float = 5e-5
    block: float = 0.1
    read_bytes: float = 1e9
    core_memory: float = 1e10
    gpu_memory: float = 2e12
    start: float = 1.0
    gpu_start: float = 10.0
    question: float = 1.7e-4
    prompt: float = 8e-4
    draw: float = 10.0
    streamed: float = 1.6
    gang: float = 0.7
    cube: float = 0.6
    square: float = 0.8
    ratios: Mapping[Key, float] = field(default_factory=dict)

    def operations(self, spec: TrialSpec, facts: ModelFacts) -> dict[str, float]:
        """Return the operations of each of `PHASES`, and of a budget's sensitivities."""
        evaluation = spec.evaluation
        texts = sum(_text_operations(facts, text, evaluation) for text in evaluation.texts)
        tasks = forward(
            facts, sum(_task_tokens(task, evaluation) for task in evaluation.tasks), 128
        )
        # The unquantized model's texts are measured in its baseline phase.
        separate = spec.rounds_nothing and evaluation.drift is not None
        sensing = {} if spec.budget is None else {SENSING: self._sensing(spec, facts)}
        return {
            "baseline": texts if separate else 0.0,
            **sensing,
            "quantize": 0.0 if spec.scheme is None else self._quantizing(spec, facts),
            "evaluate": tasks if separate else texts + tasks,
        }

    def _quantizing(self, spec: TrialSpec, facts: ModelFacts) -> float:
        settings, calibration = settings_or_default(spec.method), spec.calibration
        work = settings.work()
        rounding = work.weight_operations * float(facts.linear_parameters)
        if calibration is None:
            return rounding
        passes = work.passes
        if spec.schemes and spec.schemes.calibrates_inputs and not settings.sequential:
            passes += settings.observes()  # another pass looks for the inputs' factors
        operations = passes * forward(facts, calibration.tokens, calibration.length)
        if work.solves:
            operations += _solving(facts)[0] * calibration.tokens + self._solves(spec, facts)
        few = forward(facts, work.variant_windows * calibration.length, calibration.length)
        return operations + work.variants * (2 * few + rounding) + rounding

    def _sensing(self, spec: TrialSpec, facts: ModelFacts) -> float:
        """Return the operations of measuring a budget's sensitivities."""
        budget, calibration = spec.budget, spec.calibration
        assert budget is not None
        tokens = budget.samples * budget.length
        operations = block_passes(spec, facts) * forward(facts, tokens, budget.length)
        if calibration is not None:
            window = forward(facts, calibration.tokens, calibration.length)
            passes = settings_or_default(spec.method).work().passes
            operations += passes * calibration_passes(spec, facts) * window
        heads = 2.0 * facts.vocab * facts.hidden * tokens * head_passes(spec, facts)
        work = settings_or_default(spec.method).work()
        once = work.weight_operations * facts.linear_parameters + self._solves(spec, facts)
        return operations / facts.layers + heads + len(budget.widths) * once

    def _solves(self, spec: TrialSpec, facts: ModelFacts) -> float:
        """Return the operations of all factors and column loops."""
        if spec.calibration is None or not settings_or_default(spec.method).work().solves:
            return 0.0
        _, squares, cubes = _solving(facts)
        return self.square * squares + self.cube * cubes

    def drawing(self, spec: TrialSpec, todo: Todo) -> float:
        """Return the processor's seconds for the windows of calibration and of a budget."""
        large = any(
            drawn_spec.calibration is not None
            and not {*LARGE_TEXTS}.isdisjoint(drawn_spec.calibration.sources)
            for drawn_spec in drawing(spec)
        )
        return self.draw * (large and todo.draws)

    def writing(self, spec: TrialSpec, facts: ModelFacts, where: Rate) -> tuple[float, float]:
        """Return the seconds in which a model writes its traces, and more that a GPU waits.

        A step has a token of each window, so it may take as long as reading all weights does.
        """
        tokens, steps = written_tokens(spec), steps_of_writing(spec, facts)
        if spec.calibration is None or not tokens:
            return 0.0, 0.0
        operations = forward(facts, tokens, spec.calibration.length)
        operations += 2.0 * facts.vocab * facts.hidden * tokens
        memory = self.gpu_memory * where.units if where.gpu else self.core_memory
        seconds = max(
            operations / (self.flops(where) * where.units),
            steps * facts.weight_bytes(spec.model.dtype) / memory,
        )
        issuing = steps * facts.layers * (self.issue + self.issue_expert * facts.experts)
        return seconds, max(0.0, where.gpu * issuing - seconds)

    def issuing(self, spec: TrialSpec, facts: ModelFacts) -> dict[str, float]:
        """Return the seconds of each phase that a GPU's operations take to issue."""
        each = self.issue + self.issue_expert * facts.experts
        passes = dict.fromkeys(PHASES, 0.0)
        evaluation, calibration = spec.evaluation, spec.calibration
        texts = sum(text_windows(text) * text.window for text in evaluation.texts)
        tasks = sum(_task_tokens(task, evaluation) for task in evaluation.tasks)
        separate = spec.rounds_nothing and evaluation.drift is not None
        passes["baseline"] = texts if separate else 0.0
        passes["evaluate"] = tasks if separate else texts + tasks
        if spec.scheme is not None and calibration is not None:
            passes["quantize"] = settings_or_default(spec.method).work().passes * calibration.tokens
        if spec.budget is not None:
            of_text = spec.budget.samples * spec.budget.length * block_passes(spec, facts)
            of_method = calibration_passes(spec, facts) * (calibration.tokens if calibration else 0)
            passes[SENSING] = (of_text + of_method) / facts.layers
        batch = batch_tokens(facts, spec.model.dtype, "cuda")
        seconds = {phase: facts.layers * each * tokens / batch for phase, tokens in passes.items()}
        if spec.scheme is not None:
            seconds["quantize"] += facts.layers * self.block
        return seconds

    def flops(self, where: Rate) -> float:
        """Return the operations a second of a core, or of a whole GPU."""
        if not where.gpu:
            return self.core_flops
        words = re.findall(r"[A-Za-z0-9]+", where.name)
        peaks = [GPU_PEAKS[word] for word in words if word in GPU_PEAKS]
        return self.reached * (peaks[0] if peaks else self.gpu_peak)

    def predict(
        self,
        spec: TrialSpec,
        facts: ModelFacts,
        where: Rate,
        *,
        loader: str,
        ranks: int = 1,
        todo: Todo = ALONE,
    ) -> Prediction:
        """Return the predicted seconds of a trial that has `where.units` for itself.

        On a GPU, windows and prompts are made by another process while it loads and quantizes, so
        they take the seconds by which they last longer than that.
        """
        slower = self.streamed if loader == "streamed" else 1 / self.gang if ranks > 1 else 1.0
        rate = self.flops(where) * where.units * ranks
        read = 0.0
        if loader != "streamed":
            read = facts.weight_bytes(spec.model.dtype) / self.read_bytes
        issuing, beside = self.issuing(spec, facts), self.drawing(spec, todo)
        seconds = {"load": (self.gpu_start if where.gpu else self.start) + read}
        seconds["calibrate"] = max(0.0, beside - where.gpu * seconds["load"])
        beside += self.prompt * todo.questions
        idle = sum(seconds.values())
        writing, waiting = (todo.writes * part for part in self.writing(spec, facts, where))
        ratio = self._ratio("calibrate", spec, where, loader)
        seconds["calibrate"] += (writing + waiting) * ratio
        idle += waiting * ratio
        for phase, operations in self.operations(spec, facts).items():
            computing = operations / rate
            if where.gpu and phase in ("quantize", SENSING):
                solves = self._solves(spec, facts)
                solves *= len(spec.budget.widths) if spec.budget and phase == SENSING else 1
                computing += solves / (self.gpu_solving * where.units * ranks) - solves / rate
            part = {"quantize": todo.blocks, SENSING: todo.units}.get(phase, 1.0)
            computing *= slower * part
            waiting = max(0.0, part * issuing[phase] - computing) if where.gpu else 0.0
            if phase == "evaluate":
                asked = sum(questions_of(task, spec.evaluation) for task in spec.evaluation.tasks)
                waiting += self.question * asked
                if where.gpu:
                    waiting += max(0.0, beside - sum(seconds.values()))
                else:
                    waiting += self.prompt * todo.questions
            ratio = self._ratio(phase, spec, where, loader)
            seconds[phase] = (computing + waiting) * ratio
            idle += waiting * ratio
        return Prediction(seconds, idle if where.gpu else 0.0)

    def phases(
        self, spec: TrialSpec, facts: ModelFacts, where: Rate, *, loader: str, ranks: int = 1
    ) -> dict[str, float]:
        """Return the predicted seconds of each phase, loading included."""
        return self.predict(spec, facts, where, loader=loader, ranks=ranks).phases

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

    Two for each weight that a token meets, and attention or a delta rule.
    """
    recurrent = len(facts.recurrent)
    mixing = 4.0 * (context / 2) * facts.heads * facts.head_dim * (facts.layers - recurrent)
    mixing += 0.0 if facts.delta is None else facts.delta.operations * recurrent
    return tokens * (2.0 * _weights_per_token(facts) + mixing)


@functools.cache
def _weights_per_token(facts: ModelFacts) -> int:
    """Count the linears' weights that one token uses: of experts, the chosen ones."""
    count = 0
    for k in range(facts.layers):
        shapes = facts.block_shapes(k)
        for shape in (shapes[name] for name in facts.linears(k)):
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
        shapes = facts.block_shapes(k)
        for site in facts.sites(k):
            of_site = [shapes[name] for name in site.weights]
            rows, columns = sum(shape[-2] for shape in of_site), of_site[0][-1]
            stacked = len(of_site[0]) == 3
            copies, seen = (of_site[0][0], facts.top_k) if stacked else (1, 1)
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
        # Before plans said how many trials share a GPU's time, each had its share of it.
        part = planned.get("gpu_time", min(1.0, float(planned.get("gpus", 1.0))))
        rate = Rate(str(hardware["gpu"]), True, float(part))
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
    parts = len(task.data) or 1
    return questions_of(ref, evaluation) * task.tokens + parts * task.shared_tokens


def questions_of(ref: TaskRef, evaluation: Evaluation) -> int:
    """Count a task's questions; of one that is not known, estimate them."""
    if ref.name not in TASKS:
        return TASK_QUESTIONS
    task = TASKS[ref.name]
    questions, limit = sum(task.questions), evaluation.limit_of(ref)
    return questions if limit is None else min(questions, limit * (len(task.data) or 1))

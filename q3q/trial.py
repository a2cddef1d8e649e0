"""One trial from start to finish: load, calibrate, quantize, evaluate, record."""

import json
import math
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q3q.calibrate.sources import load_text
from q3q.calibrate.windows import consecutive_windows, draw_windows, encoder
from q3q.environment import Phases, git_commit, hardware, now, packages
from q3q.errors import ConfigError, IntegrityError, Q3QError
from q3q.evaluate.integrity import check_weights
from q3q.evaluate.perplexity import perplexity
from q3q.models.checkpoint import Checkpoint, load_tokenizer, locate
from q3q.models.decoder import Decoder, load_decoder
from q3q.quantize.blocks import BlockStore
from q3q.quantize.method import Method
from q3q.quantize.methods.settings import settings_of
from q3q.quantize.walk import QuantizedBlock, quantize_model
from q3q.record import (
    COMPLETED,
    FAILED,
    Progress,
    TrialRecord,
    blocks_folder,
    kept_blocks_folder,
    trial_folder,
    write_atomically,
)
from q3q.spec import Json, TrialSpec

Report = Callable[[Progress], None]
AWQ_SHUFFLE_SEED = 42  # so that seed 0 draws the documents that AWQ's official code draws
UNQUANTIZED_BITS = 16  # embeddings, norms and the router stay in 16 bits, as the released checkpoints store them


def run_trial(spec: TrialSpec, report: Report = lambda event: None) -> TrialRecord:
    """Load, calibrate, quantize, evaluate: one trial, on this machine, going on from where a killed one stopped.

    Returns:
        The record, already saved. A trial that fails its integrity checks is FAILED and says why.

    Raises:
        Q3QError: a setting, a file or the numerics make the trial impossible. Nothing is recorded then.
    """
    folder, phases, started = trial_folder(spec), Phases(), now()
    write_atomically(folder / "spec.json", json.dumps(spec.to_json(), indent=1).encode())

    def steps(phase: str, note: str = "") -> Callable[[int, int], None]:
        return lambda done, total: report(Progress(trial=spec.id, phase=phase, done=done, total=total, note=note))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        steps("load")(0, 1)
        with phases.phase("load"):
            checkpoint = open_checkpoint(spec)
            tokenizer = load_tokenizer(checkpoint.folder)
            model = load_decoder(checkpoint, getattr(torch, spec.model["dtype"]), device)
        blocks: list[QuantizedBlock] = []
        store = BlockStore(blocks_folder(spec), kept_blocks_folder(spec))
        if spec.scheme is not None:
            steps("calibrate")(0, 1)
            with phases.phase("calibrate"):
                windows = None if store.holds(len(model.blocks)) else calibration_windows(spec, tokenizer)
            steps("quantize")(0, len(model.blocks))
            with phases.phase("quantize"):
                method = build_method(spec)
                blocks = quantize_model(model, method, spec.scheme, windows, store, steps("quantize"))
        with phases.phase("evaluate"):
            set_activations(model, spec)
            scores = evaluate(model, tokenizer, spec, folder / "evaluations", steps)
        checks = check_weights(model, [block.quantized for block in blocks])
    failed = [check for check in checks if not check.passed]
    record = TrialRecord(
        spec=spec,
        status=FAILED if failed else COMPLETED,
        reason="; ".join(f"{check.name}: {check.detail}" for check in failed),
        metrics={**scores.metrics, **sizes(checkpoint, blocks), **phases.metrics},
        intervals=scores.intervals,
        diverged=tuple(scores.diverged),
        sites=tuple(error for block in blocks for error in block.errors),
        checks=tuple(checks),
        environment={
            "git_commit": git_commit(),
            "packages": packages(),
            "hardware": hardware(),
            "started": started,
            "ended": now(),
        },
        results=scores.results,
        notes={key: note for block in blocks for key, note in block.notes.items()}
        | ({"blocks_from_disk": store.taken} if store.taken else {}),
    )
    record.save()
    shutil.rmtree(folder / "evaluations", ignore_errors=True)
    if record.completed and spec.places.get("keep") == "blocks":
        store.keep()
    else:
        store.delete()
    return record


def attempt_trial(spec: TrialSpec, report: Report = lambda event: None) -> TrialRecord:
    """`run_trial`, but an error becomes a FAILED record, saved with its traceback: it costs no other trial."""
    started = now()
    try:
        return run_trial(spec, report)
    except Exception as error:
        reason = str(error) if isinstance(error, Q3QError) else f"{type(error).__name__}: {error}"
        environment = {"git_commit": git_commit(), "packages": packages(), "started": started, "ended": now()}
        environment["traceback"] = traceback.format_exc()
        record = TrialRecord.failed(spec, reason, environment)
        record.save()
        return record


def open_checkpoint(spec: TrialSpec) -> Checkpoint:
    """The model's folder, downloaded if it is a hub's; refused if it is not what the spec says."""
    source, revision = spec.places.get("model"), spec.model.get("revision")
    checkpoint = Checkpoint(locate(source or spec.model["source"], revision))
    wanted = spec.model.get("digest")
    if wanted is not None and checkpoint.digest(Path(spec.places["trials"]) / "digests") != wanted:
        raise IntegrityError(f"the files in {checkpoint.folder} changed since the trial was planned; start it again")
    return checkpoint


def calibration_windows(spec: TrialSpec, tokenizer: Any) -> Tensor | None:
    """Token windows [samples, length], None for a method that observes nothing."""
    if spec.calibration is None:
        return None
    wanted = spec.calibration
    text = load_text(wanted["source"], split="calibration", path=spec.places.get("calibration"))
    _same_text(text.digest, wanted["digest"], wanted["source"])
    return draw_windows(
        text,
        encoder(tokenizer),
        samples=wanted["samples"],
        length=wanted["length"],
        draw=wanted["draw"],
        seed=spec.seed + (AWQ_SHUFFLE_SEED if wanted["draw"] == "documents" else 0),
    )


def build_method(spec: TrialSpec) -> Method:
    """The method that the spec names, with its settings."""
    settings = settings_of(spec.method)
    module, _, name = settings.implementation.partition(":")
    method: Method = getattr(import_module(module), name)(settings)
    return method


def set_activations(model: Decoder, spec: TrialSpec) -> None:
    """From here on each site's input is fake-quantized, if the scheme says so. Calibration saw 16-bit activations."""
    for block in model.blocks:
        block.act_bits = spec.scheme.act_bits if spec.scheme else None


@dataclass
class Scores:
    """What evaluation found so far: metrics with intervals, names of those that are not finite, lm-eval's results."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)
    results: Json = field(default_factory=dict)

    def add(self, part: Json) -> None:
        for name, value in part["metrics"].items():
            if value is None or not math.isfinite(value):
                self.diverged.append(name)
                continue
            self.metrics[name] = value
            low, high = part["intervals"].get(name) or (math.nan, math.nan)
            if math.isfinite(low) and math.isfinite(high):
                self.intervals[name] = (low, high)
        self.results.update(part["results"])


def evaluate(
    model: Decoder, tokenizer: Any, spec: TrialSpec, journal: Path, steps: Callable[..., Callable[[int, int], None]]
) -> Scores:
    """Each text and the tasks, one after the other; what the journal holds already is not measured again."""
    wanted = spec.evaluation
    parts: list[tuple[str, Callable[[Callable[[int, int], None]], Json]]] = []
    for text in wanted["texts"]:
        parts.append((text["name"], lambda tell, text=text: _measure_text(model, tokenizer, spec, text, tell)))  # type: ignore[misc]
    if wanted["tasks"]:
        parts.append(("tasks", lambda tell: _measure_tasks(model, tokenizer, spec, tell)))
    scores = Scores()
    for number, (name, measure) in enumerate(parts, start=1):
        note = f"{name}, {number} of {len(parts)}"
        steps("evaluate", note)(0, 1)
        kept = journal / f"{number}_{name}.json"
        if not kept.exists():
            write_atomically(kept, json.dumps(measure(steps("evaluate", note))).encode())
        scores.add(json.loads(kept.read_text(encoding="utf-8")))
    return scores


def _measure_text(
    model: Decoder, tokenizer: Any, spec: TrialSpec, wanted: Json, tell: Callable[[int, int], None]
) -> Json:
    text = load_text(wanted["source"], split="evaluation", path=spec.places.get("evaluation"))
    _same_text(text.digest, wanted["digest"], wanted["name"])
    encode = encoder(tokenizer)
    if wanted["draw"] == "random":
        samples = min(wanted["samples"], wanted["limit"] or wanted["samples"])
        windows = draw_windows(text, encode, samples=samples, length=wanted["window"], draw="random", seed=0)
    else:
        ids = encode(text.joined)
        windows = consecutive_windows(ids, wanted["window"], wanted["limit"])
    found = perplexity(model, windows, tell)
    name = f"perplexity/{wanted['name']}"
    return {"metrics": {name: found.value}, "intervals": {name: found.interval}, "results": {}}


def _measure_tasks(model: Decoder, tokenizer: Any, spec: TrialSpec, tell: Callable[[int, int], None]) -> Json:
    from q3q.evaluate.harness import run_tasks  # lm-eval takes seconds to import

    found = run_tasks(
        model, tokenizer, spec.evaluation["tasks"], limit=spec.evaluation["task_limit"], seed=spec.seed, progress=tell
    )
    return {"metrics": found.metrics, "intervals": found.intervals, "results": _plain(found.results)}


def sizes(checkpoint: Checkpoint, blocks: list[QuantizedBlock]) -> dict[str, float]:
    """Bits per weight of the quantized linears (with scales and zero points) and of the whole model, and its bytes."""
    parameters = checkpoint.facts.parameters
    quantized = [weight for block in blocks for weight in block.quantized.values()]
    count = sum(weight.codes_EOI.numel() for weight in quantized)
    bits = sum(weight.storage_bits() for weight in quantized)
    whole = bits + (parameters - count) * UNQUANTIZED_BITS
    return {
        "bits_per_weight": bits / count if count else float(UNQUANTIZED_BITS),
        "bits_per_weight_model": whole / parameters,
        "model_bytes": whole / 8,
        "share_quantized": count / parameters,
    }


def _same_text(found: str, wanted: str, name: str) -> None:
    if found != wanted:
        raise ConfigError(f"the text {name} changed since the trial was planned (digest {found}, planned {wanted})")


def _plain(value: Any) -> Any:
    """JSON's own types only: lm-eval's results hold functions and arrays."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(getattr(value, "__name__", value))

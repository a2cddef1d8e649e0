"""One trial from start to finish: load, calibrate, quantize, evaluate, record."""

import json
import math
import random
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q3q.calibrate.sources import load_text
from q3q.calibrate.windows import consecutive_windows, draw_windows, encoder
from q3q.data import Library, folder_digest
from q3q.environment import Phases, git_commit, hardware, now, packages
from q3q.errors import ConfigError, IntegrityError, Q3QError
from q3q.evaluate.baseline import Baseline, BaselineIdentity, baseline_for, kept_windows, windows_digest
from q3q.evaluate.drift import perplexity_and_drift
from q3q.evaluate.integrity import check_weights
from q3q.evaluate.perplexity import of_losses, window_losses
from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.evaluate.suites import QUICK_SEED, Batch, Part, batches, score_batch
from q3q.export.card import model_card
from q3q.export.proof import prove
from q3q.export.writer import Exporter, ExportingSink, open_exporter
from q3q.models.checkpoint import Checkpoint, load_tokenizer, locate
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.qwen3_moe import Qwen3MoeBlock
from q3q.numerics.weights import StoredWeight
from q3q.quantize.blocks import BlockStore
from q3q.quantize.method import Method
from q3q.quantize.methods.registry import settings_of
from q3q.quantize.search import search_variants
from q3q.quantize.walk import QuantizedBlock, quantize_ends, quantize_model
from q3q.record import (
    COMPLETED,
    FAILED,
    Check,
    Progress,
    TrialRecord,
    blocks_folder,
    kept_blocks_folder,
    trial_folder,
    write_atomically,
)
from q3q.spec import Json, TrialSpec, text_metric

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

    def steps(phase: str, note: str = "", metrics: Mapping[str, float] | None = None) -> Callable[[int, int], None]:
        known = dict(metrics or {})
        return lambda done, total: report(
            Progress(trial=spec.id, phase=phase, done=done, total=total, note=note, metrics=known)
        )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        steps("load")(0, 1)
        with phases.phase("load"):
            checkpoint = open_checkpoint(spec)
            tokenizer = load_tokenizer(checkpoint.folder)
            model = load_decoder(checkpoint, getattr(torch, spec.model["dtype"]), device)
        with phases.phase("baseline"):
            reference = reference_of(model, tokenizer, spec, steps)
        blocks: list[QuantizedBlock] = []
        ends: dict[str, StoredWeight] = {}
        store = BlockStore(blocks_folder(spec), kept_blocks_folder(spec))
        exporter = open_exporter(spec, checkpoint)
        sink = store if exporter is None else ExportingSink(store, exporter)
        if spec.schemes is not None:
            steps("calibrate")(0, 1)
            with phases.phase("calibrate"):
                windows = None if store.holds(len(model.blocks)) else calibration_windows(spec, tokenizer)
            set_route(model, spec)
            steps("quantize")(0, len(model.blocks))
            with phases.phase("quantize"):
                method = settle_variant(build_method(spec), model, spec, windows, store, steps)
                blocks = quantize_model(model, method, spec.schemes, windows, sink, steps("quantize"))
                ends = quantize_ends(model, spec.schemes)
        with phases.phase("evaluate"):
            set_activations(model, spec)
            scores = evaluate(model, tokenizer, spec, reference, folder / "evaluations", steps)
        checks = check_weights(model, [block.quantized for block in blocks], ends=ends, skip=spec.skip)
        exported = Exported()
        if exporter is not None:
            steps("export")(0, 1)
            with phases.phase("export"):
                exported = finish_export(exporter, model, spec, scores, checks)
    failed = [check for check in checks if not check.passed]
    searched = store.recall("search")
    if scores.samples:
        write_samples(folder / SAMPLES, scores.samples)
    record = TrialRecord(
        spec=spec,
        status=FAILED if failed else COMPLETED,
        reason="; ".join(f"{check.name}: {check.detail}" for check in failed),
        metrics={**scores.metrics, **sizes(checkpoint, blocks, ends), **exported.metrics, **phases.metrics},
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
        | ({"search": searched} if searched else {})
        | ({"blocks_from_disk": store.taken} if store.taken else {})
        | exported.notes,
        files=(SAMPLES,) if scores.samples else (),
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
    text = load_text(
        wanted["source"], split="calibration", path=spec.places.get("calibration"), data=spec.places.get("data")
    )
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
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        owner = f"method={settings.name} of {spec.method.get('package', 'q3q')}"
        raise ConfigError(f"{owner}: {settings.implementation} is not there ({error})") from error
    if not issubclass(kind, Method):
        raise ConfigError(f"method={settings.name}: {settings.implementation} is not derived from Method")
    method: Method = kind(settings)
    return method


def settle_variant(
    method: Method,
    model: Decoder,
    spec: TrialSpec,
    windows: Tensor | None,
    store: BlockStore,
    steps: Callable[..., Callable[[int, int], None]],
) -> Method:
    """The method, or of one that offers variants the best; what was found lies beside the blocks that it made."""
    variants = method.variants()
    if not variants or windows is None or spec.schemes is None:  # without windows all blocks are there, made by it
        return method
    found = store.recall("search")
    if found is None:
        found = search_variants(
            model,
            variants,
            spec.schemes,
            windows[: method.search_windows],
            lambda copy: set_activations(copy, spec),
            lambda name, done, total: steps("search", name)(done, total),
        )
        store.remember("search", found)
    return variants[found["chosen"]]


def set_route(model: Decoder, spec: TrialSpec) -> None:
    """Whether calibration shows every token to every expert. What the experts pass on is the router's choice always."""
    for block in model.blocks:
        if isinstance(block, Qwen3MoeBlock):
            block.every_expert = spec.calibration is not None and spec.calibration["route"] == "all"


def set_activations(model: Decoder, spec: TrialSpec) -> None:
    """From here on each site's input is fake-quantized, if the scheme says so. Calibration saw 16-bit activations."""
    if spec.scheme is not None:  # a model that is evaluated as it is may have been stored with activations to quantize
        for k, block in enumerate(model.blocks):
            block.act_bits = spec.scheme.act_bits
            block.unrounded = frozenset(
                site.name
                for site in block.sites
                if all(f"blocks.{k}.{name.removesuffix('.weight')}" in spec.skip for name in site.weights)
            )


@dataclass
class Scores:
    """What evaluation found so far: metrics with intervals, names of those that are not finite, lm-eval's results, and
    what each sample scored."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)
    results: Json = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)

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
        self.samples += part["samples"]


@dataclass(frozen=True)
class Reference:
    """What the unquantized model said of each text, by the text's name, and its head, which turns that into logits."""

    baselines: dict[str, Baseline]
    head_VH: Tensor | None


def reference_of(
    model: Decoder, tokenizer: Any, spec: TrialSpec, steps: Callable[..., Callable[[int, int], None]]
) -> Reference:
    """Find or compute what drift is measured against. To be called while the model is as it was loaded: later, nothing
    could tell that it is not."""
    drift = spec.evaluation.get("drift")
    if drift is None:
        return Reference({}, None)
    folder, found = Path(spec.places["trials"]).parent / "baselines", {}
    for text in spec.evaluation["texts"]:
        windows_NT = evaluation_windows(tokenizer, spec, text)
        wanted = None if drift == "auto" else int(drift)
        count, length = windows_NT.shape
        kept = kept_windows(count, length, model.facts.hidden, spec.model["dtype"], wanted)
        identity = BaselineIdentity.of(spec.model, text["digest"], windows_NT, kept)
        found[text["name"]] = baseline_for(folder, identity, model, windows_NT, steps("baseline", text["name"]))
    return Reference(found, model.head_VH)


def evaluate(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    reference: Reference,
    journal: Path,
    steps: Callable[..., Callable[[int, int], None]],
) -> Scores:
    """Each text and the tasks, one after the other; what the journal holds already is not measured again."""
    wanted = spec.evaluation
    parts: list[tuple[str, Callable[[Callable[[int, int], None]], Part]]] = []
    for text in wanted["texts"]:
        parts.append((text["name"], partial(_measure_text, model, tokenizer, spec, reference, text)))
    for number, batch in enumerate(batches(wanted), start=1):
        name = "tasks" if len(batch.tasks) > 1 else batch.tasks[0]
        parts.append((name, partial(_measure_tasks, model, tokenizer, spec, batch, journal / f"tasks_{number}")))
    scores = Scores()
    for number, (name, measure) in enumerate(parts, start=1):
        note = f"{name}, {number} of {len(parts)}"
        steps("evaluate", note)(0, 1)
        kept = journal / f"{number}_{name}.json"
        if not kept.exists():
            write_atomically(kept, json.dumps(measure(steps("evaluate", note)).to_json()).encode())
        part = json.loads(kept.read_text(encoding="utf-8"))
        scores.add(part)
        known = {key: value for key, value in part["metrics"].items() if value is not None and math.isfinite(value)}
        steps("evaluate", note, known)(1, 1)
    return scores


def evaluation_windows(tokenizer: Any, spec: TrialSpec, wanted: Json) -> Tensor:
    """Token windows [N, T] of one of the evaluation's texts."""
    text = load_text(
        wanted["source"], split="evaluation", path=spec.places.get("evaluation"), data=spec.places.get("data")
    )
    _same_text(text.digest, wanted["digest"], wanted["name"])
    encode, limit = encoder(tokenizer), wanted["limit"]
    if wanted["draw"] == "random":
        samples = min(wanted["samples"], limit or wanted["samples"])
        return draw_windows(text, encode, samples=samples, length=wanted["window"], draw="random", seed=0)
    quick = bool(spec.evaluation.get("quick"))
    windows_NT = consecutive_windows(encode(text.joined), wanted["window"], None if quick else limit)
    if quick and limit and limit < len(windows_NT):
        windows_NT = windows_NT[sorted(random.Random(QUICK_SEED).sample(range(len(windows_NT)), limit))]
    return windows_NT


def _measure_text(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    reference: Reference,
    wanted: Json,
    tell: Callable[[int, int], None],
) -> Part:
    """Perplexity, and drift where there is a baseline; of the unquantized model its baseline is the measurement."""
    name, quick = wanted["name"], bool(spec.evaluation.get("quick"))
    windows_NT, part = evaluation_windows(tokenizer, spec, wanted), Part()
    baseline = reference.baselines.get(name)
    if baseline is None or reference.head_VH is None:
        nll_N = window_losses(model, windows_NT, tell)
    elif spec.scheme is None:
        nll_N = baseline.nll_N
    else:
        found = perplexity_and_drift(model, windows_NT, baseline, reference.head_VH, tell)
        nll_N = found.nll_N
        part.metrics |= {_quickly(key, quick): value for key, value in found.drift.metrics(name).items()}
        part.intervals |= {_quickly(key, quick): value for key, value in found.drift.intervals(name).items()}
    if not torch.isfinite(nll_N).all():
        row = int((~torch.isfinite(nll_N)).nonzero()[0])
        raise IntegrityError(f"the model's logits in window {row} of {name} are not finite")
    result, metric = of_losses(nll_N), text_metric("perplexity", name, quick)
    part.metrics[metric], part.intervals[metric] = result.value, result.interval
    part.samples += window_rows(metric, windows_digest(windows_NT), nll_N.tolist())
    return part


def _quickly(metric: str, quick: bool) -> str:
    measure, _, text = metric.partition("/")
    return text_metric(measure, text, quick)


def _measure_tasks(
    model: Decoder, tokenizer: Any, spec: TrialSpec, batch: Batch, journal: Path, tell: Callable[[int, int], None]
) -> Part:
    places = {name: Path(spec.places[name]) if name in spec.places else None for name in ("data", "tasks")}
    if places["tasks"] and folder_digest(places["tasks"]) != spec.evaluation["include"]:
        raise ConfigError(f"the task files in {places['tasks']} changed since the trial was planned; start it again")
    return score_batch(
        model,
        tokenizer,
        spec.evaluation,
        batch,
        Library(places["data"], spec.evaluation.get("data", {})),
        include=places["tasks"],
        seed=spec.seed,
        journal=journal,
        identity=spec.id,
        tell=tell,
    )


@dataclass
class Exported:
    """What an export adds to the record: sizes as the files have them, and where and what it is."""

    metrics: dict[str, float] = field(default_factory=dict)
    notes: Json = field(default_factory=dict)


def finish_export(exporter: Exporter, model: Decoder, spec: TrialSpec, scores: Scores, checks: list[Check]) -> Exported:
    """Complete the checkpoint, load it elsewhere, and publish it if it is what was evaluated; a check says whether."""
    if all(check.passed for check in checks):
        exporter.finish(model)
        proof = prove(exporter.folder, model, exporter.sketches())
        checks.append(proof.check)
    if not all(check.passed for check in checks):
        exporter.withdraw()
        return Exported()
    exporter.publish(
        model_card(spec, scores.metrics, scores.intervals, packages(), exporter.checkpoint.folder, proof.loader)
    )
    facts = {"format": spec.export, "path": str(exporter.path), "reloaded_by": proof.loader}
    return Exported(
        {**exporter.sizes(), "seconds/export_write": round(exporter.seconds, 4)},
        {"export": facts | {"logit_error": proof.logit_error}},
    )


def sizes(checkpoint: Checkpoint, blocks: list[QuantizedBlock], ends: Mapping[str, StoredWeight]) -> dict[str, float]:
    """Bits per weight of the quantized linears (with scales and zero points) and of the whole model, and its bytes.

    Nominal bits are those of the codes alone, as papers count them.
    ends: embedding and head if they are quantized too: a part of the model, but no linear that a method treats.
    """
    parameters = checkpoint.facts.parameters
    quantized = [weight for block in blocks for weight in block.quantized.values()]
    count = sum(weight.shape.numel() for weight in quantized)
    bits = sum(weight.storage_bits() for weight in quantized)
    nominal = sum(weight.nominal_bits() for weight in quantized)
    ends_count = sum(weight.shape.numel() for weight in ends.values())
    whole = bits + sum(weight.storage_bits() for weight in ends.values())
    whole += (parameters - count - ends_count) * UNQUANTIZED_BITS
    return {
        "bits_per_weight": bits / count if count else float(UNQUANTIZED_BITS),
        "bits_per_weight_nominal": nominal / count if count else float(UNQUANTIZED_BITS),
        "bits_per_weight_model": whole / parameters,
        "model_bytes": whole / 8,
        "share_quantized": (count + ends_count) / parameters,
    }


def _same_text(found: str, wanted: str, name: str) -> None:
    if found != wanted:
        raise ConfigError(f"the text {name} changed since the trial was planned (digest {found}, planned {wanted})")

"""Measure a model: perplexity and drift of each text, then the tasks, resuming from the journal."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q3q.data.questions import Library, folder_digest
from q3q.data.windows import (
    evaluation_windows,
)
from q3q.errors import ConfigError, IntegrityError
from q3q.evaluate.baseline import (
    Baseline,
    BaselineIdentity,
    baseline_for,
    kept_windows,
    windows_digest,
)
from q3q.evaluate.catalogue import Batch, Part, batches
from q3q.evaluate.drift import perplexity_and_drift
from q3q.evaluate.journal import Journal
from q3q.evaluate.perplexity import of_losses, window_losses
from q3q.evaluate.samples import window_rows
from q3q.evaluate.suites import score_batch
from q3q.models.decoder import Decoder
from q3q.models.sharded import ShardedDecoder
from q3q.models.streaming import StreamedDecoder
from q3q.record import Scores
from q3q.spec import Json, TrialSpec, text_metric
from q3q.storage.files import sealed, unsealed, write_atomically
from q3q.storage.mirror import mirror_for


@dataclass(frozen=True)
class Reference:
    """What the unquantized model said of each text, by the text's name; and its head, which turns that into logits and
    is asked for when it is needed."""

    baselines: dict[str, Baseline]
    head: Callable[[], Tensor]


def reference_of(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    steps: Callable[..., Callable[[int, int], None]],
) -> Reference:
    """Find or compute what drift is measured against. To be called while the model is as it was loaded: later, nothing
    could tell that it is not."""
    drift = spec.evaluation.get("drift")
    if drift is None:
        return Reference({}, lambda: model.head_VH)
    folder, found, mirror = (
        Path(spec.places["trials"]).parent / "baselines",
        {},
        mirror_for(spec.places),
    )
    fetch = (lambda key: None) if mirror is None else (lambda key: mirror.pull(f"baselines/{key}"))
    for text in spec.evaluation["texts"]:
        windows_NT = evaluation_windows(tokenizer, spec, text)
        wanted = None if drift == "auto" else int(drift)
        count, length = windows_NT.shape
        kept = kept_windows(count, length, model.facts.hidden, spec.model["dtype"], wanted)
        identity = BaselineIdentity.of(
            spec.model, text["digest"], windows_NT, kept, model.device.type
        )
        told = steps("baseline", text["name"])
        found[text["name"]] = baseline_for(folder, identity, model, windows_NT, told, fetch)
        if mirror is not None:
            mirror.offer(f"baselines/{identity.key}")
    model.rest()
    if isinstance(model, (StreamedDecoder, ShardedDecoder)):
        return Reference(found, model.original_head)
    head_VH = model.head_VH
    return Reference(found, lambda: head_VH)


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
        parts.append(
            (text["name"], partial(_measure_text, model, tokenizer, spec, reference, text, journal))
        )
    for batch in batches(wanted):
        name = "tasks" if len(batch.tasks) > 1 else batch.tasks[0]
        parts.append((name, partial(_measure_tasks, model, tokenizer, spec, batch, journal)))
    scores = Scores()
    for number, (name, measure) in enumerate(parts, start=1):
        note = f"{name}, {number} of {len(parts)}"
        steps("evaluate", note)(0, 1)
        kept = journal / f"{number}_{name}.json"
        part = _measured(kept)
        if part is None:
            content = sealed(measure(steps("evaluate", note)).to_json())
            write_atomically(kept, content)
            part = unsealed(content)  # as it is read by whoever goes on from here
        scores.add(part)
        known = {
            key: value
            for key, value in part["metrics"].items()
            if value is not None and math.isfinite(value)
        }
        steps("evaluate", note, known)(1, 1)
    return scores


def _measured(path: Path) -> Json | None:
    """What was measured before, None if that is not there whole."""
    try:
        return unsealed(path.read_bytes())
    except (OSError, ValueError):
        return None


def _measure_text(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    reference: Reference,
    wanted: Json,
    folder: Path,
    tell: Callable[[int, int], None],
) -> Part:
    """Perplexity, and drift where there is a baseline; of the unquantized model its baseline is the measurement."""
    name, quick = wanted["name"], bool(spec.evaluation.get("quick"))
    windows_NT, part = evaluation_windows(tokenizer, spec, wanted), Part()
    baseline = reference.baselines.get(name)
    with closing(
        Journal(folder / f"windows_{name}.jsonl", f"{spec.id} {wanted['digest']}")
    ) as journal:
        if baseline is None:
            nll_N = window_losses(model, windows_NT, tell, journal)
        elif spec.scheme is None:
            nll_N = baseline.nll_N
        else:
            found = perplexity_and_drift(
                model, windows_NT, baseline, reference.head(), tell, journal
            )
            nll_N = found.nll_N
            part.metrics |= {
                _quickly(key, quick): value for key, value in found.drift.metrics(name).items()
            }
            part.intervals |= {
                _quickly(key, quick): value for key, value in found.drift.intervals(name).items()
            }
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
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    batch: Batch,
    journal: Path,
    tell: Callable[[int, int], None],
) -> Part:
    places = {
        name: Path(spec.places[name]) if name in spec.places else None for name in ("data", "tasks")
    }
    if places["tasks"] and folder_digest(places["tasks"]) != spec.evaluation["include"]:
        raise ConfigError(
            f"the task files in {places['tasks']} changed since the trial was planned; start it again"
        )
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

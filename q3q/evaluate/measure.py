"""Measure a model: perplexity and drift of each text, then the tasks, resuming from the journal."""

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from q3q.data.pinned import check_files, folder_digest
from q3q.data.prepared import Shelf
from q3q.data.questions import Library
from q3q.data.windows import evaluation_windows
from q3q.errors import ConfigError, IntegrityError
from q3q.evaluate.baseline import (
    Baseline,
    BaselineIdentity,
    BeingComputedError,
    baseline_for,
    kept_windows,
    rounding_of,
    windows_digest,
)
from q3q.evaluate.batches import Batch, Part, batches
from q3q.evaluate.drift import perplexity_and_drift
from q3q.evaluate.journal import Journal
from q3q.evaluate.perplexity import of_losses, window_losses
from q3q.evaluate.samples import window_rows
from q3q.evaluate.suites import score_batch
from q3q.models.decoder import Decoder
from q3q.models.sharded import ShardedDecoder
from q3q.models.streaming import StreamedDecoder
from q3q.placement import Trial
from q3q.record import UNQUANTIZED, Scores
from q3q.reporter import Reporter, Steps
from q3q.spec import AUTO_DRIFT, Json, TextRef, TrialSpec, text_metric
from q3q.storage.aside import put_aside
from q3q.storage.files import read_file, sealed, unsealed, write_atomically
from q3q.storage.mirror import mirror_for

OF = "of"  # key of a stored part: which part of which trial it is
T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The unquantized model's hidden states of each text, by the text's name, and its head.

    head: returns the head, which turns states into logits, when it is needed
    awaited: waits for the hidden states that another trial was computing; None: they are here
    """

    baselines: dict[str, Baseline]
    head: Callable[[], Tensor]
    awaited: Callable[[], dict[str, Baseline]] | None = None

    def complete(self) -> "Reference":
        """Return it with all hidden states, once they are there."""
        return self if self.awaited is None else Reference(self.awaited(), self.head)

    def perplexities(self, quick: bool) -> dict[str, list[float]]:
        """Return the unquantized model's perplexity of each text, by the record's names.

        Each comes with the two ends of its interval, which a single window does not have. A
        perplexity that is not finite is left out.
        """
        perplexities: dict[str, list[float]] = {}
        for text, baseline in self.baselines.items():
            result = of_losses(baseline.nll_N)
            ends = [end for end in result.interval if math.isfinite(end)]
            if math.isfinite(result.value):
                metric = text_metric("perplexity", text, quick)
                perplexities[metric] = [result.value, *(ends if len(ends) == 2 else [])]
        return perplexities


def reference_of(
    model: Decoder,
    tokenizer: Any,
    trial: Trial,
    reporter: Reporter,
    original: Callable[[], Decoder] | None = None,
) -> Reference:
    """Find or compute what drift is measured against.

    Call it while the model is as it was loaded: nothing could tell later that it is not.

    Args:
        original: loads the unquantized model again. If it is given, what another trial computes now
            is not waited for before `Reference.complete`; if that trial dies, it is computed then.
    """
    if trial.spec.evaluation.drift is None:
        return Reference({}, lambda: model.head_VH)
    find = partial(_baselines, model, tokenizer, trial, reporter)
    awaited: Callable[[], dict[str, Baseline]] | None = None
    try:
        baselines = find(wait=original is None)
    except BeingComputedError:
        baselines, awaited = {}, partial(find, original=original)
    model.release_head()
    if isinstance(model, (StreamedDecoder, ShardedDecoder)):
        return Reference(baselines, model.original_head, awaited)
    head_VH = model.head_VH
    return Reference(baselines, lambda: head_VH, awaited)


def _baselines(
    model: Decoder,
    tokenizer: Any,
    trial: Trial,
    reporter: Reporter,
    *,
    wait: bool = True,
    original: Callable[[], Decoder] | None = None,
) -> dict[str, Baseline]:
    """Return the baseline of each text; see `baseline_for`."""
    spec, placement, drift = trial.spec, trial.placement, trial.spec.evaluation.drift
    assert drift is not None
    mirror, baselines = mirror_for(placement.store), dict[str, Baseline]()
    fetch = (lambda key: None) if mirror is None else (lambda key: mirror.pull(f"baselines/{key}"))
    for text in spec.evaluation.texts:
        steps = reporter.phase("baseline", text.name)
        windows_NT = evaluation_windows(tokenizer, trial, text, partial(steps, 0, 1))
        count, length = windows_NT.shape
        rows = kept_windows(
            count,
            length,
            model.facts.hidden,
            spec.model.dtype,
            None if drift == AUTO_DRIFT else int(drift),
        )
        identity = BaselineIdentity.of(
            spec.model.to_json(),
            text.digest,
            windows_NT,
            rows,
            rounding_of(model.device, model.norm_H.dtype),
        )
        folder = placement.storage / "baselines"
        baselines[text.name] = baseline_for(
            folder, identity, model, windows_NT, steps, fetch, wait=wait, original=original
        )
        if mirror is not None:
            mirror.push_if_absent(f"baselines/{identity.key}")
    return baselines


def noted_baseline(reference: Reference, spec: TrialSpec) -> Json:
    """Return the note of the unquantized model's perplexities; see `record.UNQUANTIZED`.

    It is empty if this is the unquantized model's own trial, or nothing was measured of it.
    """
    perplexities = {} if spec.rounds_nothing else reference.perplexities(spec.evaluation.quick)
    return {UNQUANTIZED: perplexities} if perplexities else {}


def evaluate(
    model: Decoder, tokenizer: Any, trial: Trial, reference: Reference, reporter: Reporter
) -> Scores:
    """Measure each text, then the tasks; nothing that the journal holds is measured again."""
    journal = trial.folder / "evaluations"
    measures: list[tuple[str, Callable[[Steps], Part]]] = [
        (text.name, partial(_measure_text, model, tokenizer, trial, reference, text, journal))
        for text in trial.spec.evaluation.texts
    ]
    for batch in batches(trial.spec.evaluation):
        name = "tasks" if len(batch.tasks) > 1 else batch.tasks[0]
        measures.append((name, partial(_measure_tasks, model, tokenizer, trial, batch, journal)))
    scores = Scores()
    for number, (name, measure) in enumerate(measures, start=1):
        note = f"{name}, {number} of {len(measures)}"
        reporter.phase("evaluate", note)(0, 1)
        path = journal / f"{number}_{name}.json"
        part = _stored(path, trial.id)
        if part is None:
            facts = measure(reporter.phase("evaluate", note)).to_json()
            content = sealed(facts | {OF: _identity(path, trial.id)})
            write_atomically(path, content)
            part = unsealed(content)  # as whoever goes on from here reads it
        scores.add(part)
        finite = {
            key: value
            for key, value in part["metrics"].items()
            if value is not None and math.isfinite(value)
        }
        reporter.phase("evaluate", note, finite)(1, 1)
    return scores


def _stored(path: Path, trial: str) -> Json | None:
    """Return a part that was measured before; None without one. What else is there is put aside."""
    try:
        part = unsealed(read_file(path))
        identity = part.get(OF, _identity(path, trial))  # older versions wrote none
        if identity != _identity(path, trial):
            raise ValueError(f"it is of {identity}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        put_aside(path, f"cannot be read ({error})")
        return None
    return part


def _identity(path: Path, trial: str) -> str:
    return f"trial {trial}, {path.stem}"


def _measure_text(
    model: Decoder,
    tokenizer: Any,
    trial: Trial,
    reference: Reference,
    text: TextRef,
    folder: Path,
    steps: Steps,
) -> Part:
    """Measure perplexity, and drift where there is a baseline.

    The unquantized model's baseline is its measurement.
    """
    spec, part = trial.spec, Part()
    quick = spec.evaluation.quick
    windows_NT = evaluation_windows(tokenizer, trial, text, partial(steps, 0, 1))
    baseline = reference.baselines.get(text.name)
    with closing(
        Journal(folder / f"windows_{text.name}.jsonl", f"{spec.id} {text.digest}")
    ) as journal:
        if baseline is None:
            nll_N = window_losses(model, windows_NT, steps, journal)
        elif spec.rounds_nothing:
            nll_N = baseline.nll_N
        else:
            losses = perplexity_and_drift(
                model,
                windows_NT,
                baseline,
                reference.head(),
                steps,
                journal,
                confident=spec.reference is not None,
            )
            nll_N, drift = losses.nll_N, losses.drift
            part.metrics |= _named(drift.metrics(text.name), quick)
            part.intervals |= _named(drift.intervals(text.name), quick)
            if spec.reference is not None:
                own = text_metric("kl", text.name, quick)
                part.samples += window_rows(own, windows_digest(windows_NT), losses.kl)
                if spec.model.files == spec.reference.files:  # in another type
                    part.metrics[text_metric("kl_floor", text.name, quick)] = drift.kl
    if not torch.isfinite(nll_N).all():
        row = int((~torch.isfinite(nll_N)).nonzero()[0])
        raise IntegrityError(f"the model's logits in window {row} of {text.name} are not finite")
    result, metric = of_losses(nll_N), text_metric("perplexity", text.name, quick)
    part.metrics[metric], part.intervals[metric] = result.value, result.interval
    part.samples += window_rows(metric, windows_digest(windows_NT), nll_N.tolist())
    return part


def _named(metrics: Mapping[str, T], quick: bool) -> dict[str, T]:
    """Give metrics (`measure/text`) the names that the record has for them."""
    names = {name: name.partition("/") for name in metrics}
    return {
        text_metric(measure, text, quick): metrics[name]
        for name, (measure, _, text) in names.items()
    }


def _measure_tasks(
    model: Decoder, tokenizer: Any, trial: Trial, batch: Batch, journal: Path, steps: Steps
) -> Part:
    evaluation, placement = trial.spec.evaluation, trial.placement
    if placement.tasks and folder_digest(placement.tasks) != evaluation.include:
        raise ConfigError(
            f"the task files in {placement.tasks} changed since the trial was planned; start it "
            "again"
        )
    identities = dict(evaluation.data)
    check_files(identities, placement.tasks)
    return score_batch(
        model,
        tokenizer,
        evaluation,
        batch,
        Library(placement.data, identities, include=placement.tasks),
        include=placement.tasks,
        seed=trial.spec.seed,
        journal=journal,
        identity=trial.id,
        steps=steps,
        shelf=Shelf.of(trial, tokenizer),
    )

"""Complete an exported checkpoint, prove it, and publish it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from q3q.environment import packages
from q3q.export.card import model_card
from q3q.export.marker import disk_bytes
from q3q.export.measured import Measured
from q3q.export.proof import prove
from q3q.export.writer import Exporter
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder
from q3q.placement import Trial
from q3q.record import Check, Scores
from q3q.spec import Json
from q3q.storage.mirror import mirror_for


@dataclass
class Exported:
    """What an export adds to the record: sizes of its files, and notes on where and what it is."""

    metrics: dict[str, float] = field(default_factory=dict)
    notes: Json = field(default_factory=dict)


def finish_export(
    exporter: Exporter,
    model: Decoder,
    trial: Trial,
    scores: Scores,
    checks: list[Check],
    unquantized: Mapping[str, float] = MappingProxyType({}),
) -> Exported:
    """Complete the checkpoint, load it in another process, and publish it if it proves equal.

    Args:
        checks: gets the proof.
        unquantized: what is known already of the unquantized model's metrics, for the card.

    Raises:
        ExportError: the proof could not be made. What was written stays, for the next attempt.
    """
    if all(check.passed for check in checks):
        exporter.finish(model)
        proof = prove(exporter.folder, model, gpu=_has_own_gpu(model, trial))
        published = exporter.finished  # by another run
        checks.append(_of_another_run(proof.check, exporter.path) if published else proof.check)
    if not all(check.passed for check in checks):
        exporter.withdraw()
        return Exported()
    sizes = exporter.sizes()
    original = sum(exporter.checkpoint.bits_on_disk().values()) // 8
    measured = Measured(
        metrics=scores.metrics,
        intervals=scores.intervals,
        diverged=scores.diverged,
        unquantized=unquantized,
        weights=sizes["export_bytes"],
        original=original,
    )
    facts, base = exporter.checkpoint.facts, exporter.checkpoint.folder
    card = model_card(trial, facts, proof, measured, packages=packages(), base=base)
    exporter.publish(card)
    # Remembered, so that a trial which evaluates the checkpoint need not hash its files again.
    digest = Checkpoint(exporter.path).digest(trial.placement.digests)
    mirror = mirror_for(trial.placement.store)
    sent = None if mirror is None else mirror.name_of(exporter.path)
    where = str(exporter.path) if sent is None else f"{trial.placement.store}/{sent}"
    notes: Json = {
        "format": trial.spec.export,
        "path": where,
        "sha256": digest,
        "reloaded_by": proof.loader,
        "logit_error": proof.logit_error,
        "disk_bytes": disk_bytes(exporter.path),
        "original_bytes": original,
    }
    if proof.use is not None:
        notes["use"] = proof.use.to_json()
    metrics = {**sizes, "seconds/export_write": round(exporter.seconds, 4)}
    return Exported(metrics, {"export": notes})


def _has_own_gpu(model: Decoder, trial: Trial) -> bool:
    """Return True if the trial has a whole GPU: a share's other trials need the rest of it."""
    grant = trial.placement.grant
    return model.device.type == "cuda" and (grant is None or grant.gpus >= 1)


def _of_another_run(check: Check, path: Path) -> Check:
    """Explain a failed proof of a checkpoint that this run found published.

    A sound one may fail, by other last digits.
    """
    if check.passed:
        return check
    why = f"{path} was exported by another run, of other codes ({check.detail})"
    return replace(check, detail=f"{why}; give fresh=true or another export.path")

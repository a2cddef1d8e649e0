"""One trial from start to finish: load, calibrate, quantize, evaluate, record."""

import errno
import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict

import torch

from q3q.attempt import LOG, Attempt, TrialLog, attempt
from q3q.data.windows import calibration_windows
from q3q.environment import Phases, SystemWatch, git_commit, hardware, now, packages
from q3q.errors import Q3QError
from q3q.evaluate.catalogue import refuse_other_versions
from q3q.evaluate.integrity import check_weights
from q3q.evaluate.measure import evaluate, reference_of
from q3q.evaluate.samples import SAMPLES, write_samples
from q3q.export.proof import PASSED
from q3q.export.publish import Exported, finish_export
from q3q.export.writer import ExportingSink, open_exporter
from q3q.models.adjust import set_activations, set_route
from q3q.models.checkpoint import load_tokenizer
from q3q.models.loading import device_of, load_model, open_checkpoint
from q3q.numerics.weights import StoredWeight
from q3q.quantize.blocks import BlockStore
from q3q.quantize.ends import quantize_ends
from q3q.quantize.ledger import Ledger, StoredCodes, sizes
from q3q.quantize.methods.build import build_method
from q3q.quantize.search import settle_variant
from q3q.quantize.walk import quantized_blocks
from q3q.record import (
    COMPLETED,
    FAILED,
    Progress,
    TrialRecord,
    block_errors,
    blocks_folder,
    kept_blocks_folder,
    trial_folder,
)
from q3q.spec import TrialSpec
from q3q.storage.claim import ClaimLostError
from q3q.storage.files import write_atomically
from q3q.team import SOLO, PeerLostError, Seat, Team, joined

Report = Callable[[Progress], None]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_trial(
    spec: TrialSpec, report: Report = lambda event: None, team: Team = SOLO
) -> TrialRecord:
    """Load, calibrate, quantize, evaluate: one trial, on this machine, going on from where a killed one stopped.

    team: of a gang, whose rank 0 this is; it divides the model and the work among all.

    Returns:
        The record, already saved. A trial that fails its integrity checks is FAILED and says why.

    Raises:
        Q3QError: a setting, a file or the numerics make the trial impossible. Nothing is recorded then.
    """
    refuse_other_versions(spec.evaluation)
    folder, phases, started, watch = trial_folder(spec), Phases(), now(), SystemWatch()
    write_atomically(folder / "spec.json", json.dumps(spec.to_json(), indent=1).encode())

    def steps(
        phase: str, note: str = "", metrics: Mapping[str, float] | None = None
    ) -> Callable[[int, int], None]:
        known = dict(metrics or {})
        return lambda done, total: report(
            Progress(
                trial=spec.id,
                phase=phase,
                done=done,
                total=total,
                note=note,
                metrics=known,
                system=watch.due(),
            )
        )

    with torch.inference_mode():
        steps("load")(0, 1)
        with phases.phase("load"):
            checkpoint = open_checkpoint(spec)
            tokenizer = load_tokenizer(checkpoint.folder)
            model, loading = load_model(checkpoint, spec, device_of(spec), team)
        steps("load", loading.told)(1, 1)
        with phases.phase("baseline"):
            reference = reference_of(model, tokenizer, spec, steps)
        ledger = Ledger()
        ends: dict[str, StoredWeight] = {}
        store = BlockStore(blocks_folder(spec), kept_blocks_folder(spec))
        exporter = open_exporter(spec, checkpoint)
        sink = store if exporter is None else ExportingSink(store, exporter)
        if spec.schemes is not None:
            steps("calibrate")(0, 1)
            with phases.phase("calibrate"):
                windows = (
                    None if store.holds(len(model.blocks)) else calibration_windows(spec, tokenizer)
                )
            set_route(model, spec)
            steps("quantize")(0, len(model.blocks))
            with phases.phase("quantize"):
                method = settle_variant(build_method(spec), model, spec, windows, store, steps)
                for block in quantized_blocks(model, method, spec.schemes, windows, sink):
                    ledger.add(block)
                    found = block_errors(block.errors).get(block.index)
                    steps("quantize", metrics=found)(block.index + 1, len(model.blocks))
                ends = quantize_ends(model, spec.schemes)
        with phases.phase("evaluate"):
            set_activations(model, spec)
            scores = evaluate(model, tokenizer, spec, reference, folder / "evaluations", steps)
        checks = check_weights(model, StoredCodes(store, ledger.blocks), ends=ends, skip=spec.skip)
        exported = Exported()
        if exporter is not None:
            steps("export")(0, 1)
            with phases.phase("export"):
                exported = finish_export(exporter, model, spec, scores, checks)
    steps("record")(0, 1)
    failed = [check for check in checks if not check.passed]
    searched = store.recall("search")
    if scores.samples:
        write_samples(folder / SAMPLES, scores.samples)
    record = TrialRecord(
        spec=spec,
        status=FAILED if failed else COMPLETED,
        reason="; ".join(f"{check.name}: {check.detail}" for check in failed),
        metrics={
            **scores.metrics,
            **sizes(checkpoint, ledger, ends),
            **exported.metrics,
            **phases.metrics,
        },
        intervals=scores.intervals,
        diverged=tuple(scores.diverged),
        sites=tuple(ledger.errors),
        checks=tuple(checks),
        environment={
            "git_commit": git_commit(),
            "packages": packages(),
            "hardware": hardware(),
            "loading": asdict(loading),
            "started": started,
            "ended": now(),
        },
        results=scores.results,
        notes=ledger.notes
        | ({"search": searched} if searched else {})
        | ({"blocks_from_disk": store.taken} if store.taken else {})
        | exported.notes,
        files=(SAMPLES,) if scores.samples else (),
    )
    record.save()
    steps("record")(1, 1)
    clear(record)
    return record


def clear(record: TrialRecord) -> None:
    """Delete what only a trial under way needs; its blocks move to where other trials find them, if it keeps them.

    All stays where the export's proof alone failed: codes and measurements are sound, and the next attempt takes them.
    """
    spec = record.spec
    if [check.name for check in record.checks if not check.passed] == [PASSED]:
        return
    shutil.rmtree(trial_folder(spec) / "evaluations", ignore_errors=True)
    for torn in trial_folder(spec).glob(".*.partial"):  # of a process that died while it wrote
        torn.unlink(missing_ok=True)
    store = BlockStore(blocks_folder(spec), kept_blocks_folder(spec))
    if record.completed and spec.places.get("keep") == "blocks":
        store.keep()
    else:
        store.delete()


def share_trial(spec: TrialSpec, report: Report, seat: Seat) -> TrialRecord | None:
    """`attempt_trial` by a gang: rank 0 runs it, and the others do their part."""
    with joined(seat) as team:
        if team.rank > 0:
            TrialLog(trial_folder(spec) / LOG).write(f"rank {team.rank} of {team.size}")
            with torch.inference_mode():
                # What it reports is not heard, but its machine may have asked for it back.
                team.follow(lambda: report(Progress(trial=spec.id, phase="follow")))
            return None
        record = attempt_trial(spec, report, team)
        if (
            record.completed
        ):  # else the others may wait for something else, and are ended with the gang
            team.dismiss()
        return record


def attempt_trial(
    spec: TrialSpec, report: Report = lambda event: None, team: Team = SOLO
) -> TrialRecord:
    """`run_trial`, alone at it and not if it is done; an error becomes a FAILED record, saved with its traceback, and
    costs no other trial."""
    while True:
        try:
            with attempt(spec, report) as mine:
                if mine.done is None:
                    return _recorded(spec, mine, team)
                clear(mine.done)  # whoever finished it may have died before that
                return mine.done
        except (
            ClaimLostError
        ):  # whoever took this process for dead is at it by now, and is waited for
            if team.size > 1:  # with new ranks: these are where they were when the claim was lost
                raise PeerLostError("another process took this gang's trial over") from None


def _recorded(spec: TrialSpec, mine: Attempt, team: Team) -> TrialRecord:
    started = now()
    try:
        record = run_trial(spec, mine.tell, team)
    except (ClaimLostError, PeerLostError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, Q3QError) else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            where = error.filename or trial_folder(spec)
            reason = f"the disk is full ({where}); free some space, and the same command goes on from the last block"
        environment = {
            "git_commit": git_commit(),
            "packages": packages(),
            "started": started,
            "ended": now(),
        }
        environment["traceback"] = traceback.format_exc()
        record = TrialRecord.failed(spec, reason, environment)
        with suppress(
            OSError
        ):  # what could not be written is still the answer to whoever asked for the trial
            record.save()
    mine.end(record)
    return record

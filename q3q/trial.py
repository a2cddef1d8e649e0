"""One trial from start to finish: load, calibrate, quantize, evaluate, export, record."""

import errno
import json
import platform
import shutil
import traceback
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from functools import partial

import torch

from q3q.attempt import LOG, Attempt, TrialLog, attempt, running_quantizations
from q3q.crash import crash_reason, forget_crash
from q3q.environment import Phases, SystemWatch, git_commit, hardware, now, packages
from q3q.errors import GPU_LOST_WORDS, GPU_SUSPECT_WORDS, Q3QError
from q3q.evaluate.integrity import check_weights
from q3q.evaluate.measure import Reference, evaluate, noted_baseline
from q3q.evaluate.samples import SAMPLES, write_samples
from q3q.evaluate.version import refuse_other_versions
from q3q.export.proof import PASSED
from q3q.export.publish import Exported, finish_export
from q3q.loaded import load, notes_on_kernels
from q3q.models.adjust import set_activations, set_cache
from q3q.models.loading import (
    device_of,
    this_gpu,
)
from q3q.placement import Trial
from q3q.quantize.block_store import BlockStore
from q3q.quantize.ledger import (
    StoredCodes,
    cache_note,
    cache_sizes,
    sizes,
    stored_note,
)
from q3q.quantize.methods.registry import settings_or_default
from q3q.quantize.methods.source import source_of
from q3q.quantize.shared import blocks_of
from q3q.quantized import quantized
from q3q.record import (
    COMPLETED,
    FAILED,
    Progress,
    Report,
    Scores,
    TrialRecord,
    finished_baseline,
)
from q3q.reporter import Reporter
from q3q.storage.claim import ClaimLostError, Holder
from q3q.storage.files import write_atomically
from q3q.team import SOLO, PeerLostError, Rendezvous, Team, join_gang

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_trial(trial: Trial, report: Report = lambda event: None, team: Team = SOLO) -> TrialRecord:
    """Run one trial on this machine, from where a killed one stopped.

    Args:
        team: of a gang, whose rank 0 this is; it divides the model and the work among all.

    Returns:
        The record, already saved. A trial that fails its integrity checks is FAILED and says why.

    Raises:
        Q3QError: a setting, a file or the numerics make the trial impossible. Nothing is recorded.
    """
    refuse_other_versions(trial.spec.evaluation)
    phases, started = Phases((lambda: team.together) if team.size > 1 else None), now()
    reporter = Reporter(trial.spec.id, report, SystemWatch().due)
    write_atomically(trial.folder / "spec.json", json.dumps(trial.to_json(), indent=1).encode())
    exported = Exported()
    with torch.inference_mode(), ExitStack() as beside:
        loaded = load(trial, team, beside, phases, reporter)
        model, reference = loaded.model, loaded.reference
        with _blocks_of(trial, len(model.blocks), reporter) as store:
            made = quantized(trial, loaded, store, phases, reporter)
        trial = made.trial
        if reference.awaited:  # another trial was computing it
            with phases.phase("baseline"):
                reference = reference.complete()
        with phases.phase("evaluate"):
            set_activations(model, trial.spec, made.ledger.peaks)
            set_cache(model, trial.spec)
            scores = evaluate(model, loaded.tokenizer, trial, reference, reporter)
        checks = check_weights(
            model,
            StoredCodes(store, made.ledger.blocks, "cpu" if model.streamed else model.device),
            ends=made.ends,
            skip=trial.spec.skip,
        )
        if made.exporter is not None:
            reporter.phase("export")(0, 1)
            with phases.phase("export"):
                unquantized = unquantized_metrics(trial, reference)
                exported = finish_export(made.exporter, model, trial, scores, checks, unquantized)
    reporter.phase("record")(0, 1)
    facts, failed = loaded.checkpoint.facts, [check for check in checks if not check.passed]
    record = TrialRecord(
        spec=trial.spec,
        placement=trial.placement,
        status=FAILED if failed else COMPLETED,
        reason="; ".join(f"{check.name}: {check.detail}" for check in failed),
        metrics=scores.metrics
        | sizes(loaded.checkpoint, made.ledger, made.ends)
        | cache_sizes(trial, facts)
        | exported.metrics
        | phases.metrics,
        intervals=scores.intervals,
        diverged=tuple(scores.diverged),
        sites=tuple(made.ledger.errors),
        checks=tuple(checks),
        environment={
            "git_commit": git_commit(),
            "packages": packages(),
            "hardware": hardware(),
            "method_source": source_of(trial.spec.method),
            "loading": asdict(loaded.loading),
            "started": started,
            "ended": now(),
        },
        results=scores.results,
        notes=made.ledger.notes
        | made.notes
        | store.notes()
        | stored_note(loaded.checkpoint, in_files=bool(exported.notes) or not made.changed)
        | exported.notes
        | cache_note(trial, facts)
        | noted_baseline(reference, trial.spec)
        | loaded.notes
        | phases.notes(),
        files=_write_samples(trial, scores),
    )
    record.save()
    reporter.phase("record")(1, 1)
    _try_to_clear(record, made_blocks=store.made)
    return record


def _write_samples(trial: Trial, scores: Scores) -> dict[str, str | None]:
    """Write the files that the record names; return them with their checksums."""
    if not scores.samples:
        return {}
    return {SAMPLES: write_samples(trial.folder / SAMPLES, scores.samples)}


def unquantized_metrics(trial: Trial, reference: Reference) -> dict[str, float]:
    """Return what is known of the unquantized model: its trial's metrics if it has finished."""
    noted = reference.perplexities(trial.spec.evaluation.quick)
    metrics = {name: value for name, (value, *_) in noted.items()}
    record = finished_baseline(trial)
    return metrics if record is None else metrics | record.metrics


def _blocks_of(trial: Trial, count: int, reporter: Reporter) -> AbstractContextManager[BlockStore]:
    """See `blocks_of`; the trial's log says what it waits for."""

    def wait(holder: Holder) -> None:
        reporter.phase("wait", f"for {holder}, which makes the same blocks")(0, 1)

    return blocks_of(trial, count, wait, lambda line: reporter.phase("load", line)(1, 1))


def _try_to_clear(record: TrialRecord, *, made_blocks: bool = False) -> None:
    """`clear`; the trial is done even if that fails, and then its log says so."""
    try:
        clear(record, made_blocks=made_blocks)
    except Exception as error:
        log = TrialLog(record.trial.folder / LOG)
        log.write(f"not cleared: {type(error).__name__}: {error}")


def clear(record: TrialRecord, *, made_blocks: bool = False) -> None:
    """Delete what only a running trial needs, and of kept blocks what is beyond their budget.

    If only the export's proof failed, nothing is deleted: codes and measurements are sound, and the
    next attempt reuses them.

    Args:
        made_blocks: the trial made some of its blocks; if it failed its checks, they go too. Those
            that keep=auto found go in any case, those that keep=blocks found do not.
    """
    trial = record.trial
    if [check.name for check in record.checks if not check.passed] == [PASSED]:
        return
    shutil.rmtree(trial.folder / "evaluations", ignore_errors=True)
    for torn in trial.folder.glob(".*.partial"):  # of a process that died while it wrote
        torn.unlink(missing_ok=True)
    own = BlockStore(trial.blocks_folder, trial.kept_blocks_folder, trial.spec.quantization_id)
    if not trial.placement.shares_blocks:
        own.delete()
    elif record.completed:
        own.keep()  # an older version left them in the trial's folder until now
        trial.placement.block_cache.trim(partial(running_quantizations, besides=trial))
    else:
        own.delete()
        if made_blocks or trial.placement.caches_blocks:
            trial.placement.block_cache.delete(trial.spec.quantization_id)


def share_trial(trial: Trial, report: Report, seat: Rendezvous) -> TrialRecord | None:
    """Run `attempt_trial` as a gang: on rank 0, while the other ranks follow."""
    with join_gang(seat) as team:
        if team.rank > 0:
            TrialLog(trial.folder / LOG).write(f"rank {team.rank} of {team.size}")
            notes_on_kernels(device_of(trial))  # tries Triton while the GPU has room for it
            try:
                with torch.inference_mode():
                    # Nobody reads these reports, but `report` also notices SIGTERM.
                    team.follow(lambda: report(Progress(trial=trial.id, phase="follow")))
            except RuntimeError as error:
                if not GPU_LOST_WORDS.search(str(error)):
                    raise
                raise Q3QError(f"rank {team.rank}: {gpu_loss(error)}") from error
            return None
        record = attempt_trial(trial, report, team)
        if record.completed:  # after a failure the others may be blocked; the driver ends them
            team.dismiss()
        return record


def attempt_trial(
    trial: Trial, report: Report = lambda event: None, team: Team = SOLO
) -> TrialRecord:
    """Run a trial exclusively, or return its record if it is done.

    An error becomes a FAILED record, saved with its traceback, and does not stop other trials.
    """
    while True:
        try:
            with attempt(trial, report) as turn:
                if turn.done is None:
                    return _recorded(trial, turn, team)
                # The process that finished it may have died before that.
                _try_to_clear(turn.done)
                return turn.done
        except ClaimLostError:  # another process took this one for dead, and runs the trial now
            if team.size > 1:  # these ranks are out of step: the driver starts a new gang
                raise PeerLostError("another process took this gang's trial over") from None


def gpu_loss(error: Exception) -> str:
    """Return in a line that this process's GPU is lost, and which one it is."""
    return (
        f"{this_gpu()} of {platform.node()} failed, or is gone ({str(error).splitlines()[0]}): "
        "nvidia-smi and the kernel's log there (Xid) say more; the same command continues from the "
        "last block"
    )


def _recorded(trial: Trial, turn: Attempt, team: Team) -> TrialRecord:
    started = now()
    forget_crash(trial.folder)
    try:
        record = run_trial(trial, turn.report, team)
    except (ClaimLostError, PeerLostError):
        raise
    except Exception as error:
        if isinstance(error, Q3QError):
            reason = str(error)
        elif isinstance(error, OSError) and error.errno in DISK_FULL:
            reason = (
                f"the disk is full ({error.filename or trial.folder}); free some space, and the "
                "same command continues from the last block"
            )
        elif GPU_LOST_WORDS.search(str(error)):
            reason = gpu_loss(error)
        else:
            module = settings_or_default(trial.spec.method).implementation
            reason = crash_reason(error, trial.folder, [module.partition(".")[0]])
            if GPU_SUSPECT_WORDS.search(str(error)):
                reason += f"; it ran on {this_gpu()} of {platform.node()}"
        environment = {
            "git_commit": git_commit(),
            "packages": packages(),
            "started": started,
            "ended": now(),
            "traceback": traceback.format_exc(),
        }
        record = TrialRecord.failed(trial, reason, environment)
        with suppress(OSError):  # the caller gets the record all the same
            record.save()
    turn.end(record)
    return record

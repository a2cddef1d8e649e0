"""Run a study (a trial, a sweep, trials to resume): plan it, and run what is not done."""

import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from q3q.attempt import afresh
from q3q.data.needs import fetch_weights
from q3q.environment import now
from q3q.models.facts import ModelFacts
from q3q.models.hub import facts_of_trial
from q3q.placement import KEEP_AUTO, Trial
from q3q.quantize.methods.source import code_changes
from q3q.record import TrialRecord
from q3q.spec import Json
from q3q.storage.aside import clear_storage
from q3q.storage.mirror import refreshed
from q3q.storage.stores import is_url
from q3q.sweep.allocation import Allocation
from q3q.sweep.comparing import baseline_record
from q3q.sweep.costs import CostModel
from q3q.sweep.earlier import damaged_exports, failed_records, finished_records, quantized_again
from q3q.sweep.machines import Machine, ResourceRequest, refuse_old_cards
from q3q.sweep.plan import (
    Planned,
    describe,
    plan,
    refuse_what_fills_the_disk,
    unlike_methods,
)
from q3q.sweep.running import RunningStudy, show_notes, tracked
from q3q.sweep.settings import StudySettings
from q3q.sweep.study import recent_records, sole_driver


class Host(Protocol):
    """Where a study's trials run."""

    where: str = "this machine"  # for people; or a cluster's address

    def machines(self, request: ResourceRequest) -> tuple[list[Machine], ResourceRequest]:
        """Return the machines to plan with, and the request as it is meant here."""

    def running(self) -> AbstractContextManager[None]:
        """Start what trials need in the background, and stop it at the end."""
        return nullcontext()

    def wait_until_ready(self) -> None:
        """Raise ConfigError if trials cannot run here; nothing has been tracked yet."""
        return

    def run(self, planned: Sequence[Planned], study: RunningStudy) -> None:
        """Run trials; `study` receives their events and records."""


def run_study(
    trials: Sequence[Trial],
    facts: Mapping[str, ModelFacts],
    settings: StudySettings,
    command: str,
    host: Host,
    only: Collection[str] | None = None,
) -> dict[str, TrialRecord] | None:
    """Run the trials that are not done; show, track and report all of them.

    Args:
        facts: of each trial's model, by the trial's id.
        command: what a person types to get this study again.
        only: ids of the trials to run now; None for all.

    Returns:
        Records by trial id; None if the plan alone was asked for.

    Raises:
        ConfigError: the study cannot start, and nothing has started.
        SweepFailedError: it ended, and some trials failed.
    """
    storage = refreshed(settings.storage)
    finished = {} if settings.fresh else finished_records(trials)
    if not settings.fresh:
        for line in damaged_exports(t for t in trials if only is None or t.id in only):
            print(line)
    for line in code_changes(finished.values()):
        print(f"q3q: {line}", file=sys.stderr)
    failed = failed_records(trial for trial in trials if only is not None and trial.id not in only)
    machines, request = host.machines(settings.request)
    planned = plan(
        trials if only is None else [trial for trial in trials if trial.id in only],
        finished,
        facts,
        machines=machines,
        request=request,
        model=CostModel().learned(recent_records(storage), facts_of_trial),
        fresh=settings.fresh,
    )
    left = [entry for entry in planned if not entry.done]
    on_gpus = [entry for entry in left if entry.allocation and entry.allocation.gpus]
    refuse_old_cards((entry.spec.model.dtype for entry in on_gpus), machines)
    if len(trials) > 1 and not settings.fresh:
        _say_what_repeats(left, storage)
    if settings.plan_only:
        _show_plan(planned, machines, host.where, settings)
    if not (settings.address and is_url(settings.storage)):  # there each machine has its own mirror
        refuse_what_fills_the_disk(planned, machines, storage)
    if settings.plan_only:
        return None
    if unlike := unlike_methods([trial.spec for trial in trials]):
        print(unlike)
    if settings.address is None:
        say = partial(print, file=sys.stderr, flush=True)
        fetch_weights([entry.spec for entry in left], say)
    clear_storage(storage)
    if settings.fresh:
        since = now()
        left = [replace(entry, trial=afresh(entry.trial, since)) for entry in left]
        trials = [afresh(trial, since) for trial in trials]
    with (
        sole_driver(trials, settings.storage, partial(print, file=sys.stderr)),
        host.running() if left else nullcontext(),
        tracked(trials, left, finished, failed, settings, command, host.wait_until_ready) as study,
    ):
        ids = [trial.id for trial in trials]
        outside = [trial for trial in trials if trial.placement.baseline not in (None, *ids)]
        if any(baseline_record(trial, {}) is None for trial in outside):
            study.display.note(
                "Nothing to compare with yet: run the same command with method=none once, then "
                "this one again, which then only compares"
            )
        if left:
            host.run(left, study)
    return study.study.records


def _show_plan(
    planned: Sequence[Planned],
    machines: Sequence[Machine],
    where: str,
    settings: StudySettings,
) -> None:
    show_notes(settings)
    print(describe(planned, machines=machines, where=where, storage=settings.storage))
    if settings.absent:
        print(settings.absent)
    left = [entry for entry in planned if not entry.done]
    places = [entry.trial.placement for entry in left if entry.spec.schemes]
    if places and places[0].keep == KEEP_AUTO:
        print(places[0].block_cache.promise())


def _say_what_repeats(left: Sequence[Planned], storage: Path) -> None:
    if again := quantized_again([entry.trial for entry in left], recent_records(storage)):
        print(
            f"{len(again)} trials repeat the quantization of finished trials, whose blocks were "
            "deleted; keep=blocks keeps them, and a new evaluation then only evaluates"
        )


def with_plan(
    record: TrialRecord, planned: Planned, allocation: Allocation | None = None
) -> TrialRecord:
    """Return the record with what was planned beside what it took.

    Args:
        allocation: what the trial had in the end, if it is known.
    """
    facts = planned.to_json(allocation) | measured(record)
    first = planned.allocation
    if allocation is not None and first is not None and allocation != first:
        facts["first"] = f"{first}, {first.loader}: out of memory"
    return replace(record, environment={**record.environment, "planned": facts})


def measured(record: TrialRecord) -> Json:
    """Return seconds of all phases, and the peak of the memory where the model lay."""
    metrics = record.metrics
    gpu = any(name.startswith("gpu_peak_bytes/") for name in metrics)
    kind = "gpu_peak_bytes/" if gpu else "peak_bytes/"
    peaks = [value for name, value in metrics.items() if name.startswith(kind)]
    seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    return {"took": round(seconds, 3), "peak": max(peaks)} if peaks else {}

"""A trial's bits are allotted: its sensitivities are found or measured, and the program solved.

The allotment is stored beside the quantized blocks that were made with it, so that a trial that
finds blocks finds their widths too, even if the sensitivities are measured anew meanwhile.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from q3q.bit_budget import KL
from q3q.data.calibration import calibration_windows, drawing
from q3q.errors import IntegrityError
from q3q.formatting import duration
from q3q.models.adjust import set_route
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder
from q3q.placement import Trial
from q3q.quantize.block_store import BlockStore
from q3q.quantize.budget.measure import Measurement, measured
from q3q.quantize.budget.program import allot
from q3q.quantize.budget.sensitivities import SENSING, Sensitivities, turn_at
from q3q.quantize.budget.units import (
    Unit,
    ends_bits,
    limit_of,
    refuse_unreachable,
    sizes_of,
    units_of,
    weights_in,
    with_widths,
)
from q3q.quantize.ledger import Ledger, bits_beside
from q3q.quantize.methods.build import build_method
from q3q.quantize.methods.registry import settings_or_default
from q3q.quoting import override
from q3q.record import ALLOTMENT, forget_progress
from q3q.reporter import Reporter
from q3q.scheme import DYNAMIC
from q3q.spec import Json, TrialSpec
from q3q.storage.claim import ClaimLostError, Holder


@dataclass(frozen=True)
class Allotment:
    """Which width each unit has.

    spec: the trial's, with the widths among its overrides
    facts: for the record's notes; None without a budget. The first two alone decide on the weights
        units: names, in the order of the model
        bits: of each unit's weights
        limit, total: bits that the units may take, and that they take
        sensitivities: id of the file, None if it was not needed
        widths, measured: the candidates, and each unit's sensitivity at each
        predicted: the sum of the chosen sensitivities
        overrides: the command-line word that gives the same widths without a budget
    """

    spec: TrialSpec
    facts: Json | None

    @property
    def notes(self) -> Json:
        return {} if self.facts is None else {ALLOTMENT: self.facts}

    def check(self, ledger: Ledger) -> None:
        """Raise IntegrityError unless the codes take the bits that were counted for them."""
        if self.facts is not None and ledger.bits != self.facts["total"]:
            raise IntegrityError(
                f"the quantized linears take {ledger.bits} bits, and {self.facts['total']} were "
                "counted for their budget"
            )


def allotted(
    trial: Trial,
    model: Decoder,
    checkpoint: Checkpoint,
    tokenizer: Any,
    store: BlockStore,
    reporter: Reporter,
) -> Allotment:
    """Return the trial's widths: as its spec has them, or as its budget is allotted.

    Call it while the model is as it was loaded.

    Raises:
        ConfigError: no allotment keeps the budget.
    """
    spec, facts = trial.spec, checkpoint.facts
    if spec.budget is None:
        return Allotment(spec, None)
    units = units_of(spec, facts)
    allotment = store.recall(ALLOTMENT)
    if allotment is None or allotment["units"] != [unit.name for unit in units]:
        beside = math.ceil(
            bits_beside(checkpoint, weights_in(facts, units), _ends(spec, facts.tied))
        )
        allotment = _solved(
            trial, model, tokenizer, units, beside + ends_bits(spec, facts), reporter
        )
        if store.holds(1):  # blocks without their widths
            forget_progress(trial)
            store.delete()
        store.remember(ALLOTMENT, allotment)
    reporter.phase(SENSING)(1, 1)
    return Allotment(with_widths(spec, units, allotment["bits"])[0], allotment)


def _ends(spec: TrialSpec, tied: bool) -> list[str]:
    """Return the names of the quantized ends, as `quantize_ends` has them."""
    ends = ["embedding"] if spec.embedding_bits else []
    return ends + (["head"] if spec.head_bits and not tied else [])


def _solved(
    trial: Trial,
    model: Decoder,
    tokenizer: Any,
    units: Sequence[Unit],
    beside: int,
    reporter: Reporter,
) -> Json:
    spec, facts = trial.spec, model.facts
    assert spec.budget is not None
    budget, weights = spec.budget, weights_in(facts, units)
    sizes = sizes_of(spec, facts, units, budget.widths)
    limit = limit_of(spec, facts, units, beside)
    refuse_unreachable(budget, sizes, limit, weights, beside)
    sensitivities = _sensitivities(trial, model, tokenizer, units, reporter)
    costs = sensitivities.table()
    chosen = allot(costs, sizes, limit)
    bits = [budget.widths[w] for w in chosen]
    _, patterns = with_widths(spec, units, bits)
    return {
        "units": [unit.name for unit in units],
        "bits": bits,
        "limit": limit,
        "total": sum(row[w] for row, w in zip(sizes, chosen, strict=True)),
        "sensitivities": sensitivities.id,
        "widths": list(budget.widths),
        "measured": costs,
        "predicted": math.fsum(row[w] for row, w in zip(costs, chosen, strict=True)),
        "overrides": override("overrides", patterns),
    }


def _sensitivities(
    trial: Trial, model: Decoder, tokenizer: Any, units: Sequence[Unit], reporter: Reporter
) -> Sensitivities:
    """Return the complete sensitivities; what is missing, one process measures."""

    def wait(holder: Holder) -> None:
        reporter.phase("wait", f"for {holder}, which measures the same sensitivities")(0, 1)

    while True:
        try:
            with turn_at(trial, units, wait) as (sensitivities, claim):
                if claim is not None:
                    job = _measurement(trial, model, tokenizer, units, reporter)
                    begin = partial(_tell, reporter, _UnitPace(job, sensitivities))
                    for unit, row in measured(job, sensitivities.rows, begin):
                        claim.check()
                        sensitivities.add(unit, row)
                    model.release_head()
            return sensitivities
        except ClaimLostError:  # whoever took the claim measures the rest
            continue


def _measurement(
    trial: Trial, model: Decoder, tokenizer: Any, units: Sequence[Unit], reporter: Reporter
) -> Measurement:
    spec = trial.spec
    assert spec.budget is not None
    assert spec.schemes is not None
    budget = spec.budget
    steps = reporter.phase(SENSING, "windows")
    other = replace(trial, spec=drawing(spec)[-1])
    text_NT = calibration_windows(other, tokenizer, partial(steps, 0, 1))
    assert text_NT is not None
    calibration_NT = None
    if settings_or_default(spec.method).observes():
        calibration_NT = calibration_windows(trial, tokenizer, partial(steps, 0, 1))
    set_route(model, spec)
    # Activations stay in 16 bits here, so their factors are not looked for.
    base = replace(spec.schemes.base, scales=None, act_scales=DYNAMIC)
    overrides = {
        linear: {key: value for key, value in changes.items() if key != "act_scales"}
        for linear, changes in spec.schemes.overrides.items()
    }
    schemes = replace(spec.schemes, base=base, overrides=overrides)
    return Measurement(
        model=model,
        method=build_method(spec),
        schemes=schemes,
        units=units,
        widths=budget.widths,
        measure=budget.measure,
        calibration_NT=calibration_NT,
        text_NT=text_NT,
    )


class _UnitPace:
    """How long the rest of the units takes, from what those took that are measured.

    For a divergence, a unit's outputs run through all later blocks, so early units take longer.
    """

    def __init__(self, job: Measurement, sensitivities: Sensitivities) -> None:
        blocks = len(job.model.blocks)
        self._works = {
            unit.name: 2 + (blocks - unit.block if job.measure == KL else 0) for unit in job.units
        }
        self._sensitivities, self._before = sensitivities, set(sensitivities.rows)
        self._started = time.monotonic()

    def left(self) -> str:
        done = sum(
            self._works[name] for name in self._sensitivities.rows if name not in self._before
        )
        rest = sum(
            work for name, work in self._works.items() if name not in self._sensitivities.rows
        )
        if not done:
            return ""
        return f", about {duration((time.monotonic() - self._started) * rest / done)} left"

    @property
    def share(self) -> tuple[int, int]:
        return len(self._sensitivities.rows), len(self._works)


def _tell(reporter: Reporter, pace: _UnitPace, unit: Unit) -> None:
    reporter.phase(SENSING, f"{unit.name}{pace.left()}")(*pace.share)

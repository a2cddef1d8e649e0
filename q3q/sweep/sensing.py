"""What measuring sensitivities costs: operations, counted from shapes as `costs` counts them."""

from q3q.bit_budget import KL
from q3q.models.facts import ModelFacts
from q3q.quantize.budget.units import units_of
from q3q.quantize.methods.registry import settings_or_default
from q3q.spec import TrialSpec


def block_passes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return how many times the text's windows run through a block, and its units' changed ones.

    Each unit at each width runs through its own block and, for a divergence, all later ones.
    """
    if spec.budget is None:
        return 0
    later = 1 if spec.budget.measure == KL else 0
    each = sum(1 + later * (facts.layers - 1 - unit.block) for unit in units_of(spec, facts))
    return 2 * facts.layers + len(spec.budget.widths) * each


def head_passes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return how many times the text's windows run through a head: two a divergence."""
    if spec.budget is None or spec.budget.measure != KL:
        return 0
    return 2 * len(spec.budget.widths) * len(units_of(spec, facts))


def calibration_passes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return how many times the calibration windows run through a block: once for each solve."""
    if spec.budget is None or not settings_or_default(spec.method).observes():
        return 0
    sites = {(unit.block, unit.sites) for unit in units_of(spec, facts)}
    return facts.layers + len(spec.budget.widths) * len(sites)

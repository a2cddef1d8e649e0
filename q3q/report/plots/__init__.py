"""The plots of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from q3q.record import TrialRecord
from q3q.report.measures import by_model, in_order
from q3q.report.plots.bits import perplexity_against_bits, quality_against_bits
from q3q.report.plots.cost import predicted_against_actual_cost
from q3q.report.plots.drawing import Plot
from q3q.report.plots.drift import divergence_against_bits
from q3q.report.plots.heatmaps import (
    errors_of_experts,
    site_error_heatmap,
    site_errors,
    tokens_of_experts,
)
from q3q.report.plots.looks import study_looks
from q3q.report.plots.sensitivities import sensitivities
from q3q.report.plots.sizes import quality_against_bytes, quality_against_parameters

__all__ = ["Plot", "perplexity_against_bits", "site_error_heatmap", "study_plots", "with_own_names"]


def study_plots(
    records: Sequence[TrialRecord],
    predicted: Mapping[str, float] | None = None,
    context: int | None = None,
) -> list[Plot]:
    """Draw every plot for which these records have data.

    Args:
        predicted: the seconds that a trial was predicted to take, by its id.
        context: tokens for which sizes count the cache too; None: they are of weights alone.
    """
    records = in_order(records)
    looks = study_looks(records)
    plots: list[Plot] = []
    for model, trials in by_model(records).items():
        plots += quality_against_bits(model, trials, looks)
        plots += quality_against_bytes(model, trials, looks, context)
        plots += divergence_against_bits(model, trials, looks)
        plots += tokens_of_experts(model, trials)
        plots += errors_of_experts(model, trials)
        plots += site_errors(model, trials)
        plots += sensitivities(model, trials)
    plots += quality_against_parameters(records)
    plots += predicted_against_actual_cost(records, predicted or {})
    return with_own_names(plots)


def with_own_names(plots: Sequence[Plot]) -> list[Plot]:
    """Number plots whose models' names differ in nothing that a file name can hold."""
    seen: dict[str, int] = {}
    named = []
    for plot in plots:
        count = seen[plot.name] = seen.get(plot.name, 0) + 1
        named.append(plot if count == 1 else replace(plot, name=f"{plot.name}-no{count}"))
    return named

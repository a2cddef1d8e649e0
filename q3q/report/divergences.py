"""How far each choice's predictions are from the unquantized model's, and how much of it is noise.

A row a choice, a column a text; and what widths by sensitivity change at equal bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from q3q.bit_budget import BitBudget
from q3q.formatting import plural, significant
from q3q.record import TrialRecord
from q3q.report.certainty import in_words
from q3q.report.changes import change_between
from q3q.report.measures import judged_metrics
from q3q.report.pools import Pool, comparable, pools
from q3q.report.tables import Table
from q3q.spec import TrialSpec, text_metric

# A record's measures of the KL of the unquantized model with itself, and what a reader is told.
FLOORS = {"kl_floor": "", "kl_floor_quick": " (a quick look)"}
NOISE = "noise"
NOTE = (
    "KL divergence of the next-token distribution from the unquantized model's, in nats per token "
    "(lower is better), with its 95 % interval over windows."
)
SAME_WIDTHS = "the same widths"


def noise_floors(records: Sequence[TrialRecord]) -> list[str]:
    """Return a sentence for each model and text whose KL's floor was measured.

    The floor is the KL of the unquantized model with itself, computed in another type. A KL below
    it says nothing of a quantization. A quick look has a floor of its own.
    """
    return [
        f"A KL of {text}{FLOORS[measure]} below {significant(value, 2)} is noise for {model}: the "
        "unquantized model is as far from itself when its numbers are rounded otherwise."
        for (model, measure, text), value in _floors(records).items()
    ]


def divergence_tables(records: Sequence[TrialRecord]) -> list[Table]:
    """Return the choices' KLs, a table for each model and evaluation that has measured any.

    Args:
        records: the trials that measured noise floors among them.
    """
    floors = _floors(records)
    tables = []
    for name, tried, metrics in _measured(records):
        rows = []
        for pool in tried:
            cells = []
            for text, metric in metrics.items():
                floor = floors.get((pool.spec.model.label, _floor_of(metric), text), 0.0)
                value = pool.cell(metric)
                noise = isinstance(value, float) and value <= floor
                cells.append(pool.shown(metric, intervals=True) + (f" ({NOISE})" if noise else ""))
            rows.append((pool.name, *cells))
        note = NOTE
        if any(NOISE in cell for row in rows for cell in row[1:]):
            note += f' "{NOISE}": not above the noise floor.'
        columns = ("choice", *(f"KL on {text}" for text in metrics))
        tables.append(Table(f"{name}: divergence", columns, tuple(rows), note))
    return tables


def equal_bytes_tables(records: Sequence[TrialRecord]) -> list[Table]:
    """Return what widths by sensitivity change from one width for all that takes as many bytes.

    A row for each budget of `budget.uniform` whose uniform trial is there too.
    """
    tables = []
    for name, tried, metrics in _measured(records):
        alone = {_plain(pool.spec).id: pool for pool in tried if pool.spec.budget is None}
        pairs = [
            (alone[_plain(pool.spec).id], pool)
            for pool in tried
            if _is_uniform(pool.spec.budget) and _plain(pool.spec).id in alone
        ]
        if not pairs:
            continue
        quality = judged_metrics([record for pool in tried for record in pool.records])
        columns = [f"KL on {text}: {side}" for text in metrics for side in ("one width", "budget")]
        columns += [f"change of {in_words(metric)}" for metric in quality]
        rows = tuple(
            (
                uniform.name,
                *(
                    pool.shown(metric, intervals=True)
                    for metric in metrics.values()
                    for pool in (uniform, budget)
                ),
                *(_changed(budget, uniform, metric) for metric in quality),
            )
            for uniform, budget in pairs
        )
        count = plural(len(pairs), "budget")
        title = f"{name}: {count} against one width for all, at equal bytes"
        note = (
            f"{NOTE} Changes go from the one width to the budget, compared on the same windows and "
            "questions, with 95 % intervals; each is tested alone."
        )
        tables.append(Table(title, ("one width", *columns), rows, note))
    return tables


def _measured(
    records: Sequence[TrialRecord],
) -> Iterator[tuple[str, list[Pool], dict[str, str]]]:
    """Yield comparable trials' name, their choices with a KL, and its metrics by text."""
    own = [record for record in records if record.spec.reference is None]
    for name, group in comparable(own).items():
        evaluation = group[0].spec.evaluation
        metrics = {
            text.name: text_metric("kl", text.name, evaluation.quick) for text in evaluation.texts
        }
        tried = [
            pool
            for pool in pools(group)
            if not pool.is_reference and any(pool.values(metric) for metric in metrics.values())
        ]
        if tried:
            yield name, tried, metrics


def _floors(records: Sequence[TrialRecord]) -> dict[tuple[str, str, str], float]:
    """Return the largest floor by model, measure and text."""
    floors: dict[tuple[str, str, str], float] = {}
    for record in records:
        model = (record.spec.reference or record.spec.model).label
        for name, value in record.metrics.items():
            measure, _, text = name.partition("/")
            if measure in FLOORS:
                key = (model, measure, text)
                floors[key] = max(value, floors.get(key, 0.0))
    return floors


def _floor_of(metric: str) -> str:
    """Return the floor's measure for a KL's metric: `kl_quick/demo` has `kl_floor_quick`."""
    return metric.partition("/")[0].replace("kl", "kl_floor", 1)


def _is_uniform(budget: BitBudget | None) -> bool:
    return budget is not None and budget.uniform is not None


def _plain(spec: TrialSpec) -> TrialSpec:
    """Return the trial without its budget and the widths that this gave."""
    return replace(spec, budget=None, overrides={}, rules={})


def _changed(budget: Pool, uniform: Pool, metric: str) -> str:
    if not any("bits" in change for change in budget.spec.overrides.values()):
        return SAME_WIDTHS
    difference = change_between(budget, uniform, metric)
    return "-" if difference is None else str(difference)

"""What a calibration text costs on each evaluated text: a row a calibration, a column a text.

Williams and Aletras 2024 (arXiv 2311.09755) find that the choice of a calibration set moves results
by more than its size does. KL from the unquantized model shows it without questions: a set of
another domain costs more off its own domain than on it.
"""

import json
from collections.abc import Sequence

from q3q.data.texts import FROM_FILES
from q3q.evaluate.metrics import reads_calibrated_kind
from q3q.record import TrialRecord
from q3q.report.measures import labels
from q3q.report.pools import Pool, comparable, pools
from q3q.report.tables import Table
from q3q.spec import TrialSpec, text_metric

OWN = "own"  # marks a text of the kind that the row is calibrated on
NOTE = (
    f'KL divergence from the unquantized model, nats per token (lower is better). "{OWN}": the '
    "text is of the kind that the row is calibrated on. Rows differ in the calibration text alone, "
    "so a column shows what each costs on that text."
)
# What of a calibration says which text it is, and not how much of it is read.
OF_THE_TEXT = ("source", "digest", "draw", "temperature", "prompts", "parts")


def domain_tables(records: Sequence[TrialRecord]) -> list[Table]:
    """Return a table per model, method and width that was calibrated on several texts.

    There are none unless several texts were evaluated, with their drift.
    """
    tables = []
    for name, group in comparable(records).items():
        texts = group[0].spec.evaluation.texts
        quick = group[0].spec.evaluation.quick
        metrics = {text.name: text_metric("kl", text.name, quick) for text in texts}
        if len(metrics) < 2:
            continue
        tried = [pool for pool in pools(group) if pool.spec.calibration is not None]
        alike: dict[str, list[Pool]] = {}
        for pool in tried:
            if all(pool.values(metric) for metric in metrics.values()):
                alike.setdefault(_but_for_the_text(pool.spec), []).append(pool)
        several = [rows for rows in alike.values() if len({_text(row.spec) for row in rows}) > 1]
        heads = _heads([rows[0].spec for rows in several])
        tables += [
            _table(f"{name}: {head}", rows, metrics)
            for head, rows in zip(heads, several, strict=True)
        ]
    return tables


def calibration_name(pool: Pool) -> str:
    """Name what a pool is calibrated on: a file by its own name, any other text by its source."""
    calibration, placement = pool.spec.calibration, pool.records[0].placement
    assert calibration is not None
    reads = calibration.source in FROM_FILES or calibration.prompts is not None
    file = placement.calibration if reads else None
    return calibration.label if file is None else f"{calibration.label} {file.name}"


def _table(title: str, rows: Sequence[Pool], metrics: dict[str, str]) -> Table:
    columns = ("calibrated on", *(f"KL on {text}" for text in metrics))
    lines = []
    for row in rows:
        texts = {text.name: text for text in row.spec.evaluation.texts}
        cells = [
            row.shown(metric, intervals=True)
            + (f" ({OWN})" if reads_calibrated_kind(texts[name], row.spec) else "")
            for name, metric in metrics.items()
        ]
        lines.append((calibration_name(row), *cells))
    return Table(f"{title}: what each calibration costs", columns, tuple(lines))


def _heads(specs: Sequence[TrialSpec]) -> list[str]:
    """Name each table's trials by what they share: `gptq, 2 bits, 32 windows`."""
    shared = [f"calibration.{key}" for key in (*OF_THE_TEXT, "samples", "length")]
    heads = []
    for spec, label in zip(
        specs, labels(specs, seeds=False, models=False, shared=shared), strict=True
    ):
        assert spec.scheme is not None
        assert spec.calibration is not None
        windows = f"{spec.calibration.samples} windows of {spec.calibration.length} tokens"
        heads.append(f"{label}, {spec.scheme.bits} bits, {windows}")
    return heads


def _but_for_the_text(spec: TrialSpec) -> str:
    """Return what trials of one table share: all of the quantization but the text and the seed."""
    facts = dict(spec.quantization)
    facts.pop("seed")
    facts["act_bits"] = spec.scheme and spec.scheme.act_bits
    calibration = dict(facts["calibration"])
    for key in OF_THE_TEXT:
        calibration.pop(key, None)
    return json.dumps(facts | {"calibration": calibration}, sort_keys=True)


def _text(spec: TrialSpec) -> str:
    assert spec.calibration is not None
    return spec.calibration.digest

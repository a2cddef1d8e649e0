"""LaTeX tables like the study's Tables 1 to 4: a block per model, a row per width and method."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from q3q.evaluation import is_accuracy, is_perplexity
from q3q.formatting import fixed, significant, with_spread
from q3q.record import TrialRecord
from q3q.report.escapes import latex_text
from q3q.report.means import by_mean
from q3q.report.measures import (
    ABSENT,
    Cell,
    appearance_of,
    cell,
    headline_metrics,
    is_base,
    natural,
    shown,
)
from q3q.report.paper import is_released, study_model
from q3q.report.pools import Pool, pools
from q3q.spec import MEAN_ACCURACY, Scheme, TrialSpec

HEADS = {
    "perplexity/wikitext2": r"WikiText2 PPL $\downarrow$",
    "perplexity/c4": r"C4 PPL $\downarrow$",
    "piqa/acc": r"PIQA $\uparrow$",
    "arc_easy/acc": r"ARC-E $\uparrow$",
    "arc_challenge/acc": r"ARC-C $\uparrow$",
    "hellaswag/acc": r"HellaSwag $\uparrow$",
    "winogrande/acc": r"WinoGrande $\uparrow$",
    "boolq/acc": r"BoolQ $\uparrow$",
    "mmlu/acc": r"MMLU $\uparrow$",
    "mmlu_paper/acc": r"MMLU $\uparrow$",
}
# Words of a label that columns show: pc, g128, a8, pt, 128x128.
GROUPS_OR_BITS = r"pc|pt|[ga]\d+|(all|\d+)x(all|\d+)"
MEAN = "Avg."
# The first that was measured counts: the study's own script before lm-eval's.
MMLU = ("mmlu_paper/acc", "mmlu/acc")


# The unquantized model's row, by the type that it computes in.
UNQUANTIZED = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


def latex(records: Sequence[TrialRecord]) -> str:
    """Return a table each for base, post-trained and other models, per channel and for each group.

    The tables need booktabs. The unquantized model heads each of its blocks; failed and diverged
    trials are named as such; several seeds are shown by their mean.
    """
    tried = pools(records, over_models=True)
    parts = [r"% \usepackage{booktabs}"]
    sizes = {_sides(pool.spec.scheme) for pool in tried if pool.spec.scheme}
    for sides in sorted(sizes):
        for kind in ("Base models", "Post-trained models", "Models"):
            alike = [
                pool
                for pool in tried
                if _kind(pool.spec) == kind
                and (pool.spec.scheme is None or _sides(pool.spec.scheme) == sides)
            ]
            models = {study_model(pool.spec) for pool in alike if pool.spec.scheme}
            rows = [pool for pool in alike if study_model(pool.spec) in models]
            if rows:
                parts.append(_table(rows, kind))
    return "\n\n".join(parts) + "\n"


def _sides(scheme: Scheme) -> tuple[int, int]:
    """Return the columns and rows that share a scale."""
    return scheme.group_size, scheme.group_rows


def _kind(spec: TrialSpec) -> str:
    """Return what is known of a model: only Qwen3's releases are known to be post-trained."""
    if is_base(spec):
        return "Base models"
    return "Post-trained models" if is_released(spec) else "Models"


def _table(tried: Sequence[Pool], kind: str) -> str:
    records = [record for pool in tried for record in pool.records]
    columns = _columns(records)
    lines = []
    previous = ""
    for pool in sorted(tried, key=_row_order):
        scheme, name = pool.spec.scheme, study_model(pool.spec)
        if previous and name != previous:
            lines.append(r"\midrule")
        cells = [
            latex_text(name) if name != previous else "",
            latex_text(_method(pool)),
            _weight_bits(pool),
            str(_act_bits(pool)),
            "-" if scheme is None else _group(scheme),
            *(column.content(pool) for column in columns),
        ]
        lines.append(" & ".join(cells) + r" \\")
        previous = name
    per = next(_per(pool.spec.scheme) for pool in tried if pool.spec.scheme)
    means = [column.over for column in columns if column.over]
    marks = [f"{MEAN} {number}: " if len(means) > 1 else f"{MEAN}: " for number in range(1, 99)]
    over = [f"{mark}mean of {latex_text(mean)}." for mark, mean in zip(marks, means, strict=False)]
    caption = " ".join(
        [f"{kind} under {per} quantization. Perplexity (PPL) and accuracy (\\%).", *over]
    )
    return "\n".join(
        [
            r"\begin{table}[t]",
            rf"\caption{{{caption}}}",
            r"\centering\small",
            rf"\begin{{tabular}}{{llccc{'c' * len(columns)}}}",
            r"\toprule",
            " & ".join(
                ["Model", "Method", r"\#W", r"\#A", r"\#G", *(column.head for column in columns)]
            )
            + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


@dataclass(frozen=True)
class Column:
    """A metric's column. A mean accuracy has a column for each set of tasks, and only its rows.

    over: the tasks of a mean, in words.
    trials: ids of the trials of this mean; None for all trials.
    """

    metric: str
    head: str
    over: str = ""
    trials: frozenset[str] | None = None

    def content(self, pool: Pool) -> str:
        ours = self.trials is None or pool.spec.id in self.trials
        return _content(pool, self.metric) if ours else "--"


def _columns(records: Sequence[TrialRecord]) -> list[Column]:
    """Return the columns in the study's order: perplexities, zero-shot tasks, their mean, MMLU."""
    metrics = headline_metrics(records)
    measured = [name for name in MMLU if any(cell(record, name) != ABSENT for record in records)]
    aside = (*MMLU, MEAN_ACCURACY)
    columns = [
        Column(name, _head(name))
        for name in metrics
        if name not in aside and not name.startswith("word_perplexity")
    ]
    means = by_mean(records)
    for number, (over, group) in enumerate(means.items(), start=1):
        head = rf"{MEAN} {number} $\uparrow$" if len(means) > 1 else rf"{MEAN} $\uparrow$"
        trials = frozenset(record.spec.id for record in group)
        columns.append(Column(MEAN_ACCURACY, head, over, trials))
    return columns + [Column(name, _head(name)) for name in measured[:1] if name in metrics]


def _head(metric: str) -> str:
    """Return a column's head, with an arrow towards the better values where that is known."""
    if metric in HEADS:
        return HEADS[metric]
    if is_perplexity(metric):
        kind, _, text = metric.partition("/")
        quick = " (quick)" if kind.endswith("_quick") else ""
        return rf"{latex_text(text)}{quick} PPL $\downarrow$"
    name = latex_text(metric.removesuffix("/acc"))
    return rf"{name} $\uparrow$" if is_accuracy(metric) else name


def _row_order(pool: Pool) -> tuple[list, int, int, int, str]:
    """Return a sort key: by model, weight bits, method in the study's order, activation bits."""
    row = appearance_of(pool.spec.method.name).row
    return natural(study_model(pool.spec)), -pool.bits, row, -_act_bits(pool), pool.label


def _method(pool: Pool) -> str:
    """Return the method and what no column shows of it: `GPTQ damping=0.05`."""
    name, *words = pool.label.split(" ")
    if pool.is_reference:
        return " ".join([UNQUANTIZED.get(pool.spec.model.dtype, pool.spec.model.dtype), *words[1:]])
    others = (word for word in words if not re.fullmatch(GROUPS_OR_BITS, word))
    return " ".join([appearance_of(name).title or name, *others])


def _group(scheme: Scheme) -> str:
    """Return what shares a scale, for a cell: so many columns, `-` for a row, or `128x128`."""
    if scheme.group_rows != 1:
        return scheme.groups
    return "-" if scheme.group_size == -1 else str(scheme.group_size)


def _per(scheme: Scheme) -> str:
    """Return what shares a scale, for a caption."""
    if scheme.group_rows == scheme.group_size == -1:
        return "per-tensor"
    if scheme.group_rows != 1:
        return f"per-block (blocks of {scheme.groups})"
    if scheme.group_size == -1:
        return "per-channel"
    return f"per-group (groups of {scheme.group_size})"


def _weight_bits(pool: Pool) -> str:
    """Return a weight's bits; fractional if the codes are, as BiLLM's 1.06."""
    nominal = pool.records[0].metrics.get("bits_per_weight_nominal", pool.bits)
    whole = pool.spec.scheme is None or abs(nominal - pool.bits) < 0.005
    return str(pool.bits) if whole else fixed(nominal, 2)


def _act_bits(pool: Pool) -> int:
    if pool.is_reference:
        return pool.bits
    return (pool.spec.scheme and pool.spec.scheme.act_bits) or 16


def _content(pool: Pool, metric: str) -> str:
    content, spread = pool.cell(metric), pool.spread(metric)
    if spread is None or not isinstance(content, float):
        return _number(content, metric)
    unit = 100 if is_accuracy(metric) else 1
    return r"$\pm$".join(with_spread(unit * content, unit * spread))


def _number(content: Cell, metric: str) -> str:
    """Format a perplexity to three digits, from 1,000 on as the study prints it: 1.23E5."""
    if isinstance(content, str):
        return "--" if content == ABSENT else content
    if not is_perplexity(metric):
        return shown(content, metric)
    digits, _, exponent = f"{content:.2e}".partition("e")
    if int(exponent) > 2:
        return f"{digits}E{int(exponent)}"
    return significant(content, 3)

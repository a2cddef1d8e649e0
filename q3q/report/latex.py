"""LaTeX tables like the study's Tables 1 to 4: a block per model, a row per width and method."""

import re
from collections.abc import Sequence

from q3q.record import TrialRecord
from q3q.report.measures import (
    ABSENT,
    Cell,
    appearance_of,
    cell,
    headline_metrics,
    is_base,
    is_perplexity,
    natural,
    shown,
)
from q3q.report.paper import study_model
from q3q.report.pools import Pool, pools, shown_spread
from q3q.spec import MEAN_ACCURACY

HEADS = {
    "perplexity/wikitext2": r"WikiText2 $\downarrow$",
    "perplexity/c4": r"C4 $\downarrow$",
    "piqa/acc": r"PIQA $\uparrow$",
    "arc_easy/acc": r"ARC-E $\uparrow$",
    "arc_challenge/acc": r"ARC-C $\uparrow$",
    "hellaswag/acc": r"HellaSwag $\uparrow$",
    "winogrande/acc": r"WinoGrande $\uparrow$",
    "boolq/acc": r"BoolQ $\uparrow$",
    "mmlu/acc": r"MMLU $\uparrow$",
    "mmlu_paper/acc": r"MMLU $\uparrow$",
    MEAN_ACCURACY: r"Avg. $\uparrow$",
}
# The first that was measured counts: the study's own script before lm-eval's.
MMLU = ("mmlu_paper/acc", "mmlu/acc")


def latex(records: Sequence[TrialRecord]) -> str:
    """Return a table each for base and post-trained models, per channel and for each group size.

    The tables need booktabs. The unquantized model heads each of its blocks; failed and diverged
    trials are named as such; several seeds are shown by their mean.
    """
    tried = pools(records, over_models=True)
    parts = [r"% \usepackage{booktabs}"]
    for group in sorted({pool.spec.scheme.group_size for pool in tried if pool.spec.scheme}):
        for base in (True, False):
            alike = [
                pool
                for pool in tried
                if is_base(pool.spec) == base
                and (pool.spec.scheme is None or pool.spec.scheme.group_size == group)
            ]
            models = {study_model(pool.spec) for pool in alike if pool.spec.scheme}
            rows = [pool for pool in alike if study_model(pool.spec) in models]
            if rows:
                parts.append(_table(rows, base, group))
    return "\n\n".join(parts) + "\n"


def _table(tried: Sequence[Pool], base: bool, group: int) -> str:
    metrics = _columns([record for pool in tried for record in pool.records])
    names = [metric.removeprefix("perplexity/").removesuffix("/acc") for metric in metrics]
    heads = [HEADS.get(key, _escaped(name)) for key, name in zip(metrics, names, strict=True)]
    lines = []
    previous = ""
    for pool in sorted(tried, key=_row_order):
        scheme, name = pool.spec.scheme, study_model(pool.spec)
        if previous and name != previous:
            lines.append(r"\midrule")
        cells = [
            _escaped(name) if name != previous else "",
            _escaped(_method(pool)),
            _weight_bits(pool),
            str(_act_bits(pool)),
            "-" if scheme is None or scheme.group_size == -1 else str(scheme.group_size),
            *(_content(pool, metric) for metric in metrics),
        ]
        lines.append(" & ".join(cells) + r" \\")
        previous = name
    models = "Base" if base else "Post-trained"
    per = "per-channel" if group == -1 else f"per-group (groups of {group})"
    caption = f"{models} models under {per} quantization. Perplexity and accuracy (\\%)."
    return "\n".join(
        [
            r"\begin{table}[t]",
            rf"\caption{{{caption}}}",
            r"\centering\small",
            rf"\begin{{tabular}}{{llccc{'c' * len(metrics)}}}",
            r"\toprule",
            " & ".join(["Model", "Method", r"\#W", r"\#A", r"\#G", *heads]) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _columns(records: Sequence[TrialRecord]) -> list[str]:
    """Return the metrics in the study's order: perplexities, zero-shot tasks, their mean, MMLU."""
    metrics = headline_metrics(records)
    measured = [name for name in MMLU if any(cell(record, name) != ABSENT for record in records)]
    last = [name for name in (MEAN_ACCURACY, *measured[:1]) if name in metrics]
    aside = (*MMLU, MEAN_ACCURACY)
    return [
        name for name in metrics if name not in aside and not name.startswith("word_perplexity")
    ] + last


def _row_order(pool: Pool) -> tuple[list, int, int, int, str]:
    """Return a sort key: by model, weight bits, method in the study's order, activation bits."""
    row = appearance_of(pool.spec.method.name).row
    return natural(study_model(pool.spec)), -pool.bits, row, -_act_bits(pool), pool.label


def _method(pool: Pool) -> str:
    """Return the method and what no column shows of it: `GPTQ damping=0.05`."""
    name, *words = pool.label.split(" ")
    others = (word for word in words if not re.fullmatch(r"pc|[ga]\d+", word))
    return " ".join([appearance_of(name).title or name, *others])


def _weight_bits(pool: Pool) -> str:
    """Return a weight's bits; fractional if the codes are, as BiLLM's 1.06."""
    nominal = pool.records[0].metrics.get("bits_per_weight_nominal", pool.bits)
    whole = pool.spec.scheme is None or abs(nominal - pool.bits) < 0.005
    return str(pool.bits) if whole else f"{nominal:.2f}"


def _act_bits(pool: Pool) -> int:
    return (pool.spec.scheme and pool.spec.scheme.act_bits) or 16


def _content(pool: Pool, metric: str) -> str:
    spread = pool.spread(metric)
    deviation = "" if spread is None else rf"$\pm${shown_spread(spread, metric)}"
    return _number(pool.cell(metric), metric) + deviation


def _number(content: Cell, metric: str) -> str:
    """Format a perplexity to three digits, from 1,000 on as the study prints it: 1.23E5."""
    if isinstance(content, str):
        return "--" if content == ABSENT else content
    if not is_perplexity(metric):
        return shown(content, metric)
    digits, _, exponent = f"{content:.2e}".partition("e")
    if int(exponent) > 2:
        return f"{digits}E{int(exponent)}"
    return f"{float(f'{content:.3g}'):#.3g}".rstrip(".")


def _escaped(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)

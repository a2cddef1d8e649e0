"""Tables as the study prints its Tables 1 to 4: a block of rows per model, in it a row per width and method."""

import re
from collections.abc import Sequence

from q3q.record import TrialRecord
from q3q.report.measures import (
    ABSENT,
    Cell,
    cell,
    headline_metrics,
    is_base,
    is_perplexity,
    natural,
    shown,
)
from q3q.report.paper import METHODS, study_model
from q3q.report.pools import Pool, pools, shown_spread
from q3q.spec import MEAN_ACCURACY, TrialSpec

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
MMLU = (
    "mmlu_paper/acc",
    "mmlu/acc",
)  # the first that was measured: the study's own script before lm-eval's
ORDER = ("none", "rtn", "awq", "gptq", "smoothquant", "billm")  # of the rows of one width


def latex(records: Sequence[TrialRecord]) -> str:
    """One table for base and one for post-trained models, per channel and for each group size; needs booktabs.

    The unquantized model heads each of its blocks. What failed or diverged says so; of several seeds it is the mean.
    """
    tried = pools(records, over_models=True)
    parts = [r"% \usepackage{booktabs}"]
    for group in sorted({pool.spec.scheme.group_size for pool in tried if pool.spec.scheme}):
        for base in (True, False):
            some = [
                pool
                for pool in tried
                if is_base(pool.spec) == base and _group(pool.spec) in (None, group)
            ]
            models = {study_model(pool.spec) for pool in some if pool.spec.scheme}
            rows = [pool for pool in some if study_model(pool.spec) in models]
            if rows:
                parts.append(_table(rows, base, group))
    return "\n\n".join(parts) + "\n"


def _table(tried: Sequence[Pool], base: bool, group: int) -> str:
    metrics = _columns([record for pool in tried for record in pool.records])
    heads = [
        "Model",
        "Method",
        r"\#W",
        r"\#A",
        r"\#G",
        *(HEADS.get(name, _escaped(_head(name))) for name in metrics),
    ]
    lines = []
    before = ""
    for pool in sorted(tried, key=_place):
        scheme, name = pool.spec.scheme, study_model(pool.spec)
        if before and name != before:
            lines.append(r"\midrule")
        cells = [
            _escaped(name) if name != before else "",
            _escaped(_method(pool)),
            _width(pool),
            str(scheme.act_bits or 16 if scheme else 16),
            "-" if scheme is None or scheme.group_size == -1 else str(scheme.group_size),
            *(_told(pool, metric) for metric in metrics),
        ]
        lines.append(" & ".join(cells) + r" \\")
        before = name
    how = "per-channel" if group == -1 else f"per-group (groups of {group})"
    caption = f"{'Base' if base else 'Post-trained'} models under {how} quantization. Perplexity and accuracy (\\%)."
    return "\n".join(
        [
            r"\begin{table}[t]",
            rf"\caption{{{caption}}}",
            r"\centering\small",
            rf"\begin{{tabular}}{{llccc{'c' * len(metrics)}}}",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _columns(records: Sequence[TrialRecord]) -> list[str]:
    """As printed: perplexities, zero-shot tasks, their mean, MMLU."""
    metrics = headline_metrics(records)
    measured = [name for name in MMLU if any(cell(record, name) != ABSENT for record in records)]
    last = [name for name in (MEAN_ACCURACY, *measured[:1]) if name in metrics]
    aside = (*MMLU, MEAN_ACCURACY)
    return [
        name for name in metrics if name not in aside and not name.startswith("word_perplexity")
    ] + last


def _place(pool: Pool) -> tuple[list, int, int, int, str]:
    """Of a row: by model and width, then as the study orders methods."""
    method, scheme = str(pool.spec.method["name"]), pool.spec.scheme
    order = ORDER.index(method) if method in ORDER else len(ORDER)
    return (
        natural(study_model(pool.spec)),
        -pool.bits,
        order,
        -(scheme.act_bits or 16 if scheme else 16),
        pool.label,
    )


def _group(spec: TrialSpec) -> int | None:
    return spec.scheme.group_size if spec.scheme else None


def _method(pool: Pool) -> str:
    """The method, and what no column says of it: `GPTQ damping=0.05`."""
    name, *words = pool.label.split(" ")
    return " ".join(
        [
            METHODS.get(name, name),
            *(word for word in words if not re.fullmatch(r"pc|[ga]\d+", word)),
        ]
    )


def _width(pool: Pool) -> str:
    """Bits of a weight; as codes count where they are not whole, as BiLLM's 1.06."""
    nominal = pool.records[0].metrics.get("bits_per_weight_nominal", pool.bits)
    return (
        str(pool.bits)
        if pool.spec.scheme is None or abs(nominal - pool.bits) < 0.005
        else f"{nominal:.2f}"
    )


def _told(pool: Pool, metric: str) -> str:
    spread = pool.spread(metric)
    return _number(pool.cell(metric), metric) + (
        rf"$\pm${shown_spread(spread, metric)}" if spread is not None else ""
    )


def _number(found: Cell, metric: str) -> str:
    """A perplexity to three digits, from 1,000 on as the study prints it: 1.23E5."""
    if isinstance(found, str):
        return "--" if found == ABSENT else found
    if not is_perplexity(metric):
        return shown(found, metric)
    digits, _, exponent = f"{found:.2e}".partition("e")
    return (
        f"{digits}E{int(exponent)}"
        if int(exponent) > 2
        else f"{float(f'{found:.3g}'):#.3g}".rstrip(".")
    )


def _head(metric: str) -> str:
    return metric.removeprefix("perplexity/").removesuffix("/acc")


def _escaped(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)

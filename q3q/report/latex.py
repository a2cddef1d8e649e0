"""Tables as the study prints its Tables 1 to 4: a row per method and width, a block of rows per model."""

import re
from collections.abc import Sequence

from q3q.record import TrialRecord
from q3q.report.measures import ABSENT, MEAN_ACCURACY, cell, headline_metrics, in_order, model_name, shown

NAMES = {"none": "FP16", "rtn": "RTN", "gptq": "GPTQ", "awq": "AWQ", "smoothquant": "SmoothQuant", "billm": "BiLLM"}
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


def latex(records: Sequence[TrialRecord]) -> str:
    """One table for base and one for post-trained models, per channel and for each group size; needs booktabs.

    The unquantized model heads each of its blocks. What failed or diverged says so.
    """
    records = in_order(records)
    parts = [r"% \usepackage{booktabs}"]
    for base in (True, False):
        mine = [record for record in records if _is_base(record) == base]
        for group in sorted({r.spec.scheme.group_size for r in mine if r.spec.scheme}):
            some = [r for r in mine if r.spec.scheme is None or r.spec.scheme.group_size == group]
            with_group = {model_name(r.spec) for r in some if r.spec.scheme}
            parts.append(_table([r for r in some if model_name(r.spec) in with_group], base, group))
    return "\n\n".join(parts) + "\n"


def _table(records: Sequence[TrialRecord], base: bool, group: int) -> str:
    metrics = headline_metrics(records)
    # As printed: perplexities, zero-shot tasks, their mean, MMLU.
    few_shot = [name for name in metrics if name.startswith("mmlu")]
    mean = [name for name in metrics if name == MEAN_ACCURACY]
    metrics = [name for name in metrics if name not in (*few_shot, *mean)] + mean + few_shot
    heads = ["Model", "Method", r"\#W", r"\#A", r"\#G", *(HEADS.get(name, _escaped(_head(name))) for name in metrics)]
    lines = []
    before = ""
    for record in sorted(records, key=lambda record: (model_name(record.spec), _place(record))):
        scheme, name = record.spec.scheme, model_name(record.spec)
        if before and name != before:
            lines.append(r"\midrule")
        cells = [
            _escaped(name) if name != before else "",
            _escaped(NAMES.get(str(record.spec.method["name"]), str(record.spec.method["name"]))),
            str(scheme.bits if scheme else 16),
            str(scheme.act_bits or 16 if scheme else 16),
            "-" if scheme is None or scheme.group_size == -1 else str(scheme.group_size),
            *(_number(shown(cell(record, metric), metric)) for metric in metrics),
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


def _place(record: TrialRecord) -> tuple[int, int, int]:
    order = list(NAMES)
    name, scheme = str(record.spec.method["name"]), record.spec.scheme
    return (
        order.index(name) if name in order else len(order),
        -(scheme.bits if scheme else 16),
        -((scheme.act_bits or 16) if scheme else 16),
    )


def _is_base(record: TrialRecord) -> bool:
    return bool(re.search(r"[-_]base$", model_name(record.spec), re.IGNORECASE))


def _head(metric: str) -> str:
    return metric.removeprefix("perplexity/").removesuffix("/acc")


def _number(text: str) -> str:
    """`1.23e+05` as the study prints it, 1.23E5."""
    found = re.fullmatch(r"([\d.]+)e\+?(-?\d+)", text)
    if found:
        return f"{found[1]}E{int(found[2])}"
    return "--" if text == ABSENT else text


def _escaped(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)

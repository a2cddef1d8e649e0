"""The study's printed numbers, and what makes some of them doubtful.

They are Tables 1 to 4 of "An Empirical Study of Qwen3 Quantization" (arXiv 2505.02214v1), in
`paper_results.csv` beside this file, a row per printed number. The printed means over six tasks are
wrong in 29 of 250 rows, so they are left out. `NOTES` lists other printed numbers that are
doubtful.
"""

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = "An Empirical Study of Qwen3 Quantization, arXiv 2505.02214v1, Tables 1 to 4"
PUBLISHED = Path(__file__).with_name("paper_results.csv")


@dataclass(frozen=True)
class Published:
    """One printed number.

    bits: of a weight, 1 for BiLLM's nominal 1.04 to 1.07.
    value: nan where NaN is printed.
    """

    model: str
    method: str
    bits: int
    act_bits: int
    group: str
    dataset: str
    value: float
    source: str


@dataclass(frozen=True)
class Note:
    """A reason to doubt some published numbers."""

    text: str
    concerns: Callable[[Published], bool]


NOTES = (
    Note(
        "AWQ with groups of 128 is printed worse than per channel in 43 of 44 perplexities at 3 "
        "and 4 bits, and its MMLU in 22 of 22: the two blocks are probably exchanged, or the "
        "groups were left out when evaluating.",
        lambda row: row.method == "AWQ" and row.bits in (3, 4),
    ),
    Note(
        "Table 2 prints AWQ's zero-shot scores of 8B under 14B and vice versa.",
        lambda row: (
            row.source == "Table 2"
            and row.method == "AWQ"
            and row.model in ("Qwen3-8B", "Qwen3-14B")
            and row.dataset not in ("wikitext2", "c4", "mmlu")
        ),
    ),
    Note(
        "For GPTQ with 8 bits on 4B, Table 2 prints the row of 1.7B.",
        lambda row: (
            row.source == "Table 2" and (row.model, row.method, row.bits) == ("Qwen3-4B", "GPTQ", 8)
        ),
    ),
    Note(
        "An 80.1 among neighbours of about 25: a misprint.",
        lambda row: (
            row.source == "Table 2"
            and (row.model, row.method, row.bits, row.dataset)
            == ("Qwen3-4B", "GPTQ", 2, "arc_easy")
        ),
    ),
    Note(
        "The published script never smooths: row rounds weights per channel and activations per "
        "token (here method.smooth=false).",
        lambda row: row.method == "SmoothQuant",
    ),
    Note(
        "Nearly the perplexities of the 0.6B row: probably a copy.",
        lambda row: (
            (row.model, row.method, row.act_bits) == ("Qwen3-8B", "SmoothQuant", 4)
            and row.dataset in ("wikitext2", "c4")
        ),
    ),
    Note(
        "Above the unquantized model's 72.1 by 5 points: probably a misprint.",
        lambda row: (
            (row.model, row.method, row.dataset) == ("Qwen3-8B-Base", "SmoothQuant", "winogrande")
            and (row.bits, row.act_bits) == (8, 8)
        ),
    ),
    Note(
        "HellaSwag at or above the unquantized model's: probably acc_norm where other rows print "
        "acc.",
        lambda row: (
            row.method == "BiLLM"
            and row.dataset == "hellaswag"
            and row.model in ("Qwen3-14B", "Qwen3-32B")
        ),
    ),
    Note(
        "The unquantized model is printed twice, 19.2 and 19.3.",
        lambda row: (row.model, row.method, row.dataset) == ("Qwen3-1.7B", "FP16", "c4"),
    ),
)


@cache
def published() -> tuple[Published, ...]:
    """Return all printed numbers except the means over six tasks."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] != "avg6"]
    return tuple(
        Published(
            model=row["model"],
            method=row["method"],
            bits=math.floor(float(row["w_bits"])),
            act_bits=int(row["a_bits"]),
            group=row["group_size"],
            dataset=row["dataset"],
            value=float(row["value"]),
            source=row["source"],
        )
        for row in rows
    )


@cache
def published_models() -> dict[str, str]:
    return {plain_name(row.model): row.model for row in published()}


@cache
def published_cells() -> dict[tuple, list[Published]]:
    cells: dict[tuple, list[Published]] = {}
    for row in published():
        key = (row.model, row.method, row.bits, row.act_bits, row.group, row.dataset)
        cells.setdefault(key, []).append(row)
    return cells


def plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

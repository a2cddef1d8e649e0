"""Run the study's grid on a real language model, SmolLM2-135M-Instruct, and tabulate the records.

`python benchmarks/real_model.py MODEL STORAGE --test FILE --calibration FILE [--arc FILE]
[--mmlu DIR]` runs what is missing in STORAGE through launch.py, one trial at a time and the most
telling first, then writes the table and the claims that the records support.

MODEL is a folder in Hugging Face's layout: `python benchmarks/smollm2.py MODEL` makes it. --test
and --calibration are WikiText-2's test and validation texts; perplexity is of --windows windows of
2,048 tokens of the test text, and the methods are calibrated on --samples windows of 2,048 tokens
of the validation text (AWQ: 512, its own default). --arc is a CSV file of ARC-Easy's questions,
--mmlu a folder with MMLU's dev/ and test/, both in the columns question, A, B, C, D, answer and
without a header. A cell's questions are a trial of their own, which loads the blocks that the
cell's first one quantized.

A trial takes two to ten minutes on one core, the whole grid about three hours on two. What is
finished is not run again. SIGTERM to this process (or Ctrl-C) stops it after the running trial.

The tables keep what STORAGE has not measured. `--tables` runs nothing. `benchmarks/real_peers.py`
puts other quantizers beside q3q's.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import fidelity

from q3q.limits import cores

ROOT = Path(__file__).parent.parent
LENGTH = 2048  # tokens of a window
NAME = "smollm2_135m_q4_1"
TASKS = ("arc_easy", "mmlu")
TEXT = "wikitext2_test"  # in metrics: tokenized WikiText-2 is not the raw text that papers read
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_135m.csv"
GROUP_SIZE = 64  # the study's groups are of 128, into which 576 columns do not divide


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: a method at a width, in groups of this many columns or whole rows (-1).

    act_bits: of activations; None leaves them alone
    smooth: SmoothQuant's; False is what the study's script ran
    static_groups: GPTQ's; True keeps neighbouring columns in a group
    """

    method: str
    bits: int = 0
    group_size: int = -1
    act_bits: int | None = None
    smooth: bool = True
    static_groups: bool = False

    @property
    def words(self) -> list[str]:
        """What launch.py is told."""
        if self.method == "none":
            return ["method=none"]
        words = [f"method={self.method}", f"group_size={self.group_size}"]
        if self.method != "billm":
            words.append(f"bits={self.bits}")
        if self.act_bits:
            words.append(f"act_bits={self.act_bits}")
        if not self.smooth:
            words.append("method.smooth=false")
        if self.static_groups:
            words.append("method.static_groups=true")
        return words

    @property
    def name(self) -> str:
        if self.method == "none":
            return "unquantized"
        method = self.method if self.smooth else "rtn w/a"
        act = f"a{self.act_bits}" if self.act_bits else ""
        group = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        static = ", static groups" if self.static_groups else ""
        return f"{method} w{self.bits}{act} {group}{static}"


WEIGHT_ONLY = ("rtn", "gptq", "awq")
SMOOTHED = (True, False)
# The most telling first, and AWQ, which takes longest, behind what is as telling.
CELLS = (
    Cell("none"),
    *(Cell(method, 4, GROUP_SIZE) for method in WEIGHT_ONLY),
    *(Cell(method, bits, GROUP_SIZE) for bits in (3, 2) for method in ("rtn", "gptq")),
    *(Cell("smoothquant", 4, -1, 4, smooth) for smooth in SMOOTHED),
    Cell("gptq", 4, GROUP_SIZE, static_groups=True),
    *(Cell("awq", bits, GROUP_SIZE) for bits in (3, 2)),
    *(Cell(method, bits) for bits in (3, 2, 4) for method in WEIGHT_ONLY),
    Cell("billm", 1, GROUP_SIZE),
    *(Cell("smoothquant", bits, -1, 8, smooth) for bits in (4, 8) for smooth in SMOOTHED),
    *(Cell(method, 8, size) for size in (GROUP_SIZE, -1) for method in WEIGHT_ONLY),
)


@dataclass(frozen=True)
class Data:
    """The files in the storage folder that trials read, made from the ones given."""

    folder: Path

    @property
    def test(self) -> Path:
        return self.folder / f"{TEXT}.txt"

    @property
    def calibration(self) -> Path:
        return self.folder / "wikitext2_valid.txt"

    def fill(self, options: argparse.Namespace) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for given, place in ((options.test, self.test), (options.calibration, self.calibration)):
            shutil.copyfile(given, place)
        if options.arc:
            place = self.folder / "arc_easy" / "test.jsonl"
            place.parent.mkdir(exist_ok=True)
            place.write_text("".join(arc_rows(options.arc)), encoding="utf-8")
        if options.mmlu:
            for split in ("dev", "test"):
                shutil.copytree(
                    options.mmlu / split, self.folder / "mmlu" / split, dirs_exist_ok=True
                )


def arc_rows(path: Path) -> Iterator[str]:
    """Yield questions in the columns of ARC's official files, a JSON line each."""
    with path.open(encoding="utf-8", newline="") as file:
        for question, *texts, answer in csv.reader(file):
            choices = {"text": texts, "label": list("ABCD")}
            row = {"question": question, "choices": choices, "answerKey": answer}
            yield json.dumps(row) + "\n"


def words_of(cell: Cell, options: argparse.Namespace, evaluation: list[str]) -> list[str]:
    """Return what launch.py is told of a cell's trial."""
    data = Data(options.storage / "data")
    words = [
        *cell.words,
        "model=local",
        f"model.path={options.model}",
        f"model.name={NAME}",
        "dtype=bfloat16",  # in which SmolLM2 was trained; the study ran in 16 bits too
        *evaluation,
        f"data.path={data.folder}",
        f"storage={options.storage / 'storage'}",
    ]
    if cell.method not in ("none", "rtn"):
        length = 512 if cell.method == "awq" else LENGTH
        words += [
            "calibration=file",
            f"calibration.path={data.calibration}",
            f"calibration.samples={options.samples}",
            f"calibration.length={length}",
            "calibration.draw=random",
        ]
    return words


def evaluation_of(options: argparse.Namespace) -> list[str]:
    return [
        "evaluation=file",
        f"evaluation.path={Data(options.storage / 'data').test}",
        f"evaluation.limit={options.windows}",
        f"evaluation.drift_windows={options.windows}",
    ]


def tasks_evaluation(options: argparse.Namespace) -> list[str]:
    limits = {}
    if options.arc:
        limits["arc_easy"] = options.questions
    if options.mmlu:
        limits["mmlu"] = options.mmlu_questions
    return [
        "evaluation=tasks",
        f"evaluation.tasks=[{','.join(limits)}]",
        "evaluation.shots={mmlu:5}" if options.mmlu else "evaluation.shots={}",
        f"evaluation.limits={{{','.join(f'{task}:{limit}' for task, limit in limits.items())}}}",
        "evaluation.drift=false",
    ]


class Stop:
    """Whether a signal has asked to stop after the running trial."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def run(options: argparse.Namespace) -> None:
    """Run the cells one by one; one that fails is told and the next one runs."""
    Data(options.storage / "data").fill(options)
    stop = Stop()
    evaluations = [] if options.questions_alone else [evaluation_of(options)]
    if options.arc or options.mmlu:
        evaluations.append(tasks_evaluation(options))
    for cell, evaluation in product(CELLS[: options.cells], evaluations):
        if stop.asked:
            print("stopped: the same command goes on", flush=True)
            return
        print(f"--- {cell.name}", flush=True)
        launch(words_of(cell, options, evaluation), options.threads)


def launch(words: list[str], threads: int) -> None:
    """Run a trial; one that fails says so itself."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "launch.py", *words]
    # In a session of its own, so that a terminal's Ctrl-C does not reach the trial.
    subprocess.run(command, cwd=ROOT, env=environment, check=False, start_new_session=True)


Interval = tuple[float, float]


# What the records say of a cell, in the columns of RESULTS. A ratio is of the perplexity to the
# unquantized model's, a difference of an accuracy to the unquantized model's on the same questions.
VALUES = ("perplexity", "perplexity_ratio", "kl", *(f"{task}_acc" for task in TASKS))
VALUES += tuple(f"{task}_difference" for task in TASKS)
COLUMNS = [name + end for name in VALUES for end in ("", "_low", "_high")] + ["agreement"]
CELL = ("method", "static_groups", "bits", "group_size", "act_bits", "bits_per_weight")
Result = dict[str, float]  # what was measured, by column; bits_per_weight always


def cell_of(spec: dict[str, Any]) -> Cell:
    scheme, method = spec["scheme"], spec["method"]
    if scheme is None:
        return Cell("none")
    return Cell(
        method["name"],
        scheme["bits"],
        scheme["group_size"],
        scheme.get("act_bits"),
        method.get("smooth", True),
        method.get("static_groups", False),
    )


def read(storage: Path) -> dict[Cell, Result]:
    """Return the table's numbers, and instead of them what STORAGE has measured."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        results = dict(map(from_row, csv.DictReader(file)))
    for path in sorted((storage / "storage").glob("trials/*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        cell = cell_of(record["spec"])
        # Others in the storage have other settings.
        of_grid = record["spec"]["model"]["name"] == NAME and cell in CELLS
        if record["status"] == "COMPLETED" and of_grid:
            results[cell] = results.get(cell, {}) | measured(record)
    return {cell: results[cell] for cell in CELLS if cell in results}


def measured(record: dict[str, Any]) -> Result:
    metrics = record["metrics"] | dict.fromkeys(record["diverged"], math.inf)
    result = {"bits_per_weight": metrics["bits_per_weight"]}
    names = {"perplexity": f"perplexity/{TEXT}", "kl": f"kl/{TEXT}"}
    names |= {f"{task}_acc": f"{task}/acc" for task in TASKS}
    for column, name in names.items():
        if name in metrics:
            result[column] = metrics[name]
            ends = record["intervals"].get(name, ())
            result |= dict(zip((f"{column}_low", f"{column}_high"), ends, strict=False))
    if f"top1_agreement/{TEXT}" in metrics:
        result["agreement"] = metrics[f"top1_agreement/{TEXT}"]
    for name, compared in (record["comparisons"] or {}).items():
        ends = {"": "difference", "_low": "low", "_high": "high"}
        values = {end: compared[key] for end, key in ends.items() if compared[key] is not None}
        if name == names["perplexity"]:
            result |= {f"perplexity_ratio{end}": math.exp(value) for end, value in values.items()}
        for task in TASKS:
            if name == names[f"{task}_acc"]:
                result |= {f"{task}_difference{end}": value for end, value in values.items()}
    return result


def from_row(row: dict[str, str]) -> tuple[Cell, Result]:
    plain = row["method"] == "rtn w/a"
    cell = Cell(
        "smoothquant" if plain else row["method"],
        int(row["bits"] or 0),
        int(row["group_size"] or -1),
        int(row["act_bits"]) if row["act_bits"] else None,
        not plain,
        row["static_groups"] == "yes",
    )
    names = ("bits_per_weight", *COLUMNS)
    return cell, {name: float(row[name]) for name in names if row.get(name)}


def to_row(cell: Cell, result: Result) -> dict[str, str]:
    row = {
        "method": cell.method if cell.smooth else "rtn w/a",
        "static_groups": "yes" if cell.static_groups else "",
        "bits": str(cell.bits or ""),
        "group_size": str(cell.group_size) if cell.bits else "",
        "act_bits": str(cell.act_bits or ""),
    }
    return row | {name: f"{value:.6g}" for name, value in result.items()}


def grid_table(results: dict[Cell, Result]) -> str:
    head = ["cell", "bits a weight", "perplexity", "over the unquantized", "KL, nats a token"]
    rows = [[*head, "most likely token agrees"]]
    for cell, result in results.items():
        agreement = result.get("agreement")
        rows.append(
            [
                cell.name,
                f"{result['bits_per_weight']:.2f}",
                *(with_ends(result, name) for name in ("perplexity", "perplexity_ratio", "kl")),
                "" if agreement is None else f"{agreement:.1%}",
            ]
        )
    missing = [cell.name for cell in CELLS if cell not in results]
    return "\n".join(
        [*markdown(rows), *(["", f"Not run: {'; '.join(missing)}."] if missing else [])]
    )


def tasks_table(results: dict[Cell, Result]) -> str:
    """Tabulate accuracies, in percent, and their differences to the unquantized model's."""
    asked = [task for task in TASKS if any(f"{task}_acc" in found for found in results.values())]
    rows = [["cell", *(f"{task}{of}" for task in asked for of in (", %", ": difference, points"))]]
    for cell, result in results.items():
        names = [f"{task}_{of}" for task in asked for of in ("acc", "difference")]
        texts = [with_ends(result, name, 100) for name in names]
        if any(texts):
            rows.append([cell.name, *texts])
    return "\n".join(markdown(rows))


def markdown(rows: list[list[str]]) -> list[str]:
    head, *rest = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest)]


def with_ends(result: Result, name: str, scale: float = 1.0) -> str:
    low, high = (result.get(f"{name}{end}") for end in ("_low", "_high"))
    pair = None if low is None or high is None else (scale * low, scale * high)
    return with_interval(scale * result[name], pair) if name in result else ""


def with_interval(value: float | None, pair: Interval | None) -> str:
    if value is None:
        return ""
    text = short(value)
    return text if pair is None else f"{text} [{short(pair[0])}, {short(pair[1])}]"


def short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2e}"


def claims_table(results: dict[Cell, Result]) -> str:
    """Return which of the study's claims hold, and which lack a cell and are not judged."""
    cells = {
        (
            cell.method if cell.smooth else "rtn w/a",
            cell.bits,
            cell.group_size if cell.bits else 0,
            cell.act_bits,
        ): fidelity.Cell(
            method=cell.method,
            bits=cell.bits,
            group_size=cell.group_size,
            act_bits=cell.act_bits,
            perplexity={TEXT: result["perplexity"]},
            accuracy=math.nan,
            bits_per_weight=result["bits_per_weight"],
        )
        for cell, result in results.items()
        if "perplexity" in result and not cell.static_groups
    }
    grid = fidelity.Grid(cells, TEXT, GROUP_SIZE)
    found = [(claim, *judge(grid)) for claim, judge in fidelity.CLAIMS]
    judged = [
        f"| {claim} | {fidelity.VERDICT[holds]}: {how} |"
        for claim, holds, how in found
        if holds is not None
    ]
    head = ["| the study | SmolLM2-135M-Instruct (Q4_1) |", "|---|---|"] if judged else []
    missing = [f"- {claim}: without {how}" for claim, holds, how in found if holds is None]
    undecided = ["", "Not decided, because cells are missing:", "", *missing] if missing else []
    return "\n".join([*head, *judged, *undecided])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("storage", type=Path, help="folder for data, trials and tables")
    parser.add_argument("--test", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--arc", type=Path, help="ARC-Easy's questions, CSV")
    parser.add_argument("--mmlu", type=Path, help="MMLU's folder")
    parser.add_argument("--windows", type=int, default=16, help="of the test text")
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--questions", type=int, default=200, help="of ARC-Easy")
    parser.add_argument("--mmlu-questions", type=int, default=2, help="of each MMLU subject")
    parser.add_argument("--questions-alone", action="store_true", help="no perplexity")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="so many, from the first")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.storage = options.storage.absolute()
    options.model = options.model.absolute()
    if not options.tables:
        run(options)
    results = read(options.storage)
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*CELL, *COLUMNS], lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(to_row(cell, result) for cell, result in results.items())
    page = fidelity.PAGE.read_text(encoding="utf-8")
    page = fidelity.rewrite(page, "real grid", grid_table(results))
    page = fidelity.rewrite(page, "real tasks", tasks_table(results))
    page = fidelity.rewrite(page, "real claims", claims_table(results))
    fidelity.PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Ask how much of GPTQ's loss at few bits is due to the text that it is calibrated on.

`python benchmarks/calibration.py STORAGE` quantizes the demo model with GPTQ, calibrated on
stories, on text of Python's library that the model was trained on, and on a mix of both, and
measures held-out text of both kinds. Rounding to nearest, which reads no text, stands beside it.

`--model DIR --test FILE --texts NAME=FILE ...` asks the same of SmolLM2-135M-Instruct
(`benchmarks/real_model.py`), whose held-out texts are WikiText-2's test part and Python's library.
A FILE of `--texts` may be a folder of MMLU's CSV files, whose questions and choices are then read.

A mix is of pieces of 4,000 characters of each text in turn. What is finished is not run again;
SIGTERM or Ctrl-C stops after the running trial. The table keeps what STORAGE has not measured;
`--tables` runs nothing. `--samples` chooses numbers of windows.
"""

import argparse
import csv
import itertools
import json
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fidelity
from real_model import GROUP_SIZE, NAME, TEXT, Cell, Stop, launch, markdown, short, with_interval

from q3q.data.texts import load_text
from q3q.limits import cores
from q3q.models.demo.library import training_text

BITS = (2, 3)
PIECE = 4_000  # characters


@dataclass(frozen=True)
class Question:
    """A model, the texts to calibrate on, and what its trials have in common.

    marker: of the table in docs/FIDELITY.md
    words: for launch.py, of all trials
    pieces: most of each text that are used
    measured: texts, by their names in metrics
    samples, length: windows to calibrate on (the fewest run first), and tokens of each
    """

    marker: str
    words: list[str]
    texts: dict[str, str]
    pieces: int
    measured: tuple[str, str]
    group_size: int
    samples: list[int]
    length: int


def demo_question() -> Question:
    return Question(
        marker="demo calibration",
        words=["model=demo", "evaluation=demo", "evaluation.tasks=[]"],
        texts={
            "stories": load_text("demo", split="calibration").joined,
            "library": training_text(),
        },
        pieces=80,
        measured=("stories", "library"),
        group_size=128,
        samples=[32, 128],
        length=256,
    )


def real_question(options: argparse.Namespace) -> Question:
    words = [
        "model=local",
        f"model.path={options.model.absolute()}",
        f"model.name={NAME}",
        "dtype=bfloat16",
        "evaluation=file",
        f"evaluation.path={options.test.absolute()}",
        "evaluation.texts=[file,library]",
        f"evaluation.limit={options.windows}",
        f"evaluation.drift_windows={options.windows}",
    ]
    given = dict(item.split("=", 1) for item in options.texts)
    return Question(
        marker="real calibration",
        words=words,
        texts={name: text_of(Path(path)) for name, path in given.items()},
        pieces=280,
        measured=(options.test.stem, "library"),
        group_size=GROUP_SIZE,
        samples=[16, 64, 256],
        length=512,
    )


def text_of(path: Path) -> str:
    """Return a file's text, or the questions and choices of a folder's CSV files."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    lines: list[str] = []
    for file in sorted(path.glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as rows:
            lines.extend("\n".join(row[:-1]) + "\n" for row in csv.reader(rows))
    return "\n".join(lines)


def write_texts(question: Question, folder: Path) -> dict[str, Path]:
    """Write a part of each text, and their mix; return the files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = {name: pieces_of(text)[: question.pieces] for name, text in question.texts.items()}
    contents = {name: "\n".join(some) for name, some in pieces.items()}
    turns = zip(*pieces.values(), strict=False)
    contents["mix"] = "\n".join(piece for turn in turns for piece in turn)
    files = {name: folder / f"{name}.txt" for name in contents}
    for name, file in files.items():
        file.write_text(contents[name], encoding="utf-8")
    return files


def pieces_of(text: str) -> list[str]:
    """Return pieces from all over a text, always the same ones."""
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    random.Random(0).shuffle(pieces)
    return pieces


def run(
    question: Question, storage: Path, files: dict[str, Path], numbers: list[int], threads: int
) -> None:
    stop = Stop()
    work = [["method=none"]]
    work += [Cell("rtn", bits, question.group_size).words for bits in BITS]
    for samples, bits, file in itertools.product(numbers, BITS, files.values()):
        calibration = [
            "calibration=file",
            f"calibration.path={file}",
            f"calibration.samples={samples}",
            f"calibration.length={question.length}",
            "calibration.draw=random",
        ]
        work.append([*Cell("gptq", bits, question.group_size).words, *calibration])
    for words in work:
        if stop.asked:
            print("stopped: the same command goes on", flush=True)
            return
        launch([*words, *question.words, f"storage={storage}"], threads)


def table(question: Question, storage: Path, names: dict[str, str], page: str) -> str:
    """Tabulate the records, and the rows on the page that have no record in STORAGE.

    Args:
        names: of calibration texts, by digest.
    """
    head = ["bits", "method", "calibrated on", "windows"]
    head += [f"{kind}, {text}" for text in question.measured for kind in ("perplexity", "KL")]
    rows = fidelity.rows_on(page, question.marker, keys=4)
    for path in storage.glob("trials/*/record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["status"] == "COMPLETED":
            row = row_of(record, names, question.measured)
            rows[tuple(row[:4])] = row
    lines = markdown([head, *sorted(rows.values(), key=place_of)])
    wanted = itertools.product(BITS, question.samples, names.values())
    missing = [
        f"{bits} bits on {samples} windows of {name}"
        for bits, samples, name in wanted
        if (str(bits), "gptq", name, str(samples)) not in rows
    ]
    words = textwrap.wrap(f"Not run: {', '.join(missing)}.", 100) if missing else []
    return "\n".join([*lines, *(["", *words] if words else [])])


def place_of(row: list[str]) -> tuple[int, bool, int, str]:
    bits, method, text, windows = row[:4]
    return -int(bits or 16), method != "rtn", int(windows or 0), text


def row_of(record: dict[str, Any], names: dict[str, str], measured: tuple[str, str]) -> list[str]:
    spec, metrics, intervals = record["spec"], record["metrics"], record["intervals"]
    calibration = spec["calibration"]
    text = names.get(calibration["digest"], "another text") if calibration else ""
    windows = str(calibration["samples"]) if calibration else ""
    bits, method = "", "unquantized"
    if spec["scheme"]:
        bits, method = str(spec["scheme"]["bits"]), spec["method"]["name"]
    row = [bits, method, text, windows]
    for name in measured:
        row.append(short(metrics[f"perplexity/{name}"]))
        row.append(with_interval(metrics.get(f"kl/{name}"), intervals.get(f"kl/{name}")))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("storage", type=Path, help="folder for texts and trials")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder; without: the demo model")
    parser.add_argument("--test", type=Path, help=f"WikiText-2's test part, {TEXT}.txt")
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=8, help="to measure on, with --model")
    parser.add_argument("--samples", type=int, nargs="+", help="windows to calibrate on")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.model and not (options.test and options.texts):
        parser.error("--model needs --test and --texts")
    question = real_question(options) if options.model else demo_question()
    storage = options.storage.absolute()
    files = write_texts(question, storage / "texts")
    if not options.tables:
        numbers = options.samples or question.samples
        run(question, storage / "storage", files, numbers, options.threads)
    digests = {
        load_text("file", split="calibration", path=file).digest: name
        for name, file in files.items()
    }
    page = fidelity.PAGE.read_text(encoding="utf-8")
    content = table(question, storage / "storage", digests, page)
    fidelity.PAGE.write_text(fidelity.rewrite(page, question.marker, content), encoding="utf-8")


if __name__ == "__main__":
    main()

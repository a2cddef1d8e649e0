"""Ask how much of GPTQ's loss at few bits is due to the text that it is calibrated on.

`python benchmarks/calibration.py STORAGE` quantizes the demo model with GPTQ, calibrated on
stories, on text of Python's library that the model was trained on, and on a mix of both, and
measures held-out text of both kinds. Rounding to nearest, which reads no text, stands beside it.

`--model DIR --test FILE --texts NAME=FILE ...` asks the same of SmolLM2-135M-Instruct
(`benchmarks/real_model.py`), whose held-out texts are WikiText-2's test part and Python's library.

A mix is of pieces of 4,000 characters of each text in turn. What is finished is not run again;
SIGTERM or Ctrl-C stops after the running trial; `--tables` runs nothing.
"""

import argparse
import itertools
import json
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fidelity
from real_model import GROUP_SIZE, NAME, TEXT, Cell, Stop, launch, short, with_interval

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
        texts={name: Path(path).read_text(encoding="utf-8") for name, path in given.items()},
        pieces=280,
        measured=(options.test.stem, "library"),
        group_size=GROUP_SIZE,
        samples=[16, 64, 256],
        length=512,
    )


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


def run(question: Question, storage: Path, files: dict[str, Path], threads: int) -> None:
    stop = Stop()
    work = [["method=none"]]
    work += [Cell("rtn", bits, question.group_size).words for bits in BITS]
    for samples, bits, file in itertools.product(question.samples, BITS, files.values()):
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


def table(question: Question, storage: Path, names: dict[str, str]) -> str:
    """Tabulate the records.

    Args:
        names: of calibration texts, by digest.
    """
    head = ["bits", "method", "calibrated on", "windows"]
    head += [f"{kind}, {text}" for text in question.measured for kind in ("perplexity", "KL")]
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(storage.glob("trials/*/record.json"))
    ]
    rows = [
        row_of(record, names, question.measured)
        for record in records
        if record["status"] == "COMPLETED"
    ]
    body = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]]
    found = {tuple(row[:4]) for row in body}
    wanted = itertools.product(BITS, question.samples, names.values())
    missing = [
        f"{bits} bits on {samples} windows of {name}"
        for bits, samples, name in wanted
        if (str(bits), "gptq", name, str(samples)) not in found
    ]
    words = textwrap.wrap(f"Not run: {', '.join(missing)}.", 100) if missing else []
    return "\n".join([*lines, *(["", *words] if words else [])])


def row_of(
    record: dict[str, Any], names: dict[str, str], measured: tuple[str, str]
) -> tuple[tuple[int, bool, int, str], list[str]]:
    """Return a record's place in the table, and its row."""
    spec, metrics, intervals = record["spec"], record["metrics"], record["intervals"]
    bits = spec["scheme"]["bits"] if spec["scheme"] else 16
    calibration = spec["calibration"]
    text = names.get(calibration["digest"], "another text") if calibration else ""
    windows = calibration["samples"] if calibration else 0
    method = spec["method"]["name"] if spec["scheme"] else "unquantized"
    row = [str(bits) if spec["scheme"] else "", method, text, str(windows) if windows else ""]
    for name in measured:
        row.append(short(metrics[f"perplexity/{name}"]))
        row.append(with_interval(metrics.get(f"kl/{name}"), intervals.get(f"kl/{name}")))
    return (-bits, method != "rtn", windows, text), row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("storage", type=Path, help="folder for texts and trials")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder; without: the demo model")
    parser.add_argument("--test", type=Path, help=f"WikiText-2's test part, {TEXT}.txt")
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=8, help="to measure on, with --model")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.model and not (options.test and options.texts):
        parser.error("--model needs --test and --texts")
    question = real_question(options) if options.model else demo_question()
    storage = options.storage.absolute()
    files = write_texts(question, storage / "texts")
    if not options.tables:
        run(question, storage / "storage", files, options.threads)
    digests = {
        load_text("file", split="calibration", path=file).digest: name
        for name, file in files.items()
    }
    page = fidelity.PAGE.read_text(encoding="utf-8")
    content = table(question, storage / "storage", digests)
    fidelity.PAGE.write_text(fidelity.rewrite(page, question.marker, content), encoding="utf-8")


if __name__ == "__main__":
    main()

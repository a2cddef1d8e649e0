"""Processor seconds that an evaluation takes beside the model: `python benchmarks/preparation.py`.

A trial of the study's suite loads tasks and texts, builds prompts, turns them into token ids, lays
them out as a tree, and makes metrics and samples of the scores, while the device waits. The script
takes the suite through all of that with a model whose scores cost nothing, each time in a process
of its own with one thread: without templates compiled once and without prepared files (`plain`),
then with them, for the first trial of a storage folder and for a later one. It checks that all
three asked for the same: the digest of all requests and samples.

Data sets come from `--data`, a folder as for `data.path`; those that it lacks are made up, with the
official numbers of rows (times `--scale`) and lengths like the real ones. `--tokenizer` is a
model's folder, by default the demo's.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

TASKS = "piqa,arc_easy,arc_challenge,hellaswag,winogrande,boolq,mmlu,mmlu_paper,wikitext"
WAYS = ("plain", "first", "later")
WINDOW = 32_768  # tokens, of Qwen3
TREE = "requests laid out as a tree"
CHECKING = "checking"  # that all ways asked for the same, which is no trial's work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with data sets, as for data.path")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "q3q/models/demo/dense")
    parser.add_argument("--tasks", default=TASKS, help="tasks, with commas")
    parser.add_argument("--texts", default="c4", help="texts, with commas; may be empty")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the rows to make up")
    parser.add_argument("--ways", default=",".join(WAYS), help="which of plain, first, later")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_trial(options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_up(folder / "data", options)
        found = {way: in_a_process(way, folder) for way in options.ways.split(",")}
        size = sum(path.stat().st_size for path in (folder / "storage").rglob("*.safetensors"))
    digests = {way: result.pop("digest") for way, result in found.items()}
    if len(set(digests.values())) > 1:
        raise SystemExit(f"the ways asked for different things: {digests}")
    parts = list(dict.fromkeys(part for result in found.values() for part in result))
    print(f"{'processor seconds':42}" + "".join(f"{way:>9}" for way in found))
    for part in parts:
        row = "".join(f"{result.get(part, 0):9.1f}" for result in found.values())
        print(f"{part:42}{row}")
    sums = "".join(f"{sum(result.values()):9.1f}" for result in found.values())
    print(f"{'sum':42}{sums}\nprepared files: {size / 1e6:.1f} MB; the same requests each time")


def in_a_process(way: str, scratch: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", way, "--scratch", str(scratch)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    environment = os.environ | threads | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class Clock:
    """Processor seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._before = time.process_time()

    def stop(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._before
        self._before = now


def one_trial(options: argparse.Namespace) -> dict[str, Any]:
    """Take the suite through everything but the model; return the seconds by part."""
    clock, sha = Clock(), hashlib.sha256()
    import torch

    from q3q.data import prepared
    from q3q.data.questions import Library
    from q3q.data.windows import evaluation_windows
    from q3q.evaluate import scorer, suites
    from q3q.evaluate.batches import batches
    from q3q.evaluate.harness import run
    from q3q.evaluate.version import EVALUATION_VERSION, lm_eval_version
    from q3q.models.checkpoint import load_tokenizer
    from q3q.placement import Placement, Trial
    from q3q.reporter import no_steps
    from q3q.spec import Evaluation, MethodRef, ModelRef, TaskRef, TrialSpec

    torch.set_num_threads(1)
    plain, data, storage = options.one == "plain", options.scratch / "data", options.scratch
    tokenizer = load_tokenizer(options.tokenizer)  # which imports transformers
    planned = json.loads((data / "planned.json").read_text(encoding="utf-8"))
    texts = tuple(text_ref(name, data, planned) for name in filter(None, options.texts.split(",")))
    shots = {"mmlu": 5}
    evaluation = Evaluation(
        texts=texts,
        tasks=tuple(TaskRef(name=name, shots=shots.get(name)) for name in options.tasks.split(",")),
        data=planned["data"],
        lm_eval=lm_eval_version(),
        version=EVALUATION_VERSION,
    )
    spec = TrialSpec(
        model=ModelRef(name="none", digest="none", dtype="bfloat16"),
        method=MethodRef(name="none", version=1),
        scheme=None,
        calibration=None,
        evaluation=evaluation,
        seed=0,
    )
    trial = Trial(spec, Placement(trials=storage / "storage" / "trials", data=data))
    clock.stop("importing torch, lm-eval and transformers")
    if plain:
        setattr(run, "templates_compiled_once", nullcontext)  # noqa: B010
    shelf = None if plain else prepared.Shelf.of(trial, tokenizer)
    for text in texts:
        for _ in range(2):  # for the baseline, and for the trial
            windows_NT = evaluation_windows(tokenizer, trial, text)
            if plain:
                shutil.rmtree(storage / "storage" / prepared.FOLDER)
        sha.update(windows_NT.numpy().tobytes())
        clock.stop(f"windows of {text.name}")

    def free(model: Any, requests: Any, budget: Any) -> Iterator[Any]:
        clock.stop(part)
        effort = lay_out(requests)
        clock.stop(TREE)
        for request in requests:
            sha.update(request.inputs.tobytes() + request.targets.tobytes())
        scores = free_scores(requests)
        clock.stop(CHECKING)
        yield scores, effort

    setattr(scorer, "score", free)  # noqa: B010
    facts = SimpleNamespace(max_positions=WINDOW)
    model: Any = SimpleNamespace(
        facts=facts, streamed=False, device=torch.device("cpu"), activations=None
    )
    for number, batch in enumerate(batches(evaluation)):
        part = ", ".join(batch.tasks)[:42]
        result = suites.score_batch(
            model,
            tokenizer,
            evaluation,
            batch,
            Library(data, dict(evaluation.data)),
            include=None,
            seed=0,
            journal=storage / f"journal_{options.one}" / str(number),
            identity="a model that costs nothing",
            steps=no_steps,
            shelf=shelf,
        )
        clock.stop(part)
        sha.update(json.dumps([result.metrics, result.samples]).encode())
        clock.stop(CHECKING)
    clock.seconds.pop(CHECKING)
    return {**clock.seconds, "digest": sha.hexdigest()}


def lay_out(requests: Any) -> Any:
    """Plan the batches of the requests' tree, as on a GPU, and run none."""
    from q3q.evaluate.scoring import Effort, Reads, pack_requests

    tree, readers = pack_requests(requests, varlen=True)
    reads = Reads.of(tree, readers, requests)
    while not tree.done:
        batch = tree.next_batch(1 << 16)
        reads.within(batch.first, batch.stop)
        tree.advance()
    return Effort(sum(len(request.inputs) for request in requests), len(tree))


def free_scores(requests: Any) -> list[Any]:
    """Give each request a number that follows from its tokens alone."""
    from q3q.evaluate.scoring import Score

    return [
        (number, Score(-1.0 - int(request.targets.sum()) % 97 / 7, False))
        for number, request in enumerate(requests)
    ]


def text_ref(name: str, data: Path, planned: dict[str, Any]) -> Any:
    from q3q.spec import TextRef

    drawn: dict[str, Any] = {"draw": "random", "samples": 256} if name == "c4" else {}
    digest = planned["texts"].get(name) or text_digest(name, data)
    return TextRef(name=name, source=name, digest=digest, window=2048, **drawn)


def text_digest(name: str, data: Path) -> str:
    from q3q.data.texts import load_text

    return load_text(name, split="evaluation", data=data).digest


def make_up(folder: Path, options: argparse.Namespace) -> None:
    """Link the user's data sets into a folder, make up the others, and note the identities."""
    from q3q.data.question_files import files_of
    from q3q.data.questions import Library
    from q3q.evaluate.catalogue import TASKS as KNOWN

    folder.mkdir()
    for path in sorted(options.data.absolute().iterdir()) if options.data else ():
        (folder / path.name).symlink_to(path)
    tasks = [KNOWN[name] for name in options.tasks.split(",")]
    draw, words = random.Random(0), made_up_words()
    for task in tasks:
        if task.data and not files_of(task.data[0], folder):
            for data_set, count in zip(task.data, task.questions, strict=True):
                rows = max(6, round(count * options.scale))
                write_rows(folder, data_set, task.examples_split, rows, draw, words)
    texts = list(filter(None, options.texts.split(",")))
    if "c4" in texts and not (folder / "c4").exists():
        (folder / "c4").mkdir()
        with gzip.open(folder / "c4/validation.json.gz", "wt", 1, encoding="utf-8") as file:
            for _ in range(45_576):
                text = some(draw, words, max(20, round(draw.expovariate(1 / 360))))
                file.write(json.dumps({"text": text}) + "\n")
    library = Library(folder, settle=True)
    for task in tasks:
        for data_set in task.data:
            library.identify(replace(data_set, splits=data_set.splits[:1]))
    planned = {
        "data": library.identities,
        "texts": {name: text_digest(name, folder) for name in texts},
    }
    (folder / "planned.json").write_text(json.dumps(planned), encoding="utf-8")


def made_up_words() -> list[str]:
    from q3q.models.demo.library import held_out_text
    from q3q.models.demo.stories import stories

    text = " ".join(story.full_text() for story in islice(stories(0, held_out=False), 300))
    return (text + " " + held_out_text()).split()


def some(draw: random.Random, words: list[str], count: int) -> str:
    start = draw.randrange(len(words) - min(count, 4000))
    return " ".join(words[start : start + count])


def write_rows(
    folder: Path,
    data_set: Any,
    examples: str | None,
    count: int,
    draw: random.Random,
    words: list[str],
) -> None:
    """Write a data set of the study in its official schema, with texts of about its lengths."""
    make = SCHEMAS[data_set.repository]
    place = folder / data_set.folders[0 if data_set.repository != "cais/mmlu" else 1]
    place.mkdir(parents=True, exist_ok=True)
    splits = {data_set.splits[0]: count} | ({examples: 5} if examples == "dev" else {})
    for split, rows in splits.items():
        lines = (json.dumps(make(draw, words, data_set.name)) + "\n" for _ in range(rows))
        (place / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _piqa(draw: random.Random, words: list[str], name: str) -> dict[str, Any]:
    goal, *ways = (some(draw, words, count) for count in (8, 20, 20))
    return {"goal": goal, "sol1": ways[0], "sol2": ways[1], "label": draw.randrange(2)}


def _arc(draw: random.Random, words: list[str], name: str) -> dict[str, Any]:
    choices = {"text": [some(draw, words, 4) for _ in range(4)], "label": list("ABCD")}
    answer = draw.choice("ABCD")
    return {"question": some(draw, words, 20), "choices": choices, "answerKey": answer}


def _hellaswag(draw: random.Random, words: list[str], name: str) -> dict[str, Any]:
    return {
        "activity_label": some(draw, words, 3),
        "ctx_a": some(draw, words, 50),
        "ctx_b": some(draw, words, 3),
        "endings": [some(draw, words, 21) for _ in range(4)],
        "label": str(draw.randrange(4)),
    }


def _winogrande(draw: random.Random, words: list[str], name: str) -> dict[str, Any]:
    sentence = f"{some(draw, words, 9)} _ {some(draw, words, 9)}"
    options = {"option1": some(draw, words, 1), "option2": some(draw, words, 1)}
    return {"sentence": sentence, **options, "answer": draw.choice("12")}


def _boolq(draw: random.Random, words: list[str], name: str) -> dict[str, Any]:
    passage, question = some(draw, words, 95), some(draw, words, 9)
    return {"passage": passage, "question": question, "label": draw.randrange(2)}


def _mmlu(draw: random.Random, words: list[str], name: str) -> dict[str, Any]:
    choices = [some(draw, words, 8) for _ in range(4)]
    question = some(draw, words, round(draw.expovariate(1 / 35)) + 5)
    return {"question": question, "choices": choices, "answer": draw.randrange(4), "subject": name}


def _page(draw: random.Random, words: list[str], name: str) -> dict[str, Any]:
    return {"page": some(draw, words, 3900)}


SCHEMAS = {
    "baber/piqa": _piqa,
    "allenai/ai2_arc": _arc,
    "Rowan/hellaswag": _hellaswag,
    "allenai/winogrande": _winogrande,
    "aps/super_glue": _boolq,
    "cais/mmlu": _mmlu,
    "EleutherAI/wikitext_document_level": _page,
}

if __name__ == "__main__":
    main()

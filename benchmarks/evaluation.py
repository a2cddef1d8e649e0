"""Our evaluation against lm-eval's HFLM and the plain perplexity loop: `python benchmarks/evaluation.py`.

Each side runs in a process of its own, with the same threads and the same requests, HFLM at the fastest of the batch
sizes it is tried with (not counted) and with its logits cache. Memory is the peak above the loaded model.

Models: the demo, and a random one with Qwen3-0.6B's widths and real vocabulary (`--blocks` of 28). Suites: real 5-shot
MMLU from the files of hendrycks/test (`--mmlu`), a generated one with HellaSwag's shape, and perplexity in windows.
The window is 8,192 tokens on both sides, since the demo's small vocabulary makes prompts longer than its own 2,048.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
WINDOW = 8192
BATCH_SIZES = (1, 2, 4, 8, 16)
# Whole subjects with short, middling and long prompts.
DEMO_SUBJECTS = "abstract_algebra,global_facts,us_foreign_policy,business_ethics,college_computer_science"


def mmlu(folder: Path, subjects: str) -> list[tuple[str, str]]:
    """Context and answer of each request, as lm-eval's mmlu template with num_fewshot=5 makes them."""

    def ask(row: list[str]) -> str:
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row[1:5], strict=True))
        return f"{row[0].strip()}\n{choices}Answer:"

    names = sorted(path.stem.removesuffix("_test") for path in (folder / "test").glob("*_test.csv"))
    requests = []
    for name in names if subjects == "all" else subjects.split(","):
        with (folder / "dev" / f"{name}_dev.csv").open(encoding="utf-8") as dev:
            shots = "".join(f"{ask(row)} {row[5]}\n\n" for row in list(csv.reader(dev))[:5])
        head = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        with (folder / "test" / f"{name}_test.csv").open(encoding="utf-8") as test:
            requests += [(head + shots + ask(row), f" {letter}") for row in csv.reader(test) for letter in "ABCD"]
    return requests


def hellaswag_shaped(count: int) -> list[tuple[str, str]]:
    """A label and about 75 tokens of context, four endings of about 27: HellaSwag's means."""
    from q3q.calibrate.sources import load_text

    words = load_text("demo", split="evaluation").joined.split()
    draw = random.Random(0)

    def some(mean: int) -> str:
        begin = draw.randrange(len(words) - 2 * mean)
        return " ".join(words[begin : begin + max(4, round(draw.gauss(mean, mean / 3)))])

    requests = []
    for _ in range(count):
        context = f"Playing: {some(58)}"
        requests += [(context, f" {some(21)}") for _ in range(4)]
    return requests


def windows_of(text_windows: int, length: int, tokenizer: object) -> object:
    from q3q.calibrate.sources import load_text
    from q3q.calibrate.windows import consecutive_windows, encoder

    return consecutive_windows(encoder(tokenizer)(load_text("demo", split="evaluation").joined), length, text_windows)


def status_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(side: str, folder: Path, suite: dict) -> dict:  # noqa: PLR0915
    """In a process of its own: load, warm up, run, and say seconds, peak memory and scores."""
    import torch
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM

    from q3q.evaluate.harness import HarnessLM
    from q3q.models.checkpoint import Checkpoint, load_tokenizer
    from q3q.models.decoder import load_decoder

    torch.set_num_threads(suite["threads"])
    tokenizer = load_tokenizer(folder)
    if side == "ours":
        model = load_decoder(Checkpoint(folder), getattr(torch, suite["dtype"]))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, suite["dtype"])).eval()
    notes = {}
    if suite["kind"] == "perplexity":
        windows = windows_of(suite["count"], suite["length"], tokenizer)
        warm = windows[:, :32]

        def run(chosen: torch.Tensor) -> list[float]:
            if side == "ours":
                from q3q.evaluate.perplexity import perplexity

                return [perplexity(model, chosen).nll]
            losses = []
            for window in chosen:
                logits = model(window[None]).logits[:, :-1].contiguous().float()
                losses.append(float(torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), window[1:])))
            return [sum(losses) / len(losses)]

    else:
        pairs = (
            mmlu(Path(suite["mmlu"]), suite["subjects"])
            if suite["kind"] == "mmlu"
            else hellaswag_shaped(suite["count"])
        )
        windows = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i, metadata=("benchmark", i, 1))
            for i, pair in enumerate(pairs)
        ]
        warm = windows[:4]
        if side == "ours":
            lm = HarnessLM(model, tokenizer, max_length=WINDOW)
        else:
            from lm_eval.models.huggingface import HFLM

            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW)
            trial = windows[: suite["trial"] * 4]
            rates = {}
            for size in BATCH_SIZES:
                lm.batch_size_per_gpu = size
                begin = time.perf_counter()
                lm.loglikelihood(trial, disable_tqdm=True)
                rates[size] = time.perf_counter() - begin
            lm.batch_size_per_gpu = min(rates, key=rates.get)
            notes["batch_size"] = lm.batch_size

        def run(chosen: list) -> list[float]:
            return [score for score, _ in lm.loglikelihood(chosen, disable_tqdm=True)]

    with torch.inference_mode():
        run(warm)
        if side == "ours" and suite["kind"] != "perplexity":
            run(windows[: suite["trial"] * 4])  # finds its batches by trying, as theirs were found
            lm.effort = type(lm.effort)()
        # What warming up and trying batch sizes have freed would else be taken for part of the loaded model.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        loaded = status_kilobytes("VmRSS")
        begin, worked = time.perf_counter(), time.process_time()
        scores = run(windows)
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    if side == "ours" and suite["kind"] != "perplexity":
        notes |= vars(lm.effort) | {"budget": lm.budget.tokens}
    return {
        "seconds": seconds,
        "cpu": worked,
        "peak": (status_kilobytes("VmHWM") - loaded) * 1024,
        "scores": scores,
        "notes": notes,
    }


def worker(side: str, folder: Path, suite: dict) -> dict:
    command = [sys.executable, __file__, "--worker", side, str(folder), json.dumps(suite)]
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(suite["threads"])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(title: str, folder: Path, suite: dict, turns: int) -> None:
    """Both take turns; of each, the fastest one counts."""
    pairs_of_turns = [[worker(side, folder, suite) for side in ("ours", "theirs")] for _ in range(turns)]
    ours, theirs = (min(found, key=lambda one: one["seconds"]) for found in zip(*pairs_of_turns, strict=True))
    pairs = list(zip(ours["scores"], theirs["scores"], strict=True))
    far = max(abs(a - b) / (1e-4 + 1e-6 * abs(b)) for a, b in pairs)
    apart = f"{far:.2f} of the tolerance"
    if suite["dtype"] != "float32":  # HFLM rounds each log-probability to the model's 16 bits, we do not
        apart = f"{max(abs(a - b) / abs(b) for a, b in pairs):.2%}"
    faster, lighter = theirs["seconds"] / ours["seconds"], ours["peak"] / theirs["peak"]
    print(
        f"{title}: {faster:.2f} x as fast ({theirs['cpu'] / ours['cpu']:.2f} in CPU time), {lighter:.2f} of the memory"
    )
    for side, found in (("ours", ours), ("theirs", theirs)):
        figures = f"{found['seconds']:8.2f} s {found['cpu']:8.2f} s CPU {found['peak'] / 1e6:8.0f} MB"
        print(f"  {side:>6} {figures}   {found['notes'] or ''}")
    print(f"  largest difference {apart}", end="")
    if notes := ours["notes"]:
        print(
            f"; tokens asked / computed {notes['asked'] / notes['computed']:.2f}, computed / unique "
            f"{notes['computed'] / notes['unique']:.3f}, logits / asked {notes['logits'] / notes['asked']:.3f}, "
            f"padding {notes['padded'] / notes['attended']:.1%} in attention, none elsewhere",
            end="",
        )
    print(flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmlu", type=Path, help="folder of hendrycks/test with dev/ and test/; without, no MMLU")
    parser.add_argument("--turns", type=int, default=1, help="of each side; the fastest one counts")
    parser.add_argument("--subjects", default=DEMO_SUBJECTS, help="for the demo model; `all` takes hours for HFLM")
    parser.add_argument("--shape-subjects", default="abstract_algebra", help="for the 0.6B-shaped model")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the 0.6B-shaped model, 28 in the real one")
    parser.add_argument("--shape-dtype", default="bfloat16", help="of the 0.6B-shaped model; as Qwen3 is released")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", default="demo,shape")
    parser.add_argument("--suites", default="mmlu,hellaswag,perplexity")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shape = Path(scratch) / "shape"
        if "shape" in options.models:
            from benchmarks.trial import make_model

            make_model(shape, options.blocks)
        for model in options.models.split(","):
            demo = model == "demo"
            folder = ROOT / "q3q/models/demo/dense" if demo else shape
            subjects = options.subjects if demo else options.shape_subjects
            suites = {
                "mmlu": {"kind": "mmlu", "mmlu": str(options.mmlu), "subjects": subjects, "trial": 16 if demo else 2},
                "hellaswag": {"kind": "hellaswag", "count": 200 if demo else 12, "trial": 16 if demo else 2},
                "perplexity": {"kind": "perplexity", "count": 32 if demo else 2, "length": 1024},
            }
            for name in options.suites.split(","):
                if name == "mmlu" and (options.mmlu is None or not options.mmlu.is_dir()):
                    print("mmlu left out: give its folder as --mmlu")
                    continue
                dtype = "float32" if demo else options.shape_dtype
                compare(
                    f"{model}, {name}",
                    folder,
                    suites[name] | {"threads": options.threads, "dtype": dtype},
                    options.turns,
                )


if __name__ == "__main__":
    main()

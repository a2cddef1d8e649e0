"""Compare q3q's evaluation with lm-eval's HFLM and a plain perplexity loop.

`python benchmarks/evaluation.py`. Each side runs in its own process, with the same threads and
requests; HFLM uses its logits cache and the fastest of several batch sizes (the search for it is
not counted). Memory is the peak above the loaded model. With `--device cuda` each side is one
process for all suites, and memory is what torch allocates on the GPU.

Models: the demo, and random ones with the widths and vocabulary of Qwen3-0.6B or 8B (`--blocks`,
of 28 or 36). Suites: real 5-shot MMLU from the files of hendrycks/test (`--mmlu`), a generated one
with HellaSwag's shape, and perplexity in windows. Both sides use a window of 8,192 tokens, since
the demo's small vocabulary makes prompts longer than its own 2,048.
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
from multiprocessing import Process
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.trial import ROOT, make_model

if TYPE_CHECKING:
    import torch

WINDOW = 8192
BATCH_SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (16, 64, 128, 256)}
# Whole subjects with short, middling and long prompts.
DEMO_SUBJECTS = (
    "abstract_algebra,global_facts,us_foreign_policy,business_ethics,college_computer_science"
)


def mmlu(folder: Path, subjects: str, every: int = 1) -> list[tuple[str, str]]:
    """Context and answer of each request, as lm-eval's mmlu template with num_fewshot=5 makes them.

    every: use each so-manieth question of a subject. Fewer questions share the cost of the five
        examples less.
    """

    def ask(row: list[str]) -> str:
        choices = "".join(
            f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row[1:5], strict=True)
        )
        return f"{row[0].strip()}\n{choices}Answer:"

    names = sorted(path.stem.removesuffix("_test") for path in (folder / "test").glob("*_test.csv"))
    requests = []
    for name in names if subjects == "all" else subjects.split(","):
        with (folder / "dev" / f"{name}_dev.csv").open(encoding="utf-8") as dev:
            shots = "".join(f"{ask(row)} {row[5]}\n\n" for row in list(csv.reader(dev))[:5])
        subject = name.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        with (folder / "test" / f"{name}_test.csv").open(encoding="utf-8") as test:
            asked = list(csv.reader(test))[::every]
            requests += [
                (head + shots + ask(row), f" {letter}") for row in asked for letter in "ABCD"
            ]
    return requests


def hellaswag_shaped(count: int) -> list[tuple[str, str]]:
    """A label and about 75 tokens of context, four endings of about 27: HellaSwag's means."""
    from q3q.data.texts import load_text

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


def windows_of(text_windows: int, length: int, tokenizer: Any) -> "torch.Tensor":
    from q3q.data.texts import load_text
    from q3q.data.windows import consecutive_windows, encoder

    return consecutive_windows(
        encoder(tokenizer)(load_text("demo", split="evaluation").joined), length, text_windows
    )


def status_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


class Meter:
    """Seconds, processor seconds, and bytes at the peak beyond those of the loaded model."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = torch.cuda if device == "cuda" else None

    def __enter__(self) -> "Meter":
        # Memory freed by warming up and trying batch sizes must not count as the loaded model's.
        gc.collect()
        if self.cuda:
            self.cuda.synchronize()
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()
            self.before = self.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
            self.before = status_kilobytes("VmRSS")
        self.seconds, self.processor = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            self.cuda.synchronize()
        self.seconds += time.perf_counter()
        self.processor += time.process_time()
        self.peak = (
            self.cuda.max_memory_allocated() - self.before
            if self.cuda
            else (status_kilobytes("VmHWM") - self.before) * 1024
        )


def measure(side: str, folder: Path, suites: list[dict[str, Any]]) -> list[dict]:
    """Load the model, and warm up and measure each suite; runs in its own process."""
    import torch
    from transformers import AutoModelForCausalLM

    from q3q.models.checkpoint import Checkpoint, load_tokenizer
    from q3q.models.decoder import load_decoder

    device, dtype = suites[0]["device"], getattr(torch, suites[0]["dtype"])
    torch.set_num_threads(suites[0]["threads"])
    tokenizer = load_tokenizer(folder)
    if side == "ours":
        model = load_decoder(Checkpoint(folder), dtype, device)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    with torch.inference_mode():
        found = []
        for suite in suites:
            kind = perplexity_suite if suite["kind"] == "perplexity" else requests_suite
            found.append(kind(side, model, tokenizer, suite))
        return found


def perplexity_suite(side: str, model: Any, tokenizer: Any, suite: dict[str, Any]) -> dict:
    import torch

    from q3q.evaluate.perplexity import perplexity

    windows = windows_of(suite["count"], suite["length"], tokenizer)

    def run(chosen: torch.Tensor) -> list[float]:
        if side == "ours":
            return [perplexity(model, chosen).nll]
        losses = []
        for window in chosen.to(suite["device"]):
            logits = model(window[None]).logits[:, :-1].contiguous().float()
            losses.append(
                torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), window[1:])
            )
        return [float(torch.stack(losses).mean())]

    run(windows[:, :32] if suite["device"] == "cpu" else windows[:4])
    with Meter(suite["device"]) as meter:
        scores = run(windows)
    return said(meter, scores, {})


def requests_suite(side: str, model: Any, tokenizer: Any, suite: dict[str, Any]) -> dict:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from q3q.evaluate.harness.lm import HarnessLM

    of_mmlu = suite["kind"] == "mmlu"
    pairs = (
        mmlu(Path(suite["mmlu"]), suite["subjects"], suite["every"])
        if of_mmlu
        else hellaswag_shaped(suite["count"])
    )
    requests = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=pair,
            idx=i,
            metadata=("benchmark", i, 1),
        )
        for i, pair in enumerate(pairs)
    ]
    trial, notes = requests[: suite["trial"] * 4], {}
    if side == "ours":
        lm = HarnessLM(model, tokenizer, max_length=WINDOW)
        lm.loglikelihood(trial)  # finds its batches by trying, as theirs are found
        lm.loglikelihood(trial)
        lm.scorer.effort = type(lm.scorer.effort)()
    else:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW)
        lm.batch_size_per_gpu = fastest_batch(lm, trial, suite["device"])
        notes["batch_size"] = lm.batch_size
    with Meter(suite["device"]) as meter:
        scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    if side == "ours":
        notes |= vars(lm.scorer.effort) | {"budget": lm.scorer.budget.tokens}
    return said(meter, scores, notes)


def fastest_batch(lm: Any, trial: list, device: str) -> int:
    """Of HFLM's batch sizes; one that does not fit into memory is not."""
    import torch

    lm.loglikelihood(trial[:4], disable_tqdm=True)
    rates = {}
    for size in BATCH_SIZES[device]:
        lm.batch_size_per_gpu = size
        begin = time.perf_counter()
        try:
            lm.loglikelihood(trial, disable_tqdm=True)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        rates[size] = time.perf_counter() - begin
    return min(rates, key=rates.__getitem__)


def said(meter: Meter, scores: list[float], notes: dict) -> dict:
    return {
        "seconds": meter.seconds,
        "cpu": meter.processor,
        "peak": meter.peak,
        "scores": scores,
        "notes": notes,
    }


def worker(side: str, folder: Path, suites: list[dict[str, Any]]) -> list[dict]:
    command = [sys.executable, __file__, "--worker", side, str(folder), json.dumps(suites)]
    threads = str(suites[0]["threads"])
    environment = {
        **os.environ,
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
    }
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr.decode()[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_all(model: str, folder: Path, suites: dict[str, dict], turns: int) -> None:
    """Both take turns, on a CPU suite by suite; of each, the fastest turn counts."""
    groups = (
        [list(suites)]
        if next(iter(suites.values()))["device"] == "cuda"
        else [[name] for name in suites]
    )
    for names in groups:
        chosen = [suites[name] for name in names]
        taken = [
            [worker(side, folder, chosen) for side in ("ours", "theirs")] for _ in range(turns)
        ]
        for n, name in enumerate(names):
            sides = [[turn[side][n] for turn in taken] for side in (0, 1)]
            ours, theirs = (min(found, key=lambda one: one["seconds"]) for found in sides)
            compare(f"{model}, {name}", ours, theirs, suites[name]["dtype"])


def compare(title: str, ours: dict, theirs: dict, dtype: str) -> None:
    pairs = list(zip(ours["scores"], theirs["scores"], strict=True))
    far = max(abs(a - b) / (1e-4 + 1e-6 * abs(b)) for a, b in pairs)
    apart = f"{far:.2f} of the tolerance"
    if dtype != "float32":  # HFLM rounds each log-probability to the model's 16 bits, we do not
        apart = f"{max(abs(a - b) / abs(b) for a, b in pairs):.2%}"
    faster, lighter = theirs["seconds"] / ours["seconds"], ours["peak"] / theirs["peak"]
    print(
        f"{title}: {faster:.2f} x as fast ({theirs['cpu'] / ours['cpu']:.2f} in CPU time), "
        f"{lighter:.2f} of the memory"
    )
    for side, found in (("ours", ours), ("theirs", theirs)):
        figures = (
            f"{found['seconds']:8.2f} s {found['cpu']:8.2f} s CPU {found['peak'] / 1e6:8.0f} MB"
        )
        print(f"  {side:>6} {figures}   {found['notes'] or ''}")
    print(f"  largest difference {apart}", end="")
    if notes := ours["notes"]:
        print(
            f"; tokens asked / computed {notes['asked'] / notes['computed']:.2f}, "
            f"computed / unique {notes['computed'] / notes['unique']:.3f}, "
            f"logits / asked {notes['logits'] / notes['asked']:.3f}, "
            f"padding {notes['padded'] / notes['attended']:.1%} in attention, none elsewhere",
            end="",
        )
    print(flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mmlu", type=Path, help="folder of hendrycks/test with dev/ and test/; without, no MMLU"
    )
    parser.add_argument("--turns", type=int, default=1, help="of each side; the fastest one counts")
    parser.add_argument(
        "--subjects", default=DEMO_SUBJECTS, help="for the demo model; `all` takes HFLM an hour"
    )
    parser.add_argument(
        "--every", type=int, default=1, help="of so many questions of a subject one"
    )
    parser.add_argument(
        "--shape-subjects", default="abstract_algebra", help="for the random models"
    )
    parser.add_argument(
        "--blocks",
        type=int,
        help="blocks of the random models; 2 on a CPU, the real number on a GPU",
    )
    parser.add_argument(
        "--shape-dtype", default="bfloat16", help="of the random models; as Qwen3 is released"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--questions", type=int, default=2000, help="of the HellaSwag-shaped suite on a GPU"
    )
    parser.add_argument("--models", default="demo,0.6B", help="of demo, 0.6B, 8B")
    parser.add_argument("--suites", default="mmlu,hellaswag,perplexity")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            demo = model == "demo"
            folder = ROOT / "q3q/models/demo/dense" if demo else Path(scratch)
            if not demo:
                blocks = options.blocks or (None if cuda else 2)
                made = Process(target=make_model, args=(folder, blocks, model))
                made.start()  # its own process: what it holds of a GPU would be missing to HFLM
                made.join()
            few = demo or cuda
            suites = {
                "mmlu": {
                    "mmlu": str(options.mmlu),
                    "subjects": options.subjects if demo else options.shape_subjects,
                    "every": options.every,
                    "trial": 64 if cuda else 16 if demo else 2,
                },
                "hellaswag": {
                    "count": options.questions if cuda else 200 if demo else 12,
                    "trial": 128 if cuda else 16 if few else 2,
                },
                "perplexity": {"count": 32 if few else 2, "length": 1024},
            }
            shared = {"threads": options.threads, "device": options.device}
            shared["dtype"] = "float32" if demo and not cuda else options.shape_dtype
            chosen = {
                name: {"kind": name, **suites[name], **shared} for name in options.suites.split(",")
            }
            if "mmlu" in chosen and (options.mmlu is None or not options.mmlu.is_dir()):
                print("mmlu left out: give its folder as --mmlu")
                del chosen["mmlu"]
            compare_all(model, folder, chosen, options.turns)


if __name__ == "__main__":
    main()

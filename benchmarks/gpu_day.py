"""Ten minutes on one GPU: is each fast path right, and where does the time go?

`python benchmarks/gpu_day.py [--minutes 10] [--only PART ...]` needs an NVIDIA GPU. It

- `checks` each fast path against its plain twin;
- times each phase of models of the `0.6B`, `8B` and `30B-A3B` shapes: random weights made on the
  spot, one block first, then as many as fit the time and the memory; seconds of the whole model
  follow from the number of its blocks;
- runs BiLLM to its end on the 0.6B shape;
- puts two tasks on one GPU under Ray (`ray`), and lets a task run out of memory, which is tried
  again with more;
- lets an evaluation run out of `memory`, which goes on with smaller batches.

It prints tables for docs/BENCHMARKS.md, and exits 1 if a check failed. Nothing begins once the
minutes are over, nor a phase of several blocks that would end later, by what it took on one; what
is left out is named. `--small` runs the same phases on a CPU with tiny shapes: it says that the
script works, and nothing about a GPU.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import gpu_checks
from q3q import limits
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.perplexity import perplexity
from q3q.evaluate.scoring import Request, score
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.disk_names import disk_shapes
from q3q.models.facts import ModelFacts, read_facts
from q3q.quantize import walk
from q3q.quantize.activations import activations_of
from q3q.quantize.block_store import BlockStore
from q3q.quantize.method import Method
from q3q.quantize.methods import gptq
from q3q.quantize.methods.awq import Awq
from q3q.quantize.methods.billm import Billm
from q3q.quantize.methods.gptq import Gptq
from q3q.quantize.methods.settings import AwqSettings, BillmSettings, GptqSettings
from q3q.quantize.site_errors import SquaredErrors
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Task

SHARED = {
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 151_936,
}


def _config(
    hidden: int, heads: int, kv_heads: int, inner: int, layers: int, **more: Any
) -> dict[str, Any]:
    return SHARED | {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        **more,
    }


EXPERTS = {"model_type": "qwen3_moe", "norm_topk_prob": True}
SHAPES = {
    "0.6B": _config(1024, 16, 8, 3072, 28, tie_word_embeddings=True),
    "8B": _config(4096, 32, 8, 12_288, 36),
    "30B-A3B": _config(
        2048, 32, 4, 6144, 48, **EXPERTS, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
}  # fmt: skip
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
TINY |= {"intermediate_size": 128, "vocab_size": 512, "moe_intermediate_size": 64}
TINY |= {"num_hidden_layers": 2}
TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
PARTS = ("checks", *SHAPES, "ray", "memory")
# Blocks that say more than one, where they fit: the second one reads what the first has changed.
LEAST_BLOCKS = {"0.6B": 4, "8B": 2, "30B-A3B": 2}
# Seconds that the parts after the shapes may take.
LAST_PARTS = {"ray": 60.0, "memory": 5.0}
# Bytes beside a model, as parts of its weights: a second copy and codes; files, and one block more.
MEMORY_FACTOR, DISK_FACTOR = 2.5, 1.5


@dataclass(frozen=True)
class Scale:
    """How much is run: windows of some length for calibration, the first of which are evaluated."""

    device: torch.device
    sizes: gpu_checks.Sizes
    small: bool
    windows: int
    length: int
    group_size: int

    def scheme(self, bits: int) -> Scheme:
        return Scheme(bits=bits, group_size=self.group_size, symmetric=False)

    def config(self, shape: str) -> dict[str, Any]:
        """Return the config of the whole model."""
        config = SHAPES[shape]
        if self.small:
            config = config | TINY | (TINY_EXPERTS if "num_experts" in config else {})
        return config


LARGE_SCALE = partial(
    Scale, sizes=gpu_checks.LARGE, small=False, windows=128, length=2048, group_size=128
)
SMALL_SCALE = partial(
    Scale, sizes=gpu_checks.SMALL, small=True, windows=8, length=32, group_size=32
)


@dataclass(frozen=True)
class Deadline:
    """The moment, on the monotonic clock, when all should have ended."""

    end: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the seconds until then."""
        return self.end - time.monotonic()

    def earlier(self, seconds: float) -> "Deadline":
        return Deadline(self.end - seconds)


@dataclass
class Phases:
    """Seconds by phase, each measured until the device is done."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    @contextmanager
    def inside_a_walk(self) -> Iterator[None]:
        """Time what the walk calls for Gram matrices, factors, columns and errors."""
        with ExitStack() as stack:
            for home, name, phase in (
                (walk, "show_inputs", "Gram matrices"),
                (gptq, "factored_columns", "factors"),
                (gptq, "round_rows", "columns"),
                (SquaredErrors, "of", "errors for the record"),
            ):
                stack.enter_context(patch.object(home, name, self._timing(home, name, phase)))
            yield

    def _timing(self, home: Any, name: str, phase: str) -> Callable[..., Any]:
        plain = getattr(home, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self.timed(phase):
                return plain(*arguments, **options)

        return call

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Row:
    """A phase of one shape: what the blocks that ran took, and what the whole model would."""

    shape: str
    phase: str
    ran: str = ""
    whole: str = ""


class Kept:
    """A sink of blocks that keeps the last one, to be stored apart."""

    def __init__(self) -> None:
        self.last: Any = None

    def load(self, index: int) -> None:
        return None

    def store(self, block: Any) -> None:
        self.last = block


def random_checkpoint(folder: Path, config: dict[str, Any], device: torch.device) -> None:
    """Write a model of random weights as the Hub has it."""
    facts = read_facts(config)
    folder.mkdir()
    shapes = {
        f"model.layers.{k}.{name}": shape
        for k in range(facts.layers)
        for name, shape in disk_shapes(facts, k).items()
    }
    shapes |= {"model.embed_tokens.weight": (facts.vocab, facts.hidden)}
    shapes |= {"model.norm.weight": (facts.hidden,)}
    if not facts.tied:
        shapes |= {"lm_head.weight": (facts.vocab, facts.hidden)}

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        wide = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return wide.normal_(std=shape[-1] ** -0.5).cpu()

    save_file({n: weight(n, s) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


class Subject:
    """The first blocks of a shape with random weights, and the phases that are timed on them."""

    def __init__(self, shape: str, scale: Scale, blocks: int, folder: Path) -> None:
        self.shape, self.scale, self.blocks, self.folder = shape, scale, blocks, folder
        config = scale.config(shape)
        self.config = config | {"num_hidden_layers": blocks}
        self.facts = read_facts(self.config)
        self.by_blocks = config["num_hidden_layers"] / blocks
        self.by_bytes = read_facts(config).weight_bytes() / self.facts.weight_bytes()
        self.ids = torch.randint(self.facts.vocab, (scale.windows, scale.length))
        self.sink = Kept()

    def phases(self) -> dict[str, Callable[[], Iterator[Row]]]:
        """Return the phases in their order."""
        named: dict[str, Callable[[], Iterator[Row]]] = {
            "weights": self._write,
            "load": self._load,
            "forward": self._forward,
            "GPTQ in parts": self._gptq_in_parts,
            "GPTQ in all": self._gptq,
            "store": self._store,
            "AWQ": partial(self._other, "AWQ", Awq(AwqSettings()), 4),
            "BiLLM": partial(self._other, "BiLLM", Billm(BillmSettings()), 1),
            "perplexity": self._perplexity,
            "questions": self._questions,
        }
        if self.shape != "0.6B":
            del named["BiLLM"]
        return named

    def expected(self, phase: str, seconds: Mapping[str, float]) -> float:
        """Return the seconds of a phase here, given those of the same phases on one block."""
        if phase in ("weights", "load"):
            one = read_facts(self.config | {"num_hidden_layers": 1}).weight_bytes()
            return seconds.get(phase, 0.0) * self.facts.weight_bytes() / one
        return seconds.get(phase, 0.0) * (1 if phase == "store" else self.blocks)

    def run(self, deadline: Deadline, seconds: dict[str, float]) -> Iterator[Row]:
        """Run the phases that fit, and name those that do not.

        Args:
            seconds: of the phases on one block, as far as they are known; one block notes its own.
        """
        left_out: list[str] = []
        for name, phase in self.phases().items():
            needed = {"weights", "load", *(["GPTQ in all"] if name == "store" else [])}
            if needed & {*left_out} or self.expected(name, seconds) >= deadline.left():
                left_out.append(name)
                continue
            begin = time.monotonic()
            yield from phase()
            if self.blocks == 1:
                seconds[name] = time.monotonic() - begin
        if left_out:
            yield Row(self.shape, f"left out for want of time: {', '.join(left_out)}")

    def _row(self, phase: str, seconds: float, times: float | None = None) -> Row:
        whole = "" if times is None else f"{times * seconds:.1f} s"
        return Row(self.shape, phase, f"{seconds:.2f} s", whole)

    def _write(self) -> Iterator[Row]:
        if not self.folder.exists():
            random_checkpoint(self.folder, self.config, self.scale.device)
        self.checkpoint = Checkpoint(self.folder)
        yield from ()

    def _decoder(self) -> Decoder:
        return load_decoder(self.checkpoint, torch.bfloat16, self.scale.device)

    def _load(self) -> Iterator[Row]:
        phases = Phases(self.scale.device)
        with phases.timed("load"):
            self.model = self._decoder()
        yield self._row("load", phases.seconds["load"], self.by_bytes)

    def _walk_rows(self, phases: Phases) -> Iterator[Row]:
        for name, seconds in phases.seconds.items():
            yield self._row(f"{name}, {self.ids.numel():,} tokens", seconds, self.by_blocks)

    def _forward(self) -> Iterator[Row]:
        phases, hidden = Phases(self.scale.device), activations_of(self.model, self.ids).hidden
        with phases.timed("forward"):
            for b in range(len(hidden)):
                for block in self.model.blocks:
                    hidden[b] = block(hidden[b], self.model.rope)
        hidden.close()
        yield from self._walk_rows(phases)

    def _gptq_in_parts(self) -> Iterator[Row]:
        phases, scheme = Phases(self.scale.device), self.scale.scheme(bits=4)
        with phases.inside_a_walk():
            quantize_model(self.model.copy(), Gptq(GptqSettings()), scheme, self.ids, self.sink)
        yield from self._walk_rows(phases)

    def _gptq(self) -> Iterator[Row]:
        phases, scheme = Phases(self.scale.device), self.scale.scheme(bits=4)
        with phases.timed("GPTQ in all"):
            quantize_model(self.model, Gptq(GptqSettings()), scheme, self.ids, self.sink)
        yield from self._walk_rows(phases)

    def _store(self) -> Iterator[Row]:
        phases = Phases(self.scale.device)
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as folder:
            store = BlockStore(Path(folder))
            with phases.timed("store"):
                store.store(self.sink.last)
                store.settle()  # what is written behind the walk
        self.sink.last = None
        layers = self.by_blocks * self.blocks
        yield self._row("store of one block", phases.seconds["store"], layers)

    def _other(self, name: str, method: Method, bits: int) -> Iterator[Row]:
        phases, again = Phases(self.scale.device), self._decoder()
        few = self.ids[: max(4, len(self.ids) // 4)]  # AWQ's default calibration is so long
        with phases.timed(name):
            quantize_model(again, method, self.scale.scheme(bits), few, Kept())
        yield self._row(f"{name}, {few.numel():,} tokens", phases.seconds[name], self.by_blocks)

    def _perplexity(self) -> Iterator[Row]:
        phases, few = Phases(self.scale.device), self.ids[:16]
        with phases.timed("perplexity"):
            found = perplexity(self.model, few)
        assert found.nll > 0  # false for NaN
        name = f"perplexity of {few.numel():,} tokens, head included"
        yield self._row(name, phases.seconds["perplexity"])

    def _questions(self) -> Iterator[Row]:
        phases = Phases(self.scale.device)
        requests = _requests(self.facts, max(4, self.ids.numel() // 1024))
        with phases.timed("scoring"):
            for _ in score(self.model, requests, TokenBudget.measured(self.model)):
                pass
        yield self._row(f"{len(requests)} questions of 400 tokens", phases.seconds["scoring"])


def time_shape(shape: str, scale: Scale, deadline: Deadline, share: float) -> Iterator[Row]:
    """Time each phase on one block of a shape, then on as many as fit.

    Args:
        share: the seconds that this shape may take, unless the least number of blocks takes more.
    """
    within = Deadline.after(share)
    with tempfile.TemporaryDirectory(prefix="q3q_gpu_day_") as scratch:
        room = blocks_in_memory(shape, scale, Path(scratch))
        seconds, rows = time_one_block(shape, scale, deadline, Path(scratch) / "one")

        def cost(blocks: int) -> float:
            subject = Subject(shape, scale, blocks, Path(scratch) / "more")
            return sum(subject.expected(name, seconds) for name in subject.phases())

        least = min(LEAST_BLOCKS[shape], room)
        blocks = blocks_that_fit(cost, least, room, within.left(), deadline.left())
        if seconds:
            whole = scale.config(shape)["num_hidden_layers"]
            yield Row(shape, "blocks", str(blocks), str(whole))
        if blocks > 1:
            larger = Subject(shape, scale, blocks, Path(scratch) / "more")
            yield from larger.run(deadline, seconds)
        else:
            yield from rows


def time_one_block(
    shape: str, scale: Scale, deadline: Deadline, folder: Path
) -> tuple[dict[str, float], list[Row]]:
    """Return the seconds of each phase that fits on one block, and its rows.

    A pass over a few windows comes first, in which kernels are compiled.
    """
    few, seconds = replace(scale, windows=max(1, scale.windows // 16)), dict[str, float]()
    list(Subject(shape, few, 1, folder).run(deadline, seconds))
    writing = seconds.get("weights", 0.0)
    rows = list(Subject(shape, scale, 1, folder).run(deadline, seconds))
    if seconds:
        seconds["weights"] = writing  # the second time, they were there
    shutil.rmtree(folder, ignore_errors=True)
    return seconds, rows


def blocks_that_fit(
    cost: Callable[[int], float], least: int, most: int, share: float, left: float
) -> int:
    """Return how many blocks to time.

    Args:
        cost: returns the seconds that so many blocks take.
        least: take so many if they fit the time that is `left`, though they exceed the `share`.
    """
    fitting = [n for n in range(1, most + 1) if cost(n) <= (left if n <= least else share)]
    return max(fitting, default=1)


def blocks_in_memory(shape: str, scale: Scale, scratch: Path) -> int:
    """Return how many blocks of a shape the machine's memory and disk hold."""
    memory = limits.free_memory()
    if scale.device.type == "cuda":
        memory = min(memory, torch.cuda.mem_get_info(scale.device)[0])
    disk = shutil.disk_usage(scratch).free
    config = scale.config(shape)

    def holds(blocks: int) -> bool:
        weights = read_facts(config | {"num_hidden_layers": blocks}).weight_bytes()
        return MEMORY_FACTOR * weights <= memory and DISK_FACTOR * weights <= disk

    return max(filter(holds, range(1, config["num_hidden_layers"] + 1)), default=1)


def _requests(facts: ModelFacts, count: int) -> list[Request]:
    random = np.random.default_rng(0)
    rows = random.integers(0, facts.vocab, (count, 400), dtype=np.int32)
    return [Request(row[:-1], row[-1:], "gpu_day") for row in rows]


def out_of_memory(scale: Scale) -> gpu_checks.Result:
    """Have a batch ask for more memory than there is, as one that is too large does."""
    asked: list[int] = []

    def attempt(tokens: int) -> tuple[int, int]:
        asked.append(tokens)
        if tokens > 256:
            take_all_memory(scale.device.type)
        return tokens, tokens

    found = TokenBudget(1024, most=1024).run(attempt)
    passed = (found, asked) == (256, [1024, 512, 256])
    return gpu_checks.Result("a batch too large is halved", passed, f"tokens tried: {asked}")


def take_all_memory(device: str) -> None:
    torch.empty(2**50, dtype=torch.uint8, device=device)


def under_ray(scale: Scale) -> Iterator[gpu_checks.Result]:
    """Put two tasks on one GPU; let one run out of memory, which then runs with more."""
    device, gpus = scale.device.type, int(scale.device.type == "cuda")

    def share(_: Any) -> tuple[float, float, float]:
        import time

        import torch

        begin = time.time()
        x = torch.randn(512, 512, device=device)
        while time.time() - begin < 2:
            x = (x @ x).clamp(-1, 1)
        return begin, time.time(), float(x.abs().max())

    def too_large(_: Any) -> str:
        import torch

        torch.empty(2**50, dtype=torch.uint8, device=device)
        return "not out of memory"

    half = Resources(cpus=1, gpus=gpus / 2)
    larger = Task(key="memory", call=lambda _: "with more", resources=Resources(cpus=1, gpus=gpus))
    tasks = [Task(key=key, call=share, resources=half) for key in ("one", "other")]
    tasks.append(Task(key="memory", call=too_large, resources=half, larger=larger))
    with Cluster(cpus=2, gpus=gpus) as cluster:
        outcomes = {outcome.key: outcome for outcome in cluster.run(tasks, lambda *_: None, None)}
    ends = [outcomes[key].value for key in ("one", "other")]
    together = all(ends) and ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]
    errors = [str(outcome.error) for outcome in outcomes.values() if outcome.error]
    what = "a GPU's two halves" if gpus else "two tasks"
    yield gpu_checks.Result(
        f"Ray: {what} at the same time", together, "; ".join(errors) or "they overlapped"
    )
    retried = outcomes["memory"]
    yield gpu_checks.Result(
        "Ray: out of memory is tried again with more",
        retried.value == "with more" and retried.attempts == 2,
        f"attempts: {retried.attempts}, value: {retried.value}",
    )


HEADS = {
    "check": "| check | | |\n|---|---|---|",
    "shape": "| shape | phase | blocks that ran | whole model |\n|---|---|---|---|",
}


class Tables:
    """What is printed: a row at a time, a new head where the kind of row changes."""

    def __init__(self) -> None:
        self.failed, self.shown = 0, ""

    def show(self, result: gpu_checks.Result | Row) -> None:
        if isinstance(result, Row):
            kind, *cells = "shape", result.shape, result.phase, result.ran, result.whole
        else:
            passed = "yes" if result.passed else "NO"
            kind, *cells = "check", result.name, passed, result.detail
            self.failed += not result.passed
        if kind != self.shown:
            print(f"\n{HEADS[kind]}")
            self.shown = kind
        print(f"| {' | '.join(cells)} |", flush=True)

    def note(self, line: str) -> None:
        print(f"\n{line}", flush=True)
        self.shown = ""


def run_parts(wanted: list[str], scale: Scale, deadline: Deadline, tables: Tables) -> None:
    """Run the parts that fit, each shape for an equal share of what the ones before left."""
    after = deadline.earlier(sum(LAST_PARTS[part] for part in wanted if part in LAST_PARTS))
    shapes = [part for part in wanted if part in SHAPES]
    for part in wanted:
        until = deadline.earlier(LAST_PARTS[part]) if part in LAST_PARTS else after
        if until.left() <= 0:
            tables.note(f"{part}: left out for want of time")
        elif part in SHAPES:
            share = until.left() / (len(shapes) - shapes.index(part))
            for row in time_shape(part, scale, until, share):
                tables.show(row)
        elif part == "checks":
            left_out = []
            for name in gpu_checks.CHECKS:
                if until.left() > 0:
                    tables.show(gpu_checks.result(name, scale.device, scale.sizes))
                else:
                    left_out.append(name)
            if left_out:
                tables.note(f"checks left out for want of time: {', '.join(left_out)}")
        elif part == "ray":
            for result in under_ray(scale):
                tables.show(result)
        else:
            tables.show(out_of_memory(scale))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="that all may take")
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args(arguments)
    if not asked.small and not torch.cuda.is_available():
        print("gpu_day: there is no GPU here; --small runs the same phases on the CPU", flush=True)
        return 2
    device = torch.device("cpu" if asked.small else "cuda")
    scale: Scale = (SMALL_SCALE if asked.small else LARGE_SCALE)(device)
    name = platform.machine() if asked.small else torch.cuda.get_device_name()
    print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    begin, tables = time.monotonic(), Tables()
    torch.manual_seed(0)
    with torch.inference_mode():
        wanted = [part for part in PARTS if part in asked.only]
        run_parts(wanted, scale, Deadline.after(60 * asked.minutes), tables)
    minutes = (time.monotonic() - begin) / 60
    tables.note(f"{tables.failed} failed; {minutes:.1f} of {asked.minutes:g} minutes")
    return int(tables.failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Ten minutes on one GPU: is each fast path right, and where does the time go?

`python benchmarks/gpu_day.py [--minutes 10] [--only PART ...]` needs an NVIDIA GPU. It

- `checks` each fast path against its plain twin;
- times each phase of models of the `0.6B`, `8B` and `30B-A3B` shapes: random weights made on the
  spot, a few blocks of each; seconds of the whole model follow from the number of its blocks;
- runs BiLLM to its end on the 0.6B shape;
- puts two tasks on one GPU under Ray (`ray`), and lets a task run out of memory, which is tried
  again with more;
- lets an evaluation run out of `memory`, which goes on with smaller batches.

It prints tables for docs/BENCHMARKS.md, and exits 1 if a check failed. `--small` runs the same
phases on a CPU with tiny shapes: it says that the script works, and nothing about a GPU.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import gpu_checks
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
TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
PARTS = ("checks", *SHAPES, "ray", "memory")


@dataclass(frozen=True)
class Scale:
    """How much is run.

    blocks: of each shape
    windows, length: of calibration, whose first few windows are evaluated too
    """

    device: torch.device
    sizes: gpu_checks.Sizes
    small: bool
    blocks: dict[str, int]
    windows: int
    length: int
    group_size: int

    def scheme(self, bits: int) -> Scheme:
        return Scheme(bits=bits, group_size=self.group_size, symmetric=False)

    def config(self, shape: str) -> dict[str, Any]:
        config = SHAPES[shape] | {"num_hidden_layers": self.blocks[shape]}
        if self.small:
            config |= TINY | (TINY_EXPERTS if "num_experts" in config else {})
        return config


LARGE_SCALE = partial(
    Scale, sizes=gpu_checks.LARGE, small=False, blocks={"0.6B": 4, "8B": 2, "30B-A3B": 2},
    windows=128, length=2048, group_size=128,
)  # fmt: skip
SMALL_SCALE = partial(
    Scale, sizes=gpu_checks.SMALL, small=True, blocks=dict.fromkeys(SHAPES, 1),
    windows=8, length=32, group_size=32,
)  # fmt: skip


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
    """A phase of one shape: seconds of the blocks that ran, and of the whole model."""

    shape: str
    phase: str
    seconds: float
    whole: float | None


class Kept:
    """A sink of blocks that keeps the last one, to be stored apart."""

    def __init__(self) -> None:
        self.last: Any = None

    def load(self, index: int) -> None:
        return None

    def store(self, block: Any) -> None:
        self.last = block


def random_checkpoint(folder: Path, config: dict[str, Any], device: torch.device) -> Checkpoint:
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
    return Checkpoint(folder)


def time_shape(shape: str, scale: Scale) -> Iterator[Row]:
    """Time each phase of quantizing and evaluating a few blocks of one shape."""
    layers = SHAPES[shape]["num_hidden_layers"]
    with tempfile.TemporaryDirectory(prefix="q3q_gpu_day_") as scratch:
        checkpoint = random_checkpoint(Path(scratch) / "model", scale.config(shape), scale.device)
        facts, phases = checkpoint.facts, Phases(scale.device)
        ratio = layers / facts.layers
        with phases.timed("load"):
            model = load_decoder(checkpoint, torch.bfloat16, scale.device)
        whole = phases.seconds["load"] * _whole_bytes(shape, facts) / facts.weight_bytes()
        yield Row(shape, "load", phases.seconds["load"], whole)
        ids = torch.randint(facts.vocab, (scale.windows, scale.length))
        sink = Kept()
        yield from _walk_rows(shape, model, ids, sink, scale.scheme(bits=4), ratio)
        store = BlockStore(Path(scratch) / "blocks")
        with phases.timed("store"):
            store.store(sink.last)
            store.settle()  # what is written behind the walk
        seconds = phases.seconds["store"]
        yield Row(shape, "store of one block", seconds, layers * seconds)
        del store, sink
        others: list[tuple[str, Method, int]] = [("AWQ", Awq(AwqSettings()), 4)]
        if shape == "0.6B":
            others.append(("BiLLM", Billm(BillmSettings()), 1))
        for name, method, bits in others:
            again = load_decoder(checkpoint, torch.bfloat16, scale.device)
            few = ids[: max(4, len(ids) // 4)]  # AWQ's default calibration is a quarter as long
            with phases.timed(name):
                quantize_model(again, method, scale.scheme(bits), few, Kept())
            del again
            seconds = phases.seconds[name]
            yield Row(shape, f"{name}, {few.numel():,} tokens", seconds, ratio * seconds)
        few = ids[:16]
        with phases.timed("perplexity"):
            found = perplexity(model, few)
        assert found.nll > 0  # false for NaN
        name = f"perplexity of {few.numel():,} tokens, head included"
        yield Row(shape, name, phases.seconds["perplexity"], None)
        requests = _requests(facts, 256 if not scale.small else 8)
        with phases.timed("scoring"):
            for _ in score(model, requests, TokenBudget.measured(model)):
                pass
        name = f"{len(requests)} questions of 400 tokens"
        yield Row(shape, name, phases.seconds["scoring"], None)


def _walk_rows(
    shape: str, model: Decoder, ids: torch.Tensor, sink: Kept, scheme: Scheme, ratio: float
) -> Iterator[Row]:
    """Time a forward pass of all windows, then GPTQ of all blocks, in parts and undisturbed."""
    phases, tokens = Phases(model.device), f"{ids.numel():,} tokens"
    hidden = activations_of(model, ids).hidden
    with phases.timed("forward"):
        for b in range(len(hidden)):
            for block in model.blocks:
                hidden[b] = block(hidden[b], model.rope)
    hidden.close()
    with phases.inside_a_walk():
        quantize_model(model.copy(), Gptq(GptqSettings()), scheme, ids, sink)
    with phases.timed("GPTQ in all"):
        quantize_model(model, Gptq(GptqSettings()), scheme, ids, sink)
    for name, seconds in phases.seconds.items():
        yield Row(shape, f"{name}, {tokens}", seconds, ratio * seconds)


def _whole_bytes(shape: str, facts: ModelFacts) -> int:
    """Return the bytes of a model with all of the shape's layers."""
    block = sum(facts.block_bytes(k, "bfloat16") for k in range(facts.layers))
    rest = facts.weight_bytes() - block
    return rest + block * SHAPES[shape]["num_hidden_layers"] // facts.layers


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="begin no part after so many")
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    wanted = parser.parse_args(arguments)
    if not wanted.small and not torch.cuda.is_available():
        print("gpu_day: there is no GPU here; --small runs the same phases on the CPU", flush=True)
        return 2
    device = torch.device("cpu" if wanted.small else "cuda")
    scale: Scale = (SMALL_SCALE if wanted.small else LARGE_SCALE)(device)
    name = platform.machine() if wanted.small else torch.cuda.get_device_name()
    print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}\n", flush=True)
    begin, failed = time.monotonic(), 0
    shown = {"checks": False, "times": False}

    def show_check(result: gpu_checks.Result) -> int:
        if not shown["checks"]:
            print("\n| check | | |\n|---|---|---|")
            shown.update(checks=True, times=False)
        passed = "yes" if result.passed else "NO"
        print(f"| {result.name} | {passed} | {result.detail} |", flush=True)
        return not result.passed

    def show_row(row: Row) -> None:
        if not shown["times"]:
            print("\n| shape | phase | blocks that ran | whole model |\n|---|---|---|---|")
            shown.update(checks=False, times=True)
        whole = "" if row.whole is None else f"{row.whole:.1f} s"
        print(f"| {row.shape} | {row.phase} | {row.seconds:.2f} s | {whole} |", flush=True)

    torch.manual_seed(0)
    with torch.inference_mode():
        for part in PARTS:
            if part not in wanted.only:
                continue
            if time.monotonic() - begin > 60 * wanted.minutes:
                print(f"\n{part}: left out, as {wanted.minutes:g} minutes are over", flush=True)
                continue
            if part in SHAPES:
                for row in time_shape(part, scale):
                    show_row(row)
            elif part == "checks":
                failed += sum(map(show_check, gpu_checks.results(device, scale.sizes)))
            elif part == "ray":
                failed += sum(map(show_check, under_ray(scale)))
            else:
                failed += show_check(out_of_memory(scale))
    print(f"\n{failed} failed; {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

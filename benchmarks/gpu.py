"""Each fast path of a GPU against its plain twin, on one GPU: `python benchmarks/gpu.py`.

GPTQ's column loop and its whole solve, the sum over logits, and attention along a tree of
prefixes, at the shapes and in the types of Qwen3-0.6B and 8B. Medians of five runs, after one that
is not counted.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from q3q.evaluate.prefixes import PackedTree
from q3q.models.attention import TreeAttention
from q3q.numerics.kernels.logsum import logsum, logsum_plain
from q3q.numerics.levels import IntegerLevels
from q3q.quantize.kernels.columns import block_solver, solve_block, solve_block_plain
from q3q.quantize.methods.gptq import factored_columns, gptq_round
from q3q.spec import Scheme

GPU = torch.device("cuda")


def seconds(run: Callable[[], Any], times: int = 5) -> float:
    taken = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return median(taken[1:])


def show(title: str, **taken: float) -> None:
    (_, first), *others = taken.items()
    figures = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in taken.items())
    print(
        f"{title}: {figures}; {', '.join(f'{other / first:.1f} x' for _, other in others)}",
        flush=True,
    )


def columns(title: str, rows: int, width: int) -> None:
    """One block of 128 columns, and a whole weight with act-order."""
    weight_ECO = torch.randn(1, 128, rows, device=GPU)
    factor_ECC = torch.eye(128, device=GPU) + 0.1 * torch.randn(1, 128, 128, device=GPU).triu(1)
    scale_EKO, zero_EKO = (
        torch.rand(1, 1, rows, device=GPU) + 0.1,
        torch.full((1, 1, rows), 8.0, device=GPU),
    )
    rest = factor_ECC, scale_EKO, zero_EKO, [0] * 128, IntegerLevels(4, False)

    def each(solver: Any) -> float:
        return seconds(lambda: solver(weight_ECO.clone(), *rest), 3)

    show(
        f"{title}, 128 columns of {rows} rows",
        fused=each(block_solver(GPU, IntegerLevels(4, False))),
        five_calls=each(solve_block),
        plain=each(solve_block_plain),
    )
    tokens_TI = torch.randn(2 * width, width, device=GPU) * (torch.rand(width, device=GPU) + 0.2)
    hessian_EII = (tokens_TI.T @ tokens_TI / len(tokens_TI))[None]
    weight_EOI, scheme = (
        torch.randn(1, rows, width, device=GPU),
        Scheme(bits=4, group_size=128, symmetric=False),
    )

    def whole(solver: Any) -> float:
        return seconds(
            lambda: gptq_round(weight_EOI, hessian_EII, scheme, act_order=True, solver=solver), 3
        )

    factor = seconds(lambda: factored_columns(hessian_EII.clone(), 0.01, None, act_order=True), 3)
    show(
        f"{title}, {rows} x {width} with act-order (factor {factor * 1e3:.1f} ms)",
        fused=whole(block_solver(GPU, IntegerLevels(4, False))),
        five_calls=whole(solve_block),
    )


def sums(positions: int) -> None:
    logits_CV = torch.randn(positions, 151_936, device=GPU).bfloat16()
    show(
        f"sum over {positions} x 151,936 logits",
        fused=seconds(lambda: logsum(logits_CV)),
        plain=seconds(lambda: logsum_plain(logits_CV)),
    )


def attention(title: str, texts: list[np.ndarray], heads: int) -> None:
    """Time a block's attention over 16,384 tokens of a tree: varlen, and padded in buckets."""
    taken = {}
    for name, varlen in (("varlen", True), ("padded", False)):
        batch = PackedTree(texts, varlen=varlen).next_batch(16_384).to(GPU, torch.bfloat16)
        tokens = batch.stop - batch.first
        query = torch.randn(1, tokens, heads, 128, device=GPU).bfloat16().transpose(1, 2)
        key, value = (
            torch.randn(1, tokens, 8, 128, device=GPU).bfloat16().transpose(1, 2) for _ in range(2)
        )

        def run(batch: Any = batch, states: Any = (query, key, value)) -> None:
            tree: TreeAttention = batch.attention()
            tree(*states)

        taken[name] = seconds(run)
    show(f"{title}, {heads} heads, attention of {tokens} tokens", **taken)


def questions(stem: int, count: int, length: int, answers: int, answer: int) -> list[np.ndarray]:
    """Return sorted texts of random tokens: a stem, questions on it, and answers to each."""
    random = np.random.default_rng(0)

    def some(mean: int) -> np.ndarray:
        return random.integers(0, 150_000, max(1, round(random.normal(mean, mean / 4)))).astype(
            np.int32
        )

    head, texts = some(stem) if stem else np.zeros(0, np.int32), []
    for _ in range(count):
        question = np.concatenate((head, some(length)))
        texts += [np.concatenate((question, some(answer))) for _ in range(answers)]
    return sorted(texts, key=lambda text: text.astype(">u4").tobytes())


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this needs an NVIDIA GPU")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    with torch.inference_mode():
        columns("0.6B, gate and up", 6144, 1024)
        columns("8B, gate and up", 24_576, 4096)
        columns("8B, down", 4096, 12_288)
        sums(512)
        for heads in (16, 32):
            attention("5-shot questions", questions(700, 400, 100, 1, 1), heads)
            attention("four endings", questions(0, 400, 75, 4, 27), heads)


if __name__ == "__main__":
    main()

"""Time GPTQ on one random block of Qwen3-30B-A3B's shape.

`python benchmarks/moe.py [--tokens N] [--experts N]` prints the processor seconds of the whole walk
over the block; then, for some of its experts, the seconds of solving them together, one by one with
q3q, and with a transcription of the official loops (IST-DASLab/gptq's fasterquant, which gives gate
and up each its own Hessian and factor). All in one process, taking turns, each the best of a few;
random weights, inputs and tokens; 4 bits, groups of 128.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from q3q.limits import cores
from q3q.models.anatomy import EXPERT_DOWN, EXPERT_GATE_UP
from q3q.models.decoder import block_class
from q3q.models.facts import read_facts
from q3q.models.qwen3 import Qwen3Block, Rope
from q3q.models.spool import Spool
from q3q.numerics.grid import Grid, minmax_grid
from q3q.quantize.activations import Activations
from q3q.quantize.methods.gptq import Gptq, gptq_round
from q3q.quantize.methods.settings import GptqSettings
from q3q.quantize.walk import quantize_block
from q3q.spec import Scheme, Schemes

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 128,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 1,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SCHEME = Scheme(bits=4, group_size=128, symmetric=False)
WINDOW = 512


def random_block() -> Qwen3Block:
    facts = read_facts(CONFIG)
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(
            std=shape[-1] ** -0.5, generator=generator
        )

    return block_class(facts, 0)(
        facts, {name: weight(name, shape) for name, shape in facts.block_shapes(0).items()}
    )


def official_loops(
    weight: Tensor, hessian: Tensor, damping: float = 0.01, block: int = 128, size: int = 128
) -> None:
    """One linear as fasterquant treats it: act-order, and a dozen framework calls a column."""
    weight, hessian, top = weight.clone(), hessian.clone(), 2**SCHEME.bits - 1
    order = torch.argsort(hessian.diagonal(), descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(hessian)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    rounded = torch.zeros_like(weight)
    grid = Grid(weight, weight)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        part, wrong, local = (
            weight[:, start:stop].clone(),
            torch.zeros(len(weight), stop - start),
            factor[start:stop],
        )
        for i in range(stop - start):
            column, pivot = part[:, i], local[i, start + i]
            if (start + i) % size == 0:
                grid = minmax_grid(
                    weight[:, start + i : start + i + size], SCHEME.bits, symmetric=False
                )
            codes = torch.clamp(torch.round(column[:, None] / grid.scale) + grid.zero, 0, top)
            value = (grid.scale * (codes - grid.zero)).flatten()
            rounded[:, start + i] = value
            error = (column - value) / pivot
            part[:, i:] -= error[:, None].matmul(local[i, start + i : stop][None])
            wrong[:, i] = error
        weight[:, stop:] -= wrong.matmul(local[:, stop:])


def seconds(work: Callable[[], object]) -> float:
    """Of processor time, all threads together: what else runs on the machine weighs little."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(
    site: str, linears: int, weight_EOI: Tensor, hessian_EII: Tensor, rounds: int
) -> tuple[float, float]:
    """Time the batch, one by one, and the official loops; return the batch's and the last's."""

    def together() -> None:
        gptq_round(weight_EOI, hessian_EII, SCHEME, act_order=True)

    def one_by_one() -> None:
        for weight_OI, hessian_II in zip(weight_EOI, hessian_EII, strict=True):
            gptq_round(weight_OI[None], hessian_II[None], SCHEME, act_order=True)

    def official() -> None:
        for weight_OI, hessian_II in zip(weight_EOI, hessian_EII, strict=True):
            for part_OI in weight_OI.chunk(linears):
                official_loops(part_OI, hessian_II)

    best = {work.__name__: float("inf") for work in (together, one_by_one, official)}
    for _ in range(rounds):
        for work in (together, one_by_one, official):
            best[work.__name__] = min(best[work.__name__], seconds(work))
    for name, value in best.items():
        print(
            f"  {site:8} {name:11} {value:7.2f} s   "
            f"{value / best['together']:.2f} times the batch's",
            flush=True,
        )
    return best["together"], best["official"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, default=4096, help="calibration tokens, in windows of 512"
    )
    parser.add_argument(
        "--experts", type=int, default=8, help="experts that are solved one by one as well"
    )
    parser.add_argument("--rounds", type=int, default=2, help="each is the best of so many")
    wanted = parser.parse_args()
    print(f"{torch.get_num_threads()} of {cores()} cores; torch {torch.__version__}")
    block = random_block()
    hidden = torch.randn(max(1, wanted.tokens // WINDOW), WINDOW, 2048).bfloat16()
    inputs = Spool()
    inputs.append(hidden)
    whole = seconds(
        lambda: quantize_block(
            block,
            0,
            Gptq(GptqSettings()),
            Schemes(SCHEME),
            Activations.of_all(inputs),
            Rope(block.facts),
        )
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"the whole block, {hidden.shape[0] * WINDOW} tokens, 128 experts: {whole:.1f} s, "
        f"peak {peak:.1f} GiB",
        flush=True,
    )
    print(f"solving {wanted.experts} of its experts, Hessians of 4096 tokens each:", flush=True)
    totals = []
    for site in (EXPERT_GATE_UP, EXPERT_DOWN):
        weight = torch.cat(
            [block.weights[name][: wanted.experts].float() for name in site.weights], 1
        )
        inputs_ENI = torch.randn(wanted.experts, 4096, weight.shape[2])
        hessian_EII = inputs_ENI.mT @ inputs_ENI
        totals.append(compare(site.name, len(site.weights), weight, hessian_EII, wanted.rounds))
    together, official = map(sum, zip(*totals, strict=True))
    print(
        f"both sites: the official loops take {official / together:.1f} times as long "
        "(at least 4 wanted)"
    )


if __name__ == "__main__":
    main()

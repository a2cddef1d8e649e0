"""Time GPTQ on one random block of Qwen3-30B-A3B's shape, and count what it asks of a GPU.

`python benchmarks/moe.py --calls` counts operator calls and waits for the device of one batch of
8,192 tokens that is observed, group by group as a CPU does and with a GPU's calls, on a block with
128 experts of 8 columns: widths change no count but that of a Hessian's panels.

`python benchmarks/moe.py [--tokens N] [--experts N]` prints the processor seconds of the whole walk
over the block; then, for some of its experts, the seconds of solving them together, one by one with
q3q, and with a transcription of the official loops (IST-DASLab/gptq's fasterquant, which gives gate
and up each its own Hessian and factor). All in one process, taking turns, each the best of a few;
random weights, inputs and tokens; 4 bits, groups of 128.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.counting import Calls, counted
from q3q.limits import cores
from q3q.models.anatomy import EXPERT_DOWN, EXPERT_GATE_UP, Site
from q3q.models.block import Block, Rope
from q3q.models.facts import ModelFacts, read_facts
from q3q.models.spool import Spool
from q3q.numerics.grid import Grid, minmax_grid
from q3q.numerics.linalg import FiniteCheck
from q3q.quantize.activations import Activations, refuse_infinite, show_inputs
from q3q.quantize.methods.gptq import Gptq, gptq_round
from q3q.quantize.methods.settings import GptqSettings
from q3q.quantize.statistics import Gram
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


def random_block(facts: ModelFacts) -> Block:
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(
            std=shape[-1] ** -0.5, generator=generator
        )

    return Block(
        facts, 0, {name: weight(name, shape) for name, shape in facts.block_shapes(0).items()}
    )


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Make a CPU take the calls that a GPU takes for experts."""
    with (
        patch("q3q.numerics.grouped.multiplies_grouped", lambda rows_RI, weight_EOI: True),
        patch("q3q.quantize.statistics.pads_groups", lambda device: True),
    ):
        yield


def observe(block: Block, x_BTH: Tensor, rope: Rope) -> dict[Site, Gram]:
    """Run one batch through a block, and add each site's inputs to its Gram matrices."""
    grams: dict[Site, Gram] = {}
    checks: dict[Site, FiniteCheck] = {}
    for site, inputs in block.stages(x_BTH, rope):
        gram = grams.setdefault(site, Gram())
        check = checks.setdefault(site, FiniteCheck())
        seen = replace(inputs, windows=len(x_BTH), total_windows=len(x_BTH), first_window=0)
        show_inputs(gram, site, seen, slice(None), check)
        del inputs, seen
    for site, check in checks.items():
        refuse_infinite(check, site, 0)
    return grams


@torch.inference_mode(False)  # where composite operators would count as one
@torch.no_grad()
def observing_calls(experts: int, tokens: int) -> dict[str, Calls]:
    """Count the calls of one observed batch, on the way of a CPU and on that of a GPU.

    The waits include the one that looks, once a block and site, whether all inputs were finite.
    """
    widths = {"hidden_size": 8, "moe_intermediate_size": 8, "head_dim": 8, "num_experts": experts}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    facts = read_facts(CONFIG | widths | heads)
    block, rope = random_block(facts), Rope(facts)
    x_BTH = torch.randn(max(1, tokens // WINDOW), min(tokens, WINDOW), 8).bfloat16()
    found = {}
    with counted() as found["one by one"]:
        observe(block, x_BTH, rope)
    with as_on_a_gpu(), counted() as found["together"]:
        observe(block, x_BTH, rope)
    return found


def official_loops(weight: Tensor, hessian: Tensor) -> None:
    """One linear as fasterquant treats it: act-order, and a dozen framework calls a column."""
    weight, hessian, top = weight.clone(), hessian.clone(), 2**SCHEME.bits - 1
    damping, block, size = 0.01, 128, 128
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
    parser.add_argument("--calls", action="store_true", help="count calls, and time nothing")
    parser.add_argument(
        "--experts", type=int, default=8, help="experts that are solved one by one as well"
    )
    parser.add_argument("--rounds", type=int, default=2, help="each is the best of so many")
    wanted = parser.parse_args()
    if wanted.calls:
        for way, calls in observing_calls(experts=128, tokens=8192).items():
            print(
                f"8,192 tokens, 128 experts, {way:10}: {calls.operators:5} operator calls that are "
                f"no views, {calls.waits:3} waits for the device"
            )
        return
    print(f"{torch.get_num_threads()} of {cores()} cores; torch {torch.__version__}")
    block = random_block(read_facts(CONFIG))
    hidden = torch.randn(max(1, wanted.tokens // WINDOW), WINDOW, 2048).bfloat16()
    inputs = Spool()
    inputs.append(hidden)
    whole = seconds(
        lambda: quantize_block(
            block,
            0,
            Gptq(GptqSettings()),
            Schemes(SCHEME),
            Activations(inputs, [0], len(hidden), WINDOW),
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

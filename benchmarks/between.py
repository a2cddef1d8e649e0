"""What a block's forward does between its products: `python benchmarks/between.py [--shape 8B]`.

Runs one block of a released shape on tensors without data, counts the numbers of bytes that norms,
rope, gating and all else read and write outside of products and attention, and sets them against
the products: seconds of the calibration's forward on a GPU, at the speeds given. `fused` is what
one kernel each would read and write: its input once, its output once. The counts are exact and need
no GPU; the seconds are arithmetic, with attention's operations counted as if nothing were masked.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from q3q.models import attention
from q3q.models import block as block_module
from q3q.models.block import Block, Rope
from q3q.models.facts import ModelFacts, read_facts

# By shape: hidden, intermediate, query heads, key-value heads, blocks.
SHAPES = {
    "0.6B": (1024, 3072, 16, 8, 28),
    "8B": (4096, 12288, 32, 8, 36),
    "32B": (5120, 25600, 64, 8, 64),
}
PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product")
PARTS = ("norms", "rope", "gating", "all else")
ATTENTION = "attention"  # one kernel on a GPU, whose operators here say nothing about its bytes


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, by the part of the block that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.part = PARTS[-1]
        self.bytes: Counter[str] = Counter()
        self.least: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.__name__.startswith(PRODUCTS):
            read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            written = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
            self.bytes[self.part] += sum(one.numel() * one.element_size() for one in read + written)
        return result

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        self.part, before = part, self.part
        try:
            yield
        finally:
            self.part = before

    def counting(self, part: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the function, whose operators count for a part."""

        def counted(*given: Any, **named: Any) -> Tensor:
            with self.of(part):
                result = call(*given, **named)
            inputs = [one for one in given if isinstance(one, Tensor)]
            self.least[part] += sum(one.numel() * one.element_size() for one in [*inputs, result])
            return result

        return counted


def facts_of(shape: str) -> ModelFacts:
    hidden, intermediate, heads, kv_heads, blocks = SHAPES[shape]
    return read_facts(
        {
            "model_type": "qwen3",
            "vocab_size": 151_936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "num_hidden_layers": blocks,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
    )


@torch.no_grad()
def count(shape: str, windows: int, length: int) -> tuple[Traffic, int]:
    """Return a block's traffic, and the floating-point operations of its products."""
    facts = facts_of(shape)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in facts.block_shapes(0).items()
    }
    block, rope = Block(facts, 0, weights), Rope(facts, "meta")
    x_BTH = torch.empty(windows, length, facts.hidden, dtype=torch.bfloat16, device="meta")
    block(x_BTH, rope)  # cosines and sines are made once for all blocks
    traffic, flops = Traffic(), FlopCounterMode(display=False)
    with ExitStack() as patched:
        for name, part in (("rms_norm", "norms"), ("rotate", "rope")):
            counted = traffic.counting(part, getattr(block_module, name))
            patched.enter_context(patch.object(block_module, name, counted))
        name = "scaled_dot_product_attention"
        attend = traffic.counting(ATTENTION, getattr(attention, name))
        patched.enter_context(patch.object(attention, name, attend))
        gated = traffic.counting("gating", block.gated)
        patched.enter_context(patch.object(block, "gated", gated))
        patched.enter_context(flops)
        patched.enter_context(traffic)
        block(x_BTH, rope)
    return traffic, flops.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="of the calibration")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--bandwidth", type=float, default=2.7e12, help="bytes a second")
    parser.add_argument("--speed", type=float, default=5e14, help="operations a second")
    options = parser.parse_args()
    traffic, flops = count(options.shape, 4, options.length)
    per_token, blocks = 4 * options.length, SHAPES[options.shape][-1]
    scale = options.tokens / per_token * blocks
    print(f"{'':10}{'KB a token':>12}{'fused':>12}{'seconds':>12}{'fused':>12}")
    for part in PARTS:
        both = traffic.bytes[part], traffic.least.get(part, traffic.bytes[part])
        row = "".join(f"{count / per_token / 1000:12.0f}" for count in both)
        row += "".join(f"{count * scale / options.bandwidth:12.2f}" for count in both)
        print(f"{part:10}{row}")
    print(f"products and attention, forward: {flops * scale / options.speed:.2f} s")


if __name__ == "__main__":
    main()

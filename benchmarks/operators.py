"""Where the processor time of a quantization goes: `python benchmarks/operators.py [METHOD ...]`.

Quantizes the demo model in float32 with GPTQ and AWQ, 4 bits in groups of 128, on one thread under
PyTorch's profiler, and prints each kind of operator's share of the processor time. Matrix products,
Gram matrices and attention are the same work for every tool; what is left is ours to remove.
"""

import argparse
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from q3q.data.texts import load_text
from q3q.data.windows import draw_windows, encoder
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.methods.settings import SETTINGS
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme

DEMO = Path(__file__).parent.parent / "q3q/models/demo/dense"
LENGTH = 512
KINDS = {
    "aten::mm": "products",
    "aten::bmm": "products",
    "aten::addmm": "products",
    "aten::addmm_": "Gram matrices",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
}
SHOWN = 12  # other operators


class Nowhere:
    """Blocks are not stored."""

    def load(self, index: int) -> QuantizedBlock | None:
        return None

    def store(self, block: QuantizedBlock) -> None:
        pass


def shares(method: str, windows: int) -> tuple[float, dict[str, float]]:
    """Return processor seconds in all, and by kind of operator or, of others, by name."""
    settings = SETTINGS[method]()
    module, _, name = settings.implementation.partition(":")
    solver = getattr(import_module(module), name)(settings)
    scheme = Scheme(bits=4, group_size=128, symmetric=False)
    text = load_text("demo", split="calibration")
    encode = encoder(load_tokenizer(DEMO))
    tokens = draw_windows(text, encode, samples=windows, length=LENGTH, draw="random", seed=0)
    with torch.inference_mode():
        first = load_decoder(Checkpoint(DEMO), torch.float32)
        quantize_model(first, solver, scheme, tokens[:2], Nowhere())
        model = load_decoder(Checkpoint(DEMO), torch.float32)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            quantize_model(model, solver, scheme, tokens, Nowhere())
    found: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        found[KINDS.get(event.key, event.key)] += event.self_cpu_time_total / 1e6
    return sum(found.values()), dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=["gptq", "awq"])
    parser.add_argument("--windows", type=int, default=32, help=f"of {LENGTH} tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for method in options.methods:
        total, by_kind = shares(method, options.windows)
        print(f"{method}: {total:.1f} s")
        kinds = list(dict.fromkeys(KINDS.values()))
        others = sorted((name for name in by_kind if name not in kinds), key=by_kind.__getitem__)
        shown = others[::-1][:SHOWN]
        for name in (*kinds, *shown):
            print(f"  {by_kind.get(name, 0) / total:6.1%}  {name}")
        rest = total - sum(by_kind.get(name, 0) for name in (*kinds, *shown))
        print(f"  {rest / total:6.1%}  {len(others) - len(shown)} others")


if __name__ == "__main__":
    main()

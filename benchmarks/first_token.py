"""Ask why GPTQ loses more with long calibration windows: what does each window's first token weigh?

`python benchmarks/first_token.py MODEL --test FILE --calibration FILE` quantizes
SmolLM2-135M-Instruct (`benchmarks/real_model.py`) to 4 bits in groups of 64, with act-order and
static groups, one pass a block, in float32. In the sums of inputs that GPTQ reads, it multiplies
the share of each window's first token, to which attention gives what no other token gets and whose
numbers are larger than all others'. It prints the KL on the first 4 windows of 2,048 tokens of the
test text for each case of `CASES`, five minutes of one core each.
"""

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from methods import Judge
from real_model import GROUP_SIZE
from real_peers import calibration_windows, judged_windows
from torch import Tensor

from q3q.limits import cores
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.numerics.linalg import add_gram
from q3q.quantize import statistics
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.methods.settings import GptqSettings
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme

BITS = 4
# Windows, tokens of each, and how often a window's first token counts.
CASES = ((16, 512, 1), (64, 512, 1), (16, 2048, 1), (16, 2048, 4), (16, 2048, 0))


class Nowhere:
    """Keep no block: the walk puts each into the model anyway."""

    def load(self, index: int) -> QuantizedBlock | None:
        return None

    def store(self, block: QuantizedBlock) -> None:
        pass


def quantized(model_folder: Path, windows_NT: Tensor, weight: float) -> dict[str, Any]:
    """Return GPTQ's weights by name; see the module's first lines."""
    settings = GptqSettings(act_order=True, static_groups=True, true_sequential=False)
    module, _, name = settings.implementation.partition(":")
    method = getattr(import_module(module), name)(settings)
    length = windows_NT.shape[1]

    def weighed(upper_II: Tensor, tokens_TI: Tensor, *, fresh: bool = False) -> None:
        assert len(tokens_TI) % length == 0  # whole windows
        tokens_TI = tokens_TI.clone()
        tokens_TI[::length] *= weight**0.5
        add_gram(upper_II, tokens_TI, fresh=fresh)

    model = load_decoder(Checkpoint(model_folder), torch.float32)
    scheme = Scheme(bits=BITS, group_size=GROUP_SIZE, symmetric=False)
    with patch.object(statistics, "add_gram", weighed):
        quantize_model(model, method, scheme, windows_NT, Nowhere())
    return {
        f"model.layers.{number}.{name}": weight
        for number, block in enumerate(model.blocks)
        for name, weight in block.weights.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--windows", type=int, default=4, help="of 2,048 tokens, to measure on")
    parser.add_argument("--threads", type=int, default=cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| windows | tokens of each | the first token counts | KL | seconds |")
    print("|---|---|---|---|---|")
    with torch.inference_mode():
        model = load_decoder(Checkpoint(options.model), torch.float32)
        judge = Judge(model, judged_windows(options))
        for samples, length, weight in CASES:
            options.samples, options.length = samples, length
            begin = time.monotonic()
            weights = quantized(options.model, calibration_windows(options, seed=0), weight)
            seconds = time.monotonic() - begin
            kl = judge.scores(weights, BITS, GROUP_SIZE).divergence
            print(f"| {samples} | {length} | {weight} | {kl:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

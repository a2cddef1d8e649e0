"""Compare what q3q reads of others' checkpoints with what the formats' own loaders read.

`python benchmarks/judge.py [--cache DIR] [--only NAME]` makes checkpoints of a demo model with
llm-compressor, GPTQModel, bitsandbytes and auto-round, each in an environment of its own
(`methods.py` makes those of the first two). There the format's own loader reads the files and plain
transformers computes the logits of fixed windows in float32. q3q reads the same files. The table
shows the KL from the original by both, in nats, and the largest difference of a position's KL.
"""

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from methods import DEMO, GPTQMODEL, LLM_COMPRESSOR, SCRIPTS, ContenderError, Peer, environment_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, draw_windows, encoder
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.likeness import format_in_words
from q3q.numerics.divergence import kl_divergence

WINDOWS, LENGTH, CALIBRATION = 4, 256, 16
LIMIT = 1e-5  # nats: a larger difference of the mean KL is a disagreement
RUN_SECONDS = 1800
# Inputs in whole numbers: servers divide a token's largest magnitude by 127, and
# compressed-tensors' emulation in transformers by 127.5.
EMULATED = "int8 inputs: as transformers' emulation scales them"

PUBLISHED = Peer(
    name="published",
    script="published.py",
    requirements=("transformers==5.23.0", "accelerate", "bitsandbytes", "auto-round"),
)


@dataclass(frozen=True)
class Made:
    """A checkpoint to make: the maker and its environment, and its settings.

    inputs: False if the maker's loader does not round inputs on a CPU, so that here they are not
        rounded either
    """

    name: str
    maker: str
    peer: Peer
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: bool = True


BNB = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
CASES = (
    *(
        Made(f"llm-compressor {scheme}", "llmcompressor", LLM_COMPRESSOR, {"scheme": scheme})
        for scheme in ("W4A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16")
    ),
    Made("llm-compressor NVFP4", "llmcompressor", LLM_COMPRESSOR, {"scheme": "NVFP4"}),
    Made("GPTQModel 4 bits", "gptqmodel", GPTQMODEL, {"bits": 4, "group_size": 128}),
    Made(
        "GPTQModel 4 bits asymmetric, desc_act",
        "gptqmodel",
        GPTQMODEL,
        {"bits": 4, "group_size": 64, "sym": False, "desc_act": True, "act_group_aware": False},
    ),
    Made("GPTQModel 3 bits", "gptqmodel", GPTQMODEL, {"bits": 3, "group_size": 64}),
    Made("bitsandbytes nf4", "bitsandbytes", PUBLISHED, {**BNB, "bnb_4bit_quant_type": "nf4"}),
    Made(
        "bitsandbytes nf4, double",
        "bitsandbytes",
        PUBLISHED,
        {**BNB, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    Made("bitsandbytes fp4", "bitsandbytes", PUBLISHED, {**BNB, "bnb_4bit_quant_type": "fp4"}),
    Made("bitsandbytes int8", "bitsandbytes", PUBLISHED, {"load_in_8bit": True}),
    Made(
        "auto-round 4 bits",
        "autoround",
        PUBLISHED,
        {"bits": 4, "group_size": 128, "iters": 4, "format": "auto_round"},
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/q3q/peers")
    parser.add_argument("--only", default="", help="checkpoints whose name contains this")
    parser.add_argument("--published", type=Path, help="Python of an environment that is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = [
        ("checkpoint", "format", "KL, own loader", "KL, q3q", "largest difference", "")
    ]
    with tempfile.TemporaryDirectory(prefix="q3q-judge-") as folder:
        tokens = Path(folder) / "tokens.safetensors"
        windows = _tokens()
        save_file(windows, tokens)
        original = _logits(load_decoder(Checkpoint(DEMO), torch.float32), windows["evaluation"])
        for case in CASES:
            if options.only in case.name:
                try:
                    python = (
                        options.published
                        if case.peer is PUBLISHED and options.published
                        else environment_of(case.peer, options.cache)
                    )
                    rows.append(_compare(case, python, tokens, original, Path(folder)))
                except ContenderError as error:
                    rows.append((case.name, f"not made: {error}", "", "", "", ""))
                print(" | ".join(rows[-1]), flush=True)
    print()
    for number, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if not number:
            print("| --- " * len(row) + "|")
    wrong = [row[0] for row in rows if row[-1] == "DIFFERENT"]
    if wrong:
        raise SystemExit(f"{len(wrong)} differ by more than {LIMIT} nats: {', '.join(wrong)}")


def _tokens() -> dict[str, Tensor]:
    encode = encoder(load_tokenizer(DEMO))
    return {
        "calibration": draw_windows(
            load_text("library", split="calibration"),
            encode,
            samples=CALIBRATION,
            length=LENGTH,
            draw="random",
            seed=0,
        ),
        "evaluation": consecutive_windows(
            encode(load_text("library", split="evaluation").joined), LENGTH, WINDOWS
        ),
    }


def _compare(
    case: Made, python: Path, tokens: Path, original: Tensor, folder: Path
) -> tuple[str, ...]:
    """Make a checkpoint, and return its row.

    Raises:
        ContenderError: it was not made.
    """
    place = folder / case.name.replace(" ", "-").replace(",", "")
    job, logits = place.with_suffix(".json"), place.with_suffix(".safetensors")
    facts = {
        "maker": case.maker,
        "model": str(DEMO),
        "output": str(place),
        "settings": case.settings,
        "tokens": str(tokens),
        "logits": str(logits),
    }
    job.write_text(json.dumps(facts), encoding="utf-8")
    command = [str(python), str(SCRIPTS / "published.py"), str(job)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}  # it needs two
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise ContenderError(last)
    found = next(place.rglob("config.json")).parent  # auto-round writes into a folder of its own
    checkpoint = Checkpoint(found)
    model = load_decoder(checkpoint, torch.float32)
    evaluation = load_file(tokens)["evaluation"]
    remark = ""
    if any(block.act_bits == 8 and block.act_format == "int" for block in model.blocks):
        _emulate(model)
        remark = EMULATED
    theirs = _kl(original, load_file(logits)["logits"].flatten(0, 1))
    ours = _kl(original, _logits(model, evaluation))
    apart = float((ours - theirs).abs().max())
    equal = abs(float(ours.mean() - theirs.mean())) <= LIMIT
    return (
        case.name,
        format_in_words(checkpoint),
        f"{float(theirs.mean()):.6f}",
        f"{float(ours.mean()):.6f}",
        f"{apart:.1e}",
        remark if equal else "DIFFERENT",
    )


def _emulate(model: Decoder) -> None:
    """Scale int8 inputs as compressed-tensors does in transformers, by 127.5 instead of 127."""
    from q3q.models import block as blocks

    def rounded(inputs: Tensor, bits: int, group_size: int) -> Tensor:
        scale = inputs.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
        scale = scale.clamp(min=torch.finfo(scale.dtype).eps)
        return (inputs / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    patch.object(blocks, "absmax_per_token", rounded).start()


def _logits(model: Decoder, windows: Tensor) -> Tensor:
    with torch.inference_mode():
        rows = [part for ids in windows for _, part in model.logits(model.hidden(ids[None])[0])]
    return torch.cat(rows)


def _kl(original: Tensor, theirs: Tensor) -> Tensor:
    return kl_divergence(original, theirs)


if __name__ == "__main__":
    main()

"""Compare what q3q reads of others' checkpoints with what the formats' own loaders read.

`python benchmarks/judge.py [--cache DIR] [--only NAME]` makes checkpoints of a demo model with
llm-compressor, GPTQModel, bitsandbytes, auto-round, transformers (FP8 as Qwen releases it) and
ModelOpt, in environments of their own (`methods.py` makes those of the first two). There the
format's own loader reads the files and plain transformers computes the logits of fixed windows in
float32. q3q reads the same files. The table shows the KL from the original by both, in nats, and
the largest difference of a position's KL.

llama.cpp (`--llama`, the Python of `make llama`) quantizes a GGUF file that q3q wrote. The `gguf`
package dequantizes it for transformers; the table says what llama.cpp itself computes, too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from contenders import (
    DEMO,
    GPTQMODEL,
    LLM_COMPRESSOR,
    ROOT,
    SCRIPTS,
    ContenderError,
    Peer,
    environment_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, draw_windows, encoder
from q3q.export.gguf_vocabulary import vocabulary_of
from q3q.export.gguf_writing import tensors_of, write_model
from q3q.models import block as blocks
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.disk_names import is_stacked
from q3q.models.likeness import format_in_words
from q3q.models.tensor_files import read_header
from q3q.numerics.divergence import kl_divergence

WINDOWS, LENGTH, CALIBRATION = 4, 256, 16
LIMIT = 1e-5  # nats: a larger difference of the mean KL is a disagreement
RUN_SECONDS = 1800
# What docs/JUDGE.md names as not exact, and is computed here as the loader does it.
HALVES = "int8 inputs scaled by 127.5, as transformers' emulation does"
EXPERTS = "experts in bfloat16 and their inputs not rounded, as transformers reads them"
COLUMNS = "whole columns with a large input left as they are, as bitsandbytes does"

PUBLISHED = Peer(
    name="published",
    script="published.py",
    requirements=(
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "bitsandbytes==0.50.2",
        "auto-round==0.16.1",
    ),
)
MODELOPT = Peer(
    name="modelopt",
    script="published.py",
    requirements=(
        "nvidia-modelopt==0.47.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "requests",
    ),
)
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@dataclass(frozen=True)
class Made:
    """A checkpoint to make: the maker and its environment (None: llama.cpp's), and its settings."""

    name: str
    maker: str
    peer: Peer | None
    settings: dict[str, Any] = field(default_factory=dict)


BNB = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
CASES = (
    *(
        Made(f"llm-compressor {scheme}", "llmcompressor", LLM_COMPRESSOR, {"scheme": scheme})
        for scheme in ("W4A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16")
    ),
    Made("llm-compressor NVFP4", "llmcompressor", LLM_COMPRESSOR, {"scheme": "NVFP4"}),
    Made(
        "llm-compressor FP8_DYNAMIC, FP8 cache",
        "llmcompressor",
        LLM_COMPRESSOR,
        {"scheme": "FP8_DYNAMIC", "kv_cache_scheme": {**FP8_CACHE, "symmetric": True}},
    ),
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
    Made(
        "auto-round 4 bits, AWQ's format",
        "autoround",
        PUBLISHED,
        {"bits": 4, "group_size": 128, "iters": 4, "sym": False, "format": "auto_awq"},
    ),
    Made("transformers FP8, 128 x 128", "fp8", PUBLISHED),
    Made("ModelOpt FP8", "modelopt", MODELOPT, {"config": "FP8_DEFAULT_CFG"}),
    Made("ModelOpt NVFP4", "modelopt", MODELOPT, {"config": "NVFP4_DEFAULT_CFG"}),
    *(
        Made(f"llama.cpp {kind}", "gguf", None, {"type": kind})
        for kind in ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS")
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/q3q/peers")
    parser.add_argument("--only", default="", help="checkpoints whose name contains this")
    parser.add_argument("--model", choices=("dense", "moe"), default="dense", help="demo model")
    parser.add_argument("--published", type=Path, help="Python of an environment that is there")
    parser.add_argument("--llama", type=Path, default=ROOT / ".venv-llama/bin/python")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = [
        ("checkpoint", "format", "KL, own loader", "KL, q3q", "largest difference", "")
    ]
    with tempfile.TemporaryDirectory(prefix="q3q-judge-") as folder:
        tokens = Path(folder) / "tokens.safetensors"
        model = DEMO.parent / options.model
        windows = _tokens(model)
        save_file(windows, tokens)
        original = _logits(load_decoder(Checkpoint(model), torch.float32), windows["evaluation"])

        def python_of(peer: Peer) -> Path:
            given = options.published if peer is PUBLISHED else None
            return given or environment_of(peer, options.cache)

        for case in CASES:
            if options.only in case.name:
                try:
                    if case.peer is None:
                        rows.append(_compare_gguf(case, options.llama, model, tokens, original))
                    else:
                        found = _compare(case, python_of(case.peer), model, tokens, original)
                        rows.append(found)
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


def _tokens(model: Path) -> dict[str, Tensor]:
    encode = encoder(load_tokenizer(model))
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
    case: Made, python: Path, model: Path, tokens: Path, original: Tensor
) -> tuple[str, ...]:
    """Make a checkpoint, and return its row.

    Raises:
        ContenderError: it was not made.
    """
    place = tokens.parent / re.sub(r"\W+", "-", case.name)
    theirs = _read_by_others(case.maker, python, model, place, case.settings, tokens)
    found = next(place.rglob("config.json")).parent  # auto-round writes into a folder of its own
    return _row(case, found, tokens, original, theirs)


def _compare_gguf(
    case: Made, python: Path, model: Path, tokens: Path, original: Tensor
) -> tuple[str, ...]:
    """Quantize a file with llama.cpp, and return its row.

    Raises:
        ContenderError: it was not made.
    """
    plain, ids = tokens.parent / "original.gguf", load_file(tokens)["evaluation"]
    if not plain.exists():
        facts, stored = Checkpoint(model).facts, read_header(model / "model.safetensors")
        vocabulary = vocabulary_of(load_tokenizer(model), facts.vocab)
        contents = tensors_of(facts, stored, {})
        write_model(plain, facts, vocabulary, contents, name="demo", most="q8_0")
    place = tokens.parent / case.settings["type"]
    place.mkdir()
    numpy.save(place / "tokens.npy", ids.numpy())
    job = {
        "original": str(plain),
        "output": str(place / "model.gguf"),
        "type": case.settings["type"],
        "tokens": str(place / "tokens.npy"),
        "logits": str(place / "logits.npy"),
    }
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _run(python, "llama_cpp_logits.py", place / "job.json")
    settings = {"file": job["output"]}
    python = Path(sys.executable)
    theirs = _read_by_others("gguf", python, model, place / "read", settings, tokens)
    own = torch.from_numpy(numpy.load(job["logits"])).flatten(0, 1)
    remark = f"llama.cpp itself: {float(kl_divergence(original, own).mean()):.6f}"
    return _row(case, Path(job["output"]), tokens, original, theirs, remark)


def _read_by_others(
    maker: str, python: Path, model: Path, place: Path, settings: dict[str, Any], tokens: Path
) -> Tensor:
    """Return the logits of the format's own loader, which reads what its maker wrote."""
    facts = {
        "maker": maker,
        "model": str(model),
        "output": str(place),
        "settings": settings,
        "tokens": str(tokens),
        "logits": str(place.with_suffix(".safetensors")),
    }
    job = place.with_suffix(".json")
    job.write_text(json.dumps(facts), encoding="utf-8")
    _run(python, "published.py", job)
    return load_file(facts["logits"])["logits"].flatten(0, 1)  # type: ignore[arg-type]


def _run(python: Path, script: str, job: Path) -> None:
    done = subprocess.run(
        [str(python), str(SCRIPTS / script), str(job)],
        # GPTQModel does not start with fewer workers.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise ContenderError(last)


def _row(
    case: Made, place: Path, tokens: Path, original: Tensor, logits: Tensor, remark: str = ""
) -> tuple[str, ...]:
    checkpoint = Checkpoint(place)
    model, words = load_decoder(checkpoint, torch.float32), format_in_words(checkpoint)
    read = _read_experts(model) if words.startswith("compressed-tensors") else ""
    with _emulated(model) as emulated:
        found = _logits(model, load_file(tokens)["evaluation"])
    theirs, ours = (kl_divergence(original, each) for each in (logits, found))
    equal = abs(float(ours.mean() - theirs.mean())) <= LIMIT
    return (
        case.name,
        words,
        f"{float(theirs.mean()):.6f}",
        f"{float(ours.mean()):.6f}",
        f"{float((ours - theirs).abs().max()):.1e}",
        "; ".join(filter(None, (remark, read, emulated))) if equal else "DIFFERENT",
    )


def _read_experts(model: Decoder) -> str:
    """Read experts as transformers does: as one tensor in bfloat16, whose input nobody rounds."""
    assert isinstance(model.blocks, list)
    for k, block in enumerate(model.blocks):
        narrow = {
            name: weight.bfloat16().float()
            for name, weight in block.weights.items()
            if is_stacked(name)
        }
        if not narrow:
            return ""
        sites = {site.name for site in block.sites if set(site.weights) & set(narrow)}
        model.blocks[k] = block.with_weights(dict(block.weights) | narrow)
        model.blocks[k].unrounded = block.unrounded | sites
    return EXPERTS


@contextmanager
def _emulated(model: Decoder) -> Iterator[str]:
    """Round int8 inputs as the format's loader on a CPU does; yields what was changed."""
    name, rounding, remark = _otherwise(model)
    if rounding is None:
        yield remark
        return
    with patch.object(blocks, name, rounding):
        yield remark


def _otherwise(model: Decoder) -> tuple[str, Callable[..., Tensor] | None, str]:
    block = model.blocks[0]
    if any(rounding.scales == "outliers" for rounding in block.own_rounding.values()):
        return "ints_but_outliers", _whole_columns, COLUMNS
    if block.rounding is not None and (block.rounding.bits, block.rounding.format) == (8, "int"):
        return "absmax_per_token", _by_halves, HALVES
    return "", None, ""


def _by_halves(inputs: Tensor, bits: int, group_size: int = -1) -> Tensor:
    """As compressed-tensors in transformers."""
    scale = inputs.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    scale = scale.clamp(min=torch.finfo(scale.dtype).eps)
    return (inputs / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def _whole_columns(inputs: Tensor, bits: int) -> Tensor:
    """As bitsandbytes, which casts to float16 first."""
    narrow = inputs.half()
    large = narrow.abs() >= 6
    narrow = narrow.masked_fill(large, 0)
    scale = narrow.abs().amax(-1, keepdim=True).float()
    rounded = torch.round(narrow * (127 / scale)) * (scale / 127)
    return torch.where(large.flatten(0, -2).any(0), inputs, rounded)


def _logits(model: Decoder, windows: Tensor) -> Tensor:
    with torch.inference_mode():
        rows = [part for ids in windows for _, part in model.logits(model.hidden(ids[None])[0])]
    return torch.cat(rows)


if __name__ == "__main__":
    main()

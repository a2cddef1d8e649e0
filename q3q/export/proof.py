"""Is the checkpoint on disk what was evaluated? A fresh process that cannot import q3q loads it, and we compare."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

from q3q.models.decoder import Decoder
from q3q.models.qwen3 import rms_norm
from q3q.record import Check
from q3q.spec import Json

SCRIPT = Path(__file__).with_name("reload.py")
WINDOWS, TOKENS = 2, 24
SECONDS = 3600.0  # for the other process, whatever the model
# Sketches are float64 sums of equal numbers; one weight of a billion moved by its last bit shows far above this.
SAME_WEIGHTS = 1e-11
# Both forwards run in float32 and add up in another order, at every position.
SAME_LOGITS = 1e-4
# With rounded activations one may fall on the other side and move a position, but not most of them.
SAME_ROUNDED_LOGITS = 1e-2
PASSED = "the exported checkpoint reloads as what was evaluated"


@dataclass(frozen=True)
class Proof:
    """check: whether it does, and what differs most. loader: who loaded it. logit_error: the worst position's, None if
    logits were not compared."""

    check: Check
    loader: str = ""
    logit_error: float | None = None


def prove(folder: Path, model: Decoder, sketches: Mapping[str, list[float]]) -> Proof:
    """Load `folder` elsewhere and compare it with the model as evaluated.

    Of a streamed model, which as a whole would not fit there either, the weights alone are compared, one at a time, and
    no logits: `logit_error` is None.

    sketches: of every weight by its name on disk (see `reload.sketch`).
    """
    if model.streamed:
        return _prove_weights(folder, model, sketches)
    ids_BT = torch.randint(model.facts.vocab, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="q3q_reload_") as scratch:
        windows, out = Path(scratch) / "windows.safetensors", Path(scratch) / "out"
        save_file({"ids": ids_BT}, windows)
        done = _run(folder, windows, out)
        if isinstance(done, str):
            return Proof(Check(name=PASSED, passed=False, detail=f"it cannot be loaded: {done}"))
        found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        theirs = load_file(out.with_suffix(".safetensors"))
    loader, act_bits = found["loader"], model.blocks[0].act_bits
    error = float(relative_errors(float32_logits(model, ids_BT, None), theirs["logits"]).max())
    wrong = _wrong_weights(sketches, found)
    if not error <= SAME_LOGITS:
        wrong.append(f"logits differ by {error:.2g} of their size")
    if found["act_bits"] != act_bits:
        wrong.append(f"activations of {found['act_bits']} bits instead of {act_bits}")
    elif act_bits is not None:
        rounded = float(relative_errors(float32_logits(model, ids_BT, act_bits), theirs["rounded"]).median())
        if not rounded <= SAME_ROUNDED_LOGITS:
            wrong.append(f"logits with rounded activations differ by {rounded:.2g} of their size")
    detail = f"{'; '.join(wrong)} (read by {loader})" if wrong else ""
    return Proof(Check(name=PASSED, passed=not wrong, detail=detail), loader, error)


def _prove_weights(folder: Path, model: Decoder, sketches: Mapping[str, list[float]]) -> Proof:
    model.rest()
    with tempfile.TemporaryDirectory(prefix="q3q_reload_") as scratch:
        out = Path(scratch) / "out"
        done = _run(folder, Path("weights"), out)
        if done is not None:
            return Proof(Check(name=PASSED, passed=False, detail=f"it cannot be read: {done}"))
        found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    wrong, act_bits = _wrong_weights(sketches, found), model.blocks[0].act_bits
    if found["act_bits"] != act_bits:
        wrong.append(f"activations of {found['act_bits']} bits instead of {act_bits}")
    detail = f"{'; '.join(wrong)} (read by {found['loader']})" if wrong else ""
    return Proof(Check(name=PASSED, passed=not wrong, detail=detail), found["loader"])


def _wrong_weights(ours: Mapping[str, list[float]], found: Json) -> list[str]:
    worst, difference = worst_weight(ours, found["sketches"])
    if difference <= SAME_WEIGHTS:
        return []
    return [f"worst site {worst}, relative difference about {difference:.2g}"]


def _run(folder: Path, windows: Path, out: Path) -> str | None:
    """Why it failed, in a line; None if it did not."""
    root = Path(__file__).parents[2]
    packages = [path for path in sys.path if path and Path(path).resolve() != root]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(folder), str(windows), str(out), *packages]
    try:
        done = subprocess.run(
            command, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"
    return None


def worst_weight(ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]) -> tuple[str, float]:
    """The weight whose sketch differs most, by its block's name, and by what share of its norm; inf if missing."""
    worst, most = "none", 0.0
    for name, (value, norm) in ours.items():
        found = theirs.get(name)
        difference = abs(found[0] - value) / (norm or 1.0) if found is not None else torch.inf
        if not difference <= most:
            worst, most = name.removesuffix(".weight").replace("model.layers.", "blocks."), difference
    return worst, most


def float32_logits(model: Decoder, ids_BT: Tensor, act_bits: int | None) -> Tensor:
    """Logits [B, T, V] of the weights as evaluated, with float32 arithmetic; one block at a time is widened.

    act_bits: to round activations to; None leaves them alone.
    """
    x_BTH, rope = model.embed(ids_BT).float(), model.rope
    for block in model.blocks:
        wide = block.with_weights({name: weight.float() for name, weight in block.weights.items()})
        wide.act_bits = act_bits
        x_BTH = wide(x_BTH, rope)
    hidden_BTH = rms_norm(x_BTH, model.norm_H.float(), model.facts.rms_norm_eps)
    return torch.stack([linear(hidden_TH, model.head_VH.float()) for hidden_TH in hidden_BTH]).cpu()


def relative_errors(ours_BTV: Tensor, theirs_BTV: Tensor) -> Tensor:
    """|theirs - ours| / |ours| at each position [B, T], of logits less their mean over the vocabulary."""
    ours, theirs = (logits - logits.mean(-1, keepdim=True) for logits in (ours_BTV, theirs_BTV))
    errors_BT: Tensor = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)
    return errors_BT

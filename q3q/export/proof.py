"""Is the checkpoint on disk what was evaluated? A fresh process that cannot import q3q loads it, and we compare."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

from q3q.errors import ExportError
from q3q.export.reload import SHORT, along, is_short, sketch, sketch_rows
from q3q.models.checkpoint import names_on_disk
from q3q.models.decoder import Decoder
from q3q.models.facts import ModelFacts
from q3q.models.footprint import unclaimed_memory
from q3q.models.qwen3 import Qwen3Block, Rope, rms_norm
from q3q.record import Check
from q3q.spec import Json

SCRIPT = Path(__file__).with_name("reload.py")
WINDOWS, TOKENS = 2, 24
# What the other process is given: to start, and for each byte of weights. One core takes a tenth of that.
SECONDS, SECONDS_PER_BYTE = 900.0, 2e-6
# Bytes that it takes beside the weights: itself with its libraries, and pieces of the model as float32.
PROCESS_BYTES = 1 << 30
# Sketches are float64 sums of equal numbers; one weight of a billion moved by its last bit shows far above this.
SAME_WEIGHTS = 1e-11
# Both forwards run in float32 and add up in another order, at every position.
SAME_LOGITS = 1e-4
# Rounded, an activation may fall on the other side, and move what its block makes by a part of a rounding step.
SAME_ROUNDED = 1e-3
# GPTQModel runs in 16 bits.
SAME_IN_16_BITS = 2e-2
Readings = dict[str, tuple[Tensor, float]]
PASSED = "the exported checkpoint reloads as what was evaluated"


@dataclass(frozen=True)
class Proof:
    """check: whether it does, and what differs most. loader: who loaded it. logit_error: the worst position's, None if
    logits were not compared."""

    check: Check
    loader: str = ""
    logit_error: float | None = None


def prove(folder: Path, model: Decoder) -> Proof:
    """Load `folder` elsewhere and compare it with the model as evaluated.

    Of a model that is not in this process as a whole, or where there is no memory for a second one, the weights alone
    are compared, one at a time, and no logits: `logit_error` is None.

    Raises:
        ExportError: the other process came to no end, which says nothing of the checkpoint.
    """
    model.rest()
    runs = runs_of(model) if not model.streamed and is_room(model) else {}
    with tempfile.TemporaryDirectory(prefix="q3q_reload_") as scratch:
        given, out = Path("weights"), Path(scratch) / "out"
        if runs:
            given = Path(scratch) / "given.safetensors"
            _give(given_to_it(model, runs), given, folder)
        try:
            _reload(
                folder,
                given,
                out,
                SECONDS + SECONDS_PER_BYTE * model.facts.weight_bytes(_dtype(model)),
            )
        except _UnreadableError as error:
            return Proof(Check(name=PASSED, passed=False, detail=f"it cannot be loaded: {error}"))
        found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        return compared(model, runs, found, load_file(out.with_suffix(".safetensors")))


def given_to_it(model: Decoder, runs: "Mapping[str, Run]") -> dict[str, Tensor]:
    """What the other process runs."""
    return {"ids": windows(model.facts), **{kind: run.states for kind, run in runs.items()}}


def compared(
    model: Decoder, runs: "Mapping[str, Run]", found: Json, theirs: Mapping[str, Tensor]
) -> Proof:
    """found, theirs: `reload.findings`."""
    wrong, error = _wrong_weights(model, found), None
    if runs:
        error = float(relative_errors(runs["plain"].logits, theirs["logits"]).max())
        wrong += _wrong_logits(runs, theirs, error)
    detail = f"{'; '.join(wrong)} (read by {found['loader']})" if wrong else ""
    return Proof(Check(name=PASSED, passed=not wrong, detail=detail), found["loader"], error)


def is_room(model: Decoder) -> bool:
    """Whether another process can hold the whole model too: while it unpacks, and one piece of it as float32."""
    facts = model.facts
    pieces = [
        facts.vocab * facts.hidden,
        *(facts.block_bytes(k, "float32") // 4 for k in range(facts.layers)),
    ]
    return (
        facts.weight_bytes(_dtype(model)) * 5 // 4 + 4 * max(pieces) + PROCESS_BYTES
        <= unclaimed_memory()
    )


# ---------------------------------------------------------------------------------------------- what is ours


@dataclass(frozen=True)
class Run:
    """The model as evaluated, over the fixed windows in float32 arithmetic.

    states: [L, B, T, H], the input of each block. readings: what each site reads and each block adds, by the names and
    as `reload.run` has them, and its norm. logits: [B, T, V].
    """

    states: Tensor
    readings: Readings
    logits: Tensor


def windows(facts: ModelFacts) -> Tensor:
    """Token ids [B, T]."""
    return torch.randint(facts.vocab, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


def runs_of(model: Decoder) -> dict[str, Run]:
    """`plain`, and `rounded` if its activations are."""
    act_bits = model.blocks[0].act_bits
    runs = {"plain": run(model, None)}
    return runs if act_bits is None else runs | {"rounded": run(model, act_bits)}


def run(model: Decoder, act_bits: int | None) -> Run:
    """One block at a time is widened. act_bits: to round activations to; None leaves them alone."""
    x_BTH, rope = model.embed(windows(model.facts)).float(), model.rope
    states: list[Tensor] = []
    readings: Readings = {}
    for k, block in enumerate(model.blocks):
        wide = block.with_weights({name: weight.float() for name, weight in block.weights.items()})
        wide.act_bits = act_bits
        states.append(x_BTH.cpu())
        x_BTH = _observed(wide, k, x_BTH, rope, readings)
        readings[f"blocks.{k}"] = _reading(x_BTH - states[-1].to(x_BTH.device))
    hidden_BTH = rms_norm(x_BTH, model.norm_H.float(), model.facts.rms_norm_eps)
    logits_BTV = torch.stack(
        [linear(hidden_TH, model.head_VH.float()) for hidden_TH in hidden_BTH]
    ).cpu()
    return Run(torch.stack(states), readings, logits_BTV)


def _observed(
    block: Qwen3Block, k: int, x_BTH: Tensor, rope: Rope, readings: dict[str, tuple[Tensor, float]]
) -> Tensor:
    """The block's output; what its sites read is noted."""
    stages = block.stages(x_BTH, rope)
    while True:
        try:
            site, inputs = next(stages)
        except StopIteration as end:
            output: Tensor = end.value
            return output
        if inputs.whole_TI is not None:
            readings[f"blocks.{k}.{site.name}"] = _reading(inputs.whole_TI)


def _reading(x: Tensor) -> tuple[Tensor, float]:
    return along(x), float(x.double().norm())


def sketches(model: Decoder) -> Iterator[tuple[str, list[float]]]:
    """(name on disk, `reload.sketch`) of every weight as evaluated."""
    facts = model.facts
    yield "model.norm.weight", sketch(model.norm_H)
    yield (
        "model.embed_tokens.weight",
        sketch_rows((facts.vocab, facts.hidden), model.rows("embedding")),
    )
    if not facts.tied:
        yield "lm_head.weight", sketch_rows((facts.vocab, facts.hidden), model.rows("head"))
    for k, block in enumerate(model.blocks):
        for name, weight in block.weights.items():
            parts = weight if weight.ndim == 3 else [weight]
            yield from zip(names_on_disk(facts, k, [name]), map(sketch, parts), strict=True)


# ---------------------------------------------------------------------------------------------- what is theirs


class _UnreadableError(Exception):
    """The other process says in a line why the checkpoint cannot be loaded."""


def _give(tensors: Mapping[str, Tensor], path: Path, folder: Path) -> None:
    """Raises ExportError: there is no room for them."""
    try:
        save_file(dict(tensors), path)
    except Exception as error:  # safetensors' own kind, which says no more than its words
        if not is_short(error):
            raise
        raise _not_proved(
            folder, f"{path.parent} does not take what the loader is given ({error})"
        ) from error


def _reload(folder: Path, given: Path, out: Path, seconds: float) -> None:
    """Have the other process write its findings to `out`.

    Raises:
        _UnreadableError: it cannot load the checkpoint. ExportError: it came to no end.
    """
    root = Path(__file__).parents[2]
    packages = [path for path in sys.path if path and Path(path).resolve() != root]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["TORCHDYNAMO_DISABLE"] = (
        "1"  # GPTQModel would compile for minutes what runs for a moment
    )
    command = [
        sys.executable,
        "-I",
        "-S",
        str(SCRIPT),
        str(folder),
        str(given),
        str(out),
        *packages,
    ]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=out.parent,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _not_proved(folder, f"no answer in {seconds:.0f} s") from error
    if not done.returncode:
        return
    lines = done.stderr.strip().splitlines()
    if done.returncode < 0:
        raise _not_proved(
            folder, f"the process that loads it was ended by signal {-done.returncode}"
        )
    if done.returncode == SHORT:
        raise _not_proved(folder, lines[-1])
    raise _UnreadableError(lines[-1] if lines else f"exit code {done.returncode}")


def _not_proved(folder: Path, why: str) -> ExportError:
    return ExportError(
        f"the export in {folder} is written but not proved: {why}. It stays there unfinished; the same command goes on "
        "and tries again"
    )


# ---------------------------------------------------------------------------------------------- what differs


def _wrong_weights(model: Decoder, found: Json) -> list[str]:
    worst, difference = worst_weight(dict(sketches(model)), found["sketches"])
    wrong = (
        [f"worst site {worst}, relative difference about {difference:.2g}"]
        if not difference <= SAME_WEIGHTS
        else []
    )
    act_bits = model.blocks[0].act_bits
    if found["act_bits"] != act_bits:
        wrong.append(f"activations of {found['act_bits']} bits instead of {act_bits}")
    return wrong


def worst_weight(
    ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]
) -> tuple[str, float]:
    """The weight whose sketch differs most, by its block's name, and by what share of its norm; inf if missing."""
    worst, most = "none", 0.0
    for name, (value, norm) in ours.items():
        found = theirs.get(name)
        difference = abs(found[0] - value) / (norm or 1.0) if found is not None else torch.inf
        if not difference <= most:
            worst, most = (
                name.removesuffix(".weight").replace("model.layers.", "blocks."),
                difference,
            )
    return worst, most


def _wrong_logits(runs: Mapping[str, Run], theirs: Mapping[str, Tensor], error: float) -> list[str]:
    wrong = [] if error <= SAME_LOGITS else [f"logits differ by {error:.2g} of their size"]
    bounds = {"plain": SAME_LOGITS, "rounded": SAME_ROUNDED}
    for kind, ours in runs.items():
        if f"{kind}/logits" not in theirs:
            continue  # it knows of no rounded activations, which is said elsewhere
        site, most = worst_reading(ours, {name: theirs[f"{kind}/{name}"] for name in ours.readings})
        logits = float((theirs[f"{kind}/logits"] - ours.logits).norm() / ours.logits.norm())
        if not max(most, logits) <= bounds[kind]:
            where, most = (site, most) if most > logits else ("the head", logits)
            wrong.append(
                f"worst site {where}, where {kind} activations differ by {most:.2g} of their size"
            )
    if "public" in theirs:
        public = float(
            (theirs["public"] - runs["plain"].logits).norm() / runs["plain"].logits.norm()
        )
        if not public <= SAME_IN_16_BITS:
            wrong.append(f"GPTQModel's logits differ by {public:.2g} of their size")
    return wrong


def worst_reading(ours: Run, theirs: Mapping[str, Tensor]) -> tuple[str, float]:
    """What differs most of what sites read and blocks add, and by what share of its norm."""
    errors = {
        name: float((theirs[name] - found).norm()) / norm
        for name, (found, norm) in ours.readings.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]


def relative_errors(ours_BTV: Tensor, theirs_BTV: Tensor) -> Tensor:
    """|theirs - ours| / |ours| at each position [B, T], of logits less their mean over the vocabulary."""
    ours, theirs = (logits - logits.mean(-1, keepdim=True) for logits in (ours_BTV, theirs_BTV))
    errors_BT: Tensor = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)
    return errors_BT


def _dtype(model: Decoder) -> str:
    return str(model.norm_H.dtype).removeprefix("torch.")

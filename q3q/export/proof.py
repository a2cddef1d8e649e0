"""Proof that a checkpoint on disk is what was evaluated.

A fresh process that cannot import q3q loads it (`reload`), and its findings are compared with
the model in this process.
"""

import json
import math
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
from q3q.export.reload.script import EXIT_SHORTAGE, is_shortage
from q3q.export.reload.sketches import projection, sketch, sketch_rows
from q3q.export.use import Use
from q3q.limits import unclaimed_memory
from q3q.models.block import Block, Rope
from q3q.models.decoder import Decoder
from q3q.models.disk_names import is_stacked, names_on_disk
from q3q.models.facts import ModelFacts
from q3q.number_formats import INT
from q3q.numerics.kernels.norm import rms_norm
from q3q.record import Check
from q3q.spec import Json

PROGRAM = Path(__file__).with_name("reload")
WINDOWS, TOKENS = 2, 24
# Time limit of the other process: to start, and for each byte of weights. One core takes a tenth.
SECONDS, SECONDS_PER_BYTE = 900.0, 2e-6
# Memory of the other process besides the weights: its libraries and the model's pieces as float32.
PROCESS_BYTES = 1 << 30
# Sketches sum equal numbers in float64; one weight's last bit of a billion moves them far more.
SAME_WEIGHTS = 1e-11
# Both forwards run in float32 but sum in different orders; the bound is for each position.
SAME_LOGITS = 1e-4
# A rounded activation may fall on the other side, and move its block's output by part of a step.
SAME_ROUNDED = 1e-3
# GPTQModel runs in 16 bits.
SAME_IN_16_BITS = 2e-2
# Of the numbers that were added up: a float32 sum's last bits, which tell nothing of the weights.
# What a block adds is read as a difference, so its noise is that of the block's input.
ROUNDING = 2.0**-22
PASSED = "the exported checkpoint reloads as what was evaluated"


@dataclass(frozen=True)
class Proof:
    """The result of a comparison."""

    check: Check  # with the largest difference
    loader: str = ""  # the program that loaded the checkpoint
    logit_error: float | None = None  # of the worst position; None if logits were not compared
    use: Use | None = None  # what a public loader took; None if none was measured


def prove(folder: Path, model: Decoder, *, gpu: bool = False) -> Proof:
    """Load `folder` in another process and compare it with the model as evaluated.

    If the model is not in this process as a whole, or there is no memory for a second one, only the
    weights are compared, one at a time, and no logits: `logit_error` is None.

    Args:
        gpu: the other process may measure how fast a GPU generates.

    Raises:
        ExportError: the other process did not finish, which says nothing about the checkpoint.
    """
    model.release_head()
    runs = runs_of(model) if not model.streamed and is_room(model) else {}
    seconds = SECONDS + SECONDS_PER_BYTE * model.facts.weight_bytes(_dtype(model))
    with tempfile.TemporaryDirectory(prefix="q3q_reload_") as scratch:
        inputs, out = Path("weights"), Path(scratch) / "out"
        if runs:
            inputs = Path(scratch) / "inputs.safetensors"
            _save(reload_inputs(model, runs), inputs, folder)
        if gpu:
            torch.cuda.empty_cache()  # for the other process
        try:
            _reload(folder, inputs, out, seconds, gpu)
        except _UnreadableError as error:
            return Proof(Check(name=PASSED, passed=False, detail=f"it cannot be loaded: {error}"))
        findings = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        return compare_reload(model, runs, findings, load_file(out.with_suffix(".safetensors")))


def reload_inputs(model: Decoder, runs: "Mapping[str, ReferenceRun]") -> dict[str, Tensor]:
    """Return the token ids and block inputs that the other process runs."""
    return {"ids": windows(model.facts), **{kind: run.states for kind, run in runs.items()}}


def compare_reload(
    model: Decoder, runs: "Mapping[str, ReferenceRun]", findings: Json, theirs: Mapping[str, Tensor]
) -> Proof:
    """Compare the model with the two results of `reload.script.findings`."""
    problems, error = _weight_problems(model, findings), None
    if runs:
        error = worst_logits(runs["plain"].logits, theirs["logits"])
        problems += _logit_problems(runs, theirs, error)
    loader = findings["loader"]
    detail = f"{'; '.join(problems)} (read by {loader})" if problems else ""
    check = Check(name=PASSED, passed=not problems, detail=detail)
    return Proof(check, loader, error, Use.of(loader, findings.get("use", ())))


def is_room(model: Decoder) -> bool:
    """Return True if another process can hold the whole model, too, and unpack it."""
    facts = model.facts
    blocks = (facts.block_bytes(k, "float32") for k in range(facts.layers))
    largest = max(4 * facts.vocab * facts.hidden, *blocks)  # runs as float32
    needed = facts.weight_bytes(_dtype(model)) * 5 // 4 + largest + PROCESS_BYTES
    return needed <= unclaimed_memory()


@dataclass(frozen=True)
class Reading:
    """What was read at one place of a run.

    projection: `reload.sketches.projection` of each token
    norm: of the whole tensor
    noise: norm of the difference that rounding alone makes
    """

    projection: Tensor
    norm: float
    noise: float = 0.0

    @classmethod
    def of(cls, x: Tensor, noise: float = 0.0) -> "Reading":
        return cls(projection(x), float(x.double().norm()), noise)


@dataclass(frozen=True)
class ReferenceRun:
    """The evaluated model's run over the fixed windows in float32 arithmetic."""

    states: Tensor  # each block's input, [L, B, T, H]
    readings: dict[str, Reading]  # of site inputs and block changes: see `reload.running.run`
    logits: Tensor  # [B, T, V]


def windows(facts: ModelFacts) -> Tensor:
    """Return the fixed token ids, [B, T]."""
    return torch.randint(facts.vocab, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


def runs_of(model: Decoder) -> dict[str, ReferenceRun]:
    """Return the run `plain`, and `rounded` if the model rounds activations."""
    runs = {"plain": run(model, rounded=False)}
    rounds = any(map(roundings_of, model.blocks))
    return runs | ({"rounded": run(model, rounded=True)} if rounds else {})


def roundings_of(block: Block) -> set[tuple[str, int, int]]:
    """Return (type, bits, channels that share a scale) of each way in which inputs are rounded."""
    return {
        ("int" if how.format == INT else "float", how.bits, how.group_size)
        for site in block.sites
        if site.name not in block.unrounded
        if (how := block.own_rounding.get(site.name, block.rounding)) is not None
    }


def run(model: Decoder, *, rounded: bool) -> ReferenceRun:
    """Run the model, one block at a time widened to float32.

    rounded: round activations as the model does
    """
    x_BTH, rope = model.embed(windows(model.facts)).float(), model.rope
    states, readings = list[Tensor](), dict[str, Reading]()
    for k, block in enumerate(model.blocks):
        wide = block.with_weights({name: weight.float() for name, weight in block.weights.items()})
        wide.kv = None  # loaders round a cache only when they serve
        if not rounded:
            wide.rounding, wide.own_rounding = None, {}
        states.append(x_BTH.cpu())
        x_BTH = _observed(wide, k, x_BTH, rope, readings)
        before_BTH = states[-1].to(x_BTH.device)
        noise = ROUNDING * float(before_BTH.double().norm())
        readings[f"blocks.{k}"] = Reading.of(x_BTH - before_BTH, noise)
    facts = model.facts
    hidden_BTH = rms_norm(x_BTH, model.norm_H.float(), facts.rms_norm_eps, facts.family.gain_offset)
    logits = [linear(hidden_TH, model.head_VH.float()) for hidden_TH in hidden_BTH]
    return ReferenceRun(torch.stack(states), readings, torch.stack(logits).cpu())


def _observed(
    block: Block, k: int, x_BTH: Tensor, rope: Rope, readings: dict[str, Reading]
) -> Tensor:
    """Return the block's output, and add what its sites read to `readings`."""
    stages = block.stages(x_BTH, rope)
    while True:
        try:
            site, inputs = next(stages)
        except StopIteration as end:
            return end.value
        if inputs.all_TI is not None:
            readings[f"blocks.{k}.{site.name}"] = Reading.of(inputs.all_TI)


def sketches(
    model: Decoder, roundings: set[tuple[str, int, int]], factors: dict[str, float]
) -> Iterator[tuple[str, list[float]]]:
    """Yield (name on disk, `reload.sketches.sketch`) of each weight as evaluated.

    Args:
        roundings: takes what `roundings_of` returns, in the same pass over the blocks.
        factors: takes the factors of inputs' scales, by their linears on disk.
    """
    facts, shape = model.facts, (model.facts.vocab, model.facts.hidden)
    yield facts.family.final_norm, sketch(model.norm_H)
    yield facts.family.embedding, sketch_rows(shape, model.rows("embedding"))
    if not facts.tied:
        yield facts.family.head, sketch_rows(shape, model.rows("head"))
    for k, block in enumerate(model.blocks):
        roundings |= roundings_of(block)
        factors |= _factors_of(facts, k, block)
        for name, weight in block.weights.items():
            parts = weight if is_stacked(name) else [weight]
            yield from zip(names_on_disk(facts, k, [name]), map(sketch, parts), strict=True)


def _factors_of(facts: ModelFacts, k: int, block: Block) -> dict[str, float]:
    """Return the factors of a block's inputs by the linears that read them."""
    return {
        name.removesuffix(".weight"): how.number
        for site in block.sites
        if (how := block.own_rounding.get(site.name)) is not None
        if how.scales == "factor" and how.number is not None
        for name in names_on_disk(facts, k, set(site.weights) - block.unrounded)
    }


class _UnreadableError(Exception):
    """The other process's one-line reason why it cannot load the checkpoint."""


def _save(tensors: Mapping[str, Tensor], path: Path, folder: Path) -> None:
    """Save the other process's inputs.

    Raises:
        ExportError: there is no room for them.
    """
    try:
        save_file(dict(tensors), path)
    except Exception as error:  # safetensors' own type
        if not is_shortage(error):
            raise
        raise _not_proved(folder, f"{path.parent} has no room for its input ({error})") from error


def _reload(folder: Path, inputs: Path, out: Path, seconds: float, gpu: bool) -> None:
    """Have the other process write its findings to `out`; without `gpu` it sees none.

    Raises:
        _UnreadableError: it cannot load the checkpoint.
        ExportError: it did not finish.
    """
    root = Path(__file__).parents[2]
    packages = [path for path in sys.path if path and Path(path).resolve() != root]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "TORCHDYNAMO_DISABLE": "1",  # GPTQModel would compile for minutes what runs for a moment
    }
    arguments = map(str, (PROGRAM, folder, inputs, out))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", *arguments, *packages],
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
        reason = f"the process that loads it was ended by signal {-done.returncode}"
        raise _not_proved(folder, reason)
    if done.returncode == EXIT_SHORTAGE:
        raise _not_proved(folder, lines[-1])
    raise _UnreadableError(lines[-1] if lines else f"exit code {done.returncode}")


def _not_proved(folder: Path, reason: str) -> ExportError:
    return ExportError(
        f"the export in {folder} is written but not proved: {reason}. It stays there unfinished; "
        "the same command continues and tries again"
    )


def _weight_problems(model: Decoder, findings: Json) -> list[str]:
    problems, collected, factors = [], set[tuple[str, int, int]](), dict[str, float]()
    worst, difference = worst_weight(
        dict(sketches(model, collected, factors)), findings["sketches"]
    )
    roundings = [list(rounding) for rounding in sorted(collected)]
    if difference > SAME_WEIGHTS:
        problems.append(f"worst site {worst}, relative difference about {difference:.2g}")
    if findings["roundings"] != roundings:
        problems.append(f"activations are rounded to {findings['roundings']}, not {roundings}")
    stored = findings["factors"]
    if other := [name for name in factors | stored if stored.get(name) != factors.get(name)]:
        name = other[0]
        problems.append(
            f"the input of {name} is rounded below the factor {stored.get(name)}, not "
            f"{factors.get(name)}"
        )
    return problems


def relative(difference: float, norm: float, noise: float = 0.0) -> float:
    """Return a difference, less the noise, divided by a norm.

    0 / 0 counts as 0. Any other division by 0 gives infinity, and so does NaN, so that no
    comparison takes either for a match.
    """
    if math.isnan(difference) or math.isnan(norm):
        return math.inf
    beyond = max(0.0, difference - noise)
    if not beyond:
        return 0.0
    return beyond / norm if norm and math.isfinite(norm) else math.inf


def worst_weight(
    ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]
) -> tuple[str, float]:
    """Return the weight whose sketch differs most, and its share of the norm (inf if missing)."""
    worst, most = "none", 0.0
    for name, (value, norm) in ours.items():
        other = theirs[name][0] if name in theirs else math.inf
        difference = relative(abs(other - value), norm)
        if difference > most:
            worst = name.removesuffix(".weight").replace("model.layers.", "blocks.")
            most = difference
    return worst, most


def _logit_problems(
    runs: Mapping[str, ReferenceRun], theirs: Mapping[str, Tensor], error: float
) -> list[str]:
    problems = [] if error <= SAME_LOGITS else [f"logits differ by {error:.2g} of their size"]
    bounds = {"plain": SAME_LOGITS, "rounded": SAME_ROUNDED}
    for kind, ours in runs.items():
        if f"{kind}/logits" not in theirs:
            continue  # it rounds nothing: `_weight_problems` reports that
        site, most = worst_reading(ours, {name: theirs[f"{kind}/{name}"] for name in ours.readings})
        logits = _difference(theirs[f"{kind}/logits"], ours.logits)
        if max(most, logits) > bounds[kind]:
            site, most = (site, most) if most > logits else ("the head", logits)
            problems.append(
                f"worst site {site}, where {kind} activations differ by {most:.2g} of their size"
            )
    if "public" in theirs:
        public = _difference(theirs["public"], runs["plain"].logits)
        if public > SAME_IN_16_BITS:
            problems.append(f"GPTQModel's logits differ by {public:.2g} of their size")
    return problems


def _difference(theirs: Tensor, ours: Tensor) -> float:
    return relative(float((theirs - ours).norm()), float(ours.norm()))


def worst_reading(ours: ReferenceRun, theirs: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return the site input or block change that differs most, and by what share of its norm."""
    errors = {
        name: relative(
            float((theirs[name] - reading.projection).norm()), reading.norm, reading.noise
        )
        for name, reading in ours.readings.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def worst_logits(ours_BTV: Tensor, theirs_BTV: Tensor) -> float:
    """Return the largest |theirs - ours| / |ours| of mean-free logits at any position."""
    ours, theirs = (logits - logits.mean(-1, keepdim=True) for logits in (ours_BTV, theirs_BTV))
    differences, norms, sizes = (
        x_BTV.norm(dim=-1).flatten().tolist() for x_BTV in (theirs - ours, ours, ours_BTV)
    )
    positions = zip(differences, norms, sizes, strict=True)
    return max(relative(error, norm, ROUNDING * size) for error, norm, size in positions)


def _dtype(model: Decoder) -> str:
    return str(model.norm_H.dtype).removeprefix("torch.")

"""One trial from start to finish: load, calibrate, quantize, evaluate, record."""

import errno
import json
import math
import platform
import random
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q3q.attempt import LOG, Attempt, TrialLog, attempt
from q3q.calibrate.sources import load_text
from q3q.calibrate.windows import consecutive_windows, draw_windows, encoder
from q3q.claim import ClaimLostError
from q3q.data import Library, folder_digest
from q3q.environment import Phases, SystemWatch, git_commit, hardware, now, packages
from q3q.errors import ConfigError, IntegrityError, Q3QError
from q3q.evaluate.baseline import (
    Baseline,
    BaselineIdentity,
    baseline_for,
    kept_windows,
    windows_digest,
)
from q3q.evaluate.drift import perplexity_and_drift
from q3q.evaluate.integrity import check_weights
from q3q.evaluate.journal import Journal
from q3q.evaluate.perplexity import of_losses, window_losses
from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.evaluate.suites import (
    QUICK_SEED,
    Batch,
    Part,
    batches,
    refuse_generation,
    refuse_other_versions,
    score_batch,
)
from q3q.export.card import model_card
from q3q.export.proof import PASSED, prove
from q3q.export.writer import Exporter, ExportingSink, open_exporter
from q3q.mirror import mirror_for
from q3q.models.checkpoint import Checkpoint, load_tokenizer, locate
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.footprint import (
    AUTO,
    PROCESS_BYTES,
    Device,
    ahead_bytes,
    choose,
    free_memory,
    in_gb,
    need,
)
from q3q.models.qwen3 import Qwen3Block
from q3q.models.qwen3_moe import Qwen3MoeBlock
from q3q.models.sharded import ShardedDecoder, load_sharded
from q3q.models.streaming import StreamedDecoder
from q3q.numerics.weights import StoredWeight
from q3q.quantize.blocks import BlockStore
from q3q.quantize.method import Method
from q3q.quantize.methods.registry import settings_of
from q3q.quantize.search import search_variants
from q3q.quantize.walk import QuantizedBlock, quantize_ends, quantized_blocks
from q3q.record import (
    COMPLETED,
    FAILED,
    Check,
    Progress,
    SiteError,
    TrialRecord,
    block_errors,
    blocks_folder,
    kept_blocks_folder,
    sealed,
    trial_folder,
    unsealed,
    write_atomically,
)
from q3q.spec import Json, TrialSpec, text_metric
from q3q.team import SOLO, PeerLostError, Seat, Team, joined

Report = Callable[[Progress], None]
AWQ_SHUFFLE_SEED = 42  # so that seed 0 draws the documents that AWQ's official code draws
LEAST_ACTIVATIONS = 64 * 2**20  # bytes that hidden states may take however little is left for them
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
UNQUANTIZED_BITS = (
    16  # embeddings, norms and the router stay in 16 bits, as the released checkpoints store them
)


def run_trial(
    spec: TrialSpec, report: Report = lambda event: None, team: Team = SOLO
) -> TrialRecord:
    """Load, calibrate, quantize, evaluate: one trial, on this machine, going on from where a killed one stopped.

    team: of a gang, whose rank 0 this is; it divides the model and the work among all.

    Returns:
        The record, already saved. A trial that fails its integrity checks is FAILED and says why.

    Raises:
        Q3QError: a setting, a file or the numerics make the trial impossible. Nothing is recorded then.
    """
    refuse_other_versions(spec.evaluation)
    folder, phases, started, watch = trial_folder(spec), Phases(), now(), SystemWatch()
    write_atomically(folder / "spec.json", json.dumps(spec.to_json(), indent=1).encode())

    def steps(
        phase: str, note: str = "", metrics: Mapping[str, float] | None = None
    ) -> Callable[[int, int], None]:
        known = dict(metrics or {})
        return lambda done, total: report(
            Progress(
                trial=spec.id,
                phase=phase,
                done=done,
                total=total,
                note=note,
                metrics=known,
                system=watch.due(),
            )
        )

    with torch.inference_mode():
        steps("load")(0, 1)
        with phases.phase("load"):
            checkpoint = open_checkpoint(spec)
            tokenizer = load_tokenizer(checkpoint.folder)
            model, loading = load_model(checkpoint, spec, device_of(spec), team)
        steps("load", loading.told)(1, 1)
        with phases.phase("baseline"):
            reference = reference_of(model, tokenizer, spec, steps)
        ledger = Ledger()
        ends: dict[str, StoredWeight] = {}
        store = BlockStore(blocks_folder(spec), kept_blocks_folder(spec))
        exporter = open_exporter(spec, checkpoint)
        sink = store if exporter is None else ExportingSink(store, exporter)
        if spec.schemes is not None:
            steps("calibrate")(0, 1)
            with phases.phase("calibrate"):
                windows = (
                    None if store.holds(len(model.blocks)) else calibration_windows(spec, tokenizer)
                )
            set_route(model, spec)
            steps("quantize")(0, len(model.blocks))
            with phases.phase("quantize"):
                method = settle_variant(build_method(spec), model, spec, windows, store, steps)
                for block in quantized_blocks(model, method, spec.schemes, windows, sink):
                    ledger.add(block)
                    found = block_errors(block.errors).get(block.index)
                    steps("quantize", metrics=found)(block.index + 1, len(model.blocks))
                ends = quantize_ends(model, spec.schemes)
        with phases.phase("evaluate"):
            set_activations(model, spec)
            scores = evaluate(model, tokenizer, spec, reference, folder / "evaluations", steps)
        checks = check_weights(model, StoredCodes(store, ledger.blocks), ends=ends, skip=spec.skip)
        exported = Exported()
        if exporter is not None:
            steps("export")(0, 1)
            with phases.phase("export"):
                exported = finish_export(exporter, model, spec, scores, checks)
    steps("record")(0, 1)
    failed = [check for check in checks if not check.passed]
    searched = store.recall("search")
    if scores.samples:
        write_samples(folder / SAMPLES, scores.samples)
    record = TrialRecord(
        spec=spec,
        status=FAILED if failed else COMPLETED,
        reason="; ".join(f"{check.name}: {check.detail}" for check in failed),
        metrics={
            **scores.metrics,
            **sizes(checkpoint, ledger, ends),
            **exported.metrics,
            **phases.metrics,
        },
        intervals=scores.intervals,
        diverged=tuple(scores.diverged),
        sites=tuple(ledger.errors),
        checks=tuple(checks),
        environment={
            "git_commit": git_commit(),
            "packages": packages(),
            "hardware": hardware(),
            "loading": asdict(loading),
            "started": started,
            "ended": now(),
        },
        results=scores.results,
        notes=ledger.notes
        | ({"search": searched} if searched else {})
        | ({"blocks_from_disk": store.taken} if store.taken else {})
        | exported.notes,
        files=(SAMPLES,) if scores.samples else (),
    )
    record.save()
    steps("record")(1, 1)
    clear(record)
    return record


def clear(record: TrialRecord) -> None:
    """Delete what only a trial under way needs; its blocks move to where other trials find them, if it keeps them.

    All stays where the export's proof alone failed: codes and measurements are sound, and the next attempt takes them.
    """
    spec = record.spec
    if [check.name for check in record.checks if not check.passed] == [PASSED]:
        return
    shutil.rmtree(trial_folder(spec) / "evaluations", ignore_errors=True)
    for torn in trial_folder(spec).glob(".*.partial"):  # of a process that died while it wrote
        torn.unlink(missing_ok=True)
    store = BlockStore(blocks_folder(spec), kept_blocks_folder(spec))
    if record.completed and spec.places.get("keep") == "blocks":
        store.keep()
    else:
        store.delete()


def share_trial(spec: TrialSpec, report: Report, seat: Seat) -> TrialRecord | None:
    """`attempt_trial` by a gang: rank 0 runs it, and the others do their part."""
    with joined(seat) as team:
        if team.rank > 0:
            TrialLog(trial_folder(spec) / LOG).write(f"rank {team.rank} of {team.size}")
            with torch.inference_mode():
                # What it reports is not heard, but its machine may have asked for it back.
                team.follow(lambda: report(Progress(trial=spec.id, phase="follow")))
            return None
        record = attempt_trial(spec, report, team)
        if (
            record.completed
        ):  # else the others may wait for something else, and are ended with the gang
            team.dismiss()
        return record


def attempt_trial(
    spec: TrialSpec, report: Report = lambda event: None, team: Team = SOLO
) -> TrialRecord:
    """`run_trial`, alone at it and not if it is done; an error becomes a FAILED record, saved with its traceback, and
    costs no other trial."""
    while True:
        try:
            with attempt(spec, report) as mine:
                if mine.done is None:
                    return _recorded(spec, mine, team)
                clear(mine.done)  # whoever finished it may have died before that
                return mine.done
        except (
            ClaimLostError
        ):  # whoever took this process for dead is at it by now, and is waited for
            if team.size > 1:  # with new ranks: these are where they were when the claim was lost
                raise PeerLostError("another process took this gang's trial over") from None


def _recorded(spec: TrialSpec, mine: Attempt, team: Team) -> TrialRecord:
    started = now()
    try:
        record = run_trial(spec, mine.tell, team)
    except (ClaimLostError, PeerLostError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, Q3QError) else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            where = error.filename or trial_folder(spec)
            reason = f"the disk is full ({where}); free some space, and the same command goes on from the last block"
        environment = {
            "git_commit": git_commit(),
            "packages": packages(),
            "started": started,
            "ended": now(),
        }
        environment["traceback"] = traceback.format_exc()
        record = TrialRecord.failed(spec, reason, environment)
        with suppress(
            OSError
        ):  # what could not be written is still the answer to whoever asked for the trial
            record.save()
    mine.end(record)
    return record


def open_checkpoint(spec: TrialSpec) -> Checkpoint:
    """The model's folder, downloaded if it is a hub's; refused if it is not what the spec says."""
    source, revision = spec.places.get("model"), spec.model.get("revision")
    checkpoint = Checkpoint(locate(source or spec.model["source"], revision))
    wanted = spec.model.get("digest")
    if wanted is not None and checkpoint.digest(Path(spec.places["trials"]) / "digests") != wanted:
        raise IntegrityError(
            f"the files in {checkpoint.folder} changed since the trial was planned; start it again"
        )
    return checkpoint


def device_of(spec: TrialSpec) -> Device:
    """Where the trial computes: as its plan says; without one on a GPU, if there is one.

    Raises:
        ConfigError: it was planned on a GPU, and torch has none.
    """
    gpus, there = spec.places.get("share", {}).get("gpus"), torch.cuda.is_available()
    if gpus and not there:
        built = (
            "no GPU is to be seen" if torch.version.cuda else "this torch was built without CUDA"
        )
        raise ConfigError(
            f"this trial was planned on a GPU, and on {platform.node()} {built}: install a torch for its driver there "
            "(README, A real Qwen3), or give cluster.gpus_per_trial=0"
        )
    return "cuda" if there and gpus != 0 else "cpu"


def keep_to_share(gpus: float) -> None:
    """Let torch allocate no more than this share of the GPU, so that it takes nothing from those beside it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, gpus - PROCESS_BYTES["cuda"] / total))


@dataclass(frozen=True)
class Loading:
    """How the model is held: by which loader, bytes that the trial may take (of a GPU's memory, if it has one), that it
    is predicted to take, and that hidden states may take of them; of a gang, each of its ranks."""

    loader: str
    memory: int
    needs: int
    activations: int
    ranks: int = 1

    @property
    def told(self) -> str:
        return f"{self.loader}, {in_gb(self.needs)} of {in_gb(self.memory)}"


def load_model(
    checkpoint: Checkpoint, spec: TrialSpec, kind: Device, team: Team = SOLO
) -> tuple[Decoder, Loading]:
    """The model as the trial's share and its places say or, where they say nothing, as fits into the memory that is
    free; a gang divides it.

    Raises:
        ConfigError: it does not fit, or it is streamed and a task generates text.
    """
    facts, dtype = checkpoint.facts, spec.model["dtype"]
    method, share = (
        None if spec.scheme is None else str(spec.method["name"]),
        spec.places.get("share", {}),
    )
    bounds = [one["memory"] for one in (spec.places, share) if "memory" in one]
    memory = (
        min(bounds) if bounds else torch.cuda.mem_get_info()[0] if kind == "cuda" else free_memory()
    )
    loader = share.get("loader", spec.places.get("loader", AUTO)) if team.size == 1 else "sharded"
    if kind == "cuda" and share.get("gpus", 1) < 1:
        keep_to_share(share["gpus"])
    if loader == AUTO:
        loader = choose(facts, dtype, method=method, memory=memory, device=kind, heads=spec.heads)
    elif loader not in ("resident", "streamed") and team.size == 1:
        raise ConfigError(
            f"loader={loader} is for a gang of processes (cluster.ranks_per_trial=2 or more); one alone takes resident "
            "or streamed"
        )
    needs = need(
        facts, dtype, method=method, loader=loader, ranks=team.size, device=kind, heads=spec.heads
    )
    spare = memory - needs
    ahead = loader == "streamed" and spare >= ahead_bytes(facts, dtype)
    spare -= ahead_bytes(facts, dtype) if ahead else 0
    loading = Loading(loader, memory, needs, max(spare, LEAST_ACTIVATIONS), team.size)
    if loader == "resident":
        model = load_decoder(checkpoint, getattr(torch, dtype), kind)
        model.activations = loading.activations
        return model, loading
    refuse_generation(spec.evaluation, loader)
    if loader == "sharded":
        return load_sharded(
            checkpoint, getattr(torch, dtype), team, activations=loading.activations
        ), loading
    dtype_read = getattr(torch, dtype)
    return StreamedDecoder(
        checkpoint, dtype_read, kind, activations=loading.activations, ahead=ahead
    ), loading


@dataclass
class Ledger:
    """What a record needs of the quantized blocks, taken down one by one: they are too large to be kept.

    weights, bits, nominal_bits: of all quantized linears.
    """

    blocks: int = 0
    errors: list[SiteError] = field(default_factory=list)
    notes: Json = field(default_factory=dict)
    weights: int = 0
    bits: int = 0
    nominal_bits: int = 0

    def add(self, block: QuantizedBlock) -> None:
        self.blocks += 1
        self.errors += block.errors
        self.notes |= block.notes
        for weight in block.quantized.values():
            self.weights += weight.shape.numel()
            self.bits += weight.storage_bits()
            self.nominal_bits += weight.nominal_bits()


@dataclass(frozen=True)
class StoredCodes(Sequence[Mapping[str, StoredWeight]]):
    """Each block's codes by weight name, read from disk when they are asked for."""

    store: BlockStore
    blocks: int

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, k: Any) -> Any:
        block = self.store.load(range(self.blocks)[k])
        if block is None:
            raise IntegrityError(
                f"block {k} was quantized and stored, and is not there whole any more"
            )
        return block.quantized


def calibration_windows(spec: TrialSpec, tokenizer: Any) -> Tensor | None:
    """Token windows [samples, length], None for a method that observes nothing."""
    if spec.calibration is None:
        return None
    wanted = spec.calibration
    text = load_text(
        wanted["source"],
        split="calibration",
        path=spec.places.get("calibration"),
        data=spec.places.get("data"),
    )
    _same_text(text.digest, wanted["digest"], wanted["source"])
    return draw_windows(
        text,
        encoder(tokenizer),
        samples=wanted["samples"],
        length=wanted["length"],
        draw=wanted["draw"],
        seed=spec.seed + (AWQ_SHUFFLE_SEED if wanted["draw"] == "documents" else 0),
    )


def build_method(spec: TrialSpec) -> Method:
    """The method that the spec names, with its settings."""
    settings = settings_of(spec.method)
    module, _, name = settings.implementation.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        owner = f"method={settings.name} of {spec.method.get('package', 'q3q')}"
        raise ConfigError(f"{owner}: {settings.implementation} is not there ({error})") from error
    if not issubclass(kind, Method):
        raise ConfigError(
            f"method={settings.name}: {settings.implementation} is not derived from Method"
        )
    method: Method = kind(settings)
    return method


def settle_variant(
    method: Method,
    model: Decoder,
    spec: TrialSpec,
    windows: Tensor | None,
    store: BlockStore,
    steps: Callable[..., Callable[[int, int], None]],
) -> Method:
    """The method, or of one that offers variants the best; what was found lies beside the blocks that it made."""
    variants = method.variants()
    if (
        not variants or windows is None or spec.schemes is None
    ):  # without windows all blocks are there, made by it
        return method
    found = store.recall("search")
    if found is None:
        found = search_variants(
            model,
            variants,
            spec.schemes,
            windows[: method.search_windows],
            lambda copy: set_activations(copy, spec),
            lambda name, done, total: steps("search", name)(done, total),
        )
        store.remember("search", found)
    return variants[found["chosen"]]


def set_route(model: Decoder, spec: TrialSpec) -> None:
    """Whether calibration shows every token to every expert. What the experts pass on is the router's choice always."""
    if model.facts.experts:
        model.adjust(Route(spec.calibration is not None and spec.calibration.get("route") == "all"))


@dataclass(frozen=True)
class Route:
    """A change of every block, which can go to other processes."""

    every_expert: bool

    def __call__(self, _: int, block: Qwen3Block) -> None:
        if isinstance(block, Qwen3MoeBlock):
            block.every_expert = self.every_expert


def set_activations(model: Decoder, spec: TrialSpec) -> None:
    """From here on each site's input is fake-quantized, if the scheme says so. Calibration saw 16-bit activations."""
    if (
        spec.scheme is not None
    ):  # a model that is evaluated as it is may have been stored with activations to quantize
        model.adjust(RoundedInputs(spec.scheme.act_bits, frozenset(spec.skip)))


@dataclass(frozen=True)
class RoundedInputs:
    """A change of every block, which can go to other processes. skip: linears that stay as they are."""

    act_bits: int | None
    skip: frozenset[str]

    def __call__(self, k: int, block: Qwen3Block) -> None:
        block.act_bits = self.act_bits
        block.unrounded = frozenset(
            site.name
            for site in block.sites
            if all(
                f"blocks.{k}.{name.removesuffix('.weight')}" in self.skip for name in site.weights
            )
        )


@dataclass
class Scores:
    """What evaluation found so far: metrics with intervals, names of those that are not finite, lm-eval's results, and
    what each sample scored."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)
    results: Json = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)

    def add(self, part: Json) -> None:
        for name, value in part["metrics"].items():
            if value is None or not math.isfinite(value):
                self.diverged.append(name)
                continue
            self.metrics[name] = value
            low, high = part["intervals"].get(name) or (math.nan, math.nan)
            if math.isfinite(low) and math.isfinite(high):
                self.intervals[name] = (low, high)
        self.results.update(part["results"])
        self.samples += part["samples"]


@dataclass(frozen=True)
class Reference:
    """What the unquantized model said of each text, by the text's name; and its head, which turns that into logits and
    is asked for when it is needed."""

    baselines: dict[str, Baseline]
    head: Callable[[], Tensor]


def reference_of(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    steps: Callable[..., Callable[[int, int], None]],
) -> Reference:
    """Find or compute what drift is measured against. To be called while the model is as it was loaded: later, nothing
    could tell that it is not."""
    drift = spec.evaluation.get("drift")
    if drift is None:
        return Reference({}, lambda: model.head_VH)
    folder, found, mirror = (
        Path(spec.places["trials"]).parent / "baselines",
        {},
        mirror_for(spec.places),
    )
    fetch = (lambda key: None) if mirror is None else (lambda key: mirror.pull(f"baselines/{key}"))
    for text in spec.evaluation["texts"]:
        windows_NT = evaluation_windows(tokenizer, spec, text)
        wanted = None if drift == "auto" else int(drift)
        count, length = windows_NT.shape
        kept = kept_windows(count, length, model.facts.hidden, spec.model["dtype"], wanted)
        identity = BaselineIdentity.of(
            spec.model, text["digest"], windows_NT, kept, model.device.type
        )
        told = steps("baseline", text["name"])
        found[text["name"]] = baseline_for(folder, identity, model, windows_NT, told, fetch)
        if mirror is not None:
            mirror.offer(f"baselines/{identity.key}")
    model.rest()
    if isinstance(model, (StreamedDecoder, ShardedDecoder)):
        return Reference(found, model.original_head)
    head_VH = model.head_VH
    return Reference(found, lambda: head_VH)


def evaluate(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    reference: Reference,
    journal: Path,
    steps: Callable[..., Callable[[int, int], None]],
) -> Scores:
    """Each text and the tasks, one after the other; what the journal holds already is not measured again."""
    wanted = spec.evaluation
    parts: list[tuple[str, Callable[[Callable[[int, int], None]], Part]]] = []
    for text in wanted["texts"]:
        parts.append(
            (text["name"], partial(_measure_text, model, tokenizer, spec, reference, text, journal))
        )
    for batch in batches(wanted):
        name = "tasks" if len(batch.tasks) > 1 else batch.tasks[0]
        parts.append((name, partial(_measure_tasks, model, tokenizer, spec, batch, journal)))
    scores = Scores()
    for number, (name, measure) in enumerate(parts, start=1):
        note = f"{name}, {number} of {len(parts)}"
        steps("evaluate", note)(0, 1)
        kept = journal / f"{number}_{name}.json"
        part = _measured(kept)
        if part is None:
            content = sealed(measure(steps("evaluate", note)).to_json())
            write_atomically(kept, content)
            part = unsealed(content)  # as it is read by whoever goes on from here
        scores.add(part)
        known = {
            key: value
            for key, value in part["metrics"].items()
            if value is not None and math.isfinite(value)
        }
        steps("evaluate", note, known)(1, 1)
    return scores


def _measured(path: Path) -> Json | None:
    """What was measured before, None if that is not there whole."""
    try:
        return unsealed(path.read_bytes())
    except (OSError, ValueError):
        return None


def evaluation_windows(tokenizer: Any, spec: TrialSpec, wanted: Json) -> Tensor:
    """Token windows [N, T] of one of the evaluation's texts."""
    text = load_text(
        wanted["source"],
        split="evaluation",
        path=spec.places.get("evaluation"),
        data=spec.places.get("data"),
    )
    _same_text(text.digest, wanted["digest"], wanted["name"])
    encode, limit = encoder(tokenizer), wanted["limit"]
    if wanted["draw"] == "random":
        samples = min(wanted["samples"], limit or wanted["samples"])
        return draw_windows(
            text, encode, samples=samples, length=wanted["window"], draw="random", seed=0
        )
    quick = bool(spec.evaluation.get("quick"))
    windows_NT = consecutive_windows(
        encode(text.joined), wanted["window"], None if quick else limit
    )
    if quick and limit and limit < len(windows_NT):
        windows_NT = windows_NT[
            sorted(random.Random(QUICK_SEED).sample(range(len(windows_NT)), limit))
        ]
    return windows_NT


def _measure_text(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    reference: Reference,
    wanted: Json,
    folder: Path,
    tell: Callable[[int, int], None],
) -> Part:
    """Perplexity, and drift where there is a baseline; of the unquantized model its baseline is the measurement."""
    name, quick = wanted["name"], bool(spec.evaluation.get("quick"))
    windows_NT, part = evaluation_windows(tokenizer, spec, wanted), Part()
    baseline = reference.baselines.get(name)
    with closing(
        Journal(folder / f"windows_{name}.jsonl", f"{spec.id} {wanted['digest']}")
    ) as journal:
        if baseline is None:
            nll_N = window_losses(model, windows_NT, tell, journal)
        elif spec.scheme is None:
            nll_N = baseline.nll_N
        else:
            found = perplexity_and_drift(
                model, windows_NT, baseline, reference.head(), tell, journal
            )
            nll_N = found.nll_N
            part.metrics |= {
                _quickly(key, quick): value for key, value in found.drift.metrics(name).items()
            }
            part.intervals |= {
                _quickly(key, quick): value for key, value in found.drift.intervals(name).items()
            }
    if not torch.isfinite(nll_N).all():
        row = int((~torch.isfinite(nll_N)).nonzero()[0])
        raise IntegrityError(f"the model's logits in window {row} of {name} are not finite")
    result, metric = of_losses(nll_N), text_metric("perplexity", name, quick)
    part.metrics[metric], part.intervals[metric] = result.value, result.interval
    part.samples += window_rows(metric, windows_digest(windows_NT), nll_N.tolist())
    return part


def _quickly(metric: str, quick: bool) -> str:
    measure, _, text = metric.partition("/")
    return text_metric(measure, text, quick)


def _measure_tasks(
    model: Decoder,
    tokenizer: Any,
    spec: TrialSpec,
    batch: Batch,
    journal: Path,
    tell: Callable[[int, int], None],
) -> Part:
    places = {
        name: Path(spec.places[name]) if name in spec.places else None for name in ("data", "tasks")
    }
    if places["tasks"] and folder_digest(places["tasks"]) != spec.evaluation["include"]:
        raise ConfigError(
            f"the task files in {places['tasks']} changed since the trial was planned; start it again"
        )
    return score_batch(
        model,
        tokenizer,
        spec.evaluation,
        batch,
        Library(places["data"], spec.evaluation.get("data", {})),
        include=places["tasks"],
        seed=spec.seed,
        journal=journal,
        identity=spec.id,
        tell=tell,
    )


@dataclass
class Exported:
    """What an export adds to the record: sizes as the files have them, and where and what it is."""

    metrics: dict[str, float] = field(default_factory=dict)
    notes: Json = field(default_factory=dict)


def finish_export(
    exporter: Exporter, model: Decoder, spec: TrialSpec, scores: Scores, checks: list[Check]
) -> Exported:
    """Complete the checkpoint, load it elsewhere, and publish it if it is what was evaluated; a check says whether.

    Raises:
        ExportError: it could not be found out. What was written stays, for the next attempt.
    """
    if all(check.passed for check in checks):
        exporter.finish(model)
        proof = prove(exporter.folder, model)
        checks.append(
            _of_another_run(proof.check, exporter.path) if exporter.finished else proof.check
        )
    if not all(check.passed for check in checks):
        exporter.withdraw()
        return Exported()
    card = model_card(
        spec,
        exporter.checkpoint.facts,
        proof,
        metrics=scores.metrics,
        intervals=scores.intervals,
        diverged=scores.diverged,
        packages=packages(),
        base=exporter.checkpoint.folder,
    )
    exporter.publish(card)
    # Remembered, so that nobody has to hash the files again who evaluates the checkpoint.
    digest = Checkpoint(exporter.path).digest(Path(spec.places["trials"]) / "digests")
    mirror = mirror_for(spec.places)
    sent = None if mirror is None else mirror.name_of(exporter.path)
    where = str(exporter.path) if sent is None else f"{spec.places['store']}/{sent}"
    facts = {"format": spec.export, "path": where, "sha256": digest, "reloaded_by": proof.loader}
    return Exported(
        {**exporter.sizes(), "seconds/export_write": round(exporter.seconds, 4)},
        {"export": facts | {"logit_error": proof.logit_error}},
    )


def _of_another_run(check: Check, path: Path) -> Check:
    """The proof of a checkpoint that this run found published: that of a sound one may fail, by other last digits."""
    if check.passed:
        return check
    why = f"{path} was exported by another run, of other codes ({check.detail})"
    return replace(check, detail=f"{why}; give fresh=true or another export.path")


def sizes(
    checkpoint: Checkpoint, ledger: Ledger, ends: Mapping[str, StoredWeight]
) -> dict[str, float]:
    """Bits per weight of the quantized linears (with scales and zero points) and of the whole model, and its bytes.

    Nominal bits are those of the codes alone, as papers count them.
    ends: embedding and head if they are quantized too: a part of the model, but no linear that a method treats.
    """
    parameters, count, bits = checkpoint.facts.parameters, ledger.weights, ledger.bits
    ends_count = sum(weight.shape.numel() for weight in ends.values())
    whole = bits + sum(weight.storage_bits() for weight in ends.values())
    whole += (parameters - count - ends_count) * UNQUANTIZED_BITS
    return {
        "bits_per_weight": bits / count if count else float(UNQUANTIZED_BITS),
        "bits_per_weight_nominal": ledger.nominal_bits / count
        if count
        else float(UNQUANTIZED_BITS),
        "bits_per_weight_model": whole / parameters,
        "model_bytes": whole / 8,
        "share_quantized": (count + ends_count) / parameters,
    }


def _same_text(found: str, wanted: str, name: str) -> None:
    if found != wanted:
        raise ConfigError(
            f"the text {name} changed since the trial was planned (digest {found}, planned {wanted})"
        )

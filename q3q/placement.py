"""Where a trial's files lie, what it is given, and how it is run: all that is no part of its id."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from q3q.spec import Json, TrialSpec
from q3q.storage.block_cache import BlockCache
from q3q.storage.mirrored_blocks import block_cache_of
from q3q.storage.stores import mirror_of

# What a trial keeps of its quantized blocks once it has succeeded: nothing, what a budget allows
# (see `storage.block_cache`), or all.
KEEP_NONE, KEEP_AUTO, KEEP_BLOCKS = KEEPS = ("none", "auto", "blocks")


MAPPINGS = ("texts", "parts")  # fields of a placement that hold several files
# Fields of a placement that are paths.
PATHS = ("trials", "model", "reference", "calibration", "evaluation", "data", "tasks", "export")


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What the plan gives a trial of its machine; of a gang, each rank.

    gpus: a share of one GPU, or 1; 0 for cores alone
    loader: resident, streamed or sharded
    memory: bytes where the model lies; None if the plan does not know
    pinned: bytes of main memory for activations that its GPU does not hold
    """

    gpus: float
    loader: str
    memory: int | None = None
    pinned: int = 0

    def to_json(self) -> Json:
        bound = {} if self.memory is None else {"memory": self.memory}
        pinned = {"pinned": self.pinned} if self.pinned else {}
        return {"gpus": self.gpus, "loader": self.loader, **bound, **pinned}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One trial's placement on one machine.

    trials: folder of every trial's state
    keep: what is kept of the quantized blocks once the trial has succeeded, one of KEEPS
    store: URL that the storage folder mirrors
    model: folder of a local model, or its GGUF file
    reference: folder of a local original that a published checkpoint is compared with
    calibration, evaluation: files of texts that are not q3q's own
    texts: files of the evaluation's texts that the user named, by name
    parts: files of a calibration mix, by their parts' digests
    data: folder with data sets
    loader, memory: as the user asked for them
    tasks: folder of the user's task files
    export: folder of the exported checkpoint
    command: that makes this trial again, for the model card
    baseline: id of the unquantized model's trial, which this one is compared with
    fresh: moment of the wish to run from nothing
    grant: None before the trial is planned
    context: tokens for which the cache's bytes are counted, as the user asked; where they count in
        a budget, the spec has them too
    """

    # In the order of the JSON, where all of it is called `places`, and a grant `share`.
    trials: Path = Path("mlruns/trials")
    keep: str = KEEP_NONE
    store: str | None = None
    model: Path | None = None
    calibration: Path | None = None
    evaluation: Path | None = None
    texts: Mapping[str, Path] | None = None
    parts: Mapping[str, Path] | None = None
    data: Path | None = None
    loader: str | None = None
    memory: int | None = None
    tasks: Path | None = None
    export: Path | None = None
    command: str | None = None
    baseline: str | None = None
    fresh: str | None = None
    grant: Grant | None = None
    context: int | None = None
    reference: Path | None = None

    @property
    def storage(self) -> Path:
        return self.trials.parent

    @property
    def digests(self) -> Path:
        """The memo of digests of model files."""
        return self.trials / "digests"

    def calibration_file(self, digest: str) -> Path | None:
        """Return the file of a calibration text, or of a mix's part; None if it has none."""
        return (self.parts or {}).get(digest, self.calibration)

    def evaluation_file(self, name: str) -> Path | None:
        """Return the file of an evaluation's text, by the text's name; None if it has none."""
        return (self.texts or {}).get(name, self.evaluation)

    @property
    def keeps_blocks(self) -> bool:
        """True if quantized blocks stay for good."""
        return self.keep == KEEP_BLOCKS

    @property
    def caches_blocks(self) -> bool:
        """True if quantized blocks stay in the storage, within a budget."""
        return self.keep == KEEP_AUTO

    @property
    def block_cache(self) -> BlockCache:
        """Where quantized blocks stay within a budget."""
        return block_cache_of(self.store or self.storage)

    @property
    def shares_blocks(self) -> bool:
        """True if quantized blocks lie where other trials read them."""
        return self.keeps_blocks or self.caches_blocks

    def in_storage(self, storage: Path, **changes: Any) -> "Placement":
        """Return the same placement in another storage folder; an export inside moves along."""
        if self.export is not None and self.export.is_relative_to(self.storage):
            changes["export"] = storage / self.export.relative_to(self.storage)
        return replace(self, trials=storage / "trials", **changes)

    def here(self) -> "Placement":
        """Return it on this machine: a storage that is a URL is mirrored in a folder of its own."""
        return self if self.store is None else self.in_storage(mirror_of(self.store))

    def to_json(self) -> Json:
        facts = {part.name: getattr(self, part.name) for part in fields(self)}
        facts["share"] = (grant := facts.pop("grant")) and grant.to_json()
        return {key: _as_json(value) for key, value in facts.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Placement":
        """Read what any version wrote, on any machine, as it is here."""
        facts = {part.name: data[part.name] for part in fields(cls) if part.name in data}
        for name in PATHS:
            if facts.get(name) is not None:
                facts[name] = Path(facts[name])
        for name in MAPPINGS:
            if facts.get(name) is not None:
                facts[name] = {key: Path(path) for key, path in facts[name].items()}
        if data.get("share") is not None:
            facts["grant"] = Grant(**data["share"])
        return cls(**facts).here()


@dataclass(frozen=True)
class Trial:
    """A trial that runs: what it is, and its placement here. Equal specs are equal trials."""

    spec: TrialSpec
    placement: Placement = field(default=Placement(), compare=False)

    @property
    def id(self) -> str:
        return self.spec.id

    @cached_property
    def folder(self) -> Path:
        """The trial's durable state: spec, blocks and evaluations so far, record."""
        return self.placement.trials / self.spec.id

    @property
    def blocks_folder(self) -> Path:
        """Quantized blocks while a trial runs that shares none."""
        return self.folder / "blocks"

    @property
    def kept_blocks_folder(self) -> Path:
        """Quantized blocks that trials share which differ in evaluation alone."""
        return self.placement.trials / "blocks" / self.spec.quantization_id

    @property
    def block_folders(self) -> tuple[Path, Path]:
        """Both places where the trial looks for quantized blocks."""
        return self.blocks_folder, self.kept_blocks_folder

    def placed(self, **changes: Any) -> "Trial":
        return replace(self, placement=replace(self.placement, **changes))

    def moved(self, storage: Path) -> "Trial":
        """Return the trial as it lies in a storage folder that may have been moved or copied.

        The store that the old folder mirrored is not this one's.
        """
        if self.placement.storage == storage:
            return self
        return replace(self, placement=self.placement.in_storage(storage, store=None))

    def to_json(self, *, complete: bool = False) -> Json:
        """Return the spec's JSON with its placement, as `spec.json` and records hold it."""
        facts = self.spec.to_json(complete=complete)
        rules = {"rules": facts.pop("rules")} if "rules" in facts else {}
        return {**facts, "places": self.placement.to_json(), **rules}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Trial":
        """Read what any version wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not a trial.
        """
        return cls(TrialSpec.from_json(data), Placement.from_json(data.get("places", {})))


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value

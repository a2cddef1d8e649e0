"""Resolve the model that a config names: its identity, its folder and its facts."""

import functools
from pathlib import Path

from omegaconf import DictConfig

from q3q.config.schema import DEMO_NAMES, DTYPES, refuse_unknown
from q3q.errors import CheckpointError, ConfigError
from q3q.models.checkpoint import Checkpoint
from q3q.models.facts import ModelFacts
from q3q.models.hub import fetch_facts, resolve_revision
from q3q.quantize.methods.settings import MethodSettings
from q3q.spec import Json
from q3q.storage.stores import folder_of

DEMO_MODELS = Path(__file__).parents[1] / "models" / "demo"


def resolve_model(config: DictConfig) -> tuple[Json, Path | None, ModelFacts]:
    """The spec's model entry, its folder if it is local, and its facts."""
    wanted = config.model
    if wanted.source is None and wanted.path is None:
        raise ConfigError("model=local needs a folder: model.path=DIR")
    if wanted.path is not None:
        path: str = wanted.path
        if wanted.source is not None or (
            wanted.name in DEMO_NAMES and not path.startswith("demo:")
        ):
            raise ConfigError(
                f"model.path={path} and model={wanted.name} contradict each other: give model=local"
            )
        folder = (
            DEMO_MODELS / path.removeprefix("demo:")
            if path.startswith("demo:")
            else Path(path).expanduser()
        )
        if wanted.revision is not None:
            raise ConfigError(
                f"model.revision={wanted.revision} is for Hub models; {path} is a folder"
            )
        facts, digest = _local_model(folder.absolute(), str(folder_of(config.storage).absolute()))
        identity: Json = {"name": wanted.name or folder.absolute().name, "digest": digest}
        place: Path | None = folder.absolute()
    else:
        revision, facts = _hub_model(wanted.source, wanted.revision)
        identity, place = {"name": wanted.name, "source": wanted.source, "revision": revision}, None
    dtype = config.dtype or wanted.dtype or facts.dtype
    refuse_unknown("dtype", dtype, DTYPES)
    return {**identity, "dtype": dtype}, place, facts


@functools.cache
def _local_model(folder: Path, storage: str) -> tuple[ModelFacts, str]:
    checkpoint = Checkpoint(folder)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: a model is evaluated with its own tokenizer"
        )
    return checkpoint.facts, checkpoint.digest(Path(storage) / "trials" / "digests")


@functools.cache
def _hub_model(source: str, revision: str | None) -> tuple[str, ModelFacts]:
    commit = resolve_revision(source, revision)
    return commit, fetch_facts(source, commit)


def refuse_second_rounding(
    settings: MethodSettings, folder: Path | None, facts: ModelFacts
) -> None:
    if settings.quantizes and facts.quantized is not None:
        raise CheckpointError(
            f"{folder or 'the model'} is quantized already ({facts.quantized}); a second rounding would measure both. "
            "Give the original model, or method=none to evaluate this one as it is"
        )


def facts_of(config: DictConfig) -> ModelFacts:
    """The facts of the model that a config means."""
    return resolve_model(config)[2]

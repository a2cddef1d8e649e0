"""Resolve the model that a config names: its identity, its folder and its facts."""

import functools
import sys
from pathlib import Path

from omegaconf import DictConfig

from q3q.config.judged import as_candidate, is_judged
from q3q.config.pages import hub_sources
from q3q.config.schema import DEMO_NAMES, DTYPES, refuse_unknown
from q3q.errors import CheckpointError, ConfigError
from q3q.models.checkpoint import Checkpoint
from q3q.models.facts import ModelFacts
from q3q.models.families.registry import package_of
from q3q.models.hub import fetch_facts, resolve_revision
from q3q.spec import ModelRef
from q3q.storage.stores import folder_of

DEMO_MODELS = Path(__file__).parents[1] / "models" / "demo"


def resolve_model(config: DictConfig) -> tuple[ModelRef, Path | None, ModelFacts]:
    """Return the spec's model, its folder (or GGUF file) if it is local, and its facts."""
    judged = is_judged(config)
    config = as_candidate(config) if judged else config
    model = config.model
    if model.source is None and model.path is None:
        raise ConfigError(
            "no model is named: give model=hub model.source=ORGANIZATION/NAME for one of the Hub, "
            "or model=local model.path=DIR for a folder or a GGUF file"
        )
    folder: Path | None = None
    if model.path is None:
        _refuse_another_models_name(model.name, model.source)
        revision, facts = _hub_model(model.source, model.revision)
        name = model.name or model.source.rpartition("/")[2]
        identity = {"name": name, "source": model.source, "revision": revision}
    else:
        demo = model.path.startswith("demo:")
        if model.source is not None or (model.name in DEMO_NAMES and not demo):
            raise ConfigError(
                f"model.path={model.path} and model={model.name} contradict each other: give "
                "model=local"
            )
        if model.revision is not None:
            raise ConfigError(
                f"model.revision={model.revision} is for Hub models; {model.path} is a local one"
            )
        folder = (
            DEMO_MODELS / model.path.removeprefix("demo:")
            if demo
            else Path(model.path).expanduser()
        )
        folder = folder.absolute()
        storage = str(folder_of(config.storage).absolute())
        facts, digest = _local_model(folder, storage, own_tokenizer=not judged)
        identity = {"name": model.name or folder.name, "digest": digest}
    dtype = config.dtype or model.dtype or facts.dtype
    refuse_unknown("dtype", dtype, DTYPES)
    package = package_of(facts.family)
    return ModelRef(**identity, dtype=dtype, package=package), folder, facts


def _refuse_another_models_name(name: str | None, source: str) -> None:
    """Refuse a source under the name of a page whose source is another.

    Reports call a model by its name, and would take this one for that page's.
    """
    own = "q3q's own" if name in DEMO_NAMES else hub_sources().get(name or "", source)
    if own.lower() != source.lower():
        raise ConfigError(
            f"model.source={source} is not {name}, which is {own}. For a model under its own name: "
            f"model=hub model.source={source}"
        )


@functools.cache
def _local_model(folder: Path, storage: str, *, own_tokenizer: bool) -> tuple[ModelFacts, str]:
    checkpoint = Checkpoint(folder)
    if own_tokenizer and not (checkpoint.folder / "tokenizer.json").is_file():
        cure = "; copy the original's beside the GGUF file" if checkpoint.gguf else ""
        raise CheckpointError(
            f"{checkpoint.folder} has no tokenizer.json: a model is evaluated with its own "
            f"tokenizer{cure}"
        )
    for remark in checkpoint.remarks:
        print(f"q3q: {folder}: {remark}", file=sys.stderr)
    return checkpoint.facts, checkpoint.digest(Path(storage) / "trials" / "digests")


@functools.cache
def _hub_model(source: str, revision: str | None) -> tuple[str, ModelFacts]:
    commit = resolve_revision(source, revision)
    facts = fetch_facts(source, commit)
    if not facts.says_dtype:
        print(
            f"Note: the config.json of {source} names no dtype, which means {facts.dtype}: in 16 "
            "bits (dtype=bfloat16) it takes half the memory",
            file=sys.stderr,
        )
    return commit, facts


def facts_of(config: DictConfig) -> ModelFacts:
    """Return the facts of the model that a config means."""
    return resolve_model(config)[2]

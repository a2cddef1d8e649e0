"""The schema of conf/, and a composed config as a TrialSpec: what makes no sense is refused before anything runs."""

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from q3q.calibrate.sources import Text, load_text
from q3q.errors import CalibrationError, CheckpointError, ConfigError, IncompatibleError
from q3q.models.checkpoint import Checkpoint, ModelFacts, fetch_facts, resolve_revision
from q3q.quantize.methods.settings import SETTINGS, MethodSettings
from q3q.spec import Json, Scheme, TrialSpec

DEMO_MODELS = Path(__file__).parent / "models" / "demo"
DEMO_NAMES = ("demo", "demo_moe")
OWN_TASKS = Path(__file__).parent / "evaluate" / "tasks"
DTYPES = ("float32", "bfloat16", "float16")
UNTOUCHED_BITS = 16  # act_bits=16: activations stay as they are
DRAWS = ("random", "first", "documents")
# How each evaluation text is named in metrics, and drawn: the study's C4 is 256 random windows, others run through.
TEXT_NAMES = {"demo": "stories"}
RANDOM_TEXTS = {"c4": 256}
# No text has tokens so long on average: with more characters than this per token needed, it is long enough.
CHARACTERS_PER_TOKEN = 100


@dataclass
class ModelConfig:
    """name: for people. source: a Hub id, or path: a folder (`demo:dense` ships with q3q). revision: of a Hub id."""

    name: str | None = None
    source: str | None = None
    path: str | None = None
    revision: str | None = None
    dtype: str | None = None


@dataclass
class CalibrationConfig:
    """samples windows of length tokens; draw: random, first or documents. null: the method's own default."""

    source: str = MISSING
    path: str | None = None
    samples: int | None = None
    length: int | None = None
    draw: str | None = None


@dataclass
class EvaluationConfig:
    """texts: perplexity of each, in windows of `window` tokens, at most `limit` of them. tasks: lm-eval's names.

    task_limit: questions per task, null for all.
    """

    name: str = MISSING
    texts: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    window: int = 2048
    limit: int | None = None
    path: str | None = None
    task_limit: int | None = None


@dataclass
class ClusterConfig:
    """address: of a running Ray, null to start one here. A trial gets so many cores (and torch threads) and GPUs."""

    name: str = MISSING
    address: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float | None = None


@dataclass
class TrackConfig:
    """uri: of the MLflow store or server; null for a SQLite file in `storage`."""

    uri: str | None = None
    experiment: str = "q3q"


@dataclass
class Config:
    """Everything that can be set; see conf/config.yaml."""

    model: ModelConfig = MISSING
    method: MethodSettings = MISSING
    calibration: CalibrationConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    cluster: ClusterConfig = MISSING
    track: TrackConfig = MISSING
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_bits: int | None = None
    dtype: str | None = None
    seed: int = 0
    plan: bool = False
    fresh: bool = False
    keep: str = "none"
    name: str | None = None
    storage: str = "mlruns"


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "calibration": CalibrationConfig,
    "evaluation": EvaluationConfig,
    "cluster": ClusterConfig,
    "track": TrackConfig,
}


def register() -> None:
    """Give Hydra the schema; once, before it composes."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_", provider="q3q")
    for name, node in GROUPS.items():
        store.store(group="schema", name=name, node=node, provider="q3q")
    for name, settings in SETTINGS.items():
        store.store(group="schema/method", name=name, node=settings, provider="q3q")


def spec_from(config: DictConfig) -> TrialSpec:
    """The trial that a composed config means, in canonical form.

    Raises:
        IncompatibleError: valid values that make no sense together. ConfigError: a value that cannot be meant.
    """
    _refuse_strangers(config)
    settings: MethodSettings = OmegaConf.to_object(config.method)  # type: ignore[assignment]
    problem = settings.problem()
    if problem:
        raise ConfigError(problem)
    _one_of("keep", config.keep, ("none", "blocks"))
    model, folder, facts = _model(config)
    scheme = _scheme(config, settings, facts)
    calibration = _calibration(config, settings, folder) if scheme is not None and settings.observes() else None
    evaluation = _evaluation(config, facts, folder)
    places: Json = {"trials": str(Path(config.storage).absolute() / "trials"), "keep": config.keep}
    if folder is not None:
        places["model"] = str(folder)
    for name in ("calibration", "evaluation"):
        if config[name].path is not None:
            places[name] = str(Path(config[name].path).expanduser().absolute())
    return TrialSpec(
        model=model,
        method={**asdict(settings), "version": settings.version},
        scheme=scheme,
        calibration=calibration,
        evaluation=evaluation,
        # Nothing but calibration windows and lm-eval's few shots is drawn at random.
        seed=config.seed,
        places=places,
    )


def tracking_uri(config: DictConfig) -> str:
    """The MLflow URI that the config means."""
    return config.track.uri or f"sqlite:///{config.storage}/mlflow.db"


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: `; did you mean gptq? `, or just its full stop."""
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}? " if close else ". "


def _refuse_strangers(config: DictConfig) -> None:
    """Hydra lets `+key=value` add anything; a setting that nobody reads would be ignored in silence."""
    parts: dict[str, tuple[DictConfig, Any]] = {
        "": (config, Config),
        "method.": (config.method, SETTINGS[config.method.name]),
    }
    for name, kind in GROUPS.items():
        parts[f"{name}."] = (config[name], kind)
    for prefix, (part, kind) in parts.items():
        known = [one.name for one in fields(kind)]
        for key in map(str, part):
            if key not in known and prefix + key != "hydra":
                raise ConfigError(f"{prefix}{key} is not a setting{nearest(key, known)}See python launch.py --help")


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key}={value} is not known{nearest(value, list(known))}Choose from: {', '.join(known)}")


def _model(config: DictConfig) -> tuple[Json, Path | None, ModelFacts]:
    """The spec's model entry, its folder if it is local, and its facts."""
    wanted = config.model
    if wanted.source is None and wanted.path is None:
        raise ConfigError("model=local needs a folder: model.path=DIR")
    if wanted.path is not None:
        path: str = wanted.path
        if wanted.source is not None or (wanted.name in DEMO_NAMES and not path.startswith("demo:")):
            raise ConfigError(f"model.path={path} and model={wanted.name} contradict each other: give model=local")
        folder = DEMO_MODELS / path.removeprefix("demo:") if path.startswith("demo:") else Path(path).expanduser()
        if wanted.revision is not None:
            raise ConfigError(f"model.revision={wanted.revision} is for Hub models; {path} is a folder")
        facts, digest = _local_model(folder.absolute(), str(Path(config.storage).absolute()))
        identity: Json = {"name": wanted.name or folder.absolute().name, "digest": digest}
        place: Path | None = folder.absolute()
    else:
        revision, facts = _hub_model(wanted.source, wanted.revision)
        identity, place = {"name": wanted.name, "source": wanted.source, "revision": revision}, None
    dtype = config.dtype or wanted.dtype or facts.dtype
    _one_of("dtype", dtype, DTYPES)
    return {**identity, "dtype": dtype}, place, facts


@functools.cache
def _local_model(folder: Path, storage: str) -> tuple[ModelFacts, str]:
    checkpoint = Checkpoint(folder)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json: a model is evaluated with its own tokenizer")
    return checkpoint.facts, checkpoint.digest(Path(storage) / "trials" / "digests")


@functools.cache
def _hub_model(source: str, revision: str | None) -> tuple[str, ModelFacts]:
    commit = resolve_revision(source, revision)
    return commit, fetch_facts(source, commit)


def _scheme(config: DictConfig, settings: MethodSettings, facts: ModelFacts) -> Scheme | None:
    bits = settings.default_bits if config.bits is None else config.bits
    act_bits = settings.default_act_bits if config.act_bits is None else config.act_bits
    scheme = Scheme(
        bits=bits,
        group_size=settings.default_group_size if config.group_size is None else config.group_size,
        symmetric=settings.default_symmetric if config.symmetric is None else config.symmetric,
        act_bits=None if act_bits == UNTOUCHED_BITS else act_bits,
    )
    _check_group_size(scheme.group_size, facts)
    if not settings.quantizes:
        if scheme.act_bits is not None:
            raise IncompatibleError(
                f"method={settings.name} quantizes nothing, so act_bits={config.act_bits} has no use"
            )
        return None
    clash = settings.clash(scheme)
    if clash:
        raise IncompatibleError(clash)
    return scheme


def _check_group_size(size: int, facts: ModelFacts) -> None:
    if size == -1:
        return
    columns = {f"{site} ({width} columns)": width for site, widths in facts.columns.items() for width in widths}
    wrong = [where for where, width in columns.items() if width % size]
    if wrong:
        usable = [s for s in (16, 32, 64, 128, 256, 512) if all(width % s == 0 for width in columns.values())]
        raise ConfigError(f"group_size={size} does not divide {', '.join(wrong)}; sizes that do: {usable} or -1")


def _calibration(config: DictConfig, settings: MethodSettings, folder: Path | None) -> Json:
    wanted = config.calibration
    draw = wanted.draw or settings.default_draw
    _one_of("calibration.draw", draw, DRAWS)
    samples = settings.default_samples if wanted.samples is None else wanted.samples
    length = settings.default_length if wanted.length is None else wanted.length
    for key, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ConfigError(f"calibration.{key}={value}: give 1 or more")
    _path_is_for_files(wanted.path, "calibration", [wanted.source])
    text = _text(wanted.source, "calibration", wanted.path)
    _check_long_enough(text, folder, samples, length, draw)
    return {"source": wanted.source, "digest": text.digest, "samples": samples, "length": length, "draw": draw}


def _evaluation(config: DictConfig, facts: ModelFacts, folder: Path | None) -> Json:
    wanted = config.evaluation
    for key, least in (("window", 2), ("limit", 1), ("task_limit", 1)):
        value = wanted[key]
        if value is not None and value < least:
            raise ConfigError(f"evaluation.{key}={value}: give {least} or more")
    if wanted.window > facts.max_positions:
        raise ConfigError(f"evaluation.window={wanted.window}: this model takes at most {facts.max_positions} tokens")
    _path_is_for_files(wanted.path, "evaluation", wanted.texts)
    _check_tasks(tuple(wanted.tasks))
    texts = []
    for source in wanted.texts:
        text = _text(source, "evaluation", wanted.path)
        samples = RANDOM_TEXTS.get(source)
        _check_long_enough(text, folder, 1, wanted.window, "random" if samples else "first")
        texts.append(
            {
                "name": _metric_name(text.name) if source == "file" else TEXT_NAMES.get(source, source),
                "source": source,
                "digest": text.digest,
                "window": wanted.window,
                "limit": wanted.limit,
                "draw": "random" if samples else "first",
                "samples": samples,
            }
        )
    return {
        "texts": texts,
        "tasks": list(wanted.tasks),
        "task_limit": wanted.task_limit if wanted.tasks else None,
    }


@functools.cache
def _check_long_enough(text: Text, folder: Path | None, samples: int, length: int, draw: str) -> None:
    """Draw the windows now if the text may be too short for them, so that no trial starts in vain.

    Raises:
        CalibrationError: it is too short, or has no document of the length asked for.
    """
    needed = length * (samples if draw == "first" else 1)
    if draw != "documents" and sum(map(len, text.documents)) >= CHARACTERS_PER_TOKEN * needed:
        return
    if folder is None:  # a Hub model, whose tokenizer may not be here yet: only what is certain is said
        count = len(text.joined.encode())
        if count < needed:  # a byte-level tokenizer makes at most one token of each byte
            raise CalibrationError(f"{text.name} has {count} bytes, so fewer than the {needed} tokens asked for")
        return
    from tokenizers import Tokenizer

    from q3q.calibrate.windows import draw_windows

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    draw_windows(
        text,
        lambda part: tokenizer.encode(part, add_special_tokens=False).ids,
        samples=samples,
        length=length,
        draw=draw,
        seed=0,
    )


def _metric_name(stem: str) -> str:
    """A file's name as part of a metric's: trackers take few characters."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", stem)


def _path_is_for_files(path: str | None, split: str, sources: Sequence[str]) -> None:
    if path is not None and "file" not in sources:
        raise ConfigError(f"{split}.path={path} is not read by {split}={'+'.join(sources)}: add {split}=file")


@functools.cache
def _check_tasks(tasks: tuple[str, ...]) -> None:
    """Names of tasks, before hours go by. lm-eval's own list takes seconds to load, and is asked only for them."""
    own = [path.stem for path in OWN_TASKS.glob("*.yaml")]
    others = [task for task in tasks if task not in own]
    if not others:
        return
    from q3q.evaluate.harness import known_tasks

    known = [*own, *known_tasks()]
    for task in others:
        if task not in known:
            raise ConfigError(f"evaluation.tasks: {task} is no task of lm-eval{nearest(task, known)}".strip())


@functools.cache
def _text(source: str, split: Any, path: str | None) -> Text:
    if source == "file" and path is None:
        raise CalibrationError(f"{split}=file needs a text: {split}.path=FILE")
    return load_text(source, split=split, path=path)


def facts_of(config: DictConfig) -> ModelFacts:
    """The facts of the model that a config means."""
    return _model(config)[2]

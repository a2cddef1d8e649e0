"""The schema of conf/, and a composed config as a TrialSpec: what makes no sense is refused before anything runs."""

import difflib
import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from q3q.calibrate.sources import SOURCES, Text, load_text
from q3q.data import Library, folder_digest
from q3q.errors import CalibrationError, CheckpointError, ConfigError, IncompatibleError
from q3q.evaluate.mmlu_paper import SHOTS as MMLU_SHOTS
from q3q.evaluate.suites import (
    CHATS,
    EVALUATION_VERSION,
    KNOWN,
    OWN_TASKS,
    PLAIN_CHAT,
    STUDY_MMLU,
    THINK_END,
    draws_shots,
    lm_eval_version,
    refuse_generation,
    settle,
)
from q3q.export.destination import check_destination, default_path
from q3q.export.formats import FORMATS, not_for_servers, refuse_what_it_cannot_hold, stored_scales
from q3q.mirror import folder_of, is_url, refuse_unusable
from q3q.models.checkpoint import (
    Checkpoint,
    ModelFacts,
    end_tokens,
    fetch_facts,
    fetch_file,
    resolve_revision,
)
from q3q.models.footprint import AUTO, LOADERS, bytes_of, choose, in_gb, need
from q3q.patterns import Linear, linears, meant, near, together
from q3q.quantize.methods.registry import described, offers, settings_class
from q3q.quantize.methods.settings import SETTINGS, MethodSettings, NoneSettings
from q3q.spec import Json, Scheme, Schemes, TrialSpec, heads_held

DEMO_MODELS = Path(__file__).parent / "models" / "demo"
DEMO_NAMES = ("demo", "demo_moe")
DTYPES = ("float32", "bfloat16", "float16")
UNTOUCHED_BITS = 16  # act_bits=16: activations stay as they are
DRAWS = ("random", "first", "documents")
ROUTES = ("top_k", "all")
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
    """samples windows of length tokens; draw: random, first or documents. null: the method's own default.

    route: which experts see a token, top_k (the router's choice) or all; a dense model has none, and ignores it.
    """

    source: str = MISSING
    path: str | None = None
    samples: int | None = None
    length: int | None = None
    draw: str | None = None
    route: str = "top_k"


@dataclass
class EvaluationConfig:
    """texts: perplexity of each, in windows of `window` tokens. tasks: lm-eval's names, q3q's or include_path's own.

    limit: windows of each text and questions of each task at most, null for all; task_limit: questions, where that
    differs; limits: questions of single tasks. quick: these are drawn at random once and for all, and every metric's
    name says so. num_fewshot: examples in every task's prompt, null for the task's own; shots: of single tasks.
    chat: none, template, thinking or no_thinking. max_gen_toks: tokens of a generated text at most, thoughts among
    them; null for each task's own number. drift: divergence from the unquantized model, on drift_windows
    windows of each text (null: as many as take a GiB of disk, else 32). baseline: compare with method=none.
    """

    name: str = MISSING
    texts: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    window: int = 2048
    limit: int | None = None
    path: str | None = None
    task_limit: int | None = None
    limits: dict[str, int] = field(default_factory=dict)
    quick: bool = False
    num_fewshot: int | None = None
    shots: dict[str, int] = field(default_factory=dict)
    include_path: str | None = None
    chat: str = PLAIN_CHAT
    max_gen_toks: int | None = None
    drift: bool = True
    drift_windows: int | None = None
    baseline: bool = True


@dataclass
class DataConfig:
    """path: a folder with data sets, one subfolder each, looked at before the Hub and its cache."""

    path: str | None = None


@dataclass
class ClusterConfig:
    """address: of a running Ray, null to start one here. auto: as the plan sees fit, from the model's bytes.

    cpus_per_trial: cores, and torch threads. gpus_per_trial: a share of one GPU, 1, or n for a gang of n that share the
    model out. ranks_per_trial: n for a gang of n, also on cores alone. memory_per_trial: of main memory, which a trial
    reserves (16GB). gpu_memory: of one GPU, for clusters whose GPUs this machine cannot ask (80GB). patience: seconds
    to wait for more machines, where a cluster grows on demand.
    """

    name: str = MISSING
    address: str | None = None
    cpus_per_trial: Any = "auto"  # numbers or words: the plan reads them
    gpus_per_trial: Any = "auto"
    ranks_per_trial: Any = "auto"
    memory_per_trial: Any = "auto"
    gpu_memory: Any = "auto"
    patience: float = 0.0


@dataclass
class TrackConfig:
    """uri: of the MLflow store or server; null for a SQLite file in `storage`. experiment: null for the sweep's name.

    register: a model of the server's registry that exported checkpoints become versions of.
    """

    uri: str | None = None
    experiment: str | None = None
    register: str | None = None


@dataclass
class ExportConfig:
    """name: of the checkpoint format, or none. path: of the folder to write; null for one in `storage`."""

    name: str = "none"
    path: str | None = None


@dataclass
class OverrideConfig:
    """What differs from bits, group_size and symmetric; null: nothing."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass
class Config:
    """Everything that can be set; see conf/config.yaml."""

    model: ModelConfig = MISSING
    method: MethodSettings = MISSING
    calibration: CalibrationConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = MISSING
    track: TrackConfig = MISSING
    export: ExportConfig = MISSING
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_bits: int | None = None
    overrides: dict[str, OverrideConfig] = field(default_factory=dict)
    skip: list[str] = field(default_factory=list)
    head_bits: int | None = None
    embedding_bits: int | None = None
    dtype: str | None = None
    seed: int = 0
    plan: bool = False
    fresh: bool = False
    keep: str = "none"
    name: str | None = None
    question: str | None = None
    expectation: str | None = None
    storage: str = "mlruns"
    memory: int | str | None = None
    loader: str = AUTO


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "calibration": CalibrationConfig,
    "evaluation": EvaluationConfig,
    "data": DataConfig,
    "cluster": ClusterConfig,
    "track": TrackConfig,
    "export": ExportConfig,
}


# For Hydra's own folders, which lie in the storage folder.
OmegaConf.register_new_resolver("folder_of", lambda storage: str(folder_of(storage)), replace=True)


def register() -> None:
    """Give Hydra the schema; once, before it composes."""
    store = ConfigStore.instance()
    whole = OmegaConf.structured(Config)
    OmegaConf.set_struct(whole.overrides, False)  # its keys are the user's
    store.store(group="schema", name="config", node=whole, package="_global_", provider="q3q")
    for name, kind in GROUPS.items():
        node = OmegaConf.structured(kind)
        for key in ("limits", "shots") if kind is EvaluationConfig else ():
            OmegaConf.set_struct(node[key], False)
        store.store(group="schema", name=name, node=node, provider="q3q")
    for name, settings in SETTINGS.items():
        store.store(group="schema/method", name=name, node=settings, provider="q3q")
    for offer in offers().values():
        if offer.name not in SETTINGS:
            # One that cannot be used is chosen like any other, and then says why it is refused.
            chosen: Any = offer.settings or MethodSettings(name=offer.name)
            store.store(group="method", name=offer.name, node=chosen, provider=offer.package)


def with_plain_keys(argument: str) -> str:
    """`overrides={"blocks.0":{bits:8}}` without the quotes: Hydra's grammar takes the keys of a mapping bare only."""
    if not argument.lstrip("+").startswith("overrides="):
        return argument
    return re.sub(
        r"""(["'])([^"']*)\1\s*:""",
        lambda key: re.sub(r"([\[\](){},:=])", r"\\\1", key[2]) + ":",
        argument,
    )


def spec_from(config: DictConfig) -> TrialSpec:
    """The trial that a composed config means, in canonical form.

    Raises:
        IncompatibleError: valid values that make no sense together. ConfigError: a value that cannot be meant.
    """
    _refuse_broken_methods(config.method.name)
    _refuse_strangers(config)
    settings: MethodSettings = OmegaConf.to_object(config.method)  # type: ignore[assignment]
    problem = settings.problem()
    if problem:
        raise ConfigError(problem)
    _one_of("keep", config.keep, ("none", "blocks"))
    if is_url(config.storage):
        refuse_unusable(config.storage)
    storage = folder_of(config.storage).absolute()
    model, folder, facts = _model(config)
    _refuse_second_rounding(settings, folder, facts)
    schemes, rules = _schemes(config, settings, facts)
    reads = schemes is not None and settings.observes() and len(schemes.skip) < len(linears(facts))
    calibration = _calibration(config, settings, folder, facts) if reads else None
    evaluation = _evaluation(config, facts, folder)
    places: Json = {"trials": str(storage / "trials"), "keep": config.keep}
    if is_url(config.storage):
        places["store"] = config.storage.rstrip("/")
    if folder is not None:
        places["model"] = str(folder)
    for name in ("calibration", "evaluation"):
        if config[name].path is not None:
            places[name] = str(Path(config[name].path).expanduser().absolute())
    if (data := _data_folder(config)) is not None:
        places["data"] = str(data)
    places |= _loading(
        config, facts, model["dtype"], settings.name if schemes else None, evaluation
    )
    if config.evaluation.include_path is not None:
        places["tasks"] = str(Path(config.evaluation.include_path).expanduser().absolute())
    scheme = schemes.base if schemes else None
    spec = TrialSpec(
        model=model,
        method=described(settings, scheme),
        scheme=scheme,
        calibration=calibration,
        evaluation=evaluation,
        # Nothing but calibration windows and lm-eval's few shots is drawn at random.
        seed=config.seed if schemes is not None else _seed_of_shots(evaluation, config.seed),
        overrides=dict(schemes.overrides) if schemes else {},
        skip=tuple(schemes.skip) if schemes else (),
        head_bits=config.head_bits,
        embedding_bits=config.embedding_bits,
        places=places,
        rules=rules,
    )
    _check_ends(spec, facts)
    spec = _exported(config, spec, facts)
    measures = evaluation["texts"] or evaluation["tasks"]
    if schemes is None or not measures or not config.evaluation.baseline:
        return spec
    return spec.with_places({**spec.places, "baseline": _baseline_of(spec).id})


def _loading(
    config: DictConfig, facts: ModelFacts, dtype: str, method: str | None, evaluation: Json
) -> Json:
    """Where the model is to be held, as far as that is said; refused now if it cannot fit there."""
    _one_of("loader", config.loader, (AUTO, *LOADERS))
    places: Json = {} if config.loader == AUTO else {"loader": config.loader}
    if config.loader != AUTO:
        refuse_generation(evaluation, config.loader)
    if config.memory is None:
        return places
    memory = bytes_of(config.memory)
    heads = heads_held(config.head_bits, evaluation)
    if config.loader == AUTO:
        refuse_generation(
            evaluation, choose(facts, dtype, method=method, memory=memory, heads=heads)
        )
    elif config.loader != "sharded":
        needs = need(facts, dtype, method=method, loader=config.loader, heads=heads)
        if needs > memory:
            raise ConfigError(
                f"memory={config.memory} is too little for loader={config.loader}: it needs {in_gb(needs)}"
            )
    return {**places, "memory": memory}


def _baseline_of(spec: TrialSpec) -> TrialSpec:
    """The trial of the unquantized model that this one is compared with."""
    return TrialSpec(
        model=spec.model,
        method=described(NoneSettings(), None),
        scheme=None,
        calibration=None,
        evaluation=spec.evaluation,
        seed=_seed_of_shots(spec.evaluation, spec.seed),
        places=spec.places,
    )


def _seed_of_shots(evaluation: Json, seed: int) -> int:
    """The seed, where it decides about the examples in some prompt; 0 where it decides nothing."""
    return seed if draws_shots(evaluation["tasks"], evaluation.get("shots", {})) else 0


def tracking_uri(config: DictConfig) -> str:
    """The MLflow URI that the config means."""
    return config.track.uri or f"sqlite:///{folder_of(config.storage)}/mlflow.db"


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: `; did you mean gptq? `, or just its full stop."""
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}? " if close else ". "


def _refuse_broken_methods(wanted: str) -> None:
    offer = offers().get(wanted)
    if offer is not None and offer.problem:
        raise ConfigError(offer.problem)
    _warn_of_broken_methods()


@functools.cache
def _warn_of_broken_methods() -> None:
    """Somebody's broken package must not stop a study that does not use it, but is not passed over either."""
    for offer in offers().values():
        if offer.problem:
            print(f"q3q: {offer.problem}. Other methods are not affected", file=sys.stderr)


def _refuse_strangers(config: DictConfig) -> None:
    """Hydra lets `+key=value` add anything; a setting that nobody reads would be ignored in silence."""
    parts: dict[str, tuple[DictConfig, Any]] = {
        "": (config, Config),
        "method.": (config.method, OmegaConf.get_type(config.method)),
    }
    if settings_class(config.method.name) is not parts["method."][1]:
        raise ConfigError(
            f"method.name={config.method.name} is not a setting: choose the method with method="
        )
    for name, kind in GROUPS.items():
        parts[f"{name}."] = (config[name], kind)
    for prefix, (part, kind) in parts.items():
        known = [one.name for one in fields(kind)]
        for key in map(str, part):
            if key not in known and prefix + key != "hydra":
                raise ConfigError(
                    f"{prefix}{key} is not a setting{nearest(key, known)}See python launch.py --help"
                )


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{key}={value} is not known{nearest(value, list(known))}Choose from: {', '.join(known)}"
        )


def _model(config: DictConfig) -> tuple[Json, Path | None, ModelFacts]:
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
    _one_of("dtype", dtype, DTYPES)
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


def _refuse_second_rounding(
    settings: MethodSettings, folder: Path | None, facts: ModelFacts
) -> None:
    if settings.quantizes and facts.quantized is not None:
        raise CheckpointError(
            f"{folder or 'the model'} is quantized already ({facts.quantized}); a second rounding would measure both. "
            "Give the original model, or method=none to evaluate this one as it is"
        )


def _exported(config: DictConfig, spec: TrialSpec, facts: ModelFacts) -> TrialSpec:
    """The spec with what the export adds to it, refused if its format or its destination cannot take it."""
    name, path = config.export.name, config.export.path
    _one_of("export", name, ("none", *FORMATS))
    if name == "none":
        if path is not None:
            raise ConfigError(
                f"export.path={path} is not read by export=none: choose a format, e.g. export=hf"
            )
        return spec
    refuse_what_it_cannot_hold(name, spec, facts)
    assert spec.scheme is not None
    spec = replace(
        spec,
        export=name,
        scheme=replace(spec.scheme, scales=stored_scales(name, spec.model["dtype"])),
    )
    folder = (
        default_path(spec, str(folder_of(config.storage)))
        if path is None
        else Path(path).expanduser().absolute()
    )
    from q3q.report.command import command_of  # which reads this module

    spec = spec.with_places({**spec.places, "export": str(folder), "command": command_of(spec)})
    check_destination(spec, facts)
    if (warning := not_for_servers(name, spec, facts)) is not None:
        _warn_once(warning)
    return spec


@functools.cache
def _warn_once(warning: str) -> None:
    print(f"q3q: {warning}", file=sys.stderr)


def _schemes(
    config: DictConfig, settings: MethodSettings, facts: ModelFacts
) -> tuple[Schemes | None, Json]:
    """How each linear is stored (None: not at all), and the patterns that say so, for people."""
    act_bits = settings.default_act_bits if config.act_bits is None else config.act_bits
    base = Scheme(
        bits=settings.default_bits if config.bits is None else config.bits,
        group_size=settings.default_group_size if config.group_size is None else config.group_size,
        symmetric=settings.default_symmetric if config.symmetric is None else config.symmetric,
        act_bits=None if act_bits == UNTOUCHED_BITS else act_bits,
    )
    model = linears(facts)
    schemes, rules = _mixed(config, base, model)
    _check_group_sizes(schemes, model)
    if not settings.quantizes:
        if base.act_bits is not None:
            raise IncompatibleError(
                f"method={settings.name} quantizes nothing, so act_bits={config.act_bits} has no use"
            )
        return None, {}
    _check_able(schemes, settings, model)
    return schemes, rules


def _mixed(config: DictConfig, base: Scheme, model: Mapping[str, Linear]) -> tuple[Schemes, Json]:
    """overrides and skip, patterns of names, as what they mean for each linear of this model.

    Of several patterns that mean a linear the last one wins, setting by setting; skip wins over all.
    """
    given: dict[str, Json] = {}
    changed: dict[str, Json] = {}
    for pattern, wanted in config.overrides.items():
        given[str(pattern)] = change = {
            key: value for key, value in wanted.items() if value is not None
        }
        if not change:
            raise ConfigError(
                f"overrides: {pattern} says nothing; give bits, group_size or symmetric"
            )
        try:
            replace(base, **change)
        except ConfigError as error:
            raise ConfigError(f"overrides: {pattern}: {error}") from error
        for name in _meant("overrides", str(pattern), model):
            changed.setdefault(name, {}).update(change)
    left_out = {name for pattern in config.skip for name in _meant("skip", pattern, model)}
    overrides = {}
    for name in model:
        differs = {
            key: value
            for key, value in changed.get(name, {}).items()
            if value != getattr(base, key)
        }
        if differs and name not in left_out:
            overrides[name] = differs
    rules: Json = {}
    if overrides:
        rules["overrides"] = given
    if left_out:
        rules["skip"] = list(config.skip)
    return Schemes(base, overrides, tuple(name for name in model if name in left_out)), rules


def _meant(key: str, pattern: str, model: Mapping[str, Linear]) -> list[str]:
    names = meant(pattern, model)
    if not names:
        if pattern in ("lm_head", "head", "embedding", "embed_tokens"):
            raise ConfigError(
                f"{key}: {pattern} is not in a block; it has settings of its own, head_bits and embedding_bits"
            )
        close = near(pattern, model)
        hint = f"; did you mean {' or '.join(close)}? " if close else ". "
        first, last = next(iter(model.values())), list(model.values())[-1]
        raise ConfigError(
            f"{key}: {pattern} matches nothing in this model{hint}"
            f"Names go from {first.names[2]}, {first.names[1]}, {first.names[0]} to {last.names[0]}"
        )
    return names


def _check_group_sizes(schemes: Schemes, model: Mapping[str, Linear]) -> None:
    used: dict[int, list[Linear]] = {}
    for name, linear in model.items():
        scheme = schemes.of(name)
        if scheme is not None and scheme.group_size != -1:
            used.setdefault(scheme.group_size, []).append(linear)
    complaints = []
    for size, those in used.items():
        wrong: dict[int, list[Linear]] = {}
        for linear in those:
            if linear.columns % size:
                wrong.setdefault(linear.columns, []).append(linear)
        if wrong:
            where = ", ".join(
                f"{together(some)} ({columns} columns)" for columns, some in wrong.items()
            )
            usable = [
                s
                for s in (16, 32, 64, 128, 256, 512)
                if all(linear.columns % s == 0 for linear in those)
            ]
            complaints.append(
                f"group_size={size} does not divide {where}; sizes that do: {usable} or -1"
            )
    if complaints:
        raise ConfigError("; ".join(complaints))


def _check_able(schemes: Schemes, settings: MethodSettings, model: Mapping[str, Linear]) -> None:
    """The method can do what is asked of it, everywhere; all places where it cannot are named at once."""
    clash = settings.clash(schemes.base)
    if clash:
        raise IncompatibleError(clash)
    clashes: dict[str, list[Linear]] = {}
    schemes_of_sites: dict[tuple[int, str], set[Scheme | None]] = {}
    for name, linear in model.items():
        scheme = schemes.of(name)
        schemes_of_sites.setdefault((linear.block, linear.site), set()).add(scheme)
        problem = settings.clash(scheme) if scheme is not None and scheme != schemes.base else None
        if problem:
            clashes.setdefault(problem, []).append(linear)
    if clashes:
        raise IncompatibleError(
            "; ".join(
                f"overrides: {problem} (asked of {together(some)})"
                for problem, some in clashes.items()
            )
        )
    uneven = [site for site, found in schemes_of_sites.items() if len(found) > 1]
    if uneven and settings.rebalances:
        where = together(
            linear for linear in model.values() if (linear.block, linear.site) in uneven
        )
        raise IncompatibleError(
            f"method={settings.name} scales all linears of a site together: give {where} one setting"
        )
    torn = [site for site, found in schemes_of_sites.items() if None in found and len(found) > 1]
    if torn and schemes.base.act_bits is not None:
        where = together(linear for linear in model.values() if (linear.block, linear.site) in torn)
        raise IncompatibleError(
            f"act_bits={schemes.base.act_bits} rounds what all linears of a site read: skip all of {where}, or none"
        )


def _check_ends(spec: TrialSpec, facts: ModelFacts) -> None:
    """Head and embedding: rounded as the scheme says, and one tensor where they are tied."""
    head, embedding = spec.head_bits, spec.embedding_bits
    asked = " ".join(
        f"{key}={bits}"
        for key, bits in (("head_bits", head), ("embedding_bits", embedding))
        if bits
    )
    if not asked:
        if spec.skip and len(spec.skip) == len(linears(facts)):
            raise IncompatibleError("skip leaves nothing to quantize: that is method=none")
        return
    if spec.scheme is None:
        name = spec.method["name"]
        raise IncompatibleError(
            f"method={name} quantizes nothing, so {asked} has no use; for these alone: method=rtn skip=[blocks.*]"
        )
    if spec.scheme.group_size != -1 and facts.hidden % spec.scheme.group_size:
        raise ConfigError(
            f"group_size={spec.scheme.group_size} does not divide the {facts.hidden} columns of {asked}"
        )
    if facts.tied and head != embedding:
        raise IncompatibleError(
            f"{spec.model['name']} ties head and embedding, they are one tensor: {asked} must be two equal numbers"
        )


def _calibration(
    config: DictConfig, settings: MethodSettings, folder: Path | None, facts: ModelFacts
) -> Json:
    wanted = config.calibration
    _one_of("calibration.route", wanted.route, ROUTES)
    draw = wanted.draw or settings.default_draw
    _one_of("calibration.draw", draw, DRAWS)
    samples = settings.default_samples if wanted.samples is None else wanted.samples
    length = settings.default_length if wanted.length is None else wanted.length
    for key, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ConfigError(f"calibration.{key}={value}: give 1 or more")
    _path_is_for_files(wanted.path, "calibration", [wanted.source])
    text = _text(wanted.source, "calibration", wanted.path, config.data.path)
    _check_long_enough(text, folder, samples, length, draw)
    drawn = {
        "source": wanted.source,
        "digest": text.digest,
        "samples": samples,
        "length": length,
        "draw": draw,
    }
    return {**drawn, "route": wanted.route} if facts.experts else drawn


def _evaluation(config: DictConfig, facts: ModelFacts, folder: Path | None) -> Json:
    """What is measured. What is not asked for is absent; `drift` says on how many windows: auto, or a number."""
    wanted = config.evaluation
    least = {
        "window": 2,
        "limit": 1,
        "task_limit": 1,
        "drift_windows": 1,
        "num_fewshot": 0,
        "max_gen_toks": 1,
    }
    for key, lowest in least.items():
        value = wanted[key]
        if value is not None and value < lowest:
            raise ConfigError(f"evaluation.{key}={value}: give {lowest} or more")
    if wanted.window > facts.max_positions:
        raise ConfigError(
            f"evaluation.window={wanted.window}: this model takes at most {facts.max_positions} tokens"
        )
    _path_is_for_files(wanted.path, "evaluation", wanted.texts)
    if wanted.quick and wanted.limit is None:
        raise ConfigError(
            "evaluation.quick=true draws evaluation.limit windows and questions: give evaluation.limit"
        )
    texts = []
    for source in wanted.texts:
        text = _text(source, "evaluation", wanted.path, config.data.path)
        samples = RANDOM_TEXTS.get(source)
        _check_long_enough(text, folder, 1, wanted.window, "random" if samples else "first")
        texts.append(
            {
                "name": _text_name(source, text),
                "source": source,
                "digest": text.digest,
                "window": wanted.window,
                "limit": wanted.limit,
                "draw": "random" if samples else "first",
                "samples": samples,
            }
        )
    names = [text["name"] for text in texts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"evaluation.texts: {', '.join(twice)} is there more than once, and has one place in the record"
        )
    evaluation: Json = {"texts": texts, **_tasks(config, facts, folder)}
    if texts or evaluation["tasks"]:
        evaluation["version"] = EVALUATION_VERSION
    if wanted.quick:
        evaluation["quick"] = True
    if wanted.drift and texts:
        evaluation["drift"] = "auto" if wanted.drift_windows is None else wanted.drift_windows
    return evaluation


def _shots_and_limits(
    wanted: DictConfig, tasks: list[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """By task: examples in the prompt, where they are given, and questions, where they differ from all tasks'."""
    shots, limits = (
        {str(task): value for task, value in wanted[key].items()} for key in ("shots", "limits")
    )
    for key, given, lowest in (("shots", shots, 0), ("limits", limits, 1)):
        for task, value in given.items():
            if task not in tasks:
                raise ConfigError(f"evaluation.{key}: {task} is not one of evaluation.tasks")
            if value < lowest:
                raise ConfigError(
                    f"evaluation.{key}: {task}: {value} is too few, give {lowest} or more"
                )
    studied = shots.get(STUDY_MMLU, wanted.num_fewshot)
    if STUDY_MMLU in tasks and studied not in (None, MMLU_SHOTS):
        raise ConfigError(
            f"{STUDY_MMLU} shows {MMLU_SHOTS} examples, not {studied}; mmlu takes any number"
        )
    if wanted.num_fewshot is not None:
        shots = {task: shots.get(task, wanted.num_fewshot) for task in tasks}
    shots.pop(STUDY_MMLU, None)
    return shots, limits


def _tasks(config: DictConfig, facts: ModelFacts, folder: Path | None) -> Json:
    """The tasks, their settings and what their data sets are; all of it is known to be there."""
    wanted = config.evaluation
    tasks = list(dict.fromkeys(wanted.tasks))
    _one_of("evaluation.chat", wanted.chat, tuple(CHATS))
    shots, limits = _shots_and_limits(wanted, tasks)
    include = (
        None if wanted.include_path is None else Path(wanted.include_path).expanduser().absolute()
    )
    if include is not None and not include.is_dir():
        raise ConfigError(
            f"evaluation.include_path={wanted.include_path} is not a folder with task files"
        )
    _check_tasks(tuple(tasks), include)
    found: Json = {"tasks": tasks, "task_limit": None}
    if not tasks and wanted.name == "tasks":
        raise ConfigError("evaluation=tasks needs some: evaluation.tasks=[piqa,mmlu]")
    generating: list[str] = []
    template = ""
    if tasks:
        if wanted.chat != PLAIN_CHAT:
            template = _chat_template(config.model.source, config.model.revision, folder)
            if not template:
                where = folder or config.model.source
                raise ConfigError(
                    f"evaluation.chat={wanted.chat}: the tokenizer in {where} has no chat template"
                )
        found["task_limit"] = wanted.limit if wanted.task_limit is None else wanted.task_limit
        known, generating = _data_sets(
            tuple(tasks),
            tuple(sorted(shots.items())),
            tuple((task, limits.get(task, found["task_limit"])) for task in tasks),
            include,
            _data_folder(config),
            wanted.max_gen_toks,
            facts.max_positions,
        )
    if wanted.max_gen_toks is not None and not generating:
        raise ConfigError(
            f"evaluation.max_gen_toks={wanted.max_gen_toks}: none of evaluation.tasks generates text"
        )
    if not tasks:
        return found
    thinks = CHATS[wanted.chat][1] or (wanted.chat == "template" and THINK_END in template)
    if thinks and generating and wanted.max_gen_toks is None:
        raise ConfigError(
            f"evaluation.chat={wanted.chat} needs evaluation.max_gen_toks=N, the most tokens of a thought and its "
            f"answer: what {', '.join(generating)} allows is for an answer alone"
        )
    optional = {
        "shots": dict(sorted(shots.items())),
        "limits": dict(sorted(limits.items())),
        "chat": None if wanted.chat == PLAIN_CHAT else wanted.chat,
        "include": None if include is None else folder_digest(include),
        "data": known,
        "generates": generating,
        "max_gen_toks": wanted.max_gen_toks,
        # Where a generated answer ends is not in the weights; a hub's revision covers the file that says it.
        "ends": list(end_tokens(folder)) if generating and folder is not None else None,
        "lm_eval": lm_eval_version(),
    }
    return found | {key: value for key, value in optional.items() if value}


@functools.cache
def _data_sets(
    tasks: tuple[str, ...],
    shots: tuple[tuple[str, int], ...],
    limits: tuple[tuple[str, int | None], ...],
    include: Path | None,
    folder: Path | None,
    most: int | None,
    window: int,
) -> tuple[dict[str, str], list[str]]:
    """What each data set of the tasks is: its commit, or the digest of its files; and which tasks generate text."""
    library = Library(folder, settle=True)
    generating = settle(
        tasks,
        library,
        shots=dict(shots),
        limits=dict(limits),
        include=include,
        most=most,
        window=window,
    )
    return dict(sorted(library.identities.items())), generating


@functools.cache
def _chat_template(source: str | None, revision: str | None, folder: Path | None) -> str:
    """The chat template of the model's tokenizer; empty if it has none."""

    def read(name: str) -> str:
        path = fetch_file(str(source), name, revision) if folder is None else folder / name
        try:
            return "" if path is None else path.read_text(encoding="utf-8")
        except OSError:
            return ""

    try:
        inside = json.loads(read("tokenizer_config.json") or "{}").get("chat_template")
    except ValueError:
        inside = None
    return str(inside or read("chat_template.jinja"))


def _data_folder(config: DictConfig) -> Path | None:
    if config.data.path is None:
        return None
    folder = Path(config.data.path).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"data.path={config.data.path} is not a folder")
    return folder


@functools.cache
def _check_long_enough(
    text: Text, folder: Path | None, samples: int, length: int, draw: str
) -> None:
    """Draw the windows now if the text may be too short for them, so that no trial starts in vain.

    Raises:
        CalibrationError: it is too short, or has no document of the length asked for.
    """
    needed = length * (samples if draw == "first" else 1)
    if draw != "documents" and sum(map(len, text.documents)) >= CHARACTERS_PER_TOKEN * needed:
        return
    if (
        folder is None
    ):  # a Hub model, whose tokenizer may not be here yet: only what is certain is said
        count = len(text.joined.encode())
        if count < needed:  # a byte-level tokenizer makes at most one token of each byte
            raise CalibrationError(
                f"{text.name} has {count} bytes, so fewer than the {needed} tokens asked for"
            )
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


def _text_name(source: str, text: Text) -> str:
    """A text's name in metrics; of a file its own, in the few characters that trackers take.

    Raises:
        ConfigError: a file is called like one of the texts that everyone knows: its numbers would pass for that one's.
    """
    if source != "file":
        return TEXT_NAMES.get(source, source)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", text.name)
    known = [TEXT_NAMES.get(source, source) for source in SOURCES["evaluation"] if source != "file"]
    if name in known:
        raise ConfigError(
            f"evaluation.path: a file called {name} would be taken for q3q's text of that name; rename it"
        )
    return name


def _path_is_for_files(path: str | None, split: str, sources: Sequence[str]) -> None:
    if path is not None and "file" not in sources:
        raise ConfigError(
            f"{split}.path={path} is not read by {split}={'+'.join(sources)}: add {split}=file"
        )


@functools.cache
def _check_tasks(tasks: tuple[str, ...], include: Path | None) -> None:
    """Names of tasks, before hours go by. lm-eval's own list takes seconds to load, and is asked only for them."""
    if include is None and set(tasks) <= set(KNOWN):
        return
    from q3q.evaluate.harness import refuse_namesakes, tasks_from

    if include is not None:
        refuse_namesakes(include, tasks)
    own = [OWN_TASKS, *([include] if include else [])]
    known = [*KNOWN, *tasks_from(own, [task for task in tasks if task not in KNOWN]).all_tasks]
    for task in tasks:
        if task not in known:
            raise ConfigError(
                f"evaluation.tasks: {task} is no task of lm-eval{nearest(task, known)}".strip()
            )


@functools.cache
def _text(source: str, split: Any, path: str | None, data: str | None) -> Text:
    if source == "file" and path is None:
        raise CalibrationError(f"{split}=file needs a text: {split}.path=FILE")
    return load_text(
        source, split=split, path=path, data=None if data is None else Path(data).expanduser()
    )


def facts_of(config: DictConfig) -> ModelFacts:
    """The facts of the model that a config means."""
    return _model(config)[2]

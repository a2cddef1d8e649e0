"""The schema of conf/: every setting, its type and its default, registered with Hydra."""

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from q3q.errors import ConfigError
from q3q.evaluate.catalogue import (
    PLAIN_CHAT,
)
from q3q.models.footprint import AUTO
from q3q.quantize.methods.registry import offers
from q3q.quantize.methods.settings import SETTINGS, MethodSettings
from q3q.storage.stores import folder_of

DEMO_NAMES = ("demo", "demo_moe")
DTYPES = ("float32", "bfloat16", "float16")
UNTOUCHED_BITS = 16  # act_bits=16: activations stay as they are
DRAWS = ("random", "first", "documents")
ROUTES = ("top_k", "all")
# How each evaluation text is named in metrics, and drawn: the study's C4 is 256 random windows, others run through.
TEXT_NAMES = {"demo": "stories"}


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


def tracking_uri(config: DictConfig) -> str:
    """The MLflow URI that the config means."""
    return config.track.uri or f"sqlite:///{folder_of(config.storage)}/mlflow.db"


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: `; did you mean gptq? `, or just its full stop."""
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}? " if close else ". "


def refuse_unknown(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{key}={value} is not known{nearest(value, list(known))}Choose from: {', '.join(known)}"
        )

"""The schema of conf/: every setting, its type and its default, registered with Hydra."""

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from q3q.bit_budget import KL, SITE
from q3q.errors import ConfigError
from q3q.evaluate.chat import PLAIN_CHAT
from q3q.models.footprint import AUTO
from q3q.number_formats import INT
from q3q.quantize.methods.registry import offers
from q3q.quantize.methods.settings import SETTINGS, MethodSettings
from q3q.storage.stores import folder_of
from q3q.track.mlflow_sqlite import own_uri

DEMO_NAMES = ("demo", "demo_moe", "demo_hybrid")
DTYPES = ("float32", "bfloat16", "float16")
UNTOUCHED_BITS = 16  # act_bits=16: activations stay as they are
DRAWS = ("random", "first", "documents")
ROUTES = ("top_k", "all")
# Names of evaluation texts in metrics, where they differ from the source.
TEXT_NAMES = {"demo": "stories"}


@dataclass
class ModelConfig:
    """The model.

    name: label for people; null: the name of the folder or file, or that on the Hub
    source: name on the Hub, ORGANIZATION/NAME; with model=judge also a folder or file
    reference: with model=judge, the original that sources are compared with
    path: folder with config.json, safetensors and tokenizer (`demo:dense` ships with q3q), or a
        GGUF file that lies beside the tokenizer
    revision: commit, branch or tag on the Hub; null: the newest
    dtype: of the arithmetic, unless the top-level dtype is given: float32, bfloat16 or float16;
        null: what config.json says
    """

    name: str | None = None
    source: str | None = None
    path: str | None = None
    revision: str | None = None
    dtype: str | None = None
    reference: str | None = None


@dataclass
class CalibrationConfig:
    """The calibration text. null: the method's own default.

    source: demo, library, wikitext2, c4, pile, file, chat, traces or mix; choose it with
        calibration=
    path: the text of calibration=file, of a kind that docs/EVALUATION.md lists, or the
        conversations of calibration=chat
    mix: weights of the sources of calibration=mix: {wikitext2: 0.5, file:FILE: 0.5}
    prompts: texts that the model continues for calibration=traces, FILE or chat:FILE; null: none
    temperature: sampling temperature of traces; 0: always the likeliest token
    samples: number of windows
    length: tokens per window
    draw: which windows of the text: random, first or documents
    route: experts that see a token, top_k (the router's choice) or all; ignored by dense models
    """

    source: str = MISSING
    path: str | None = None
    mix: dict[str, float] = field(default_factory=dict)
    prompts: str | None = None
    temperature: float | None = None
    samples: int | None = None
    length: int | None = None
    draw: str | None = None
    route: str = "top_k"


@dataclass
class EvaluationConfig:
    """What is measured.

    name: of the suite; choose it with evaluation=
    texts: texts whose perplexity is measured: a list of demo, library, wikitext2, c4, file, and
        your own texts under names of yours: {code: FILE, german: FILE}
    tasks: a list of tasks: lm-eval's, q3q's (stories_who ...), or those in include_path
    window: tokens per window of a text
    limit: most windows of each text and questions of each task; null: all
    path: the text of evaluation=file
    task_limit: most questions of each task, if that differs from limit; null: limit
    limits: most questions of single tasks: {mmlu:8}
    quick: true: windows and questions are a random sample, the same in all trials; metrics' names
        say so
    num_fewshot: examples in every prompt; null: each task's own number
    shots: examples in the prompts of single tasks: {mmlu:5}
    include_path: folder with your own task files
    chat: none, template, thinking or no_thinking: put questions through the model's chat template
    max_gen_toks: most tokens of a generated text, thoughts included; null: each task's own number
    drift: true: measure the divergence from the unquantized model
    drift_windows: windows of each text for that; null: as many as take a GiB of disk, else 32
    baseline: true: compare with the unquantized model
    floor: true: a sweep measures what rounding alone costs the unquantized model too, and the
        report says which divergences are noise
    """

    name: str = MISSING
    texts: list[Any] = field(default_factory=list)  # names, and mappings of a name to a file
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
    floor: bool = False


@dataclass
class DataConfig:
    """Data sets.

    path: folder with one subfolder per data set, searched before the Hub's cache and the Hub; null:
        search only these two
    """

    path: str | None = None


@dataclass
class ClusterConfig:
    """The machines. auto: the plan decides, from the model's bytes.

    name: local or existing; choose it with cluster=
    address: HOST:PORT of a running Ray cluster, or auto for the one here; null: start one
    cpus_per_trial: cores and torch threads; auto: the same fraction as of the memory
    gpus_per_trial: a share of one GPU, 1, or n for a gang of n that divide the model; 0: none;
        auto: one or, if trials outnumber GPUs, perhaps a share; a gang if one is too small
    ranks_per_trial: processes that share one trial, a gang; auto: one per GPU, or one on cores
    memory_per_trial: main memory that a trial reserves, such as 16GB; on GPUs auto is 4 GB,
        two blocks and the activations that the GPU does not hold
    gpu_memory: memory of one GPU, such as 80GB; auto: what nvidia-smi or Ray says
    patience: seconds to wait for more machines, where a cluster grows on demand
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
    """MLflow.

    uri: sqlite:///FILE or a server's address; null: mlflow.db in the storage folder
    experiment: MLflow's; null: the sweep's name
    register: model of the server's registry that exported checkpoints become versions of; null:
        none
    """

    uri: str | None = None
    experiment: str | None = None
    register: str | None = None


@dataclass
class ExportConfig:
    """The checkpoint to write.

    name: its format, or none; choose it with export=
    path: folder to write; null: one in the storage folder
    """

    name: str = "none"
    path: str | None = None


@dataclass
class ReportConfig:
    """The report.

    margin: the loss that you accept, in percent of a perplexity and in points of an accuracy; the
        report then says which trials are shown to stay within it (docs/STATISTICS.md); null: none
    """

    margin: float | None = None


@dataclass
class OverrideConfig:
    """Other numbers for some linears; null: no change. A format brings its own bits and groups."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    format: str | None = None
    act_format: str | None = None
    act_bits: int | None = None
    act_scales: str | None = None


@dataclass
class BudgetConfig:
    """A budget of bits for the quantized linears, divided among them by measured sensitivity.

    bits: average bits per weight, scales and zero points counted; bits=3.5 says the same
    bytes: size of the whole model, such as 4.2GB, and with context= of its cache too; budget=4.2GB
        says the same
    uniform: as many bytes as this width takes for all linears
    unit: the linears that share one width: linear, site (the linears that read one input) or block
    widths: bits that a unit may get
    measure: how the loss of a unit that is quantized alone is measured. kl: divergence of the
        model's predictions; block_error: error of its block's output, which is faster to measure
    samples: number of windows of the calibration text on which it is measured
    length: tokens per such window
    """

    bits: float | None = None
    bytes: Any = None
    uniform: int | None = None
    unit: str = SITE
    widths: list[int] = field(default_factory=lambda: [2, 3, 4, 6, 8])
    measure: str = KL
    samples: int = 16
    length: int = 512


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
    report: ReportConfig = field(default_factory=ReportConfig)
    bits: Any = None  # a whole number, or an average with a fraction
    group_size: int | None = None
    symmetric: bool | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    format: str = INT
    group_rows: int | None = None
    four_over_six: bool = False
    act_bits: int | None = None
    act_format: str | None = None
    act_group_size: int | None = None
    act_scales: str | None = None
    kv_bits: int | None = None
    kv_format: str | None = None
    kv_scales: str | None = None
    kv_group_size: int | None = None
    kv_chunk: int | None = None
    kv_window: int | None = None
    kv_symmetric: bool | None = None
    overrides: dict[str, OverrideConfig] = field(default_factory=dict)
    skip: list[str] | None = None
    head_bits: int | None = None
    embedding_bits: int | None = None
    dtype: str | None = None
    seed: int = 0
    plan: bool = False
    fresh: bool = False
    keep: str = "auto"
    name: str | None = None
    question: str | None = None
    expectation: str | None = None
    storage: str = "mlruns"
    memory: int | str | None = None
    loader: str = AUTO
    context: int | None = None


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "calibration": CalibrationConfig,
    "evaluation": EvaluationConfig,
    "data": DataConfig,
    "budget": BudgetConfig,
    "cluster": ClusterConfig,
    "track": TrackConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}


# Settings whose keys are the user's.
OWN_KEYS: dict[type, tuple[str, ...]] = {
    CalibrationConfig: ("mix",),
    EvaluationConfig: ("limits", "shots"),
}


def register() -> None:
    """Give Hydra the schema; once, before it composes."""
    # Hydra's own folders lie in the storage folder.
    OmegaConf.register_new_resolver(
        "folder_of", lambda storage: str(folder_of(storage)), replace=True
    )
    store = ConfigStore.instance()
    schema = OmegaConf.structured(Config)
    OmegaConf.set_struct(schema.overrides, False)  # its keys are the user's
    store.store(group="schema", name="config", node=schema, package="_global_", provider="q3q")
    for name, kind in GROUPS.items():
        node = OmegaConf.structured(kind)
        for key in OWN_KEYS.get(kind, ()):
            OmegaConf.set_struct(node[key], False)
        store.store(group="schema", name=name, node=node, provider="q3q")
    for name, settings in SETTINGS.items():
        store.store(group="schema/method", name=name, node=settings, provider="q3q")
    for offer in offers().values():
        if offer.name not in SETTINGS:
            # One that cannot be used is chosen like any other, and then refused with its reason.
            chosen: Any = offer.settings or MethodSettings(name=offer.name)
            store.store(group="method", name=offer.name, node=chosen, provider=offer.package)


def with_plain_keys(argument: str) -> str:
    """Drop the quotes of `overrides={"blocks.0":{bits:8}}`: Hydra's grammar takes bare keys.

    In `calibration.mix={file:a.txt: 1}`, a colon that is a part of a source is escaped likewise.
    """
    key = argument.lstrip("+").partition("=")[0]
    if key == "calibration.mix":
        argument = re.sub(
            r"""(?<=[{,])(\s*)([^"'{},\\]*:[^"'{},\\]*)(?=:\s*[\d.+-])""",
            lambda match: match[1] + re.sub(r"([:= ])", r"\\\1", match[2]),
            argument,
        )
    elif key != "overrides":
        return argument
    return re.sub(
        r"""(["'])([^"']*)\1\s*:""",
        lambda key: re.sub(r"([\[\](){},:=])", r"\\\1", key[2]) + ":",
        argument,
    )


def tracking_uri(config: DictConfig) -> str:
    """Return the MLflow URI that the config means."""
    return config.track.uri or own_uri(folder_of(config.storage))


def nearest(word: str, names: list[str]) -> str:
    """End a sentence about an unknown name: `; did you mean gptq? `, or just a full stop."""
    by_letters = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), list(by_letters), n=2, cutoff=0.55)
    close = [by_letters[letters] for letters in close]
    return f"; did you mean {' or '.join(close)}? " if close else ". "


def refuse_unknown(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ConfigError(
            f"{key}={value} is not known{nearest(value, list(names))}Choose from: "
            f"{', '.join(names)}"
        )

"""Trials for tests that compose no config: only specs that a config could yield."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from q3q.evaluate.version import EVALUATION_VERSION, lm_eval_version
from q3q.export.writer import Exporter, open_exporter
from q3q.models.checkpoint import Checkpoint
from q3q.placement import Placement, Trial
from q3q.quantize.methods.registry import method_ref
from q3q.quantize.methods.settings import SETTINGS
from q3q.spec import (
    Calibration,
    Evaluation,
    MethodRef,
    ModelRef,
    Scheme,
    TaskRef,
    TextRef,
    TrialSpec,
)

STUDY_TASKS = (
    "piqa",
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "winogrande",
    "boolq",
    "mmlu",
    "mmlu_paper",
    "wikitext",
)  # of the study's whole suite
OBSERVING = ("gptq", "awq", "smoothquant", "billm")
DEFAULT: Any = object()


def qwen3_config(
    hidden: int = 4096,
    layers: int = 36,
    heads: int = 32,
    kv_heads: int = 8,
    intermediate: int = 12288,
    tied: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Return the config.json of a released Qwen3, by default of the shape of Qwen3-8B."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    return config | changes


def model_of(name: str = "demo", dtype: str = "float32", **changes: Any) -> ModelRef:
    """Return a model in a folder."""
    return ModelRef(**{"name": name, "digest": f"{name}-digest", "dtype": dtype, **changes})


def hub_model_of(name: str, dtype: str = "bfloat16", source: str = "") -> ModelRef:
    """Return a model of the Hub."""
    source = source or f"Qwen/{name}"
    return ModelRef(name=name, source=source, revision="c0ffee", dtype=dtype)


def method_of(name: str, scheme: Scheme | None = None, **knobs: Any) -> MethodRef:
    """Return a method of q3q's with its version and all its knobs; `knobs`: those not default."""
    return method_ref(SETTINGS[name](**knobs), scheme)


def calibration_of(source: str = "demo", **changes: Any) -> Calibration:
    """Return what is calibrated on: 8 windows of 64 tokens, at random places of a text."""
    drawn = {"samples": 8, "length": 64, "draw": "random"}
    return Calibration(**{"source": source, "digest": f"{source}-digest", **drawn, **changes})


def text_of(
    name: str = "stories", window: int = 512, limit: int | None = None, **changes: Any
) -> TextRef:
    """Return an evaluation's text; c4's windows are drawn at random, others' run through."""
    samples = 256 if name == "c4" else None
    text = TextRef(
        name=name,
        source={"stories": "demo"}.get(name, name),
        digest=f"{name}-digest",
        window=window,
        limit=limit,
        draw="first" if samples is None else "random",
        samples=samples,
    )
    return replace(text, **changes)


def evaluation_of(
    *texts: str | TextRef,
    tasks: tuple[str, ...] | list[str] = (),
    shots: dict[str, int] | None = None,
    limits: dict[str, int] | None = None,
    **changes: Any,
) -> Evaluation:
    """Return what is measured.

    Args:
        texts: names, or what `text_of` makes of them.
        shots, limits: by task.
        changes: further settings, such as `task_limit` or `drift`.
    """
    evaluation = Evaluation(
        texts=tuple(text_of(text) if isinstance(text, str) else text for text in texts),
        tasks=tuple(
            TaskRef(name=task, shots=(shots or {}).get(task), limit=(limits or {}).get(task))
            for task in tasks
        ),
        lm_eval=lm_eval_version() if tasks else None,
        version=EVALUATION_VERSION if texts or tasks else None,
    )
    return replace(evaluation, **changes)


def changed(part: Any, **changes: Any) -> Any:
    """Return a part of a spec with some of its settings changed."""
    return replace(part, **changes)


def make_spec(
    method: str | MethodRef = "rtn",
    bits: int = 4,
    *,
    group_size: int = 128,
    symmetric: bool | None = None,
    act_bits: int | None = None,
    scales: str | None = None,
    scheme: Scheme | None = DEFAULT,
    model: str | ModelRef = "demo",
    calibration: Calibration | None = DEFAULT,
    evaluation: Evaluation = DEFAULT,
    seed: int = 0,
    **others: Any,
) -> TrialSpec:
    """Return a trial's spec, by default of the demo model on one text.

    Args:
        method: a method's name, or what `method_of` makes of it; `none` quantizes nothing.
        scheme: in place of `bits` to `scales`.
        model: a folder's model by its name, or what `model_of` or `hub_model_of` makes of it.
        calibration: by default `calibration_of()` where the method reads a text.
        others: further fields of `TrialSpec`.
    """
    name = method if isinstance(method, str) else method.name
    if name == "none":
        scheme = None
    elif scheme is DEFAULT:
        symmetric = name == "smoothquant" if symmetric is None else symmetric
        scheme = Scheme(
            bits=bits, group_size=group_size, symmetric=symmetric, act_bits=act_bits, scales=scales
        )
    if calibration is DEFAULT:
        calibration = calibration_of() if name in OBSERVING else None
    return TrialSpec(
        model=model_of(model) if isinstance(model, str) else model,
        method=method_of(method, scheme) if isinstance(method, str) else method,
        scheme=scheme,
        calibration=calibration,
        evaluation=evaluation_of("stories") if evaluation is DEFAULT else evaluation,
        seed=seed,
        **others,
    )


def make_trial(
    *args: Any, storage: Path = Path("mlruns"), placement: dict[str, Any] | None = None, **spec: Any
) -> Trial:
    """Return a trial in a storage folder.

    Args:
        args, spec: as of `make_spec`.
        placement: further fields of `Placement`.
    """
    placed = Placement(trials=storage / "trials", **(placement or {}))
    return Trial(make_spec(*args, **spec), placed)


def respecified(trial: Trial, **changes: Any) -> Trial:
    """Return the trial with another spec, placed as it is."""
    return replace(trial, spec=replace(trial.spec, **changes))


def exporter_of(trial: Trial, checkpoint: Checkpoint) -> Exporter:
    """Return the exporter of a trial that exports."""
    exporter = open_exporter(trial, checkpoint)
    assert exporter is not None
    return exporter

"""A model's facts, read from its config.json: shapes, counts and sizes, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from q3q.errors import CheckpointError
from q3q.models.config_values import Values
from q3q.models.families.registry import find_family
from q3q.models.family import DTYPE_BYTES, ModelFacts
from q3q.models.gguf_file import gguf_of, open_gguf
from q3q.models.model_json import read_json
from q3q.models.published.modelopt import FILE as MODELOPT_FILE
from q3q.models.published.modelopt import METHOD as MODELOPT_METHOD
from q3q.models.published.readers import read_packing

__all__ = [
    "DTYPE_BYTES",
    "EXPORT_KEY",
    "ModelFacts",
    "number_of_tensors",
    "read_facts",
    "refuse_second_rounding",
]

EXPORT_KEY = "q3q"  # in the config.json of q3q's own exports
LONGEST = 300  # characters of a complaint, which quotes what the file says


def read_facts(source: Path | Mapping[str, Any]) -> ModelFacts:
    """Read the facts of a model folder, a GGUF file, or a parsed config.json (transformers 4 or 5).

    Raises:
        CheckpointError: there is no readable config.json, or it is not of a family that q3q runs,
            of a model that is quantized in a way that q3q cannot read, or of a kind that q3q cannot
            run.
    """
    stored = None
    if isinstance(source, Mapping):
        where, config = "the config", source
    elif (file := gguf_of(source)) is not None:
        model = open_gguf(file)
        where, config, stored = str(file), model.config, model.quantized
    else:
        where, config = str(source), read_json(source / "config.json")

    def wrong(complaint: str) -> CheckpointError:
        shown = complaint if len(complaint) <= LONGEST else f"{complaint[: LONGEST - 1]}…"
        return CheckpointError(f"{where}: {shown}")

    values = Values(config, wrong)
    packing = None
    try:
        family = find_family(config.get("model_type"))
        if config.get("quantization_config") is not None:
            packing = read_packing(values.table("quantization_config"))
        elif not isinstance(source, Mapping) and (source / MODELOPT_FILE).is_file():
            packing = read_packing(
                {**read_json(source / MODELOPT_FILE), "quant_method": MODELOPT_METHOD}
            )
    except CheckpointError as error:
        raise wrong(str(error).removeprefix(f"{where}: ")) from error
    facts = replace(
        family.facts(values),
        packing=packing,
        quantized=packing.method if packing else stored or _made_by_q3q(config.get(EXPORT_KEY)),
    )
    _refuse_misfits(facts, wrong)
    return facts


def refuse_second_rounding(folder: Path | None, facts: ModelFacts) -> None:
    """Refuse to quantize a model that is quantized already.

    Raises:
        CheckpointError: it is.
    """
    if facts.quantized is not None:
        raise CheckpointError(
            f"{folder or 'the model'} is quantized already ({facts.quantized}); a second rounding "
            "would measure both. Give the original model, or method=none to evaluate this one as "
            "it is"
        )


def _refuse_misfits(facts: ModelFacts, wrong: Callable[[str], CheckpointError]) -> None:
    """Refuse values that do not fit each other."""
    if facts.heads % facts.kv_heads:
        raise wrong(
            f"{facts.heads} attention heads cannot share {facts.kv_heads} key/value heads evenly"
        )
    if facts.head_dim % 2:
        raise wrong(f"head_dim={facts.head_dim}: rotary positions turn pairs, so it must be even")
    if facts.rotary_dim % 2 or not facts.rotary_dim:
        raise wrong(
            f"partial_rotary_factor={facts.rotary_share:g} of head_dim={facts.head_dim} is "
            f"{facts.rotary_dim} dimensions: rotary positions turn pairs, so it must be even"
        )
    if facts.delta and facts.delta.value_heads % facts.delta.key_heads:
        raise wrong(
            f"{facts.delta.value_heads} value heads of the delta rule cannot share "
            f"{facts.delta.key_heads} key heads evenly"
        )
    if facts.dtype not in DTYPE_BYTES:
        raise wrong(f"dtype {facts.dtype!r} is not supported, only {', '.join(DTYPE_BYTES)}")


def _made_by_q3q(marker: Any) -> str | None:
    return f"by q3q: {marker.get('name')}" if isinstance(marker, dict) else None


def number_of_tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"

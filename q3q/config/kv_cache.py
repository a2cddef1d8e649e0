"""Resolve how the cache of keys and values is stored, and the context that it is counted for."""

from omegaconf import DictConfig

from q3q.bit_budget import BitBudget
from q3q.config.schema import refuse_unknown
from q3q.errors import ConfigError, IncompatibleError
from q3q.kv_scheme import (
    CHANNEL,
    KV_CHUNK,
    KV_SCALES,
    TOKEN,
    UNTOUCHED_KV_BITS,
    KvScheme,
)
from q3q.models.facts import ModelFacts
from q3q.models.footprint import cache_shape
from q3q.number_formats import FLOATS, FORMATS, INT
from q3q.spec import Evaluation


def resolve_kv(config: DictConfig, facts: ModelFacts) -> KvScheme | None:
    """Return how the cache stores keys and values; None if they stay as the model has them."""
    bits, name = config.kv_bits, config.kv_format
    if name is not None:
        refuse_unknown("kv_format", name, FORMATS)
    if config.kv_scales is not None:
        refuse_unknown("kv_scales", config.kv_scales, KV_SCALES)
    if bits == UNTOUCHED_KV_BITS or (bits is None and name in (None, INT)):
        if name == INT and bits is None:
            raise ConfigError("kv_format=int needs a number of bits: add kv_bits=8, 4, 3 or 2")
        own = None if facts.packing is None else facts.packing.kv
        return KvScheme(bits=bits) if bits and own is not None else None
    name = INT if name is None else name
    form, scales = FLOATS.get(name), config.kv_scales or TOKEN
    size, chunk = config.kv_group_size, config.kv_chunk
    if size is None:
        size = -1 if form is None else form.group_size or -1
    if chunk is None:
        chunk = KV_CHUNK if scales == CHANNEL else 1
    scheme = KvScheme(
        bits=form.bits if bits is None and form is not None else bits,
        format=name,
        scales=scales,
        group_size=size,
        chunk=chunk,
        window=config.kv_window or 0,
        symmetric=bool(config.kv_symmetric),
    )
    shape = cache_shape(facts)
    if not shape.numbers:
        raise IncompatibleError(f"kv_bits={scheme.bits}: no block of this model has a cache")
    if misfit := scheme.misfit(shape.head_dim):
        raise ConfigError(misfit)
    return scheme


def reads_cache(config: DictConfig, evaluation: Evaluation, budget: BitBudget | None) -> bool:
    """Return True if a trial reads how the cache is stored: else it is no part of the trial."""
    measured = evaluation.texts or evaluation.tasks or config.export.name != "none"
    return bool(measured) or (budget is not None and budget.context is not None)


def cache_notice(kv: KvScheme | None, facts: ModelFacts) -> str | None:
    """Return in a line that not all blocks have a cache, if it is rounded; None if all have one."""
    attending = sum(facts.family.state_width(facts, k) > 0 for k in range(facts.layers))
    if kv is None or attending == facts.layers:
        return None
    return (
        f"{attending} of {facts.layers} blocks of this model attend and have a cache of keys and "
        "values, which is rounded; the state of the others' recurrence is not"
    )


def resolve_context(config: DictConfig) -> int | None:
    """Return the tokens for which the cache's bytes are counted; None for no number."""
    context: int | None = config.context
    if context is not None and context < 1:
        raise ConfigError(f"context={context}: give a number of tokens, such as 32768, or null")
    return context

"""A scheme of the cache: what is refused, what a trial's id depends on, and the bytes it takes."""

import json
import shlex
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from q3q.config.command import command_of
from q3q.config.kv_cache import cache_notice
from q3q.config.model import DEMO_MODELS
from q3q.errors import ConfigError
from q3q.kv_scheme import CacheShape, KvScheme
from q3q.models.adjust import set_cache
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.facts import read_facts
from q3q.models.footprint import cache_shape
from q3q.models.published.packing import Packing
from q3q.placement import Placement, Trial
from q3q.quantize.ledger import cache_note, cache_sizes
from q3q.record import COMPLETED, TrialRecord
from q3q.report.about import About
from q3q.report.header import abbreviations
from q3q.report.measures import is_reference
from q3q.report.plots import study_plots
from q3q.report.sizes import cache_scheme_of, cache_shape_of
from q3q.spec import TrialSpec
from q3q.track.mlflow_fields import trial_params
from tests.composed import composed_trial
from tests.specs import make_spec, qwen3_config

KIVI = KvScheme(bits=2, scales="channel", chunk=32, group_size=32, window=128)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("kv_bits=5", "kv_bits=5 does not exist: give 2, 3, 4, 8, or null for 16"),
        ("kv_format=bfloat16", "kv_format=bfloat16 is not known"),
        ("kv_format=int", "kv_format=int needs a number of bits: add kv_bits=8, 4, 3 or 2"),
        ("kv_bits=8 kv_format=mxfp4", "numbers of kv_format=mxfp4 have 4 bits"),
        ("kv_bits=4 kv_group_size=48", r"does not divide a head of 64 channels.*\[16, 32, 64\]"),
        ("kv_bits=4 kv_chunk=16", "kv_chunk=16 is for kv_scales=channel, not token"),
        ("kv_bits=2 kv_scales=channel kv_chunk=1", "kv_chunk=1: .* at least 2 tokens share a sca"),
        ("kv_bits=4 kv_scales=fixed", "kv_scales=fixed is for kv_format=fp8_e4m3 or fp8_e5m2"),
        ("kv_format=mxfp8 kv_scales=channel", "groups of kv_format=mxfp8 lie in one token"),
        ("kv_bits=4 kv_scales=head", "kv_scales=head is not known"),
        ("kv_bits=4 kv_window=-1", "kv_window=-1: give a number of tokens"),
        ("context=0", "context=0: give a number of tokens, such as 32768, or null"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(typed, answer):
    with pytest.raises(ConfigError, match=answer) as refused:
        composed_trial(*typed.split())
    assert "\n" not in str(refused.value)


def test_a_trial_without_a_rounded_cache_is_the_trial_that_it_was():
    plain = composed_trial("method=rtn")
    assert composed_trial("method=rtn", "kv_bits=16", "context=1000").id == plain.id
    assert "kv" not in plain.spec.to_json(complete=True)
    assert "context" not in plain.placement.to_json()


def test_the_cache_is_part_of_a_trial_and_not_of_its_weights():
    plain = make_spec("rtn", 4)
    rounded = replace(plain, kv=KIVI)
    assert rounded.id != plain.id
    assert rounded.quantization_id == plain.quantization_id
    assert TrialSpec.from_json(json.loads(json.dumps(rounded.to_json()))) == rounded
    assert rounded.name == "rtn w4 g128 kv2 channel/32 g32 window 128"
    assert trial_params(rounded)["kv_bits"] == "2"
    alone = replace(make_spec("none"), kv=KvScheme(bits=8))
    assert alone.name == "none kv8"
    records = [TrialRecord(spec=spec, status=COMPLETED) for spec in (make_spec("none"), alone)]
    assert list(map(is_reference, records)) == [True, False]
    assert abbreviations(records).endswith(
        "kv8: keys and values of 8 bits, a scale for a head of a token."
    )


def test_the_printed_command_makes_the_same_trial():
    typed = ["kv_bits=2", "kv_scales=channel", "kv_group_size=32", "kv_window=128"]
    trial = composed_trial("method=rtn", *typed)
    assert trial.spec.kv == KIVI
    words = [word for word in command_of(trial).split() if word.startswith("kv_")]
    assert composed_trial("method=rtn", *words).id == trial.id
    nothing = composed_trial("method=rtn", *typed, "evaluation=none")
    assert nothing.spec.kv is None
    assert nothing.id == composed_trial("method=rtn", "evaluation=none").id
    alone = composed_trial("method=none", "kv_bits=8")
    assert alone.placement.baseline == composed_trial("method=none").id


@torch.inference_mode()
def test_16_bits_turn_off_the_cache_that_a_published_checkpoint_rounds(tmp_path):
    folder = shutil.copytree(DEMO_MODELS / "dense", tmp_path / "published")
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    settings = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": cache}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    words = ("model=local", f"model.path={folder}", "method=none")
    own, off = composed_trial(*words), composed_trial(*words, "kv_bits=16")
    assert (own.spec.kv, off.spec.kv) == (None, KvScheme(bits=16))
    assert off.id != own.id
    assert composed_trial(*shlex.split(command_of(off))[2:]).id == off.id
    assert off.spec.name == "none kv16"
    ids, states = torch.arange(40)[None], []
    for spec, place in ((own.spec, folder), (off.spec, folder), (own.spec, DEMO_MODELS / "dense")):
        model = load_decoder(Checkpoint(place), torch.float32)
        set_cache(model, spec)
        states.append(model.hidden(ids))
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[2])
    facts = Checkpoint(folder).facts
    numbers = cache_shape(facts).numbers
    assert cache_sizes(own, facts) == {"cache_bytes_per_token": numbers}
    with_context = replace(off, placement=replace(off.placement, context=100))
    assert cache_sizes(with_context, facts)["cache_bytes"] == 200 * numbers
    with pytest.raises(ConfigError, match="kv_bits=16 leaves the cache as it is: drop the other"):
        KvScheme(bits=16, window=4)


def test_bytes_of_a_known_model_are_what_one_computes_by_hand():
    shape = cache_shape(read_facts(qwen3_config()))  # of Qwen3-8B
    assert shape == CacheShape(numbers=2 * 36 * 8 * 128, head_dim=128)
    assert shape.token_bytes(None) == 147_456
    assert shape.bytes_at(None, 32768) == 147_456 * 32768
    heads = 2 * 36 * 8
    assert shape.token_bytes(KvScheme(bits=8)) == heads * (128 + 4)
    assert shape.token_bytes(KvScheme(bits=8, symmetric=True)) == heads * (128 + 2)
    assert shape.token_bytes(KvScheme(bits=8, format="fp8_e4m3", scales="fixed")) == heads * 128
    assert shape.token_bytes(KvScheme(bits=4, format="mxfp4", group_size=32)) == heads * (64 + 4)
    nvfp4 = KvScheme(bits=4, format="nvfp4", group_size=16)
    assert shape.token_bytes(nvfp4) == heads * (64 + 8 + 4)
    # Keys: 2 bits and 32 of a channel's 32 tokens; values: 2 bits and 32 of 32 channels.
    assert shape.token_bytes(KIVI) == heads * 128 * 3 / 8
    coded = 1000 - 128 - (1000 - 128) % 32
    assert shape.bytes_at(KIVI, 1000) == coded * heads * 48 + (1000 - coded) * 147_456
    assert shape.bytes_at(KIVI, 128) == shape.bytes_at(None, 128)


def test_of_a_hybrid_only_the_blocks_that_attend_are_counted_and_it_is_said():
    config = qwen3_config(layers=4, heads=8, kv_heads=2, intermediate=256, hidden=128)
    hybrid = read_facts(
        config
        | {"model_type": "qwen3_next", "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    )
    assert len(hybrid.recurrent) == 3
    assert cache_shape(hybrid).numbers == 2 * 2 * 128
    assert cache_notice(KIVI, hybrid) == (
        "1 of 4 blocks of this model attend and have a cache of keys and values, which is rounded; "
        "the state of the others' recurrence is not"
    )
    assert cache_notice(None, hybrid) is None
    assert cache_notice(KIVI, read_facts(config)) is None


def recorded(kv, perplexity, context=None):
    facts = read_facts(qwen3_config())
    trial = Trial(replace(make_spec("rtn", 4), kv=kv), Placement(context=context))
    metrics = {
        "perplexity/stories": perplexity,
        "bits_per_weight": 4.0,
        "bits_per_weight_model": 4.0,
        "model_bytes": 4e9,
    }
    return TrialRecord(
        spec=trial.spec,
        status=COMPLETED,
        metrics=metrics | cache_sizes(trial, facts),
        notes=cache_note(trial, facts),
    )


def test_a_record_without_a_note_is_counted_by_its_models_config():
    trial = composed_trial("method=rtn")
    found = cache_shape_of(
        [TrialRecord(spec=trial.spec, placement=trial.placement, status=COMPLETED)]
    )
    assert found == CacheShape(numbers=2304, head_dim=64)
    assert cache_shape_of([TrialRecord(spec=make_spec("rtn", 4), status=COMPLETED)]) is None


def test_a_checkpoint_that_says_how_its_cache_is_stored_is_counted_so_unless_another_way_is_asked():
    facts = read_facts(qwen3_config())
    fp8 = KvScheme(bits=8, format="fp8_e4m3", scales="fixed")
    published = replace(facts, packing=Packing("modelopt", (), kv=fp8))
    own, asked = (Trial(replace(make_spec("none"), kv=kv)) for kv in (None, KvScheme(bits=4)))
    assert cache_sizes(own, facts) == {}
    assert cache_sizes(own, published) == {"cache_bytes_per_token": 73_728}
    record = TrialRecord(spec=own.spec, status=COMPLETED, notes=cache_note(own, published))
    assert cache_scheme_of(record) == fp8
    assert cache_sizes(asked, published) == cache_sizes(asked, facts)


def test_memory_in_the_picture_is_weights_and_cache_where_a_context_is_given():
    records = [recorded(None, 3.0), recorded(KvScheme(bits=8), 3.1, 32768)]
    assert "cache_bytes_per_token" not in records[0].metrics
    assert records[1].metrics["cache_bytes"] == 76_032 * 32768

    def megabytes(context):
        plots = study_plots(records, None, context)
        [axes] = next(plot for plot in plots if plot.name == "demo-pareto").figure.axes
        lines: list[Any] = [line for line in axes.get_lines() if "q3q-point" in str(line.get_gid())]
        return sorted(float(line.get_xdata()[0]) for line in lines), axes.get_xlabel()

    assert megabytes(None) == ([4000.0, 4000.0], "size of the whole model, MB")
    found, label = megabytes(8192)
    assert found == pytest.approx([4000 + 76_032 * 8192 / 1e6, 4000 + 147_456 * 8192 / 1e6])
    assert label == "weights and cache of 8,192 tokens, MB"
    assert About(name="x", command="y").context is None

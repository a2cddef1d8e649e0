"""Specs know their own name; records go to disk and come back, whole or not at all."""

import json
import math
from pathlib import Path

import pytest

from q3q.errors import ConfigError
from q3q.placement import Placement, Trial
from q3q.record import Check, SiteError, TrialRecord, forget_progress
from q3q.spec import Scheme, Schemes, TrialSpec
from q3q.storage.files import write_atomically
from q3q.track.mlflow_fields import flat
from tests.specs import calibration_of, evaluation_of, make_spec, method_of

MIXED = {
    "overrides": {"blocks.0.mlp.down_proj": {"bits": 8, "symmetric": True}},
    "skip": ("blocks.1.self_attn.o_proj",),
    "head_bits": 8,
    "embedding_bits": 4,
    "rules": {
        "overrides": {"blocks.0.down": {"bits": 8, "symmetric": True}},
        "skip": ["blocks.1.o"],
    },
}


def spec(**changes) -> TrialSpec:
    return make_spec(**{"method": "gptq", "bits": 3, **changes})


def record(**changed) -> TrialRecord:
    given = {
        "spec": spec(),
        "status": "COMPLETED",
        "metrics": {"perplexity/stories": 2.5},
        "intervals": {"perplexity/stories": (2.4, 2.6)},
        "diverged": ("perplexity/library",),
        "sites": (
            SiteError(
                block=0, site="qkv", linear="self_attn.q_proj", weight_error=0.1, output_error=None
            ),
        ),
        "checks": (Check(name="finite", passed=True, detail=""),),
    }
    return TrialRecord(**{**given, **changed})


def test_an_id_is_the_same_for_equal_specs_and_does_not_see_places():
    assert Trial(spec()) == Trial(spec(), Placement(trials=Path("/elsewhere")))
    assert Trial(spec()).id == spec().id
    assert len(spec().id) == 10
    # Constants: ids must not drift between versions, or everything would run again.
    assert (spec().id, spec().quantization_id) == ("b3eab1970b", "0f51c392b2")
    assert spec().id == TrialSpec.from_json(json.loads(json.dumps(spec().to_json()))).id


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"method": method_of("gptq", damping=0.05)},
        {"calibration": calibration_of("c4")},
        {"evaluation": evaluation_of("library")},
        {"seed": 1},
        {"bits": 4},
    ],
    ids=str,
)
def test_every_part_of_a_spec_counts(change):
    assert spec(**change).id != spec().id
    same_weights = spec(**change).quantization_id == spec().quantization_id
    assert same_weights == ("evaluation" in change)


def test_names_are_for_people():
    assert spec().name == "gptq w3 g128"
    assert spec(bits=4, group_size=-1, symmetric=True, act_bits=8).name == "gptq w4a8 pc"
    assert spec(method="none").name == "none"


def test_what_departs_from_the_scheme_is_in_the_name_the_params_and_the_id():
    mixed = spec(**MIXED)
    assert mixed.name == "gptq w3 g128 blocks.0.down:w8sym -blocks.1.o head:w8 embedding:w4"
    assert flat(mixed)["overrides"] == '{"blocks.0.down": {"bits": 8, "symmetric": true}}'
    assert flat(mixed)["skip"] == '["blocks.1.o"]'
    assert TrialSpec.from_json(json.loads(json.dumps(mixed.to_json()))) == mixed
    ids = {spec(**{key: value}).quantization_id for key, value in MIXED.items() if key != "rules"}
    assert len(ids | {spec().quantization_id}) == 5
    # Patterns are for people: what they mean for this model's linears is what counts.
    assert spec(**MIXED | {"rules": {}}).id == mixed.id
    assert not {"overrides", "skip", "head_bits", "embedding_bits", "rules"} & set(spec().to_json())


def test_schemes_say_how_each_linear_is_stored():
    schemes = spec(**MIXED).schemes
    assert schemes is not None
    assert schemes.head is not None
    assert schemes.embedding is not None
    assert schemes.of("blocks.0.mlp.down_proj") == Scheme(bits=8, group_size=128, symmetric=True)
    assert schemes.of("blocks.1.self_attn.o_proj") is None
    assert (
        schemes.of("blocks.1.mlp.down_proj")
        == schemes.base
        == Scheme(bits=3, group_size=128, symmetric=False)
    )
    assert (schemes.head.bits, schemes.embedding.bits) == (8, 4)
    plain = spec()
    assert plain.scheme is not None
    assert plain.schemes == Schemes(plain.scheme, skip=frozenset())
    assert spec(method="none").schemes is None


@pytest.mark.parametrize("key", ["head_bits", "embedding_bits"])
def test_bits_of_the_ends_are_checked_at_birth(key):
    with pytest.raises(ConfigError, match=f"{key}=1 is out of range: give 2 to 8"):
        spec(**{key: 1})


def test_flat_params_are_dotted():
    params = flat(spec())
    assert params["scheme.bits"] == "3"
    assert params["evaluation.texts.0.name"] == "stories"
    assert not any(key.startswith("places") for key in params)


@pytest.mark.parametrize(
    "wrong", [{"bits": 0}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"act_bits": 1}]
)
def test_a_scheme_checks_itself_at_birth(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        Scheme(**{"bits": 4, "group_size": 128, "symmetric": False, **wrong})


def test_a_record_comes_back_from_disk_as_it_went(tmp_path):
    written = record(placement=Placement(trials=tmp_path))
    written.save()
    read = TrialRecord.load(written.trial.folder / "record.json")
    assert (read, read.placement) == (written, written.placement)
    assert [file.name for file in written.trial.folder.iterdir()] == ["record.json"]


def test_a_failure_never_replaces_a_result(tmp_path):
    one = Trial(spec(), Placement(trials=tmp_path))
    folder = one.folder
    TrialRecord.failed(one, "out of luck").save()
    assert [file.name for file in folder.iterdir()] == ["failed.json"]
    record(placement=one.placement).save()
    assert [file.name for file in folder.iterdir()] == ["record.json"]
    TrialRecord.failed(one, "out of luck again").save()
    assert TrialRecord.load(folder / "record.json").completed


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_metric_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="perplexity/x"):
        record(metrics={"perplexity/x": value})


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(
        "q3q.storage.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_forgetting_progress_keeps_the_last_record(tmp_path):
    one = Trial(spec(), Placement(trials=tmp_path))
    record(placement=one.placement).save()
    write_atomically(one.folder / "evaluations" / "1.json", b"{}")
    write_atomically(one.blocks_folder / "block_000.json", b"{}")
    forget_progress(one)
    assert (one.folder / "record.json").exists()
    assert not (one.folder / "evaluations").exists()
    assert not one.blocks_folder.exists()

"""A trial with a budget of bits, from its command line to its record, and what is refused."""

import json
import math
import os
import signal
from functools import partial

import pytest

from q3q.attempt import finished_record
from q3q.config.command import command_of
from q3q.data.prepared import kept_identities
from q3q.errors import ConfigError, IncompatibleError
from q3q.evaluate.identities import prepared_identities, says_all_of
from q3q.export.proof import PASSED
from q3q.quantize.budget.sensitivities import SENSING, Sensitivities
from q3q.record import ALLOTMENT, Progress
from q3q.report.header import abbreviations
from q3q.spec import TrialSpec
from q3q.sweep.made import inputs_of, is_over
from q3q.trial import run_trial
from tests.chaos.faults import end_of, in_child
from tests.composed import composed_trial

SMALL = (
    *("method=rtn", "group_size=32", "evaluation.tasks=[]", "evaluation.texts=[demo]"),
    *("evaluation.limit=2", "evaluation.window=64", "budget.samples=1", "budget.length=32"),
    *("budget.unit=block", "budget.widths=[2,4,8]"),
)


def test_a_trial_whose_process_is_killed_measures_only_what_is_missing(tmp_path, monkeypatch):
    """Whatever it was stopped at, the same numbers and the same widths come out."""
    words = (*SMALL[:-1], "budget.widths=[2,8]", "evaluation=none", "bits=4.1")
    killed, whole = (composed_trial(*words, f"storage={tmp_path / name}") for name in "ab")
    add, added = Sensitivities.add, list[str]()

    def dies(self, unit, row):
        if len(self.rows) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, unit, row)

    def counts(self, unit, row):
        added.append(unit)
        add(self, unit, row)

    monkeypatch.setattr(Sensitivities, "add", dies)
    assert end_of(in_child(partial(run_trial, killed))) == -signal.SIGKILL
    assert finished_record(killed) is None
    monkeypatch.setattr(Sensitivities, "add", counts)
    events = list[Progress]()

    def report(event):
        events.append(event)
        if is_over(SENSING, event):  # a sweep starts others now, which read them
            assert len(added) == 3

    resumed = run_trial(killed, report)
    assert any(is_over(SENSING, event) for event in events)
    assert added == ["blocks.3", "blocks.4", "blocks.5"]
    notes = [event.note for event in events if event.phase == "sensitivities"]
    assert any("left" in note for note in notes)
    alone = run_trial(whole)
    assert len(added) == 3 + 6
    assert alone.notes[ALLOTMENT] == resumed.notes[ALLOTMENT]


def test_a_trial_allots_its_bits_shares_sensitivities_and_can_be_typed_without_budget(
    tmp_path, monkeypatch
):
    words = (*SMALL, f"storage={tmp_path}")
    trial = composed_trial(*words, "bits=4.1")
    assert "budget" in trial.spec.name
    record = run_trial(trial)
    facts = record.notes[ALLOTMENT]
    assert record.completed
    assert record.spec.id == trial.id
    assert finished_record(trial) is not None
    assert record.metrics["bits_per_weight"] <= 4.1
    weights = facts["total"] / record.metrics["bits_per_weight"]
    assert facts["limit"] == math.floor(4.1 * round(weights))
    widths = {name: own["bits"] for name, own in record.spec.overrides.items()}
    assert set(widths.values()) <= {2, 8}  # those that are not the base, 4
    assert TrialSpec.from_json(json.loads(json.dumps(record.spec.to_json()))).id == trial.id
    assert composed_trial(*typed(command_of(record.trial)), f"storage={tmp_path}").id == trial.id

    # Whoever deletes, downloads or prepares ahead knows all of the input that the trial read.
    said, kept = prepared_identities(trial.spec), kept_identities(tmp_path / "prepared").values()
    assert len(said) == len(kept) == 2
    assert all(says_all_of(whole, said) for whole in kept)
    assert [one.identity for one in inputs_of(trial.spec)] == said

    # Another budget reads the same file, and measures nothing. It holds the model and its cache.
    whole = composed_trial(*words, "budget.bytes=6MB", "context=500", "kv_bits=8")
    assert composed_trial(*typed(command_of(whole)), f"storage={tmp_path}").id == whole.id
    with monkeypatch.context() as patched:
        patched.setattr(Sensitivities, "add", None)
        other = run_trial(whole)
    assert other.notes[ALLOTMENT]["sensitivities"] == facts["sensitivities"]
    taken = other.metrics["model_bytes"] + other.metrics["cache_bytes"]
    assert whole.spec.budget is not None
    assert whole.spec.budget.cache == other.metrics["cache_bytes"]
    assert 5.75e6 < taken <= 6e6  # a block from 2 bits to 4 takes 0.2 MB
    [legend] = [words for words in abbreviations([other]).split("; ") if "budget" in words]
    assert legend == (
        "budget:6MB:cache@500:block: each block has a width by its sensitivity, the model and the "
        "cache of a text of 500 tokens (1.224 MB) take at most 6 MB."
    )

    # The same widths, typed without a budget, are the same weights.
    plain = [word for word in words if not word.startswith("budget")]
    same = run_trial(composed_trial(*plain, "bits=4", given(facts["overrides"])))
    assert same.metrics["perplexity/stories"] == record.metrics["perplexity/stories"]
    assert same.metrics["bits_per_weight"] == record.metrics["bits_per_weight"]


@pytest.mark.slow
def test_mixed_widths_are_exported_and_the_checkpoint_is_proved(tmp_path):
    words = [word for word in SMALL if not word.startswith("budget.widths")]
    trial = composed_trial(
        *(*words, f"storage={tmp_path}", "bits=5.2", "budget.widths=[4,8]", "symmetric=true"),
        "export=compressed_tensors",
    )
    record = run_trial(trial)
    assert record.completed
    assert {check.name: check.passed for check in record.checks}[PASSED]
    assert trial.placement.export is not None
    config = json.loads((trial.placement.export / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    assert {own["bits"] for own in record.spec.overrides.values()} == {4}


def typed(command):
    """Return the overrides of a printed command."""
    import shlex

    return [given(word) for word in shlex.split(command) if "=" in word]


def given(word):
    from q3q.config.schema import with_plain_keys

    return with_plain_keys(word.strip("'"))


@pytest.mark.parametrize(
    ("words", "error", "line"),
    [
        ("bits=9.5", ConfigError, "the average, scales and zero points counted, is 2.563 to 8.75"),
        ("budget.bits=2", ConfigError, "is 2.563 to 8.75 bits"),
        ("budget.uniform=1", ConfigError, r"budget.uniform=1, an average of 1\.\d+: with"),
        ("budget.bytes=10KB", ConfigError, "what stays unquantized .* alone"),
        ("budget.bytes=3MB", ConfigError, "is too little: with budget.widths=.* the model takes"),
        (
            "budget.bytes=9MB context=2000",
            ConfigError,
            r"takes 3\.62 MB to 7\.27 MB, and 12\.8 MB to 16\.5 MB with the cache of context=2000",
        ),
        ("bits=4 budget.bytes=9MB", ConfigError, "bits=4 gives all linears one width"),
        ("bits=3.5 budget.bits=3.5", ConfigError, "say the same"),
        ("budget.bits=4.5 budget.uniform=4", ConfigError, "a budget is one of"),
        ("bits=many", ConfigError, "bits=many is not a number"),
        ("bits=inf", ConfigError, "budget.bits=inf: give a positive number of bits"),
        ("budget.bits=nan", ConfigError, "budget.bits=nan: give a positive number of bits"),
        (
            "bits=3.5 overrides={blocks.0:{bits:8}}",
            ConfigError,
            r"overrides can set group_size and symmetric, and not bits \(blocks.0\)",
        ),
        ("bits=3.5 method=billm group_size=128", IncompatibleError, "has only one width, 1 bits"),
        ("bits=3.5 format=mxfp4", IncompatibleError, "has a fixed number of bits"),
        ("bits=3.5 method=awq budget.unit=linear", IncompatibleError, "budget.unit=site or block"),
        ("bits=3.5 calibration=traces", IncompatibleError, "measured on one text"),
        ("bits=3.5 loader=sharded", IncompatibleError, "not by a gang"),
        ("bits=3.5 budget.widths=[4]", ConfigError, "two or more widths"),
        ("bits=3.5 budget.widths=[1,4]", ConfigError, "method=rtn cannot do 1"),
        ("bits=3.5 budget.unit=expert", ConfigError, "budget.unit=expert is not known"),
        ("bits=3.5 budget.samples=0", ConfigError, "budget.samples=0: give 1 or more"),
        ("bits=5.5 export=awq", IncompatibleError, "bits="),
        (
            "bits=5.5 export=compressed_tensors budget.unit=linear symmetric=true",
            IncompatibleError,
            "differ within a site",
        ),
    ],
)
def test_what_cannot_be_allotted_is_refused_in_one_line(tmp_path, words, error, line):
    with pytest.raises(error, match=line) as refused:
        composed_trial("method=rtn", "group_size=32", f"storage={tmp_path}", *words.split())
    assert "\n" not in str(refused.value)


def test_a_budget_leaves_ids_of_others_alone_and_equal_budgets_are_one_trial(tmp_path):
    def of(*words):
        return composed_trial("group_size=32", f"storage={tmp_path}", *words).spec

    assert of("method=none", "bits=3.5").budget is None
    assert "budget" not in of("method=rtn", "bits=4.0").to_json(complete=True)
    assert of("method=rtn", "bits=4.0").id == of("method=rtn", "bits=4").id
    assert of("method=rtn", "bits=3.5").id == of("method=rtn", "budget.bits=3.5").id
    assert of("method=rtn", "bits=3.5").id != of("method=rtn", "bits=3.6").id
    assert of("method=rtn", "budget.bytes=12MB").id == of("method=rtn", "budget.bytes=12000KB").id
    # The cache counts where a budget is of bytes and a context is given, as it is stored.
    weights = of("method=rtn", "budget.bytes=20MB")
    cached = [
        of("method=rtn", "budget.bytes=20MB", "context=1000", "evaluation=none", *kv)
        for kv in ((), ("kv_bits=8",), ("kv_bits=4",))
    ]
    assert len({spec.quantization_id for spec in (weights, *cached)}) == 4
    assert [spec.budget and spec.budget.cache for spec in (weights, *cached)] == [
        None,
        *(int(1000 * 6 * 2 * 3 * 64 * bits / 8) for bits in (16, 8.5, 4.5)),  # heads of 64
    ]
    assert "budget" in of("method=rtn", "bits=3.5", "context=1000").to_json()
    assert of("method=rtn", "bits=3.5", "context=1000").id == of("method=rtn", "bits=3.5").id
    # Tables sort a budget beside the uniform width that takes no less.
    beside = [of("method=rtn", f"budget.bits={bits}").scheme.bits for bits in (3.5, 3.59375, 3.6)]
    assert beside == [3, 3, 4]
    assert of("method=rtn", "budget.uniform=4").scheme.bits == 4  # takes just as much

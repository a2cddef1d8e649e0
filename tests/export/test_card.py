"""The card: lines that load the checkpoint, what was measured beside the unquantized model."""

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from q3q.export import card
from q3q.export.card import model_card
from q3q.export.measured import BEGIN, UNMEASURED, Measured, update_card
from q3q.export.proof import PASSED, Proof, compare_reload
from q3q.export.reload import script, use
from q3q.export.use import Use
from q3q.kv_scheme import KvScheme
from q3q.record import Check

W8A8 = {"bits": 8, "group_size": -1, "symmetric": True, "act_bits": 8}
USE = {
    "device": "cpu",
    "threads": 2,
    "idle_bytes": 300_000_000,
    "peak_bytes": 500_000_000,
    "prompt": 8,
    "tokens": 32,
    "seconds": 2.0,
}


def card_of(original, trial, measured=None, use=None):
    proof = Proof(Check(name=PASSED, passed=True, detail=""), "transformers 5", 1e-7, use)
    measured = measured or Measured(metrics={"perplexity/stories": 1.75})
    return model_card(trial, original.facts, proof, measured, packages={}, base=original.folder)


def blocks(card, language):
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


LOADED = [
    ("hf", {}, False, "torch transformers"),
    ("hf", {"bits": 3}, True, "torch transformers"),
    ("compressed_tensors", {"symmetric": True}, False, "compressed-tensors"),
    ("compressed_tensors", {}, False, "compressed-tensors"),
    ("compressed_tensors", {"bits": 3}, False, "compressed-tensors"),
    ("compressed_tensors", W8A8, False, "compressed-tensors"),
    ("compressed_tensors", {"symmetric": True}, True, "compressed-tensors"),
    ("gptq", {"symmetric": True}, False, "optimum gptqmodel"),
    ("gptq", {"group_size": 32}, False, "optimum gptqmodel"),
    ("awq", {}, False, "gptqmodel"),
]


@pytest.mark.parametrize(("name", "scheme", "moe", "packages"), LOADED)
def test_the_printed_lines_load_the_checkpoint(
    checkpoint, trial_of, export, tmp_path, monkeypatch, capsys, name, scheme, moe, packages
):
    """Executed as they stand; where a package is missing, it is one that the card says to install.

    The vocabulary is the tokenizer's, so that the lines' prompt has ids that the model has.
    """
    pytest.importorskip("compressed_tensors")
    original = checkpoint(moe=moe, tied=False, dtype="float32", vocab_size=4096)
    made, model = export(original, trial_of(original, name, tmp_path / "out", **scheme))
    card = card_of(original, made.trial)
    install = blocks(card, "bash")[1]
    assert install.startswith("pip install ")
    assert packages in install
    [code] = blocks(card, "python")
    monkeypatch.chdir(made.path)
    names: dict = {}
    if name in ("gptq", "awq") and find_spec("gptqmodel") is None:
        with pytest.raises(ImportError) as caught:
            exec(code, names)
        missing = re.search(r"pip install ([\w-]+)", str(caught.value))
        assert missing is not None
        assert missing[1] in install.split()
        return
    exec(code, names)
    assert capsys.readouterr().out.startswith("Once upon a time")
    if scheme == W8A8:
        return  # it rounds activations otherwise, which the proof compares by another way
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        theirs = names["model"](ids).logits[0]
        ours = model.hidden(ids)[0] @ model.head_VH.T
    assert float((theirs - ours).norm() / ours.norm()) < 1e-4


@pytest.mark.parametrize(
    ("name", "scheme", "moe", "why"),
    [
        ("compressed_tensors", {}, True, "fuses experts, so it cannot read"),
        ("compressed_tensors", W8A8, True, "fuses experts, so it cannot read"),
        ("gptq", {"group_size": 48}, False, "do not take group_size=48"),
        ("awq", {"group_size": 48}, False, "do not take group_size=48"),
    ],
)
def test_what_does_not_load_is_said_in_place_of_lines(
    checkpoint, trial_of, tmp_path, name, scheme, moe, why
):
    original = checkpoint(moe=moe)
    card = card_of(original, trial_of(original, name, tmp_path / "out", **scheme))
    assert "## Load it in Python" in card
    assert why in card
    assert not blocks(card, "python")


def test_every_card_says_how_it_is_served_or_why_not(checkpoint, trial_of, tmp_path):
    original = checkpoint()
    served = card_of(original, trial_of(original, "awq", tmp_path / "out", group_size=32))
    refused = card_of(original, trial_of(original, "gptq", tmp_path / "out", group_size=32))
    assert "vllm serve ." in served
    assert "vLLM does not load `gptq` with symmetric=false" in refused
    assert "It loads these settings as export=hf or compressed_tensors or awq." in refused


@pytest.mark.parametrize(
    ("name", "kv", "asked"),
    [
        ("compressed_tensors", {"format": "fp8_e4m3", "scales": "fixed"}, True),
        ("compressed_tensors", {}, False),
        ("gptq", {"format": "fp8_e4m3", "scales": "fixed"}, False),
    ],
)
def test_a_card_says_whether_the_files_ask_for_the_rounded_cache(
    checkpoint, trial_of, tmp_path, name, kv, asked
):
    original = checkpoint()
    trial = trial_of(original, name, tmp_path / "out", symmetric=True)
    spec = replace(trial.spec, kv=KvScheme(bits=8, **kv))
    card = card_of(original, replace(trial, spec=spec))
    [line] = [line for line in card.splitlines() if "rounded cache" in line]
    assert ("as config.json asks for it" in line, "do not ask for" in line) == (asked, not asked)


METRICS = {
    "kl_p50/stories": 0.01,
    "kl/stories": 0.02,
    "top1_agreement/stories": 0.9,
    "stories_who/acc": 0.5,
    "perplexity/stories": 2.0,
    "seconds/load": 1.0,
    "bits_per_weight": 4.2,
}
UNQUANTIZED = {"perplexity/stories": 1.6, "stories_who/acc": 0.625}


def test_the_unquantized_model_stands_beside_the_checkpoint_perplexity_first():
    lines = Measured(
        metrics=METRICS, unquantized=UNQUANTIZED, weights=6_700_000, original=11_500_000
    ).lines()
    assert [line for line in lines if line.startswith("| ")][1:] == [
        "| perplexity, stories | 2.000 | 1.600 | +25.0 % |",
        "| accuracy of stories_who, % | 50.0 | 62.5 | -12.5 points |",
        "| KL divergence from the unquantized model, stories, nats per token | 0.02000 "
        "| 0 by definition | |",
        "| weights on disk | 6.70 MB | 11.5 MB | -42 % |",
    ]
    assert UNMEASURED not in lines


def test_what_is_not_known_of_the_unquantized_model_is_said_and_added_later(
    checkpoint, trial_of, tmp_path
):
    original = checkpoint()
    card = card_of(original, trial_of(original, "hf", tmp_path / "out"), Measured(metrics=METRICS))
    assert UNMEASURED in card
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text(card + "\nWhat I know about it.\n")
    measured = Measured(metrics=METRICS, unquantized=UNQUANTIZED)
    assert update_card(folder, measured)
    text = (folder / "README.md").read_text()
    assert "| 2.000 | 1.600 | +25.0 % |" in text
    assert UNMEASURED not in text
    assert text.endswith("What I know about it.\n")
    assert text.partition(BEGIN)[0] == card.partition(BEGIN)[0]
    assert not update_card(folder, measured)  # nothing new
    (folder / "README.md").write_text("# Mine\n")
    assert not update_card(folder, measured)
    assert (folder / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("name", ["hf", "compressed_tensors"])
def test_a_public_loader_says_what_it_took(exported, name):
    """In this process, whose memory before is more than the tiny model's."""
    pytest.importorskip("compressed_tensors")
    made, model = exported(name, kind={"max_position_embeddings": 24})
    inputs = {"ids": torch.arange(24).repeat(2, 1), "plain": torch.zeros(2, 2, 24, 32)}
    with torch.inference_mode():
        facts, tensors = script.findings(made.folder, inputs, measure=True)
    [run] = facts["use"]
    assert (run["device"], run["prompt"], run["tokens"]) == ("cpu", 8, 16)  # as far as positions go
    assert run["threads"] == torch.get_num_threads()
    assert run["seconds"] > 0
    if run["peak_bytes"] is not None:  # /proc says it
        assert run["peak_bytes"] >= run["idle_bytes"] > 1e6
    assert compare_reload(model, {}, facts, tensors).use == Use.of(facts["loader"], [run])


def test_where_nothing_public_loads_it_nothing_is_measured(checkpoint, trial_of, export, tmp_path):
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    made, _ = export(original, trial)
    inputs = {"ids": torch.arange(24).repeat(2, 1), "plain": torch.zeros(2, 2, 24, 32)}
    with torch.inference_mode():
        facts, _ = script.findings(made.folder, inputs, measure=True)
    assert facts["use"] == []
    why = "Memory and speed were not measured: "
    assert f"{why}the loader did not generate any text" in card_of(original, trial)
    for loader, error, reason in (
        (facts["loader"], 1e-7, "used no public loader for its format"),
        (facts["loader"], None, "read its weights one by one"),
    ):
        proof = Proof(Check(name=PASSED, passed=True, detail=""), loader, error)
        assert reason in "\n".join(card._use_lines(proof))


def test_a_loader_that_cannot_generate_costs_no_proof(capsys):
    def fail():
        raise RuntimeError("no kernel for\nthis device")

    assert use.measured(fail) == []
    assert "not measured: RuntimeError: no kernel for this device" in capsys.readouterr().err


def test_the_card_and_the_record_say_what_was_measured_as_what_it_is(
    checkpoint, trial_of, tmp_path
):
    use = Use.of("transformers 5", [USE])
    assert use is not None
    assert Use.of_note(use.to_json()) == use
    assert Use.of_note(None) is None
    original = checkpoint()
    card = card_of(original, trial_of(original, "hf", tmp_path / "out"), use=use)
    assert (
        "- transformers 5 on CPU, 2 threads: 500 MB resident at most, 300 MB of it before loading; "
        "16 tokens/s when it generated 32 tokens greedily after a prompt of 8." in card
    )
    assert "other runtimes may differ" in card

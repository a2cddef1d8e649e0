"""Proofs and errors relative to nothing: blocks, weights, rows and outputs that are zero."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from q3q.errors import NumericsError
from q3q.export import proof
from q3q.export.proof import Proof, compare_reload, relative, reload_inputs, runs_of, worst_weight
from q3q.export.reload import script
from q3q.models.checkpoint import Checkpoint
from q3q.quantize.site_errors import SquaredErrors, site_error

ATTENTION, MLP = "model.layers.1.self_attn.", "model.layers.1.mlp."


def zero(*names):
    def change(tensors):
        for name in names:
            tensors[name].zero_()

    return change


def zero_rows(tensors):
    tensors[MLP + "gate_proj.weight"][::2] = 0
    tensors[ATTENTION + "q_proj.weight"][:16] = 0


def zero_columns(tensors):
    tensors[MLP + "down_proj.weight"][:, :32] = 0
    tensors[ATTENTION + "o_proj.weight"][:, 16:32] = 0


def constant_head(tensors):
    tensors["lm_head.weight"][:] = tensors["lm_head.weight"][:1].clone()


def nearly_nothing(tensors):
    """A block that adds less than the last bit of what passes through it."""
    for name in (ATTENTION + "o_proj.weight", MLP + "down_proj.weight"):
        tensors[name] *= 2.0**-24


def every_linear(tensors):
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor.zero_()


CHANGES = {
    "a block that adds nothing": zero(ATTENTION + "o_proj.weight", MLP + "down_proj.weight"),
    "pruned attention": zero(ATTENTION + "v_proj.weight", ATTENTION + "o_proj.weight"),
    "dead queries": zero(ATTENTION + "q_proj.weight", ATTENTION + "k_proj.weight"),
    "a dead gate": zero(MLP + "gate_proj.weight"),
    "every linear": every_linear,
    "rows": zero_rows,
    "columns": zero_columns,
    "a norm": zero("model.layers.1.input_layernorm.weight"),
    "the final norm, so all logits": zero("model.norm.weight"),
    "the embedding": zero("model.embed_tokens.weight"),
    "equal logits": constant_head,
    "nearly nothing": nearly_nothing,
}
W8A8 = {"bits": 8, "group_size": -1, "symmetric": True, "act_bits": 8}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("hf", {}),
    "gptq": ("gptq", {}),
    "awq": ("awq", {"symmetric": True}),
    "compressed_tensors": ("compressed_tensors", {"symmetric": True}),
    "asymmetric": ("compressed_tensors", {"bits": 3}),
    "W8A8": ("compressed_tensors", W8A8),
}


@pytest.fixture
def changed(checkpoint):
    def make(change):
        original = checkpoint(tied=False)
        file = original.folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
        return Checkpoint(original.folder)

    return make


def proved(made, model, alter=lambda findings, tensors: None) -> Proof:
    with torch.inference_mode():
        runs = runs_of(model)
        findings, tensors = script.findings(made.folder, reload_inputs(model, runs))
        alter(findings, tensors)
        return compare_reload(model, runs, findings, tensors)


# Each change where weights alone are rounded and where inputs are, and each format on two of them.
ZEROS = [(what, form) for what in CHANGES for form in ("gptq", "W8A8")]
ZEROS += [
    (what, form) for what in ("every linear", "rows") for form in FORMATS.keys() - {"gptq", "W8A8"}
]


@pytest.mark.parametrize(("what", "form"), sorted(ZEROS))
def test_what_is_zero_is_exported_and_proved(changed, trial_of, export, tmp_path, what, form):
    pytest.importorskip("compressed_tensors")
    original = changed(CHANGES[what])
    name, scheme = FORMATS[form]
    made, model = export(original, trial_of(original, name, tmp_path / "out", **scheme))
    result = proved(made, model)
    assert result.check.passed, result.check.detail
    assert result.logit_error is not None
    assert math.isfinite(result.logit_error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plain/blocks.1", 1e-3),
        ("plain/blocks.1", math.nan),
        ("plain/blocks.1.o", math.nan),
        ("plain/logits", math.nan),
        ("logits", math.nan),
        ("logits", math.inf),
    ],
)
def test_something_where_nothing_was_is_no_match_and_neither_is_what_is_not_a_number(
    changed, trial_of, export, tmp_path, key, value
):
    original = changed(CHANGES["a block that adds nothing"])
    made, model = export(original, trial_of(original, "hf", tmp_path / "out"))

    def alter(findings, tensors):
        tensors[key].view(-1)[0] += value

    result = proved(made, model, alter)
    assert not result.check.passed
    assert "nan" not in result.check.detail


def test_a_weight_of_zeros_is_only_equal_to_zeros():
    zeros, others = [0.0, 0.0], [0.5, 1.0]
    ours = {"a": zeros, "b": others}
    assert worst_weight(ours, {"a": zeros, "b": others}) == ("none", 0.0)
    assert worst_weight(ours, {"a": [1e-30, 1e-30], "b": others}) == ("a", math.inf)
    assert worst_weight(ours, {"a": [math.nan, 0.0], "b": others}) == ("a", math.inf)
    assert worst_weight(ours, {"a": zeros, "b": [math.nan, 1.0]}) == ("b", math.inf)
    assert worst_weight(ours, {"b": others}) == ("a", math.inf)


def test_relative_to_nothing():
    assert relative(0.0, 0.0) == 0.0
    assert relative(1e-30, 0.0) == math.inf
    assert relative(0.5, 2.0) == 0.25
    assert relative(0.5, 2.0, noise=0.5) == 0.0
    assert relative(1e-9, 0.0, noise=1e-8) == 0.0
    for difference, norm in ((math.nan, 1.0), (0.0, math.nan), (math.inf, 1.0), (1.0, math.inf)):
        assert relative(difference, norm) == math.inf


def test_a_changed_code_is_found_in_a_block_whose_other_weights_are_zero(
    changed, trial_of, export, tmp_path
):
    """The noise that is allowed for what a block adds hides no weight."""
    original = changed(CHANGES["pruned attention"])
    made, model = export(original, trial_of(original, "gptq", tmp_path / "out"))
    shard = made.path / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.self_attn.v_proj.qweight"][0, 0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert "worst site blocks.1.self_attn.v_proj" in proved(made, model).check.detail


def errors(weight, rounded, outputs=None):
    squares = SquaredErrors.of(weight.clone(), rounded.clone(), None)
    if outputs is not None:
        part, whole = map(torch.tensor, outputs)
        squares = SquaredErrors(squares.error_E, squares.weight_E, (part, whole))
    return site_error(3, "o", "self_attn.o_proj.weight", [squares])


def test_errors_of_nothing_are_none_and_errors_relative_to_nothing_are_not_guessed():
    zeros, ones = torch.zeros(2, 4, 4), torch.ones(2, 4, 4)
    assert errors(zeros, zeros).weight_error == 0.0
    assert errors(zeros, zeros, ([0.0, 0.0], [0.0, 0.0])).output_error == 0.0
    # An expert whose outputs are all zero has its weights' error.
    half = errors(ones, ones / 2, ([0.0, 2.0], [0.0, 8.0]))
    assert (half.output_error, half.experts) == (0.5, (0.0, 0.5))
    lone = errors(ones, ones / 2, ([1.0, 0.0], [0.0, 0.0]))
    assert (lone.output_error, lone.experts) == (None, (0.5, 0.0))
    unknown = errors(ones, ones / 2, ([math.nan, 2.0], [math.nan, 8.0]))
    assert (unknown.output_error, unknown.experts) == (None, (0.5, 0.5))
    for rounded in (ones, ones * math.nan):
        with pytest.raises(NumericsError, match=r"blocks\.3\.self_attn\.o_proj: .*all zero"):
            errors(zeros, rounded)


def test_the_proofs_bounds_are_far_from_its_noise():
    """What rounding may add to a block's change is less than a hundredth of what is a mismatch."""
    assert proof.ROUNDING < proof.SAME_LOGITS / 100

"""Bits and bytes of what is stored: of unquantized checkpoints, and of those that are packed."""

import pytest
import torch

from q3q.models.checkpoint import Checkpoint
from q3q.quantize.ledger import Ledger, sizes, stored_note


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16), ("float16", 16)])
def test_the_unquantized_model_has_the_bits_of_its_files(checkpoint, dtype, bits, tied):
    original = checkpoint(dtype=dtype, tied=tied)
    found = sizes(original, Ledger(), {})
    assert found["bits_per_weight"] == found["bits_per_weight_nominal"] == bits
    assert found["bits_per_weight_model"] == bits
    assert found["model_bytes"] == bits // 8 * original.facts.parameters
    assert found["share_quantized"] == 0
    note = stored_note(original, in_files=True)
    assert note == {"stored": {"dtype": dtype, "in_files": True}}


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(
    ("name", "scheme", "nominal"),
    [
        ("gptq", {}, 4),
        ("gptq", {"bits": 2, "symmetric": True}, 2),
        ("awq", {}, 4),
        ("compressed_tensors", {"bits": 3}, 3),
        (
            "compressed_tensors",
            {"bits": 8, "group_size": -1, "symmetric": True, "act_bits": 8},
            8,
        ),
    ],
)
def test_a_packed_checkpoint_evaluated_as_it_is_has_the_bits_that_were_exported(
    exported, name, scheme, nominal, moe
):
    pytest.importorskip("compressed_tensors")
    made, _ = exported(name, kind={"moe": moe, "tied": not moe}, **scheme)
    again, exported = sizes(Checkpoint(made.path), Ledger(), {}), made.sizes()
    for metric in ("bits_per_weight", "bits_per_weight_model", "model_bytes"):
        assert again[metric] == pytest.approx(exported[metric])
    assert again["bits_per_weight_nominal"] == nominal
    note = stored_note(Checkpoint(made.path), in_files=True)["stored"]
    assert note["quantized"] == Checkpoint(made.path).facts.quantized
    assert note["dtype"] == "bfloat16"


def test_plain_numbers_of_a_quantized_model_have_their_own_bits(exported):
    made, _ = exported("hf")
    assert sizes(Checkpoint(made.path), Ledger(), {})["bits_per_weight"] == 16
    assert stored_note(Checkpoint(made.path), in_files=True)["stored"]["quantized"].startswith(
        "by q3q: rtn w4"
    )


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_what_a_quantized_model_leaves_alone_has_its_own_bits(
    checkpoint, trial_of, quantized_blocks, tmp_path, dtype, bits
):
    original = checkpoint(dtype=dtype, tied=False)
    skipped = (0, "mlp.down_proj.weight")
    trial = trial_of(original, "hf", tmp_path / "out")
    blocks, _ = quantized_blocks(original, trial, leave=[skipped])
    ledger = Ledger()
    for block in blocks:
        ledger.add(block)
    facts = original.facts
    left = facts.parameters - facts.linear_parameters + 32 * 96
    found = sizes(original, ledger, {})
    assert found["model_bytes"] == pytest.approx((ledger.bits + bits * left) / 8)
    end = blocks[0].quantized["mlp.up_proj.weight"]  # in place of the head's codes
    with_head = sizes(original, ledger, {"head": end})
    fewer = bits * facts.vocab * facts.hidden - end.storage_bits()
    assert with_head["model_bytes"] == pytest.approx(found["model_bytes"] - fewer / 8)


def test_tensors_that_are_no_part_of_the_model_do_not_count(checkpoint):
    from safetensors.torch import load_file, save_file

    original = checkpoint()
    before = sizes(original, Ledger(), {})
    file = original.folder / "model.safetensors"
    tensors = load_file(file) | {"model.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, file)
    assert sizes(Checkpoint(original.folder), Ledger(), {}) == before

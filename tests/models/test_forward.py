"""Our staged forward agrees with transformers, for every family."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from q3q.models.attention import Causal
from q3q.models.block import Rope, finish
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.numerics.kernels.norm import rms_norm
from q3q.scheme import InputRounding
from tests.models.families import KINDS, build


def tied_and_not():
    """Yield kinds so that every family's ends are tied in one, and are not in another."""
    families: dict[str, list[str]] = {}
    for kind, settings in KINDS.items():
        families.setdefault(settings["model_type"], []).append(kind)
    for first, *others in families.values():
        yield first, True
        yield from ((kind, False) for kind in others or [first])


@pytest.mark.parametrize(("kind", "tied"), tied_and_not())
@torch.inference_mode()
def test_logits_and_blocks_equal_transformers(kind, tied, tmp_path):
    theirs = build(kind, tied)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(Checkpoint(tmp_path), torch.float32)
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    result = theirs(input_ids=ids, output_hidden_states=True)
    expected = result.logits.flatten(0, 1)
    hidden = ours.hidden(ids).flatten(0, 1)
    logits = torch.cat([part for _, part in ours.logits(hidden)])
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    # The last one is normed already.
    for block, x, out in zip(
        ours.blocks, result.hidden_states, result.hidden_states[1:-1], strict=False
    ):
        assert (block(x, ours.rope) - out).abs().max() < 1e-5 * out.abs().max()


@torch.inference_mode()
def test_padding_on_the_right_changes_nothing_on_the_left(tmp_path):
    build("dense", True).save_pretrained(tmp_path)
    ours = load_decoder(Checkpoint(tmp_path), torch.float32)
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.hidden(ids)[:, :20], ours.hidden(ids[:, :20]))


@torch.inference_mode()
def test_weights_exchanged_between_stages_are_used_from_there_on(tmp_path):
    build("dense", True).save_pretrained(tmp_path)
    ours = load_decoder(Checkpoint(tmp_path), torch.float32)
    block, x = ours.blocks[0], torch.randn(2, 5, 32)
    changed = {"mlp.down_proj.weight": torch.zeros(32, 48)}
    moving = block.with_weights({})
    stages = moving.stages(x, ours.rope)
    for _ in range(4):
        next(stages)
    moving.weights.update(changed)
    torch.testing.assert_close(finish(stages), block.with_weights(changed)(x, ours.rope))


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.inference_mode()
def test_a_site_whose_weights_stay_reads_activations_as_they_are(kind, tmp_path):
    build(kind, True).save_pretrained(tmp_path)
    ours = load_decoder(Checkpoint(tmp_path), torch.float32)
    block, x = ours.blocks[0], torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    unrounded = block(x, ours.rope)
    block.rounding = InputRounding(2)
    rounded = block(x, ours.rope)
    assert not torch.equal(rounded, unrounded)
    names = [site.name for site in block.sites]
    for name in names:
        block.unrounded = frozenset({name})
        partly = block.with_weights({})(x, ours.rope)
        assert not torch.equal(partly, rounded), name
        assert not torch.equal(partly, unrounded), name
    block.unrounded = frozenset(names)
    assert torch.equal(block(x, ours.rope), unrounded)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_block_changes_no_tensor_that_it_was_given(kind, dtype, tmp_path):
    """Its own intermediate results are overwritten where they lie."""
    build(kind, tied=True).save_pretrained(tmp_path)
    model = load_decoder(Checkpoint(tmp_path), dtype)
    rope, x = model.rope, model.embed(torch.arange(60).view(2, 30))
    block = model.blocks[0]
    given = {"x": x, **block.weights}
    before = {name: tensor.clone() for name, tensor in given.items()}
    first = block(x, rope)
    assert torch.equal(block(x, rope), first)
    shown = [inputs.all_TI for _, inputs in block.stages(x, rope)]
    copies = []
    for _, inputs in block.stages(x, rope):
        copies.append(None if inputs.all_TI is None else inputs.all_TI.clone())
    for tensor, copy in zip(shown, copies, strict=True):
        assert (tensor is None) == (copy is None)
        assert tensor is None or copy is None or torch.equal(tensor, copy)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_is_its_formula_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(7, 33, generator=generator) * 30).to(dtype)
    gain = torch.randn(33, generator=generator).to(dtype)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(rms_norm(x, gain, 1e-6), gain * normed.to(dtype))


def test_positions_are_made_once_for_all_blocks_and_rotations_too():
    facts: Any = SimpleNamespace(rotary_dim=8, rope_theta=1e4, rope_scaling=None)
    rope, attention, device = Rope(facts), Causal(), torch.device("cpu")
    cos, _ = rope(attention.positions(5, device), torch.float32)
    again, _ = rope(attention.positions(5, device), torch.float32)
    assert again is cos
    longer, _ = rope(attention.positions(6, device), torch.float32)
    assert torch.equal(longer[:5], cos)
    assert attention.positions(6, device).tolist() == list(range(6))

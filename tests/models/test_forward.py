"""Our staged forward agrees with transformers, for every family."""

import pytest
import torch

from q3q.models.block import finish
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from tests.models.families import KINDS, build


@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, True) for kind in KINDS), ("moe", False), ("qwen2", False)]
)
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
    block.act_bits = 2
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

"""A model divided over two ranks is the model, and neither of them has it."""

from pathlib import Path

import pytest
import torch

import q3q.models.demo
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.qwen3_moe import Qwen3MoeBlock
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.weights import round_to_grid

DEMO = Path(q3q.models.demo.__file__).parent
CHANGED = "self_attn.o_proj.weight"


def some_ids(vocab):
    return [
        torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0))
        for shape in ((2, 9), (1, 5))
    ]


def rounded(weight_VH):
    grid = minmax_grid(into_groups(weight_VH[None], -1), 4, symmetric=False)
    return round_to_grid(weight_VH[None], grid, 4, -1, symmetric=False)


def quarter(k, block):
    """A change of every block."""
    block.act_bits = 4


@pytest.fixture(scope="module")
def told(gang):
    demo, make_ids, make_codes, changed = DEMO, some_ids, rounded, CHANGED

    def lead(team):
        import gc

        import torch

        from q3q.models.checkpoint import Checkpoint
        from q3q.models.sharded import load_sharded
        from tests.ranks import known_models, live_bytes

        said, nothing = {}, team.together(live_bytes)[1]
        for name in ("dense", "moe"):
            # What rank 1 still has of the model before this one goes with the next thing that this one asks for.
            before = team.together(live_bytes)[0], nothing
            model, one = (
                load_sharded(Checkpoint(demo / name), torch.float32, team),
                said.setdefault(name, {}),
            )
            one["held"] = [
                now - then for now, then in zip(team.together(live_bytes), before, strict=True)
            ]
            batches = make_ids(model.facts.vocab)
            one["blocks"] = [dict(block.weights) for block in model.blocks]
            one["ends"] = [model.embedding_VH, model.head_VH, model.norm_H]
            one["states"] = list(model.states(batches))
            one["one"], one["none"] = list(model.states(batches[:1])), list(model.states([]))
            model.rest()
            copy, weight = model.copy(), model.blocks[1].weights[changed]
            copy.blocks.exchange(1, lambda weight=weight: {changed: weight * 2})
            copy.exchange_ends({"embedding": make_codes(model.embedding_VH)})
            one["copy"] = [copy.blocks[1].weights[changed], copy.head_VH, *copy.states(batches)]
            one["kept"] = [model.blocks[1].weights[changed], model.head_VH]
            one["known"] = [team.together(known_models)]
            del copy, weight
            gc.collect()
            model.rest()
            list(model.blocks)
            one["known"].append(team.together(known_models))
            one["left"] = team.together(live_bytes)[1] - before[1]
            del model
            gc.collect()
        team.dismiss()
        return said

    def call(team):
        import torch

        with torch.inference_mode():
            return team.follow() if team.rank else lead(team)

    return gang(2, call)[0]


@pytest.fixture(params=["dense", "moe"])
def both(request, told):
    with torch.inference_mode():
        yield load_decoder(Checkpoint(DEMO / request.param), torch.float32), told[request.param]


def same(found, wanted):
    return len(found) == len(wanted) and all(
        torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


def test_what_is_gathered_is_the_model(both):
    model, told = both
    assert len(told["blocks"]) == len(model.blocks)
    for weights, block in zip(told["blocks"], model.blocks, strict=True):
        assert list(weights) == list(block.weights)
        assert same(list(weights.values()), list(block.weights.values()))
    assert same(told["ends"], [model.embedding_VH, model.head_VH, model.norm_H])


def test_no_rank_holds_more_than_60_percent_between_blocks(both):
    model, told = both
    whole = sum(weight.nbytes for block in model.blocks for weight in block.weights.values())
    whole += model.embedding_VH.nbytes + model.norm_H.nbytes
    for share in [
        *told["held"],
        told["left"],
    ]:  # also when blocks were gathered and let go of, and copies made
        assert 0.49 * whole < share < 0.6 * whole


def test_text_that_the_ranks_divide_gives_the_same_bits(both):
    model, told = both
    wanted = list(model.states(some_ids(model.facts.vocab)))
    assert same(told["states"], wanted)
    assert same(told["one"], wanted[:1])
    assert told["none"] == []


def test_what_is_done_to_a_copy_leaves_the_model_alone(both):
    model, told = both
    weight, batches = model.blocks[1].weights[CHANGED], some_ids(model.facts.vocab)
    assert same(told["kept"], [weight, model.head_VH])
    copy = model.copy()
    copy.exchange(1, copy.blocks[1].with_weights({CHANGED: weight * 2}), dict)
    copy.exchange_ends({"embedding": rounded(model.embedding_VH)})
    assert same(told["copy"], [weight * 2, copy.head_VH, *copy.states(batches)])
    assert told["known"] == [[2, 2], [1, 1]]  # nobody keeps its part of a copy that is gone


def test_the_moe_model_has_experts():
    """So that the tests above are about both kinds of blocks."""
    kinds = {
        name: type(load_decoder(Checkpoint(DEMO / name), torch.float32).blocks[0])
        for name in ("dense", "moe")
    }
    assert kinds["moe"] is Qwen3MoeBlock
    assert kinds["dense"] is not Qwen3MoeBlock

"""A model divided over two ranks equals the resident model, and neither rank holds all of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import q3q.models.demo
from q3q.kv_scheme import KvScheme
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.family import DTYPE_BYTES
from q3q.models.kv_cache import KvRounding
from q3q.models.sharded import load_sharded
from q3q.models.tensor_files import read_header
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.weights import round_to_grid
from q3q.scheme import InputRounding
from tests.models.families import build

DEMO = Path(q3q.models.demo.__file__).parent
OTHERS = ("llama, biases", "qwen3.5 moe")  # biases; delta rules, and a shared expert
WITH_ATTENTION, CHANGED = 2, "self_attn.o_proj.weight"  # a block of every model, and its weight
KV = KvRounding(KvScheme(bits=2, scales="channel", chunk=4, window=3))


def random_ids(vocab):
    return [
        torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0))
        for shape in ((2, 9), (1, 5))
    ]


def rounded(weight_VH):
    grid = minmax_grid(into_groups(weight_VH[None], -1), 4, symmetric=False)
    return round_to_grid(weight_VH[None], grid, 4, -1, symmetric=False)


def scored(model):
    """Return log-likelihoods of texts that part within a chunk of keys; rank 0 gets none."""
    import numpy as np

    from q3q.evaluate.budget import TokenBudget
    from q3q.evaluate.scoring import Request, score

    texts = [np.array([*range(10, 19), *own], np.int32) for own in ((5, 6, 7), (8,), (9, 9, 9, 9))]
    requests = [Request(text[:-1], text[-3:], "t") for text in texts]
    ended = score(model, requests, TokenBudget(64, most=64))
    found = dict(pair for pairs, _ in ended for pair in pairs)
    return [found[number].log_likelihood for number in range(len(requests))]


def quarter(k, block):
    """A change of every block."""
    block.rounding = InputRounding(4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the models' folders by name: the demo models, and a random one of other families."""
    folders = {name: DEMO / name for name in ("dense", "moe")}
    for kind in OTHERS:
        folders[kind] = tmp_path_factory.mktemp("other") / "model"
        build(kind).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A copy of the dense model in which a number of the last rank's is NaN."""
    folder = shutil.copytree(DEMO / "dense", tmp_path_factory.mktemp("broken") / "dense")
    [shard] = folder.glob("*.safetensors")
    last = read_header(shard)["model.layers.0.mlp.down_proj.weight"]
    with shard.open("r+b") as file:
        file.seek(last.start + last.bits // 8 - 4)
        file.write(b"\xff" * 4)
    return folder


def in_one_place_alone(team, folder):
    """Return what each rank reads of a model whose files rank 0 alone sees, and its blocks."""
    from tests.ranks import bytes_read, see_other_files, see_the_same_files

    team.run_on_all(bytes_read)
    team.run_on_all(see_other_files)
    alone = load_sharded(Checkpoint(folder), torch.float32, team)
    read = team.run_on_all(bytes_read)
    blocks = [dict(block.weights) for block in alone.blocks]
    team.run_on_all(see_the_same_files)
    return {"read alone": read, "blocks alone": blocks}


@pytest.fixture(scope="module")
def results(gang, folders, broken):
    make_ids, make_codes, k, changed = random_ids, rounded, WITH_ATTENTION, CHANGED
    kv, score_all = KV, scored
    load_alone = in_one_place_alone

    def lead(team):
        import gc
        from functools import partial

        import torch

        from q3q.models.checkpoint import Checkpoint
        from q3q.models.sharded import load_sharded
        from tests.ranks import bytes_read, count_reads, known_models, live_bytes

        results: dict[str, dict[str, Any]] = {}
        nothing = team.run_on_all(live_bytes)[1]
        team.run_on_all(count_reads)
        for name, folder in folders.items():
            # Rank 1 frees its share of the previous model at this model's next call.
            before = team.run_on_all(live_bytes)[0], nothing
            model, result = (
                load_sharded(Checkpoint(folder), torch.float32, team),
                results.setdefault(name, {}),
            )
            result["held"] = [
                now - then for now, then in zip(team.run_on_all(live_bytes), before, strict=True)
            ]
            result["read"] = team.run_on_all(bytes_read)
            batches = make_ids(model.facts.vocab)
            result["blocks"] = [dict(block.weights) for block in model.blocks]
            result["ends"] = [model.embedding_VH, model.head_VH, model.norm_H]
            model.round_cache(kv)
            result["rounded"] = list(model.states(batches))
            result["scores"] = score_all(model)
            model.round_cache(None)
            result["states"] = list(model.states(batches))
            result["single"], result["none"] = (
                list(model.states(batches[:1])),
                list(model.states([])),
            )
            model.release_head()
            copy, doubled = model.copy(), {changed: model.blocks[k].weights[changed] * 2}
            copy.blocks.exchange(k, partial(dict, doubled))
            copy.exchange_ends({"embedding": make_codes(model.embedding_VH)})
            result["copy"] = [copy.blocks[k].weights[changed], copy.head_VH, *copy.states(batches)]
            result["kept"] = [model.blocks[k].weights[changed], model.head_VH]
            result["known"] = [team.run_on_all(known_models)]
            del copy, doubled
            gc.collect()
            model.release_head()
            list(model.blocks)
            result["known"].append(team.run_on_all(known_models))
            result["left"] = team.run_on_all(live_bytes)[1] - before[1]
            del model
            gc.collect()
        results["moe"] |= load_alone(team, folders["moe"])
        try:
            load_sharded(Checkpoint(broken), torch.float32, team)
        except Exception as error:
            results["dense"]["fault"] = f"{type(error).__name__}: {error}"
        team.dismiss()
        return results

    def call(team):
        import torch

        with torch.inference_mode():
            return team.follow() if team.rank else lead(team)

    return gang(2, call)[0]


@pytest.fixture(params=["dense", "moe", *OTHERS])
def both(request, folders, results):
    checkpoint = Checkpoint(folders[request.param])
    with torch.inference_mode():
        yield load_decoder(checkpoint, torch.float32), results[request.param]


def same(actual, expected):
    return len(actual) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(actual, expected, strict=True)
    )


def test_what_is_gathered_is_the_model(both):
    model, results = both
    assert len(results["blocks"]) == len(model.blocks)
    for weights, block in zip(results["blocks"], model.blocks, strict=True):
        assert list(weights) == list(block.weights)
        assert same(list(weights.values()), list(block.weights.values()))
    assert same(results["ends"], [model.embedding_VH, model.head_VH, model.norm_H])


def test_each_rank_reads_its_share_of_the_files_alone(both):
    model, results = both
    item = DTYPE_BYTES[model.facts.dtype]
    weights = [weight for block in model.blocks for weight in block.weights.values()]
    numbers = sum(map(torch.numel, [*weights, model.embedding_VH, model.norm_H]))
    assert sum(results["read"]) == numbers * item
    assert max(results["read"]) < 0.51 * numbers * item


def test_what_another_rank_finds_wrong_is_told_by_rank_0(results):
    fault = results["dense"]["fault"]
    assert fault.startswith("NumericsError: blocks.0.mlp.down_proj: the checkpoint's weights")


def test_where_only_rank_0_sees_the_files_it_reads_all_of_them(results):
    moe = results["moe"]
    assert moe["read alone"][0] >= sum(moe["read"])
    assert moe["read alone"][1] == 0
    for alone, together in zip(moe["blocks alone"], moe["blocks"], strict=True):
        assert same(list(alone.values()), list(together.values()))


def test_no_rank_holds_more_than_60_percent_between_blocks(both):
    model, results = both
    total = sum(weight.nbytes for block in model.blocks for weight in block.weights.values())
    total += model.embedding_VH.nbytes + model.norm_H.nbytes
    # After loading, and after gathering and freeing blocks and copies.
    for share in [*results["held"], results["left"]]:
        assert 0.49 * total < share < 0.6 * total


def test_text_that_the_ranks_divide_gives_the_same_bits(both):
    model, results = both
    expected = list(model.states(random_ids(model.facts.vocab)))
    assert same(results["states"], expected)
    assert same(results["single"], expected[:1])
    assert results["none"] == []


def test_every_rank_rounds_the_cache_and_plans_its_texts_by_that(both):
    model, results = both
    exact = scored(model)
    model.round_cache(KV)
    assert same(results["rounded"], list(model.states(random_ids(model.facts.vocab))))
    assert results["scores"] == pytest.approx(scored(model), abs=1e-4)
    assert results["scores"] != pytest.approx(exact, abs=1e-2)


def test_what_is_done_to_a_copy_leaves_the_model_alone(both):
    model, results = both
    weight, batches = model.blocks[WITH_ATTENTION].weights[CHANGED], random_ids(model.facts.vocab)
    assert same(results["kept"], [weight, model.head_VH])
    copy = model.copy()
    doubled = copy.blocks[WITH_ATTENTION].with_weights({CHANGED: weight * 2})
    copy.exchange(WITH_ATTENTION, doubled, dict)
    copy.exchange_ends({"embedding": rounded(model.embedding_VH)})
    assert same(results["copy"], [weight * 2, copy.head_VH, *copy.states(batches)])
    assert results["known"] == [[2, 2], [1, 1]]  # no rank keeps its share of a freed copy


def test_the_moe_model_has_experts():
    """So that the tests above are about both kinds of blocks."""
    sparse = {name: Checkpoint(DEMO / name).facts.sparse(0) for name in ("dense", "moe")}
    assert sparse == {"dense": False, "moe": True}

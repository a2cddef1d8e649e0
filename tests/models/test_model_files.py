"""Model folders that nobody should trust: absurd numbers, pipes, and files that disagree.

Where config.json, the index and the shards disagree, transformers is the judge.
"""

import json
import os
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from q3q.errors import CheckpointError
from q3q.models import completeness
from q3q.models.checkpoint import TOKENIZER_FILES, Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.models.facts import read_facts
from tests.models.families import build
from tests.models.test_checkpoint import save_tokenizer

INFINITE, NAN = float("inf"), float("nan")
ABSURD: dict[str, list[Any]] = {
    "num_hidden_layers": [10**9, 10**30, 10**5, INFINITE, 3.0, True, "3", [3], -1],
    "vocab_size": [10**12, 2**31 + 1, 0.5, {}],
    "hidden_size": [10**9 * 10, NAN],
    "num_attention_heads": [10**12],
    "head_dim": [10**12, 7],
    "max_position_embeddings": [10**12, "long"],
    "rms_norm_eps": [INFINITE, NAN, 0, 0.0, -1e-6, "1e-6", True, 10**400],
    "rope_theta": [INFINITE, NAN, 0, 0.0, -1.0, "1e4", [1e4]],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 0}, [1], "default"],
    "tie_word_embeddings": ["false", 1, []],
    "layer_types": ["full_attention", [["full_attention"]], 3],
    "quantization_config": ["gptq", [], 4],
    "model_type": ["\x1b]0;x\x07" * 999, ["qwen3"], None],
    "num_experts": [10**8, 10**12, 2.0, "8"],
    "num_experts_per_tok": [10**12],
    "moe_intermediate_size": [10**12],
    "decoder_sparse_step": [10**12, 0],
    "mlp_only_layers": [{"0": 1}, "all"],
    "norm_topk_prob": ["yes"],
}
EXPERTS = ("num_experts", "moe", "decoder", "mlp_only", "norm_topk")


def refused(folder):
    """Return the one line with which a folder is refused."""
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint(folder)
    line = str(refusal.value)
    assert line.isprintable()
    assert len(line) < 500 + len(str(folder))
    return line


def changed_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if key == "rope_theta":
            config.pop("rope_parameters", None)
        if value is not ...:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ABSURD.items() for value in values]
)
def test_absurd_numbers_are_refused_in_a_line_that_names_them(random_checkpoint, key, value):
    kind = "moe" if key.startswith(EXPERTS) else "dense"
    folder = changed_config(random_checkpoint(kind), **{key: value})
    line = refused(folder)
    named = "rope_" if key == "rope_parameters" else key
    assert named in line or "is of no family" in line or "quantized already" in line


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", {"num_hidden_layers": 10_000}),
        ("moe", {"num_experts": 10_000, "num_hidden_layers": 100}),
        ("moe", {"num_experts": 100, "num_hidden_layers": 10_000}),
    ],
)
def test_large_numbers_are_held_against_the_stored_tensors_before_any_is_listed(
    random_checkpoint, monkeypatch, kind, changes
):
    folder = changed_config(random_checkpoint(kind), **changes)
    monkeypatch.setattr(completeness, "LISTED", 1_000)
    monkeypatch.setattr(completeness, "disk_shapes", None)
    line = refused(folder)
    assert f"{changes['num_hidden_layers']} layers" in line
    assert "tensors, and the files hold" in line


def test_as_many_layers_and_experts_as_together_no_model_has_are_refused(random_checkpoint):
    folder = random_checkpoint("moe")
    changed_config(folder, num_experts=10_000, num_hidden_layers=10_000)
    assert "10000 layers of 10000 experts each" in refused(folder)


def test_dense_layers_beyond_the_last_one_do_not_count(random_checkpoint):
    folder = changed_config(random_checkpoint("moe"), mlp_only_layers=[3, 10**9, -1, "x", True])
    assert read_facts(folder).mlp_only_layers == ()


PLAIN_FILES = ["config.json", *TOKENIZER_FILES, "generation_config.json"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle", "huge"])
@pytest.mark.parametrize("name", PLAIN_FILES)
def test_what_would_be_read_without_end_is_refused(random_checkpoint, name, kind):
    """A pipe would hang, a device fill the memory."""
    folder = random_checkpoint()
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path)
    else:
        with path.open("wb") as file:
            file.truncate(10**9)  # takes no room
    assert str(path) in refused(folder)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-00002-of-00003.safetensors"]
)
def test_weights_that_are_no_files_are_refused(random_checkpoint, name, kind):
    path = random_checkpoint() / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refused(path.parent)


# How a folder of a tied model may disagree with itself: a change, and what the remark says.


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def relist(folder, **places):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, shard in places.items():
        index["weight_map"].pop(name, None)
        if shard is not None:
            index["weight_map"][name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def holder(folder, name):
    return next(shard for shard in shards(folder) if name in load_file(shard))


HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
STRANGER = "model.layers.0.self_attn.q_proj.bias"


def store(folder, name, tensor):
    rewrite(shards(folder)[-1], lambda tensors: tensors.update({name: tensor}))
    relist(folder, **{name: shards(folder)[-1].name})


def list_a_head(folder):
    relist(folder, **{HEAD: shards(folder)[0].name})


def list_a_stranger(folder):
    relist(folder, **{STRANGER: shards(folder)[0].name})


def list_too_little(folder):
    relist(folder, **{NORM: None})


def list_in_the_wrong_place(folder):
    other = next(path for path in shards(folder) if path != holder(folder, NORM))
    relist(folder, **{NORM: other.name})


def store_another_head(folder):
    store(folder, HEAD, torch.randn(97, 32))


def store_another_head_in_halves(folder):
    store(folder, HEAD, torch.randn(97, 32).bfloat16())


def store_the_same_head(folder):
    store(folder, HEAD, load_file(holder(folder, EMBEDDING))[EMBEDDING])


def store_the_head_alone(folder):
    def move(tensors):
        tensors[HEAD] = tensors.pop(EMBEDDING)

    shard = holder(folder, EMBEDDING)
    rewrite(shard, move)
    relist(folder, **{EMBEDDING: None, HEAD: shard.name})


def store_a_bias(folder):
    store(folder, STRANGER, torch.randn(48))


def store_twice(folder):
    rewrite(shards(folder)[-1], lambda tensors: tensors.update({NORM: torch.ones(32)}))
    rewrite(shards(folder)[0], lambda tensors: tensors.update({NORM: torch.randn(32)}))


def store_in_halves(folder):
    for shard in shards(folder):
        rewrite(
            shard, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()})
        )


def store_whole_too(folder):
    tensors = {key: value for shard in shards(folder) for key, value in load_file(shard).items()}
    tensors[NORM] = torch.randn(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DISAGREEMENTS = [
    (list_a_head, "lm_head.weight is listed in the index, and in no shard"),
    (list_a_stranger, "q_proj.bias is listed in the index, and in no shard"),
    (list_too_little, "model.norm.weight is not in the shard that the index names, and read"),
    (list_in_the_wrong_place, "model.norm.weight is not in the shard that the index names"),
    (store_another_head, "two different ones: they are not tied"),
    (store_another_head_in_halves, "two different ones: they are not tied"),
    (store_the_same_head, None),
    (store_the_head_alone, "the embedding is stored as the head"),
    (store_a_bias, "q_proj.bias is in the files, and not in this model: not read"),
    (store_twice, "model.norm.weight is in several shards: the last one counts"),
    (store_in_halves, "config.json says float32, and the weights are stored as bfloat16"),
    (store_whole_too, None),
]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "model"
    build("dense", tied=True).save_pretrained(folder, max_shard_size="30KB")
    assert len(shards(folder)) > 2
    return folder


@pytest.fixture
def copied(tied, tmp_path):
    return shutil.copytree(tied, tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "remark"), DISAGREEMENTS, ids=[change.__name__ for change, _ in DISAGREEMENTS]
)
@torch.inference_mode()
def test_files_that_disagree_are_read_as_transformers_reads_them(copied, change, remark):
    torch.manual_seed(3)
    change(copied)
    checkpoint = Checkpoint(copied)
    assert len(checkpoint.remarks) == (remark is not None)
    assert remark is None or remark in checkpoint.remarks[0]
    theirs = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)
    ours = load_decoder(checkpoint, torch.float32)
    assert ours.tied == (theirs.lm_head.weight is theirs.model.embed_tokens.weight)
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=ids).logits.flatten(0, 1)
    logits = torch.cat([part for _, part in ours.logits(ours.hidden(ids).flatten(0, 1))])
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_whole_folder_has_no_remarks(copied):
    assert Checkpoint(copied).remarks == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_a_config_without_a_dtype_has_that_of_the_weights_as_in_transformers(copied, dtype):
    store_in_halves(copied)
    changed_config(copied, dtype=... if dtype is None else dtype, torch_dtype=...)
    checkpoint = Checkpoint(copied)
    theirs = AutoModelForCausalLM.from_pretrained(copied, dtype="auto")
    assert checkpoint.facts.dtype == str(theirs.dtype).removeprefix("torch.")
    said = {"float32": "config.json says float32", None: "config.json names no dtype: bfloat16"}
    assert [remark.startswith(said.get(dtype, "?")) for remark in checkpoint.remarks] == [True] * (
        dtype != "bfloat16"
    )


def test_what_transformers_would_make_up_is_missing_and_named(copied):
    """Transformers fills them with random numbers."""
    changed_config(copied, tie_word_embeddings=False)
    assert "1 tensor is missing, first lm_head.weight" in refused(copied)
    assert "tie_word_embeddings is false" in refused(copied)
    changed_config(copied, tie_word_embeddings=True)
    rewrite(holder(copied, NORM), lambda tensors: tensors.pop(NORM))
    line = refused(copied)
    assert f"1 tensor is missing, first {NORM}, which the index places in model-0" in line
    relist(copied, **{NORM: None})
    assert f"1 tensor is missing, first {NORM}, which config.json implies: are" in refused(copied)


@pytest.mark.parametrize(
    ("own", "generation", "config", "expected"),
    [
        ("c", [3, 4], 5, 2),
        (None, [3, 4], 5, 3),
        (None, 3, 5, 3),
        (None, None, 5, 5),
        (None, ..., 5, 5),
        (None, ..., [6, 7], 6),
        (None, ..., None, None),
        (None, ..., 10**6, None),  # no token
    ],
)
def test_a_tokenizer_without_an_end_takes_the_models(copied, own, generation, config, expected):
    save_tokenizer(copied, tokens=20)
    if own is not None:
        settings = json.loads((copied / "tokenizer_config.json").read_text())
        (copied / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": own}))
    path = copied / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not ...:
        path.write_text(json.dumps({"eos_token_id": generation}))
    changed_config(copied, eos_token_id=config)
    assert load_tokenizer(copied).eos_token_id == expected

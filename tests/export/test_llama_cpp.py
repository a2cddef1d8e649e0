"""llama.cpp itself, on the CPU: its bytes, its numbers, its tokens and its logits.

It runs in an environment of its own, which `make llama` builds; Q3Q_LLAMA_PYTHON names its Python.
"""

import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from q3q.export.gguf_packing import pack_rows
from q3q.export.gguf_vocabulary import vocabulary_of
from q3q.export.gguf_writing import tensors_of, write_model
from q3q.export.proof import run, windows, worst_logits
from q3q.models import block as blocks
from q3q.models.checkpoint import load_tokenizer
from q3q.models.disk_names import is_stacked
from q3q.models.gguf_tokenizer import RULES
from q3q.models.tensor_files import read_header
from q3q.number_formats import BLOCKS
from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.grid import into_groups
from q3q.numerics.levels import levels_of
from q3q.scheme import InputRounding
from tests.export.conftest import DEMO, make_checkpoint
from tests.export.test_gguf import WIDE, exported

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
# Both programs add up float32 numbers, in other orders; 4e-6 is the most that was seen.
SAME_SUMS = 2e-5
# An input that lies between two codes of 8 bits may become either one; 0.014 was seen.
ANOTHER_CODE = 0.05


def llama_python():
    if named := os.environ.get("Q3Q_LLAMA_PYTHON"):
        return Path(named)
    own = ROOT / ".venv-llama"
    return own / "bin" / "python" if (own / ".ready").is_file() else None


PYTHON = llama_python()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="no llama.cpp: `make llama` builds it"),
]


def asked(folder, **request):
    (folder / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [str(PYTHON), str(SCRIPT), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(folder / "out.npz"))


def test_its_quantizer_and_its_reader_agree_with_ours(tmp_path):
    """Numbers bit for bit. Of its search many ranges err nearly alike, and last bits decide."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 64, 512, generator=generator) * 0.1
    weight *= torch.rand(1, 64, 1, generator=generator).mul_(3).exp_()
    np.save(tmp_path / "weight.npy", weight[0].numpy())
    ours = {}
    for name, form in BLOCKS.items():
        levels = levels_of(name, form.bits, form.group_size, symmetric=not form.offsets)
        groups = into_groups(weight, form.group_size)
        rounded = levels.rounded(groups, levels.minmax(groups))
        assert isinstance(rounded, BlockWeight)
        ours[name] = rounded
        np.save(tmp_path / f"{name}.npy", pack_rows(ours[name]).numpy())
    words = {name: name.replace("_k", "_K") for name in BLOCKS}
    out = asked(
        tmp_path,
        weights=dict.fromkeys(words.values(), "weight.npy"),
        bytes={word: f"{name}.npy" for name, word in words.items()},
        numbers=[64, 512],
    )
    for name, word in words.items():
        numbers = ours[name].dequantize()[0]
        assert torch.equal(torch.from_numpy(out[f"numbers/{word}"]), numbers), name
        theirs = torch.from_numpy(out[f"bytes/{word}"])
        assert (theirs == pack_rows(ours[name])).float().mean() > 0.7, name
        kind = gguf.GGMLQuantizationType[name.upper()]
        read = torch.from_numpy(gguf.quants.dequantize(theirs.numpy(), kind))
        errors = [float((part - weight[0]).norm()) for part in (numbers, read)]
        assert errors[0] < 1.002 * errors[1], name


def evaluated(model):
    """Return a model's tensors in float32 by their names on disk, each expert's apart."""
    facts = model.facts
    tensors = {facts.family.final_norm: model.norm_H, facts.family.embedding: model.embedding_VH}
    if not facts.tied:
        tensors[facts.family.head] = model.head_VH
    for k, block in enumerate(model.blocks):
        for name, weight in block.weights.items():
            parts = {name: weight}
            if is_stacked(name):
                parts = {name.replace("experts.", f"experts.{e}."): w for e, w in enumerate(weight)}
            tensors |= {facts.on_disk(k, part): numbers for part, numbers in parts.items()}
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def with_half_scales(inputs, bits, group_size):
    """Round inputs as llama.cpp does for types without super-blocks: scales become float16."""
    groups = into_groups(inputs, group_size)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups * torch.where(scale > 0, 1 / scale, 0)).round()
    return (codes * scale.half().float()).flatten(-2)


def errors_of(expected_BTV, folder, file, ids_BT):
    """Return how far llama.cpp's logits are from ours at each position, sorted."""
    errors = []
    for logits_TV, row in zip(expected_BTV, ids_BT.tolist(), strict=True):
        found_TV = torch.from_numpy(asked(folder, model=str(file), ids=row)["logits"])
        errors += [
            worst_logits(*(logits[None, None] for logits in pair))
            for pair in zip(logits_TV, found_TV, strict=True)
        ]
    return sorted(errors)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("dense", name) for name in BLOCKS),
        *((kind, "q4_k") for kind in ("moe", "llama", "qwen2")),
    ],
)
@torch.inference_mode()
def test_it_answers_with_our_logits(tmp_path, monkeypatch, kind, name):
    exporter, model = exported(tmp_path, kind, name, tied=kind != "qwen2")
    facts, ids = model.facts, windows(model.facts)

    # The evaluated numbers in float32, which llama.cpp multiplies without rounding anything.
    save_file(evaluated(model), tmp_path / "numbers.safetensors")
    tensors = tensors_of(facts, read_header(tmp_path / "numbers.safetensors"), {})
    vocabulary, file = vocabulary_of(load_tokenizer(DEMO), facts.vocab), tmp_path / "numbers.gguf"
    write_model(file, facts, vocabulary, tensors, name="it", most="q8_0")
    errors = errors_of(run(model, rounded=False).logits, tmp_path, file, ids)
    assert errors[-1] < SAME_SUMS

    # Its kernels round the inputs of linears to 8 bits, with a scale for a block of channels.
    if BLOCKS[name].groups == 1:
        monkeypatch.setattr(blocks, "absmax_per_token", with_half_scales)
    for block in model.blocks:
        block.rounding = InputRounding(8, group_size=BLOCKS[name].block)
    file = exporter.folder / "model.gguf"
    errors = errors_of(run(model, rounded=True).logits, tmp_path, file, ids)
    # Of q4_1 it also rounds each group's sum of inputs, which moves inputs to other codes.
    assert errors[len(errors) // 2] < (ANOTHER_CODE if name == "q4_1" else SAME_SUMS)
    if kind != "moe":  # another code may send a token to another expert
        assert errors[-1] < ANOTHER_CODE


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CUT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEXTS = [
    "Once upon a time there were 3 cats, and Tom's dog didn't like it!",
    "In 12345 of 1,000.50 cases  THEY'LL say:\n\n\t  'no'...   ",
    "naïve café — 漢字 и кот 😀 ½ ²³",
    "<|endoftext|> (a_b) {x+=1};\r\n# two  spaces ",
]


def steps(*pretokenizers):
    return {"type": "Sequence", "pretokenizers": list(pretokenizers)}


@pytest.mark.parametrize("splitter", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_it_cuts_texts_as_the_tokenizer_does(tmp_path, splitter):
    rules = {
        name: steps({**CUT, "pattern": {"Regex": rule}}, {**BYTES, "use_regex": False})
        for rule, name in RULES.items()
    }
    original = make_checkpoint(tmp_path / "original", kind="dense", **WIDE)
    path = original.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"gpt-2": BYTES, "smollm": steps(DIGITS, BYTES), **rules}[splitter]
    content["model"]["ignore_merges"] = splitter == "llama-bpe"  # as Llama 3's
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(original.folder)
    vocabulary = vocabulary_of(tokenizer, original.facts.vocab)
    assert vocabulary.splitter == splitter
    file = tmp_path / "words.gguf"
    write_model(file, original.facts, vocabulary, [], name="it", most="q8_0")
    out = asked(tmp_path, model=str(file), texts=TEXTS)
    for k, text in enumerate(TEXTS):
        ours = tokenizer(text, add_special_tokens=False).input_ids
        assert out[f"{k}"].tolist() == ours, text

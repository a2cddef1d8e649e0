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
from q3q.export.proof import runs_of, windows, worst_logits
from q3q.models.checkpoint import load_tokenizer
from q3q.models.tensor_files import read_header
from q3q.number_formats import BLOCKS
from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.grid import into_groups
from q3q.numerics.levels import levels_of
from tests.export.conftest import DEMO
from tests.export.test_gguf import exported

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
TEXT = "Once upon a time there were 3 cats, and Tom's dog didn't like it!"


def llama_python():
    named = os.environ.get("Q3Q_LLAMA_PYTHON")
    path = Path(named) if named else ROOT / ".venv-llama" / "bin" / "python"
    return path if path.is_file() else None


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
        codes = levels.rounded(groups, levels.minmax(groups))
        assert isinstance(codes, BlockWeight)
        ours[name] = codes
        np.save(tmp_path / f"{name}.npy", pack_rows(codes).numpy())
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


@pytest.mark.parametrize("kind", ["dense", "moe", "llama", "qwen2"])
@torch.inference_mode()
def test_it_answers_with_our_logits(tmp_path, kind):
    """On numbers in float32 as its cache rounds keys and values; on blocks as it rounds inputs."""
    exporter, model = exported(tmp_path, kind, "q4_k", tied=kind != "qwen2")
    facts, expected = model.facts, runs_of(model)["plain"].logits
    ids = windows(facts)
    # The evaluated numbers in float32, which llama.cpp multiplies without rounding anything.
    tensors = {"model.norm.weight": model.norm_H, facts.family.embedding: model.embedding_VH}
    if not facts.tied:
        tensors[facts.family.head] = model.head_VH
    for k, block in enumerate(model.blocks):
        for name, weight in block.weights.items():
            if name.startswith("mlp.experts."):
                parts = {name.replace("experts.", f"experts.{e}."): w for e, w in enumerate(weight)}
            else:
                parts = {name: weight}
            tensors |= {facts.on_disk(k, part): number for part, number in parts.items()}
    save_file(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()},
        tmp_path / "numbers.safetensors",
    )
    stored = read_header(tmp_path / "numbers.safetensors")
    vocabulary = vocabulary_of(load_tokenizer(DEMO), facts.vocab)
    # 0.004: llama.cpp keeps keys and values in float16. 0.05: it rounds inputs of blocks to 8 bits.
    for file, bound in ((tmp_path / "numbers.gguf", 4e-3), (exporter.folder / "model.gguf", 0.05)):
        if file.name == "numbers.gguf":
            write_model(
                file, facts, vocabulary, tensors_of(facts, stored, {}), name="it", most="q8_0"
            )
        for row in range(len(ids)):
            out = asked(tmp_path, model=str(file), ids=ids[row].tolist(), text="a", prompt="a")
            found = torch.from_numpy(out["logits"])[None]
            assert worst_logits(expected[row][None], found) < bound, (file.name, row)

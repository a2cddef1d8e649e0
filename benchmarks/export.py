"""What an export costs: `python benchmarks/export.py [--blocks 4] [--gptqmodel PYTHON]`.

Runs one GPTQ trial for each format, on a random model with Qwen3-0.6B's real shapes (fewer blocks,
real vocabulary) and a small calibration set. Prints packing and writing as a share of loading,
quantizing and evaluating in the same run (the goal is at most 5 %), and the proof in a second
process, which takes little beside a real calibration set and evaluation.

--gptqmodel: a Python in whose environment GPTQModel is installed. It loads exports of the demo
models in its two formats, at every number of bits, symmetric and not, in groups (of `gptq` in
act-order) and in whole rows, and its logits (float16 arithmetic) are compared with q3q's, token by
token. Ends with an error where they differ by more than 1 %; of an MoE model one token in twenty
may, because float16 may send a token that stands between two experts to the other.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from trial import make_model

from q3q.config.schema import register

ROOT = Path(__file__).parent.parent
KINDS = {
    "hf": [],
    "gptq": [],
    "awq": ["method.static_groups=true"],
    "compressed_tensors": ["method.static_groups=true"],
}
WAYS = [
    f"{how} {size}"
    for how in ("symmetric=true", "symmetric=false")
    for size in ("group_size=128", "group_size=-1")
]
LOADED = {
    "gptq": [f"bits={bits} {way}" for bits in (2, 3, 4, 8) for way in WAYS],
    "awq": [f"{way} method.static_groups=true" for way in WAYS],
}
SAME_IN_FLOAT16 = 0.01  # of the size of a token's logits
SENT_ELSEWHERE = 0.05  # of an MoE model's tokens
LOAD = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    backend = BACKEND.AWQ_TORCH if "awq" in folder.rpartition("/")[2] else BACKEND.TORCH
    model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=backend)
    with torch.inference_mode():
        torch.save(model.model(ids).logits.float(), folder + ".logits")
"""


def run(overrides: list[str], storage: Path) -> dict:
    command = [sys.executable, "launch.py", "evaluation.tasks=[]", f"storage={storage}", *overrides]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in storage.glob("trials/*/record.json")
    ]
    return next(record for record in records if record["spec"].get("export"))


def costs(blocks: int, scratch: Path) -> None:
    make_model(scratch / "model", blocks)
    small = [
        "model=local",
        f"model.path={scratch}/model",
        "evaluation.limit=8",
        "calibration.samples=16",
    ]
    print(f"0.6B-shaped, {blocks} blocks, 16 x 512 tokens, GPTQ 4 bits, group 128, bfloat16")
    for name, needed in KINDS.items():
        overrides = [*small, "calibration.length=512", "method=gptq", f"export={name}", *needed]
        metrics = run(overrides, scratch / name)["metrics"]
        write = metrics["seconds/export_write"]
        rest = sum(
            metrics[f"seconds/{phase}"] for phase in ("load", "calibrate", "quantize", "evaluate")
        )
        proof = metrics["seconds/export"]
        print(
            f"  {name:20} packing and writing {write:5.2f} s, "
            f"{100 * write / rest:4.1f} % of {rest:5.1f} s; "
            f"proof {proof:5.1f} s; {metrics['export_bytes'] / 1e6:6.1f} MB"
        )


def exports(scratch: Path) -> list[Path]:
    """Write one export of each kind by trials in this process, and return their folders."""
    from hydra import compose, initialize_config_dir

    from q3q.config.resolve import trial_from
    from q3q.trial import attempt_trial

    register()
    small = ["method=gptq", "calibration.samples=4", "evaluation=none", f"storage={scratch}/loads"]
    folders = []
    for model in ("demo", "demo_moe", "demo_hybrid"):
        for name, way in ((name, way) for name, ways in LOADED.items() for way in ways):
            folder = scratch / "loads" / re.sub(r"[^a-z0-9-]+", "_", f"{model} {name} {way}")
            overrides = [
                *small,
                f"model={model}",
                f"export={name}",
                f"export.path={folder}",
                *way.split(),
            ]
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                record = attempt_trial(trial_from(compose("config", overrides)))
            if not record.completed:
                raise SystemExit(f"{folder.name}: {record.reason}")
            folders.append(folder)
    return folders


def loads(python: str, scratch: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from q3q.export.proof import run as run_in_float32
    from q3q.export.proof import windows
    from q3q.models.checkpoint import Checkpoint
    from q3q.models.decoder import load_decoder

    folders = exports(scratch)
    torch.save(windows(Checkpoint(folders[0]).facts), scratch / "ids")
    command = [python, "-I", "-c", LOAD, str(scratch / "ids"), *map(str, folders)]
    # Compiling would take minutes, running takes a moment.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=scratch, check=False
    )
    if done.returncode:
        raise SystemExit(f"GPTQModel does not load one of them\n{done.stderr[-2000:]}")
    wrong = []
    for folder in folders:
        with torch.inference_mode():
            model = load_decoder(Checkpoint(folder), torch.float32)
            ours = run_in_float32(model, rounded=False).logits
        error_BT = (torch.load(f"{folder}.logits") - ours).norm(dim=-1) / ours.norm(dim=-1)
        far = float((error_BT > SAME_IN_FLOAT16).float().mean())
        print(
            f"  {folder.name:68} by GPTQModel: in float16, logits of a token differ by "
            f"{float(error_BT.median()):.1e} of their size, by {float(error_BT.max()):.1e} at most",
            flush=True,
        )
        wrong += [folder.name] if far > (SENT_ELSEWHERE if "_moe_" in folder.name else 0) else []
    if wrong:
        raise SystemExit(f"differ by more than {SAME_IN_FLOAT16}: {', '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=4,
        help="blocks of the 0.6B-shaped model, 28 in the real one; 0 to skip it",
    )
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="a Python that has GPTQModel")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.blocks:
            costs(options.blocks, Path(scratch))
        if options.gptqmodel:
            loads(options.gptqmodel, Path(scratch))


if __name__ == "__main__":
    main()

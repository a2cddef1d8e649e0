"""What an export costs beside its trial: `python benchmarks/export.py [--blocks 4] [--gptqmodel PYTHON]`.

One GPTQ trial for each format, on a random model with Qwen3-0.6B's real shapes (fewer blocks, real vocabulary) and a
small calibration set; prints packing and writing as a share of loading, quantizing and evaluating in the same run (at
most 5 % wanted), and the proof in a second process, which a real calibration set and evaluation dwarf.

--gptqmodel: a Python in whose environment GPTQModel is installed. Exports of both demo models in its two formats are
loaded with it, and its logits (float16 arithmetic) compared with q3q's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from trial import make_model

ROOT = Path(__file__).parent.parent
KINDS = {
    "hf": [],
    "gptq": [],
    "awq": ["method.static_groups=true"],
    "compressed_tensors": ["method.static_groups=true"],
}
LOAD = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", dtype=torch.float16, backend=getattr(BACKEND, sys.argv[2]))
ids = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    torch.save(model.model(ids).logits.float(), sys.argv[3])
"""


def run(overrides: list[str], storage: Path) -> dict:
    command = [sys.executable, "launch.py", "evaluation.tasks=[]", f"storage={storage}", *overrides]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in storage.glob("trials/*/record.json")]
    return next(record for record in records if record["spec"].get("export"))


def costs(blocks: int, scratch: Path) -> None:
    make_model(scratch / "model", blocks)
    small = ["model=local", f"model.path={scratch}/model", "evaluation.limit=8", "calibration.samples=16"]
    print(f"0.6B-shaped, {blocks} blocks, 16 x 512 tokens, GPTQ 4 bits, group 128, bfloat16")
    for name, needed in KINDS.items():
        overrides = [*small, "calibration.length=512", "method=gptq", f"export={name}", *needed]
        metrics = run(overrides, scratch / name)["metrics"]
        write = metrics["seconds/export_write"]
        rest = sum(metrics[f"seconds/{phase}"] for phase in ("load", "calibrate", "quantize", "evaluate"))
        proof = metrics["seconds/export"]
        print(
            f"  {name:20} packing and writing {write:5.2f} s, {100 * write / rest:4.1f} % of {rest:5.1f} s; "
            f"proof {proof:5.1f} s; {metrics['export_bytes'] / 1e6:6.1f} MB"
        )


def loads(python: str, scratch: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from q3q.export.proof import float32_logits, relative_errors
    from q3q.models.checkpoint import Checkpoint
    from q3q.models.decoder import load_decoder

    ids = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))
    for model in ("demo", "demo_moe"):
        for name, backend in (("gptq", "TORCH"), ("awq", "AWQ_TORCH")):
            path, out = scratch / f"{model}_{name}", scratch / f"{model}_{name}.pt"
            overrides = [f"model={model}", "method=gptq", f"export={name}", f"export.path={path}", *KINDS[name]]
            run([*overrides, "calibration.samples=4", "evaluation.limit=2"], scratch / f"{model}_{name}_trial")
            command = [python, "-I", "-c", LOAD, str(path), backend, str(out)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
            if done.returncode:
                raise SystemExit(f"{model}, {name}: GPTQModel does not load it\n{done.stderr[-2000:]}")
            with torch.inference_mode():
                ours = float32_logits(load_decoder(Checkpoint(path), torch.float32), ids, None)
            worst = relative_errors(ours, torch.load(out)).max()
            print(f"  {model:8} {name:5} by GPTQModel: logits differ by {worst:.1e} of their size, in float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the 0.6B-shaped model, 28 in the real one")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="a Python that has GPTQModel")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        costs(given.blocks, Path(scratch))
        if given.gptqmodel:
            loads(given.gptqmodel, Path(scratch))


if __name__ == "__main__":
    main()

"""A model that does not fit: `python benchmarks/streaming.py [--shape 0.6b|1.7b|4b] [--cache DIR]`.

Makes a random Qwen3 checkpoint of a real shape (4B: 8 GB), and runs whole trials on it under a
third of its bytes, and under 2.5 GB: quantize, perplexity, and divergence from the unquantized
model, each trial in a process of its own. Its peak is the kernel's (VmHWM), the largest of all
phases. Then, at 0.6B, where both fit, compares streamed with resident: processor and disk together,
taking turns, the best of a few. Exits with 1 if a peak is above its bound, or streaming below 60 %
of the resident speed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from q3q.config.schema import register
from q3q.formatting import in_gb
from q3q.models.disk_names import disk_shapes
from q3q.models.facts import ModelFacts, read_facts
from q3q.models.tensor_files import Rows, encode_tensors

ROOT = Path(__file__).parent.parent
BASE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
SHAPES = {
    "0.6b": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
    },
    "1.7b": {
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
    },
    "4b": {
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
    },
}
SETTINGS = [
    "calibration=demo",
    "calibration.samples=8",
    "calibration.length=512",
    "evaluation.tasks=[]",
    "evaluation.texts=[demo]",
    "evaluation.window=512",
    "evaluation.limit=4",
]
MOST_BYTES = 2_500_000_000  # of the bound, however large the checkpoint
LEAST_SPEED = 0.6


def random_parts(
    shape: tuple[int, ...], generator: torch.Generator, rows: int = 4096
) -> Iterator[Tensor]:
    for start in range(0, shape[0], rows):
        part = torch.empty(min(rows, shape[0] - start), *shape[1:], dtype=torch.bfloat16)
        yield (
            part.fill_(1)
            if len(shape) == 1
            else part.normal_(std=shape[-1] ** -0.5, generator=generator)
        )


def write_checkpoint(folder: Path, shape: str) -> ModelFacts:
    """Write one shard a block, a few rows at a time, unless the checkpoint is complete already."""
    config = {**BASE, **SHAPES[shape]}
    facts = read_facts(config)
    if (folder / "config.json").exists():
        return facts
    folder.mkdir(parents=True, exist_ok=True)
    shards = [
        {f"model.layers.{k}.{name}": size for name, size in disk_shapes(facts, k).items()}
        for k in range(facts.layers)
    ]
    shards.append(
        {
            "model.embed_tokens.weight": (facts.vocab, facts.hidden),
            "model.norm.weight": (facts.hidden,),
        }
    )
    weight_map: dict[str, str] = {}
    for k, sizes in enumerate(shards):
        name = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        generator = torch.Generator().manual_seed(k)
        tensors = {
            key: Rows(size, torch.bfloat16, random_parts(size, generator))
            for key, size in sizes.items()
        }
        with (folder / name).open("wb") as file:
            file.writelines(encode_tensors(tensors, {"format": "pt"}))
        weight_map |= dict.fromkeys(sizes, name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "q3q" / "models" / "demo" / "dense" / name, folder / name)
    index = {"metadata": {"total_size": facts.weight_bytes()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return facts


def one_trial(folder: Path, overrides: list[str]) -> None:
    """Run one trial in a process of its own, and print what it took as JSON."""
    from hydra import compose, initialize_config_dir

    from q3q.config.resolve import trial_from
    from q3q.record import Progress
    from q3q.trial import run_trial

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        trial = trial_from(
            compose("config", ["model=local", f"model.path={folder}", *SETTINGS, *overrides])
        )

    def show(event: Progress) -> None:
        if event.phase == "quantize":
            print(f"\r{event.done} of {event.total} blocks ", end="", file=sys.stderr, flush=True)

    record = run_trial(trial, show)
    if not record.completed:
        raise SystemExit(record.reason)
    print(json.dumps({"metrics": record.metrics, "loading": record.environment["loading"]}))


def run(folder: Path, storage: Path, *overrides: str) -> dict[str, dict[str, float]]:
    shutil.rmtree(storage / "trials", ignore_errors=True)  # of an equal trial before it
    command = [sys.executable, __file__, "--trial", str(folder), f"storage={storage}", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def by_phase(outcome: dict[str, dict[str, float]], measure: str) -> dict[str, float]:
    return {
        name.removeprefix(measure): value
        for name, value in outcome["metrics"].items()
        if name.startswith(measure)
    }


def main() -> None:
    if sys.argv[1:2] == ["--trial"]:
        one_trial(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--methods", default="rtn,gptq", help="to run under the bound")
    parser.add_argument("--cache", type=Path, help="folder to keep checkpoints in")
    parser.add_argument(
        "--memory", help="the bound; by default a third of the checkpoint's bytes, 2.5 GB at most"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="of streamed against resident; 0 for none"
    )
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="q3q_streaming_") as scratch:
        cache, storage = options.cache or Path(scratch), Path(scratch) / "storage"
        facts = write_checkpoint(cache / options.shape, options.shape)
        bound = (
            int(options.memory) if options.memory else min(facts.weight_bytes() // 3, MOST_BYTES)
        )
        on_disk = in_gb(facts.weight_bytes())
        print(f"{options.shape}: {on_disk} on disk, memory={bound} ({in_gb(bound)})")
        for method in options.methods.split(","):
            outcome = run(cache / options.shape, storage, f"method={method}", f"memory={bound}")
            peaks, seconds = by_phase(outcome, "peak_bytes/"), by_phase(outcome, "seconds/")
            where = max(peaks, key=peaks.__getitem__)
            within = peaks[where] <= bound
            failed |= not within
            print(
                f"{method:6} {outcome['loading']['loader']}: "
                f"peak {peaks[where] / 1e9:.2f} GB ({where}), "
                f"{'within' if within else 'ABOVE'} the bound; {sum(seconds.values()):.0f} s; "
                + ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in peaks.items()),
                flush=True,
            )
        if options.rounds:
            write_checkpoint(cache / "0.6b", "0.6b")
            for method in options.methods.split(","):
                best: dict[str, float] = {}
                for _ in range(options.rounds):
                    for loader in ("resident", "streamed"):
                        settings = [f"method={method}", f"loader={loader}"]
                        outcome = run(cache / "0.6b", storage, *settings)
                        seconds = by_phase(outcome, "seconds/")
                        best[loader] = min(best.get(loader, float("inf")), sum(seconds.values()))
                speed = best["resident"] / best["streamed"]
                failed |= speed < LEAST_SPEED
                print(
                    f"0.6b {method}: resident {best['resident']:.1f} s, "
                    f"streamed {best['streamed']:.1f} s, {speed:.0%} of its speed "
                    f"(goal: at least {LEAST_SPEED:.0%})",
                    flush=True,
                )
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()

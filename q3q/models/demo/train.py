"""How the two demo models were made: `python -m q3q.models.demo.train dense` (or `moe`).

A byte-level BPE of 4,096 tokens and a small Qwen3 are trained on Python's standard library and on generated stories.
The result is an ordinary Hugging Face folder (safetensors, tokenizer, config, model card with the loss curve).
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from q3q.models.demo.library import training_text
from q3q.models.demo.stories import stories

VOCAB_SIZE = 4096
END = "<|endoftext|>"
WINDOW = 512
STORY_SHARE = 0.6  # of the windows; the rest is library text

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    num_attention_heads=6,  # heads x head_dim = 384 differs from hidden on purpose, as in Qwen3 0.6B, 4B and 32B
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    tie_word_embeddings=True,
    attention_bias=False,
    bos_token_id=None,
    eos_token_id=0,
    use_cache=True,
)


def build_model(kind: str) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    if kind == "dense":
        return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=6, intermediate_size=640, **_COMMON))
    config = Qwen3MoeConfig(
        num_hidden_layers=4,
        intermediate_size=640,  # unused: every layer is sparse, as in the released MoE models
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        **_COMMON,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # trains twice as fast as expert by expert
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = stories(seed=0, held_out=False)
    tokenizer.train_from_iterator([training_text(), *(next(stream).full_text() for _ in range(10_000))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=2048)


def windows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Endless training windows [WINDOW] of token ids: packed stories, and random windows of library text."""
    generator = torch.Generator().manual_seed(seed)
    library = torch.tensor(tokenizer(training_text(), verbose=False)["input_ids"])
    stream = stories(seed, held_out=False)
    packed: list[int] = []
    while True:
        if torch.rand((), generator=generator) < STORY_SHARE:
            while len(packed) < WINDOW:
                batch = "\n".join(next(stream).full_text() for _ in range(200))
                packed += tokenizer(batch + "\n", verbose=False)["input_ids"]
            yield torch.tensor(packed[:WINDOW])
            packed = packed[WINDOW:]
        else:
            start = int(torch.randint(len(library) - WINDOW, (), generator=generator))
            yield library[start : start + WINDOW]


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else (embedding, norms, router, fused 3-D experts)."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "gate.weight" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.005, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(done: float) -> float:
    """Of the peak rate, `done` of the way: 2 % warm-up, flat to half way, then a straight line to zero."""
    return min(1.0, done / 0.02 + 1e-3, 2 * (1 - done) + 1e-3)


def train(kind: str, out: Path, *, minutes: float, steps: int, batch: int, seed: int) -> None:
    """Train for `steps` steps of `batch` windows (or stop the schedule at `minutes`), and write the folder."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(kind)
    compiled = torch.compile(model)
    stream = windows(tokenizer, seed)
    parts = optimizers(model)
    peak = [group["lr"] for part in parts for group in part.param_groups]
    curve: list[tuple[int, float]] = []
    started, recent = time.monotonic(), []
    step, done = 0, 0.0
    while done < 1.0:
        for group, rate in zip((g for part in parts for g in part.param_groups), peak, strict=True):
            group["lr"] = rate * learning_rate_factor(done)
        ids = torch.stack([next(stream) for _ in range(batch)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        step += 1
        elapsed = (time.monotonic() - started) / 60
        done = max(step / steps, elapsed / minutes)
        recent.append(loss.item())
        if step % 50 == 0 or done >= 1.0:
            curve.append((step, sum(recent) / len(recent)))
            recent = []
            print(f"step {step}/{steps}  loss {curve[-1][1]:.3f}  {elapsed:.1f} min", flush=True)
            if not math.isfinite(curve[-1][1]):
                raise SystemExit("training diverged")
    minutes_taken = (time.monotonic() - started) / 60
    if kind == "moe":
        model.config.output_router_logits = False  # wanted for the balancing loss alone
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "kind": kind,
        "seed": seed,
        "steps": step,
        "batch": batch,
        "window": WINDOW,
        "tokens": step * batch * WINDOW,
        "minutes": round(minutes_taken, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "loss": [[s, round(v, 4)] for s, v in curve],
    }
    (out / "training.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("dense", "moe"))
    parser.add_argument("--out", type=Path, help="folder to write; default: beside this file")
    parser.add_argument("--minutes", type=float, default=1e9, help="end the schedule after this long")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.out or Path(__file__).parent / given.kind
    train(given.kind, folder, minutes=given.minutes, steps=given.steps, batch=given.batch, seed=given.seed)

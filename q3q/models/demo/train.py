"""Train a demo model: `python -m q3q.models.demo.train dense` (or `moe`).

A byte-level BPE of 4,096 tokens and a small Qwen3 learn Python's standard library and generated
stories. The result is an ordinary Hugging Face folder (safetensors, tokenizer, config) with the
loss curve in `training.json`. The second of two stages adds a loss on the answers to the stories'
questions, which are a small share of the tokens and all that the tasks measure.
"""

import argparse
import json
import math
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
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


@dataclass(frozen=True)
class Stage:
    """A stage of training."""

    steps: int  # of one batch each
    seed: int
    story_share: float  # of the windows; the rest is library text
    answer_weight: float  # of the answer tokens' mean loss, added to the mean loss of all tokens
    rate: float  # factor of the optimizers' peak learning rates


STAGES = (
    Stage(steps=2000, seed=0, story_share=0.6, answer_weight=0.0, rate=1.0),
    Stage(steps=500, seed=1000, story_share=0.8, answer_weight=1.0, rate=0.6),
)
BATCH = 8  # windows a step
ROUTER_BALANCE = 0.01

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    # heads x head_dim = 384 is not hidden, on purpose, as in Qwen3 0.6B, 4B and 32B.
    num_attention_heads=6,
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
        router_aux_loss_coef=ROUTER_BALANCE,
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
    texts = [training_text(), *(next(stream).full_text() for _ in range(10_000))]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=2048
    )


def windows(
    tokenizer: PreTrainedTokenizerFast, seed: int, story_share: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training windows without end: token ids and a mask of answer tokens, [WINDOW] each.

    A window is of packed stories, or of library text at random, which has no answers.
    """
    generator = torch.Generator().manual_seed(seed)
    library = torch.tensor(tokenizer(training_text(), verbose=False)["input_ids"])
    stream = stories(seed, held_out=False)
    packed, answers = list[int](), list[bool]()
    while True:
        if torch.rand((), generator=generator) < story_share:
            while len(packed) < WINDOW:
                text = "\n".join(next(stream).full_text() for _ in range(200)) + "\n"
                encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
                spans = [match.span(1) for match in re.finditer(r"Answer:( .*)\n", text)]
                packed += encoded["input_ids"]
                answers += _inside(encoded["offset_mapping"], spans)
            yield torch.tensor(packed[:WINDOW]), torch.tensor(answers[:WINDOW])
            packed, answers = packed[WINDOW:], answers[WINDOW:]
        else:
            start = int(torch.randint(len(library) - WINDOW, (), generator=generator))
            yield library[start : start + WINDOW], torch.zeros(WINDOW, dtype=torch.bool)


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Return for each token whether its characters lie in one of the spans; both are in order."""
    inside, k = [], 0
    for start, end in offsets:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        inside.append(k < len(spans) and spans[k][0] <= start and end <= spans[k][1])
    return inside


def stage_loss(
    logits_BTV: Tensor, ids_BT: Tensor, answers_BT: Tensor, answer_weight: float
) -> Tensor:
    """Return the mean loss of all next tokens plus the weighted mean of answer tokens, in nats."""
    logits = logits_BTV[:, :-1].flatten(0, 1).float()
    loss_BT = cross_entropy(logits, ids_BT[:, 1:].flatten(), reduction="none")
    loss = loss_BT.mean()
    is_answer = answers_BT[:, 1:].flatten()
    if answer_weight and is_answer.any():
        loss = loss + answer_weight * loss_BT[is_answer].mean()
    return loss


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, AdamW for embedding, norms, router and 3-D experts."""
    matrices, others = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "gate.weight" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.005, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(done: float) -> float:
    """Return the factor of the peak rate after a share `done` of the steps.

    2 % warm-up, constant to the middle, then linear to zero.
    """
    return min(1.0, done / 0.02 + 1e-3, 2 * (1 - done) + 1e-3)


def train(kind: str, out: Path) -> None:
    """Run both stages, each from the folder that the stage before wrote.

    A stage that `training.json` lists is not repeated.
    """
    log = out / "training.json"
    facts = json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}
    done = facts.get("stages", 0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out) if done else build_tokenizer()
    for number, stage in enumerate(STAGES[done:], start=done):
        torch.manual_seed(stage.seed)
        model = build_model(kind)
        if number:
            earlier = type(model).from_pretrained(out, dtype=torch.float32)
            model.load_state_dict(earlier.state_dict())
        started = time.monotonic()
        curve = run_stage(model, tokenizer, stage)
        minutes = (time.monotonic() - started) / 60
        if kind == "moe":
            model.config.output_router_logits = False  # only the balancing loss needs them
        model.bfloat16().save_pretrained(out)
        tokenizer.save_pretrained(out)
        before = facts.get("steps", 0)
        facts = {
            "kind": kind,
            "stages": number + 1,
            "seed": STAGES[0].seed,
            "steps": before + stage.steps,
            "batch": BATCH,
            "window": WINDOW,
            "tokens": (before + stage.steps) * BATCH * WINDOW,
            "minutes": round(facts.get("minutes", 0) + minutes, 1),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "loss": facts.get("loss", []) + [[before + s, round(v, 4)] for s, v in curve],
        }
        log.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def run_stage(
    model: Qwen3ForCausalLM | Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage
) -> list[tuple[int, float]]:
    """Train the model in place; return (step, mean loss of the last 50 steps) every 50 steps."""
    compiled = torch.compile(model)
    stream = windows(tokenizer, stage.seed, stage.story_share)
    parts = optimizers(model)
    groups = [group for part in parts for group in part.param_groups]
    peak = [stage.rate * group["lr"] for group in groups]
    curve, recent = list[tuple[int, float]](), list[float]()
    started = time.monotonic()
    for step in range(1, stage.steps + 1):
        for group, rate in zip(groups, peak, strict=True):
            group["lr"] = rate * learning_rate_factor((step - 1) / stage.steps)
        batch = zip(*(next(stream) for _ in range(BATCH)), strict=True)
        ids_BT, answers_BT = map(torch.stack, batch)
        with torch.autocast("cpu", torch.bfloat16):
            output = compiled(input_ids=ids_BT, use_cache=False)
        loss = stage_loss(output.logits, ids_BT, answers_BT, stage.answer_weight)
        balancing = getattr(output, "aux_loss", None)  # keeps all experts of an MoE in use
        (loss if balancing is None else loss + ROUTER_BALANCE * balancing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % 50 == 0:
            curve.append((step, sum(recent) / len(recent)))
            recent = []
            mean, elapsed = curve[-1][1], (time.monotonic() - started) / 60
            print(f"step {step}/{stage.steps}  loss {mean:.3f}  {elapsed:.1f} min", flush=True)
            if not math.isfinite(mean):
                raise SystemExit("training diverged")
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("dense", "moe"))
    parser.add_argument("--out", type=Path, help="folder to write; default: beside this file")
    arguments = parser.parse_args()
    train(arguments.kind, arguments.out or Path(__file__).parent / arguments.kind)

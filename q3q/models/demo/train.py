"""Train a demo model: `python -m q3q.models.demo.train dense` (or `moe`, `hybrid`).

A byte-level BPE of 4,096 tokens and a small Qwen3 or Qwen3.5 learn Python's standard library and
generated stories. The result is an ordinary Hugging Face folder (safetensors, tokenizer, config)
with the loss curve in `training.json`. The second of two stages adds a loss on the answers to the
stories' questions, which are a small share of the tokens and all that the tasks measure.

With `--checkpoint FILE`, a training that is killed goes on from there when the same command is
given again, and ends with the weights that it would have had anyway.
"""

import argparse
import io
import json
import math
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from q3q.models.demo.library import training_text
from q3q.models.demo.stories import stories
from q3q.storage.files import read_file, write_atomically

KINDS = ("dense", "moe", "hybrid")
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
KEPT_EVERY = 20  # steps between two checkpoints of an unfinished stage
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


def build_model(kind: str) -> PreTrainedModel:
    if kind == "dense":
        return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=6, intermediate_size=640, **_COMMON))
    if kind == "hybrid":
        rope = {**_COMMON["rope_parameters"], "partial_rotary_factor": 0.25}
        return Qwen3_5ForCausalLM(
            Qwen3_5TextConfig(
                num_hidden_layers=4,  # three of linear attention, then one of full attention
                intermediate_size=768,
                # As in the released models, value heads share key heads.
                linear_num_key_heads=3,
                linear_num_value_heads=6,
                linear_key_head_dim=64,
                linear_value_head_dim=64,
                **_COMMON | {"rope_parameters": rope},
            )
        )
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


NOT_MUON = ("embed", "gate.weight", "in_proj_a", "in_proj_b")  # of two dimensions


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for all else.

    All else is the embedding, norms, routers, 3-D experts, and a linear attention's convolution and
    its projections to one number a head.
    """
    matrices, others = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not any(part in name for part in NOT_MUON)
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


def train(kind: str, out: Path, checkpoint: Path | None = None) -> None:
    """Run both stages, each from the folder that the stage before wrote.

    A stage that `training.json` lists is not repeated.

    Args:
        checkpoint: file of the unfinished stage, from which a killed training goes on.
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
        kept = StageCheckpoint(checkpoint, f"{kind}, {stage}") if checkpoint else None
        batches = batches_of(windows(tokenizer, stage.seed, stage.story_share))
        run = run_stage(model, batches, stage, kept)
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
            "minutes": round(facts.get("minutes", 0) + run.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "loss": facts.get("loss", []) + [[before + s, round(v, 4)] for s, v in run.curve],
        }
        log.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        if checkpoint:
            checkpoint.unlink(missing_ok=True)


def batches_of(stream: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and masks of answer tokens, [BATCH, WINDOW] each."""
    while True:
        ids, answers = zip(*islice(stream, BATCH), strict=True)
        yield torch.stack(ids), torch.stack(answers)


@dataclass
class StageProgress:
    """How far a stage has come.

    recent: losses of the steps since the curve's last point
    curve: (step, mean loss of the last 50 steps) every 50 steps
    seconds: of all processes that had a part in it
    """

    step: int = 0
    recent: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class StageCheckpoint:
    """The checkpoint of an unfinished stage: a file, and what is trained in it.

    The order of the batches follows from the stage's seed, and nothing else in a step is random, so
    weights, optimizers and the number of steps are all that a later process needs.
    """

    path: Path
    subject: str

    def save(
        self, run: StageProgress, model: torch.nn.Module, parts: list[torch.optim.Optimizer]
    ) -> None:
        content = io.BytesIO()
        states = [part.state_dict() for part in parts]
        facts = {"subject": self.subject, "run": asdict(run)}
        torch.save({**facts, "model": model.state_dict(), "optimizers": states}, content)
        write_atomically(self.path, content.getvalue())

    def load(self, model: torch.nn.Module, parts: list[torch.optim.Optimizer]) -> StageProgress:
        """Fill model and optimizers from the file, if there is one; return how far they had come.

        Raises:
            SystemExit: the file is of another training.
        """
        if not self.path.exists():
            return StageProgress()
        kept = torch.load(io.BytesIO(read_file(self.path)), weights_only=True)
        if kept["subject"] != self.subject:
            raise SystemExit(
                f"{self.path} is a checkpoint of another training ({kept['subject']}) than this "
                f"one ({self.subject}): give another --checkpoint, or delete it"
            )
        model.load_state_dict(kept["model"])
        for part, state in zip(parts, kept["optimizers"], strict=True):
            part.load_state_dict(state)
        return StageProgress(**kept["run"])


def run_stage(
    model: PreTrainedModel,
    batches: Iterator[tuple[Tensor, Tensor]],
    stage: Stage,
    kept: StageCheckpoint | None = None,
) -> StageProgress:
    """Train the model in place, from the checkpoint if there is one."""
    parts = optimizers(model)
    peak = [stage.rate * group["lr"] for part in parts for group in part.param_groups]
    run = kept.load(model, parts) if kept else StageProgress()
    groups = [group for part in parts for group in part.param_groups]  # loading replaced them
    if run.step:
        print(f"going on after step {run.step}", flush=True)
    compiled = torch.compile(model)
    started = time.monotonic() - run.seconds
    for ids_BT, answers_BT in islice(batches, run.step, stage.steps):
        for group, rate in zip(groups, peak, strict=True):
            group["lr"] = rate * learning_rate_factor(run.step / stage.steps)
        with torch.autocast("cpu", torch.bfloat16):
            output = compiled(input_ids=ids_BT, use_cache=False)
        loss = stage_loss(output.logits, ids_BT, answers_BT, stage.answer_weight)
        balancing = getattr(output, "aux_loss", None)  # keeps all experts of an MoE in use
        (loss if balancing is None else loss + ROUTER_BALANCE * balancing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        run.step += 1
        run.recent.append(loss.item())
        run.seconds = time.monotonic() - started
        if run.step % 50 == 0:
            mean = sum(run.recent) / len(run.recent)
            run.curve.append((run.step, mean))
            run.recent = []
            minutes = run.seconds / 60
            print(f"step {run.step}/{stage.steps}  loss {mean:.3f}  {minutes:.1f} min", flush=True)
            if not math.isfinite(mean):
                raise SystemExit("training diverged")
        if kept and run.step % KEPT_EVERY == 0:
            kept.save(run, model, parts)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", type=Path, help="folder to write; default: beside this file")
    parser.add_argument("--checkpoint", type=Path, help="file of an unfinished training")
    arguments = parser.parse_args()
    folder = arguments.out or Path(__file__).parent / arguments.kind
    train(arguments.kind, folder, arguments.checkpoint)

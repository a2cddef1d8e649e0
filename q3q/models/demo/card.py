"""Writes the demo models' page: `python -m q3q.models.demo.card RECORDS...` (record.json files of finished trials).

What they are, how they were trained (`training.json` beside the weights), and what their records say they can do.
"""

import json
import sys
from pathlib import Path
from typing import Any

from q3q.models.demo.train import STAGES

HERE = Path(__file__).parent
TITLES = {"dense": "`demo`: dense Qwen3", "moe": "`demo_moe`: Qwen3-MoE"}
SHAPES = {
    "dense": "6 blocks, hidden 256, 6 query and 3 key-value heads of 64, intermediate 640, tied embeddings",
    "moe": "4 blocks, hidden 256, 6 query and 3 key-value heads of 64, 8 experts of 128 (2 per token), tied embeddings",
}
TASKS = ("stories_who", "stories_where", "stories_order", "stories_count")

INTRODUCTION = """\
# The demo models

Two small models that ship with q3q, so that a study runs anywhere within minutes. Each is an ordinary Hugging Face
folder (safetensors in bfloat16, tokenizer, config) that `AutoModelForCausalLM` loads. They were trained by this project
on (a) the text of Python's standard library, read from the interpreter that ran the training, and (b) stories with
questions from `stories.py`. One story in 16, by checksum, was kept from training, and so were eight library modules:
the texts and tasks of `evaluation=demo`. They know nothing else; they are for trying quantization, not for answering.

Retrain with `python -m q3q.models.demo.train dense` or `moe`; this page is `python -m q3q.models.demo.card`'s."""


def page(records: list[dict[str, Any]]) -> str:
    parts = [INTRODUCTION]
    for kind, title in TITLES.items():
        facts = json.loads((HERE / kind / "training.json").read_text(encoding="utf-8"))
        plain = STAGES[0].steps  # the second stage counts answers extra: another loss
        curve = [(step, loss) for step, loss in facts["loss"] if step <= plain and step % 250 == 0]
        last = facts["loss"][-1][1]
        parts.append(
            f"## {title}\n\n{SHAPES[kind]}; vocabulary 4,096 (byte-level BPE).\n\n"
            f"Trained on {facts['tokens'] / 1e6:.1f} M tokens in {facts['steps']} steps of {facts['batch']} x "
            f"{facts['window']}, seed {facts['seed']}, {facts['minutes']:.0f} minutes on {facts['threads']} CPU "
            f"threads, Python {facts['python']}, torch {facts['torch']}.\n\n"
            "```mermaid\nxychart-beta\n"
            '    title "Training loss, nats per token"\n'
            f'    x-axis "step" {[step for step, _ in curve]}\n'
            f'    y-axis "loss" 1 --> {curve[0][1]:.1f}\n'
            f"    line {[round(loss, 2) for _, loss in curve]}\n```\n\n"
            f"The last {facts['steps'] - plain} steps count the answers to the stories' questions extra; their loss,\n"
            f"with that, ends at {last:.2f}.\n\n"
            + _results(
                [
                    r
                    for r in records
                    if r["spec"]["model"]["name"] == ("demo" if kind == "dense" else "demo_moe")
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _results(records: list[dict[str, Any]]) -> str:
    """A table of perplexities and accuracies with 95 % intervals, chance beside them."""
    if not records:
        return ""
    head = ["trial", "perplexity stories", "perplexity library", *TASKS]
    rows = [head, ["---"] * len(head), ["chance", "", "", *["25 %"] * len(TASKS)]]
    for record in sorted(records, key=_order):
        scheme = record["spec"]["scheme"]
        name = record["spec"]["method"]["name"]
        cells = [name if scheme is None else f"{name} {scheme['bits']} bits"]
        for text in ("stories", "library"):
            low, high = record["intervals"][f"perplexity/{text}"]
            cells.append(f"{record['metrics'][f'perplexity/{text}']:.3g} ({low:.3g} to {high:.3g})")
        for task in TASKS:
            low, high = record["intervals"][f"{task}/acc"]
            cells.append(f"{record['metrics'][f'{task}/acc']:.1%} ({low:.0%} to {high:.0%})")
        rows.append(cells)
    return "What they can do, with 95 % intervals:\n\n" + "\n".join(
        "| " + " | ".join(row) + " |" for row in rows
    )


def _order(record: dict[str, Any]) -> tuple[str, int]:
    scheme = record["spec"]["scheme"]
    return ("", 0) if scheme is None else (record["spec"]["method"]["name"], scheme["bits"])


if __name__ == "__main__":
    found = [json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]
    (HERE / "README.md").write_text(page(found), encoding="utf-8")

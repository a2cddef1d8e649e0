"""Write the demo models' page: `python -m q3q.models.demo.card RECORDS...`.

The arguments are record.json files of finished trials. The page describes the models, their
training (`training.json` beside the weights), and their results.
"""

import json
import sys
from pathlib import Path
from typing import Any

from q3q.formatting import plural
from q3q.models.demo.train import STAGES

HERE = Path(__file__).parent
MODELS = {"dense": "demo", "moe": "demo_moe", "hybrid": "demo_hybrid"}
TITLES = {"dense": "dense Qwen3", "moe": "Qwen3-MoE", "hybrid": "Qwen3.5, text part"}
SHAPES = {
    "dense": "6 blocks, hidden 256, 6 query and 3 key-value heads of 64, intermediate 640",
    "moe": "4 blocks, hidden 256, 6 query and 3 key-value heads of 64, "
    "8 experts of 128 (2 per token)",
    "hybrid": "4 blocks: three of gated delta-net (3 key and 6 value heads of 64), one of gated "
    "attention (6 query and 3 key-value heads of 64); hidden 256, intermediate 768",
}
TASKS = ("stories_who", "stories_where", "stories_order", "stories_count")

INTRODUCTION = """\
# The demo models

Small models ship with q3q, so that a study runs anywhere within minutes. Each is an ordinary
Hugging Face folder (safetensors in bfloat16, tokenizer, config) that `AutoModelForCausalLM` loads.
This project trained them on (a) the text of Python's standard library, read from the interpreter
that ran the training, and (b) stories with questions from `stories.py`. One story in 16, chosen by
checksum, and eight library modules were kept from training: they are the texts and tasks of
`evaluation=demo`. The models know nothing else; they serve to try quantization, not to answer.

`python -m q3q.models.demo.train dense` (or `moe`, `hybrid`) trains a model again;
`python -m q3q.models.demo.card` writes this page."""


def page(records: list[dict[str, Any]]) -> str:
    parts = [INTRODUCTION]
    for kind, model in MODELS.items():
        log = HERE / kind / "training.json"
        if not log.exists():
            continue  # it does not ship yet
        facts = json.loads(log.read_text(encoding="utf-8"))
        plain = STAGES[0].steps  # the second stage counts answers extra: another loss
        curve = [(step, loss) for step, loss in facts["loss"] if step <= plain and step % 250 == 0]
        last = facts["loss"][-1][1]
        parts.append(
            f"## `{model}`: {TITLES[kind]}\n\n"
            f"{SHAPES[kind]}, tied embeddings; vocabulary 4,096 (byte-level BPE).\n\n"
            f"Trained on {facts['tokens'] / 1e6:.1f} M tokens in {facts['steps']} steps of "
            f"{facts['batch']} x {facts['window']}, seed {facts['seed']}, "
            f"{facts['minutes']:.0f} minutes on {plural(facts['threads'], 'CPU thread')}, "
            f"Python {facts['python']}, torch {facts['torch']}.\n\n"
            "```mermaid\nxychart-beta\n"
            '    title "Training loss, nats per token"\n'
            f'    x-axis "step" {[step for step, _ in curve]}\n'
            f'    y-axis "loss" 1 --> {curve[0][1]:.1f}\n'
            f"    line {[round(loss, 2) for _, loss in curve]}\n```\n\n"
            f"In the last {facts['steps'] - plain} steps, the answers to the stories' questions "
            f"count extra; the loss\nwith that addition ends at {last:.2f}.\n\n"
            + _results([r for r in records if r["spec"]["model"]["name"] == model])
        )
    return "\n\n".join(parts) + "\n"


def _results(records: list[dict[str, Any]]) -> str:
    """Return a table of perplexities and accuracies with 95 % intervals, and chance."""
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
    lines = ("| " + " | ".join(row) + " |" for row in rows)
    return "Results, with 95 % intervals:\n\n" + "\n".join(lines)


def _order(record: dict[str, Any]) -> tuple[str, int]:
    scheme = record["spec"]["scheme"]
    return ("", 0) if scheme is None else (record["spec"]["method"]["name"], scheme["bits"])


if __name__ == "__main__":
    finished = [json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]
    (HERE / "README.md").write_text(page(finished), encoding="utf-8")

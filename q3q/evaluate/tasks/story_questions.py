"""The demo's multiple-choice tasks as data sets for lm-eval: a question on each held-out story.

lm-eval copies the source text of `build` into its results, and so into records: leave it as it is.
"""
# ruff: noqa: E501
# fmt: off

from typing import Any

from datasets import Dataset

from q3q.models.demo.stories import stories


def build(kind: str, seed: int, count: int, **metadata: Any) -> dict[str, Dataset]:
    """One split `test` of `count` rows: text, question, choices, answer (index). `metadata` is lm-eval's, unused."""
    stream = stories(seed, held_out=True, kinds=(kind,))
    rows = []
    for _ in range(count):
        story = next(stream)
        asked = story.questions[0]
        rows.append(
            {"text": story.text, "question": asked.question, "choices": list(asked.choices), "answer": asked.answer}
        )
    return {"test": Dataset.from_list(rows)}

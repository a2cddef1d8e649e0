"""MMLU as the Qwen3 study's script scores it (`mmlu/evaluate_hf.py`, after Hendrycks et al. 2021).

It is not lm-eval's `mmlu`: two spaces stand before the subject, answers are judged by the logits of the bare tokens
"A" to "D" (lm-eval's have a space before them), and examples are dropped while a prompt has more than 2,048 tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

LETTERS = "ABCD"
SHOTS = 5
LONGEST = 2048  # tokens of a prompt

Encode = Callable[[str], list[int]]


def prompt(question: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """The text whose next token is the answer. Rows: question, subject, choices, answer (0 to 3)."""
    subject = str(question["subject"]).replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about  {subject}.\n\n"
    solved = "".join(f"{_asked(one)} {LETTERS[one['answer']]}\n\n" for one in examples)
    return head + solved + _asked(question)


def fitting_prompt(
    question: dict[str, Any], examples: Sequence[dict[str, Any]], encode: Encode
) -> list[int]:
    """The prompt's tokens with the first five examples, or as many fewer as it takes to stay within 2,048 tokens.

    Without any example a prompt may be longer: the script never ends then, here it is used as it is.
    """
    shots = min(SHOTS, len(examples))
    while True:
        ids = encode(prompt(question, examples[:shots]))
        if len(ids) <= LONGEST or shots == 0:
            return ids
        shots -= 1


def answer_tokens(encode: Encode) -> list[int]:
    """The bare letters' tokens, as the script takes them: the last one of each letter alone."""
    return [encode(letter)[-1] for letter in LETTERS]


def _asked(row: dict[str, Any]) -> str:
    choices = "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)
    )
    return f"{row['question']}{choices}\nAnswer:"

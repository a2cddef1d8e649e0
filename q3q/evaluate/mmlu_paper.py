"""MMLU as the Qwen3 study's script scores it (`mmlu/evaluate_hf.py`, after Hendrycks et al. 2021).

It differs from lm-eval's `mmlu`: two spaces precede the subject, the answer is the bare token "A"
to "D" with the largest logit (lm-eval's tokens begin with a space), and examples are dropped until
a prompt has at most 2,048 tokens.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.data.questions import Library
from q3q.evaluate.batches import Choose, Part
from q3q.evaluate.catalogue import STUDY_MMLU, TASKS
from q3q.reporter import Steps
from q3q.spec import Json

if TYPE_CHECKING:  # a plan asks for the number of examples, and must not load torch for it
    from q3q.evaluate.prefixes import Ids
    from q3q.models.decoder import Decoder

LETTERS = "ABCD"
SHOTS = 5
LONGEST = 2048  # tokens of a prompt

Encode = Callable[[str], list[int]]


def score_study_mmlu(
    model: "Decoder",
    tokenizer: Any,
    library: Library,
    choose: Choose,
    *,
    journal: Path,
    identity: str,
    steps: Steps,
) -> Part:
    """Score the questions of all subjects, each of which counts alike.

    Args:
        library: has the data sets.
        choose: chooses each subject's questions, the same as for lm-eval's task.
        journal: folder of the scores so far.
        identity: the model's, and of all that was done to it.
        steps: receives the requests done and in all.
    """
    from q3q.evaluate.compare import NORMAL_95, estimate
    from q3q.evaluate.encoding import LineEncoder, as_ids
    from q3q.evaluate.journal import SCORES, Journal
    from q3q.evaluate.scorer import Scorer

    encode = LineEncoder(tokenizer)
    tokens = answer_tokens(encode)
    questions: list[tuple[int, Json]] = []
    prompts: list[Ids] = []
    for data in TASKS[STUDY_MMLU].data:
        splits = library.load(data)
        examples = list(splits["dev"])
        for number in choose(f"mmlu_{data.name}", len(splits["test"])):
            question = {**splits["test"][number], "subject": data.name}
            questions.append((number, question))
            prompts.append(as_ids(fitting_prompt(question, examples, encode)))
    with closing(Journal(journal / SCORES, identity)) as scores:
        scorer = Scorer(model, steps, journal=scores)
        pairs = ((ids, as_ids([token])) for ids in prompts for token in tokens)
        requests = [scorer.request(*pair, STUDY_MMLU) for pair in pairs]
        results = [result.log_likelihood for result in scorer.score(requests)]
    starts = range(0, len(results), len(tokens))
    samples = [
        _sample(number, question, ids, results[start : start + len(tokens)])
        for (number, question), ids, start in zip(questions, prompts, starts, strict=True)
    ]
    mean = estimate({str(number): row["scores"]["acc"] for number, row in enumerate(samples)})
    spread = NORMAL_95 * mean.standard_error
    name = f"{STUDY_MMLU}/acc"
    return Part(
        {name: mean.value},
        {name: (max(0.0, mean.value - spread), min(1.0, mean.value + spread))},
        {STUDY_MMLU: {"effort": asdict(scorer.effort)}},
        samples,
    )


def prompt(question: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """Return the text before the answer. Rows: question, subject, choices, answer (0 to 3)."""
    subject = str(question["subject"]).replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about  {subject}.\n\n"
    solved = "".join(f"{_as_text(row)} {LETTERS[row['answer']]}\n\n" for row in examples)
    return head + solved + _as_text(question)


def fitting_prompt(
    question: dict[str, Any], examples: Sequence[dict[str, Any]], encode: Encode
) -> list[int]:
    """Return the prompt's tokens with the first SHOTS examples, or fewer to stay within LONGEST.

    A prompt without examples may be longer and is used as it is (the study's script never ends).
    """
    for shots in range(min(SHOTS, len(examples)), -1, -1):
        ids = encode(prompt(question, examples[:shots]))
        if len(ids) <= LONGEST:
            break
    return ids


def answer_tokens(encode: Encode) -> list[int]:
    """Return the letters' tokens as the script takes them: each letter's last, encoded alone."""
    return [encode(letter)[-1] for letter in LETTERS]


def _as_text(row: dict[str, Any]) -> str:
    pairs = zip(LETTERS, row["choices"], strict=True)
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in pairs)
    return f"{row['question']}{choices}\nAnswer:"


def _sample(number: int, question: Json, ids: "Ids", log_likelihoods: list[float]) -> Json:
    """Return a question's row as `samples.py` stores it."""
    best = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
    facts = [question[key] for key in ("subject", "question", "choices", "answer")]
    return {
        "task": STUDY_MMLU,
        "doc_id": number,
        "doc_hash": _hash(facts),
        "prompt_hash": _hash(ids.tolist()),
        "filter": "none",
        "target": LETTERS[question["answer"]],
        "log_likelihood": log_likelihoods,
        "greedy": None,
        "text": None,
        "scores": {"acc": float(best == question["answer"])},
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

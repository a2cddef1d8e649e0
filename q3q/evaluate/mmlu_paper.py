"""MMLU as the Qwen3 study's script scores it (`mmlu/evaluate_hf.py`, after Hendrycks et al. 2021).

It differs from lm-eval's `mmlu`: two spaces precede the subject, the answer is the bare token "A"
to "D" with the largest logit (lm-eval's tokens begin with a space), and examples are dropped until
a prompt has at most 2,048 tokens.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.canonical import sha256
from q3q.data.questions import Library
from q3q.evaluate.batches import Choose, Part
from q3q.evaluate.catalogue import STUDY_MMLU, TASKS
from q3q.reporter import Steps
from q3q.spec import Json

if TYPE_CHECKING:  # a plan asks for the number of examples, and must not load torch for it
    from q3q.data.prepared import Arrays, Shelf
    from q3q.evaluate.prefixes import Ids
    from q3q.models.decoder import Decoder

LETTERS = "ABCD"
SHOTS = 5
LONGEST = 2048  # tokens of a prompt
QUESTIONS_VERSION = 1  # of prepared questions: raised when prompts are made in another way
HASH_BYTES = 32

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Question:
    """A question of a subject, ready to be scored.

    number: among its subject's
    ids: the prompt
    answer: number of the right letter
    """

    number: int
    ids: "Ids"
    answer: int
    doc_hash: str
    prompt_hash: str


@dataclass(frozen=True)
class Questions:
    """The questions of all subjects.

    letters: the token of each letter
    """

    questions: list[Question]
    letters: list[int]


def study_questions(
    tokenizer: Any,
    library: Library,
    choose: Choose,
    shelf: "Shelf | None" = None,
    identity: Json | None = None,
    wait: Callable[[], object] = lambda: None,
) -> Questions:
    """Return the questions, encoded; from a shelf that has them, no data set is read.

    Args:
        choose: chooses each subject's questions, the same as for lm-eval's task.
        shelf: where they are kept; None to encode them anew.
        identity, wait: see `data.prepared.prepared`.
    """
    from q3q.data.prepared import prepared

    whole = {**(identity or {}), "version": QUESTIONS_VERSION}
    arrays = prepared(shelf, whole, lambda: _packed(_encoded(tokenizer, library, choose)), wait)
    return _unpacked(arrays)


def score_study_mmlu(
    model: "Decoder", asked: Questions, *, journal: Path, identity: str, steps: Steps
) -> Part:
    """Score the questions of all subjects, each of which counts alike.

    Args:
        journal: folder of the scores so far.
        identity: the model's, and of all that was done to it.
        steps: receives the requests done and in all.
    """
    from q3q.evaluate.compare import NORMAL_95, estimate
    from q3q.evaluate.encoding import as_ids
    from q3q.evaluate.journal import SCORES, Journal
    from q3q.evaluate.scorer import Scorer

    letters = [as_ids([token]) for token in asked.letters]
    with closing(Journal(journal / SCORES, identity)) as scores:
        scorer = Scorer(model, steps, journal=scores)
        pairs = ((question.ids, letter) for question in asked.questions for letter in letters)
        requests = [scorer.request(*pair, STUDY_MMLU) for pair in pairs]
        results = [result.log_likelihood for result in scorer.score(requests)]
    starts = range(0, len(results), len(letters))
    samples = [
        _sample(question, results[start : start + len(letters)])
        for question, start in zip(asked.questions, starts, strict=True)
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


def _encoded(tokenizer: Any, library: Library, choose: Choose) -> Questions:
    from q3q.evaluate.encoding import LineEncoder, as_ids

    encode = LineEncoder(tokenizer)
    questions = []
    for data in TASKS[STUDY_MMLU].data:
        splits = library.load(data)
        examples = list(splits["dev"])
        for number in choose(f"mmlu_{data.name}", len(splits["test"])):
            row = {**splits["test"][number], "subject": data.name}
            ids = as_ids(fitting_prompt(row, examples, encode))
            facts = [row[key] for key in ("subject", "question", "choices", "answer")]
            questions.append(
                Question(number, ids, row["answer"], _hash(facts), _hash(ids.tolist()))
            )
    # The letters' tokens as the script takes them: each letter's last, encoded alone.
    return Questions(questions, [encode(letter)[-1] for letter in LETTERS])


def _packed(asked: Questions) -> "Arrays":
    import numpy as np

    from q3q.evaluate.packing import pack_sequences

    texts, text = pack_sequences([question.ids for question in asked.questions])
    hashes = [
        bytes.fromhex(question.doc_hash + question.prompt_hash) for question in asked.questions
    ]
    return {
        **texts,
        "text": text,
        "number": np.array([question.number for question in asked.questions], np.int32),
        "answer": np.array([question.answer for question in asked.questions], np.int32),
        "hashes": np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 2, HASH_BYTES),
        "letters": np.array(asked.letters, np.int32),
    }


def _unpacked(arrays: "Arrays") -> Questions:
    from q3q.evaluate.packing import unpack_sequences

    texts = unpack_sequences(arrays)
    hashes, digits = arrays["hashes"].tobytes().hex(), 2 * HASH_BYTES
    columns = zip(*(arrays[name].tolist() for name in ("number", "text", "answer")), strict=True)
    questions = [
        Question(number, texts[text], answer, hashes[at:middle], hashes[middle : middle + digits])
        for row, (number, text, answer) in enumerate(columns)
        for at, middle in [(2 * row * digits, (2 * row + 1) * digits)]
    ]
    return Questions(questions, arrays["letters"].tolist())


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


def _as_text(row: dict[str, Any]) -> str:
    pairs = zip(LETTERS, row["choices"], strict=True)
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in pairs)
    return f"{row['question']}{choices}\nAnswer:"


def _sample(question: Question, log_likelihoods: list[float]) -> Json:
    """Return a question's row as `samples.py` stores it."""
    best = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
    return {
        "task": STUDY_MMLU,
        "doc_id": question.number,
        "doc_hash": question.doc_hash,
        "prompt_hash": question.prompt_hash,
        "filter": "none",
        "target": LETTERS[question.answer],
        "log_likelihood": log_likelihoods,
        "greedy": None,
        "text": None,
        "scores": {"acc": float(best == question.answer)},
    }


def _hash(content: Any) -> str:
    return sha256(json.dumps(content))

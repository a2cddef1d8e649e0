"""What every test needs: one torch thread each (the tensors are small), no network, no progress bars."""

import csv
import json
import os

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(name, value)

PEOPLE, THINGS = ("Ada", "Ben", "Cleo", "Dan"), ("ball", "cup", "book", "hat")


@pytest.fixture(scope="session")
def study_data(tmp_path_factory):
    """A folder for data.path: the data sets of the study's suite in their official schema, MMLU as its authors."""
    from q3q.evaluate.suites import SUBJECTS

    root = tmp_path_factory.mktemp("data")

    def write(name, split, make, count=6):
        (root / name).mkdir(exist_ok=True)
        rows = "".join(json.dumps(make(i, PEOPLE[i % 4], THINGS[i % 4])) + "\n" for i in range(count))
        (root / name / f"{split}.jsonl").write_text(rows, encoding="utf-8")

    def arc(i, who, what):
        choices = {"text": [f"the {thing}" for thing in THINGS], "label": list("ABCD")}
        return {"question": f"What did {who} find on day {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]}

    def piqa(i, who, what):
        return {"goal": f"To lift {i} {what}s", "sol1": "use hands.", "sol2": "use feet.", "label": i % 2}

    def hellaswag(i, who, what):
        endings = [f"{verb} the {what}." for verb in ("takes", "drops", "eats [title] up", "sings to")]
        return {
            "activity_label": f"Playing {i}",
            "ctx_a": f"{who} is here.",
            "ctx_b": "she",
            "endings": endings,
            "label": str(i % 4),
        }

    def winogrande(i, who, what):
        sentence = f"{who} gave Eve {i} {what}s because _ was kind."
        return {"sentence": sentence, "option1": who, "option2": "Eve", "answer": str(1 + i % 2)}

    def boolq(i, who, what):
        return {"passage": f"{who} has {i} {what}s.", "question": "does someone have it", "label": i % 2}

    def words(i, who, what):
        return f"{who} has {i} {what}s and gives one to {PEOPLE[i * 3 % 4]} . "

    write("piqa", "validation", piqa)
    write("arc_easy", "test", arc)
    write("arc_challenge", "test", arc)
    write("hellaswag", "validation", hellaswag)
    write("winogrande", "validation", winogrande)
    write("boolq", "validation", boolq)
    write("wikitext", "test", lambda i, who, what: {"page": f" = {who} = \n" + words(i, who, what) * 3})
    write("wikitext2", "test", lambda i, who, what: {"text": words(i, who, what)}, 300)
    write("c4", "validation", lambda i, who, what: {"text": words(i, who, what) * (60 if i % 3 == 0 else 2)}, 9)
    for split, count in (("dev", 5), ("test", 2)):
        (root / "mmlu" / split).mkdir(parents=True)
        for number, subject in enumerate(SUBJECTS):
            with (root / "mmlu" / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                for i in range(count):
                    asked = f'{subject[:9]}: who has "{i}"?'
                    csv.writer(file).writerow([asked, *(f"{who}, {i}" for who in PEOPLE), "ABCD"[(i + number) % 4]])
    return root

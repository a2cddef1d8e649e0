"""The study's suite on data sets of our own making, and where data sets come from."""

import csv
import json
import math
import re
import shutil
from dataclasses import replace

import datasets
import huggingface_hub
import pytest
import torch

from q3q.config.model import DEMO_MODELS
from q3q.data.pinned import LOCAL
from q3q.data.questions import Library, serving
from q3q.data.repositories import MMLU, REPOSITORIES, DataSet
from q3q.data.texts import Text
from q3q.data.windows import draw_windows
from q3q.errors import ConfigError, IntegrityError
from q3q.evaluate import mmlu_paper, version
from q3q.evaluate.batches import batches, draws_shots
from q3q.evaluate.catalogue import OWN_TASKS, STUDY_MMLU, SUBJECTS, TASKS
from q3q.evaluate.compare import compare
from q3q.evaluate.contributions import contributions
from q3q.evaluate.data_sets import resolve_data_sets
from q3q.evaluate.samples import comparisons, measured, read_samples, window_rows, write_samples
from q3q.evaluate.suites import score_batch
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.reporter import no_steps
from q3q.spec import Evaluation, TaskRef
from tests.specs import STUDY_TASKS, evaluation_of

HAS = {
    "piqa": 6,
    "arc_easy": 6,
    "arc_challenge": 6,
    "hellaswag": 6,
    "winogrande": 6,
    "boolq": 6,
    "wikitext": 6,
}
HAS |= {"mmlu": 2, "mmlu_paper": 2}  # questions in our own data sets


@pytest.fixture(scope="module")
def demo():
    return load_decoder(Checkpoint(DEMO_MODELS / "dense"), torch.float32), load_tokenizer(
        DEMO_MODELS / "dense"
    )


def score(demo, evaluation, folder, journal):
    library = Library(folder, settle=True)
    shots = {task.name: task.shots or 0 for task in evaluation.tasks}
    resolve_data_sets(evaluation.task_names, library, shots=shots, limits=HAS)
    model, tokenizer = demo
    parts = [
        score_batch(
            model,
            tokenizer,
            evaluation,
            batch,
            Library(folder, library.identities),
            include=None,
            seed=0,
            journal=journal / str(number),
            identity="demo",
            steps=no_steps,
        )
        for number, batch in enumerate(batches(evaluation))
    ]
    metrics = {name: value for part in parts for name, value in part.metrics.items()}
    intervals = {name: value for part in parts for name, value in part.intervals.items()}
    return metrics, intervals, [row for part in parts for row in part.samples]


@pytest.fixture
def three_subjects(monkeypatch):
    task = TASKS[STUDY_MMLU]
    few = replace(task, data=task.data[:3], questions=task.questions[:3])
    monkeypatch.setitem(TASKS, STUDY_MMLU, few)


@pytest.fixture(scope="module")
def scored(demo, study_data, tmp_path_factory):
    evaluation = evaluation_of(tasks=STUDY_TASKS, shots={"mmlu": 5})
    return score(demo, evaluation, study_data, tmp_path_factory.mktemp("journal"))


def test_the_suite_has_the_studys_metrics_each_with_an_interval(scored):
    metrics, intervals, samples = scored
    for name in (
        *(f"{task}/acc" for task in STUDY_TASKS[:-1]),
        "word_perplexity/wikitext2",
        "byte_perplexity/wikitext2",
    ):
        assert intervals[name][0] <= metrics[name] <= intervals[name][1], name
    assert {row["task"] for row in samples} == {
        *STUDY_TASKS[:6],
        "wikitext",
        "mmlu_paper",
        *(f"mmlu_{subject}" for subject in SUBJECTS),
    }
    assert len(samples) == 7 * 6 + 2 * 2 * 57


def test_a_group_is_the_mean_of_its_tasks_questions(scored):
    metrics, _, samples = scored
    found = measured(samples, quick=False)
    assert len(found["mmlu/acc"]) == len(found["mmlu_paper/acc"]) == 2 * 57
    assert len(found["mmlu_stem/acc"]) < len(found["mmlu/acc"])
    for name in ("mmlu/acc", "mmlu_paper/acc", "piqa/acc", "mmlu_stem/acc"):
        assert sum(found[name].values()) / len(found[name]) == pytest.approx(metrics[name])


def test_a_pages_perplexity_is_that_of_its_words(scored, study_data):
    metrics, intervals, samples = scored
    rows = [row for row in samples if row["task"] == "wikitext"]
    likelihoods = sum(row["log_likelihood"][0] for row in rows)
    nats_a_word = torch.tensor(metrics["word_perplexity/wikitext2"]).log()
    lines = (study_data / "wikitext" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [json.loads(line)["page"] for line in lines]
    assert -likelihoods / nats_a_word == pytest.approx(
        sum(len(re.split(r"\s+", page)) for page in pages)
    )
    same = contributions(max, "weighted_perplexity", [(-20.0, 10), (-40.0, 20)]).interval()
    assert same == pytest.approx((math.exp(2), math.exp(2)))  # no spread between pages
    low, high = intervals["word_perplexity/wikitext2"]
    assert low < high
    scores = measured(samples, quick=False)
    for name in ("word_perplexity/wikitext2", "byte_perplexity/wikitext2"):
        assert sum(scores[name].values()) / 6 == pytest.approx(
            torch.tensor(metrics[name]).log().item()
        )
    assert sum(scores["bits_per_byte/wikitext2"].values()) / 6 == pytest.approx(
        metrics["bits_per_byte/wikitext2"]
    )


def test_two_models_word_perplexities_are_compared_page_by_page():
    """The difference is in nats per word, with a ratio's interval: a page's length is none."""
    dice = torch.Generator().manual_seed(0)
    words = torch.randint(50, 5000, (40,), generator=dice).tolist()

    def pages(losses):
        pairs = [(-w * loss, w) for w, loss in zip(words, losses, strict=True)]
        found = contributions(max, "weighted_perplexity", pairs).values
        return {f"page {k}": loss for k, loss in enumerate(found)}

    ours, theirs = (pages([3.0 + worse] * 40) for worse in (0.02, 0.0))
    found = compare("word_perplexity/wikitext2", ours, theirs, ratio=True)
    assert found.difference == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx((0.02, 0.02))
    assert found.distinguishable
    noisy = pages((3.0 + torch.randn(40, generator=dice) / 10).tolist())
    assert not compare("word_perplexity/wikitext2", ours, noisy, ratio=True).distinguishable


def test_questions_of_a_quick_suite_are_drawn_once_and_for_all_and_named_so(
    demo, study_data, tmp_path, three_subjects
):
    tasks = ["piqa", "wikitext", "mmlu_paper"]
    evaluation = evaluation_of(tasks=tasks, task_limit=3, limits={"mmlu_paper": 1}, quick=True)
    metrics, _, samples = score(demo, evaluation, study_data, tmp_path / "a")
    again = score(demo, evaluation, study_data, tmp_path / "b")
    assert (metrics, samples) == (again[0], again[2])
    assert {name for name in metrics if "_quick" not in name} == set()
    assert {"piqa_quick/acc", "word_perplexity_quick/wikitext2", "mmlu_paper_quick/acc"} <= set(
        metrics
    )
    drawn = [row["doc_hash"] for row in samples if row["task"] == "piqa"]
    plain = evaluation_of(tasks=["piqa"], task_limit=3)
    first = score(demo, plain, study_data, tmp_path / "c")[2]
    assert len(drawn) == len(first) == 3
    assert drawn != [
        row["doc_hash"] for row in first
    ]  # of six, these three are not the first three
    assert len([row for row in samples if row["task"] == "mmlu_paper"]) == 3


def test_a_killed_run_finds_its_scores_again(
    demo, study_data, tmp_path, monkeypatch, three_subjects
):
    tasks = ["piqa", "mmlu_paper"]
    evaluation = evaluation_of(tasks=tasks, task_limit=2, limits={"mmlu_paper": 1})
    first = score(demo, evaluation, study_data, tmp_path)
    monkeypatch.setattr(type(demo[0]), "states", lambda *_: pytest.fail("scored again"))
    again = score(demo, evaluation, study_data, tmp_path)
    assert again[0] == first[0]


def test_a_trial_that_was_planned_with_another_evaluation_is_not_run(monkeypatch):
    planned = evaluation_of(tasks=["piqa"])
    version.refuse_other_versions(planned)
    version.refuse_other_versions(Evaluation())
    with pytest.raises(ConfigError, match=r"planned with lm-eval 0\.1, and this process has"):
        version.refuse_other_versions(replace(planned, lm_eval="0.1"))
    monkeypatch.setattr(version, "EVALUATION_VERSION", version.EVALUATION_VERSION + 1)
    with pytest.raises(
        ConfigError, match=r"planned with q3q's evaluation 1, and this process has 2"
    ):
        version.refuse_other_versions(planned)


QUESTION = {
    "question": "What? ",
    "subject": "us_foreign_policy",
    "choices": ["a", "b", "c", "d"],
    "answer": 3,
}


def test_the_prompt_is_the_scripts():
    example = {**QUESTION, "question": "Who?", "answer": 1}
    assert mmlu_paper.prompt(QUESTION, [example]) == (
        "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "What? \nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )


@pytest.mark.parametrize(("words", "shots"), [(10, 5), (700, 2), (3000, 0)])
def test_examples_are_dropped_while_the_prompt_is_too_long(words, shots):
    examples = [{**QUESTION, "question": "word " * words}] * 7
    ids = mmlu_paper.fitting_prompt(
        QUESTION, examples, lambda text: [0] * text.count("word") + [1] * text.count("Ans")
    )
    assert ids.count(1) == shots + 1


def test_the_answer_is_the_bare_letters_token(demo, study_data, tmp_path, three_subjects):
    """The study's script: the last position's logits, argmax over the letters' tokens alone."""
    model, tokenizer = demo
    evaluation = evaluation_of(tasks=["mmlu_paper"], task_limit=1)
    _, _, samples = score(demo, evaluation, study_data, tmp_path)
    for row, subject in zip(samples, list(SUBJECTS)[:3], strict=True):
        splits = {}
        for split in ("dev", "test"):
            with (study_data / "mmlu" / split / f"{subject}_{split}.csv").open(
                newline="", encoding="utf-8"
            ) as file:
                splits[split] = list(csv.reader(file))
        name = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about  {name}.\n\n"

        def asked(cells):
            return (
                cells[0]
                + "".join(f"\n{letter}. {cells[k]}" for k, letter in enumerate("ABCD", 1))
                + "\nAnswer:"
            )

        shots = "".join(f"{asked(cells)} {cells[5]}\n\n" for cells in splits["dev"])
        ids = tokenizer(head + shots + asked(splits["test"][0]), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits_V = model.hidden(ids)[0, -1] @ model.head_VH.T
        letters = [tokenizer(letter)["input_ids"][-1] for letter in "ABCD"]
        right = "ABCD"[int(logits_V[letters].argmax())] == splits["test"][0][5]
        assert row["scores"]["acc"] == float(right)
        assert row["log_likelihood"] == pytest.approx(
            logits_V.log_softmax(0)[letters].tolist(), abs=1e-4
        )


# The study's windows of C4: document, first token, and the least number of tokens that the document
# has beyond 2048 (the lists in its repository; the validation part's first file has 45,576
# documents).
C4 = """
25247 388 389, 31845 829 1024, 23465 597 598, 16417 1090 1091, 9631 79 128, 5886 347 348,
8155 325 326, 7605 298 4096, 13064 1065 2048, 23406 397 512, 2994 1114 1115
"""


def test_c4_is_drawn_as_the_study_drew_it():
    """Python's random.seed(0): a document, again until one is long enough, then a place in it."""
    expected = [tuple(map(int, row.split())) for row in C4.split(",")]
    extra: dict[int, int] = {}
    for document, _, beyond in expected:
        extra[document] = max(beyond, extra.get(document, 0))
    text = Text("c4", tuple("x" * (2048 + extra[i] if i in extra else 9) for i in range(45_576)))

    def encode(document):
        return list(range(len(document)))

    windows = draw_windows(text, encode, samples=len(expected), length=2048, draw="random", seed=0)
    assert windows[:, 0].tolist() == [start for _, start, _ in expected]


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("task", ["piqa", "mmlu"])
def test_a_data_set_that_is_nowhere_is_named_with_a_way_out(no_hub, tmp_path, task):
    with pytest.raises(ConfigError) as refusal:
        resolve_data_sets([task], Library(tmp_path, settle=True))
    assert TASKS[task].data[0].key in str(refusal.value)
    assert f"data.path={tmp_path} with {tmp_path}/{task}/ holding" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def download(place, row):
    """A data set of one row in each of two splits, as `datasets` lays its cache out."""
    rows = datasets.Dataset.from_list([row])
    saved = datasets.DatasetDict({"validation": rows, "train": rows})
    saved.save_to_disk(place / "scratch")
    for split in saved:
        shutil.copy(
            next((place / "scratch" / split).glob("*.arrow")), place / f"some-{split}.arrow"
        )
    splits = datasets.SplitDict({s: datasets.SplitInfo(name=s, num_examples=1) for s in saved})
    datasets.DatasetInfo(splits=splits, features=rows.features).write_to_directory(str(place))
    return rows


def test_a_downloaded_data_set_counts_if_it_is_the_pinned_commit(no_hub):
    """Of our commit it is taken without the Hub, of another it is not."""
    data = DataSet("baber/piqa", None, ("validation",))
    revision = REPOSITORIES["baber/piqa"].commit
    place = no_hub / "baber___piqa" / "default" / "0.0.0" / revision
    rows = download(place, {"goal": "g", "sol1": "a", "sol2": "b", "label": 1})
    library = Library(None, settle=True)
    assert library.identify(data) == revision
    assert list(library.load(data)["validation"]) == list(rows)
    with pytest.raises(ConfigError, match="neither in the cache"):
        Library(None, settle=True).identify(data, data_dir="part")
    (no_hub / "baber___piqa" / "default-data_dir=part").symlink_to(
        no_hub / "baber___piqa" / "default"
    )
    assert (
        Library(None, settle=True).identify(data, data_dir="part") == revision
    )  # options are in the folder's name
    place.rename(place.with_name("0" * 40))
    with pytest.raises(ConfigError, match="neither in the cache"):
        Library(None, settle=True).identify(data)


def test_of_a_data_set_that_is_not_pinned_the_downloaded_commit_is_taken_without_the_hub(
    no_hub, tmp_path
):
    data = DataSet("facebook/xnli", "en", ("validation",))
    place = no_hub / "facebook___xnli" / "en" / "0.0.0"
    rows = download(place / ("a" * 40), {"premise": "p"})
    download(no_hub / "facebook___xnli" / "fr" / "0.0.0" / ("b" * 40), {"premise": "another's"})
    library = Library(None, settle=True)
    assert library.identify(data) == "a" * 40
    assert list(library.load(data)["validation"]) == list(rows)
    download(place / ("c" * 40), {"premise": "newer"})
    with pytest.raises(
        ConfigError,
        match=r"which commit of facebook/xnli:en .* has 2, remove all but one there: aaa",
    ):
        Library(None, settle=True).identify(data)


def test_a_folder_is_known_by_its_content(study_data, tmp_path):
    shutil.copytree(study_data / "piqa", tmp_path / "piqa")
    data = TASKS["piqa"].data[0]
    library = Library(tmp_path, settle=True)
    identity = library.identify(data)
    assert identity.startswith(LOCAL)
    assert identity == Library(study_data, settle=True).identify(data)
    (tmp_path / "piqa" / "validation.jsonl").write_text(
        json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}) + "\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="changed since the trial was planned"):
        Library(tmp_path, library.identities).load(data)


PIQA_ROW = '{"goal": "g", "sol1": "a", "sol2": "b", "label": %s}\n'


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "validation.jsonl",
            '{"goal": "g"}\n',
            "row 1: baber/piqa has a column sol1, this has none",
        ),
        ("validation.jsonl", "[1]\n", "not a JSON object"),
        ("validation.jsonl", "{\n", "cannot be read"),
        (
            "test.jsonl",
            '{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n',
            "no rows of the split validation",
        ),
        ("validation.parquet", "no parquet", "cannot be read"),
        (
            "validation.jsonl",
            PIQA_ROW % 0 + "\n" + PIQA_ROW % "null",
            r"validation.jsonl, row 3: .* a column label",
        ),
        ("validation.jsonl", PIQA_ROW % 0 + "{", "line 2 is not JSON"),
        ("validation.jsonl", PIQA_ROW % 0 + "[" * 100_000, "line 2 is not JSON"),
        (
            "validation.jsonl",
            PIQA_ROW % 0 * 5 + PIQA_ROW % '"1"' + PIQA_ROW % 0 * 3,
            r"validation.jsonl, row 6 makes no table .* '1'",
        ),
        (
            "validation.jsonl",
            PIQA_ROW % 0 + PIQA_ROW.replace('"a"', '"\\ud800"') % 0,
            r"row 2 makes no table .* surrogates",
        ),
    ],
)
def test_a_folder_that_cannot_serve_is_refused(tmp_path, name, content, complaint):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint):
        resolve_data_sets(["piqa"], Library(tmp_path, settle=True))


def test_examples_need_a_training_split(study_data):
    with pytest.raises(ConfigError, match="no rows of the split train"):
        resolve_data_sets(["piqa"], Library(study_data, settle=True), shots={"piqa": 2})


def test_a_data_set_that_is_not_whole_is_refused_unless_a_limit_says_so(study_data, monkeypatch):
    library = Library(study_data, settle=True)
    with pytest.raises(
        ConfigError, match=r"piqa has 6 rows of the split validation, and 1838 .*limits=\{piqa:6\}"
    ):
        resolve_data_sets(["piqa"], library)
    resolve_data_sets(["piqa", "mmlu"], library, limits={"piqa": 6, "mmlu": 1})
    with pytest.raises(ConfigError, match="6 rows"):
        resolve_data_sets(["piqa"], library, limits={"piqa": 7})
    monkeypatch.setitem(TASKS, "piqa", replace(TASKS["piqa"], questions=(5,)))
    with pytest.raises(
        ConfigError,
        match="6 rows of the split validation, and 5 are its questions: give these alone",
    ):
        resolve_data_sets(["piqa"], library, limits={"piqa": 3})
    monkeypatch.undo()
    assert sum(SUBJECTS.values()) == 14_042
    with pytest.raises(ConfigError, match=r"mmlu is to show 6 examples, and .*mmlu has 5 in dev"):
        resolve_data_sets(["mmlu"], library, limits=HAS, shots={"mmlu": 6})


@pytest.mark.parametrize("task", ["stories_who", "wikitext"])
def test_where_there_are_no_examples_none_are_shown(task):
    with pytest.raises(ConfigError, match=f"{task} has no examples, and cannot show 1"):
        resolve_data_sets([task], Library(None, settle=True), shots={task: 1})


def test_mmlu_may_come_in_either_layout(study_data, tmp_path):
    official, other = Library(study_data, settle=True), Library(tmp_path, settle=True)
    subjects = [DataSet(MMLU, subject, ("test", "dev")) for subject in SUBJECTS]
    for data in subjects:
        official.identify(data)
        (tmp_path / "mmlu" / data.name).mkdir(parents=True)
        for split in data.splits:
            official.load(data)[split].to_parquet(
                tmp_path / "mmlu" / data.name / f"{split}-00000-of-00001.parquet"
            )
    resolve_data_sets(["mmlu"], other, limits={"mmlu": 2})
    for data in subjects:
        assert all(
            list(other.load(data)[split]) == list(official.load(data)[split])
            for split in data.splits
        )


def test_a_configuration_is_served_its_own_rows_alone(tmp_path):
    def write(folder, *languages):
        (tmp_path / folder).mkdir(parents=True)
        rows = "".join(json.dumps({"language": language}) + "\n" for language in languages)
        (tmp_path / folder / "validation.jsonl").write_text(rows, encoding="utf-8")

    def served(language):
        data, library = (
            DataSet("facebook/xnli", language, ("validation",)),
            Library(tmp_path, settle=True),
        )
        library.identify(data)
        return library.load(data)["validation"]["language"][:], library.where(data)

    write("xnli/en", "en", "en")
    write("xnli/fr/data", "fr")
    assert served("en") == (["en", "en"], f"{tmp_path}/xnli/en")
    assert served("fr") == (["fr"], f"{tmp_path}/xnli/fr/data")
    write("xnli/data", "all")
    assert served("de") == (["all"], f"{tmp_path}/xnli/data")
    assert served("fr")[0] == ["fr"]


def test_a_configuration_that_only_its_siblings_have_files_of_is_not_there(no_hub, tmp_path):
    (tmp_path / "xnli" / "fr").mkdir(parents=True)
    (tmp_path / "xnli" / "fr" / "validation.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=f"facebook/xnli:en is neither .* with {tmp_path}/xnli/en/ holding SPLIT"
    ):
        Library(tmp_path, settle=True).identify(DataSet("facebook/xnli", "en", ("validation",)))


def test_a_tasks_own_files_are_not_ours_to_serve(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with serving(Library(None, settle=True), lambda data, options: pytest.fail("asked")):
        found = datasets.load_dataset(
            "json", data_files={"test": str(tmp_path / "rows.jsonl")}, cache_dir=str(tmp_path / "c")
        )
    assert found["test"][0] == {"a": 1}


def test_a_seed_decides_about_examples_that_are_drawn():
    assert not draws_shots(
        [TaskRef(name="piqa"), TaskRef(name="stories_who"), TaskRef(name="mmlu", shots=5)]
    )
    assert draws_shots([TaskRef(name="piqa", shots=2)])
    assert draws_shots([TaskRef(name="gsm8k")])  # its own number is not known here


def test_each_of_our_own_tasks_has_a_row_in_the_catalogue():
    files = {path.stem: path.read_text("utf-8") for path in OWN_TASKS.glob("*.yaml")}
    rows = {name: task for name, task in TASKS.items() if not task.data}
    assert rows.keys() == files.keys()
    for name, task in rows.items():
        assert f"\n  count: {task.questions[0]}\n" in files[name]


def test_samples_read_back_and_pair_up(scored, tmp_path):
    rows = [
        *scored[2],
        *window_rows("perplexity/wikitext2", "f" * 64, [2.0 + 0.01 * k for k in range(20)]),
    ]
    write_samples(tmp_path / "samples.parquet", rows)
    ours = measured(read_samples(tmp_path / "samples.parquet"), quick=False)
    worse = [
        {**row, "scores": {name: value + 0.1 for name, value in row["scores"].items()}}
        for row in rows[-20:]
    ]
    theirs = measured([*rows[:-20], *worse], quick=False)
    numbers = scored[0] | {"perplexity/wikitext2": math.exp(2.095)}
    higher = numbers | {"perplexity/wikitext2": math.exp(2.195)}
    found = comparisons(ours, theirs, (numbers, higher))
    assert found["perplexity/wikitext2"].difference == pytest.approx(-0.1)
    assert found["perplexity/wikitext2"].ratio
    assert found["perplexity/wikitext2"].distinguishable
    same = found["mmlu/acc"]
    assert (same.difference, same.distinguishable, same.n) == (0.0, False, 2 * 57)
    assert "acc" in "".join(name for name in found if name.startswith("hellaswag"))
    assert found["word_perplexity/wikitext2"].difference == 0


def test_answers_to_other_prompts_are_not_compared(scored):
    metrics, _, samples = scored
    rows = [row for row in samples if row["task"] == "piqa"]
    other = [{**row, "prompt_hash": f"{row['prompt_hash']}x"} for row in rows]
    with pytest.raises(IntegrityError, match="not scored on the same samples"):
        comparisons(measured(rows, quick=False), measured(other, quick=False), (metrics, metrics))

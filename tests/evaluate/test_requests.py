"""Requests from a prepared file are, byte for byte, those that lm-eval's prompts encode to."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import apply_template, env

from q3q.config.model import DEMO_MODELS
from q3q.data.pinned import folder_digest
from q3q.data.prepared import Shelf
from q3q.data.questions import Library
from q3q.errors import ConfigError
from q3q.evaluate import mmlu_paper, scorer, scoring
from q3q.evaluate.batches import batches
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.catalogue import STUDY_MMLU, TASKS
from q3q.evaluate.chat import CHATS
from q3q.evaluate.data_sets import resolve_data_sets
from q3q.evaluate.encoding import LineEncoder
from q3q.evaluate.harness import lm as harness
from q3q.evaluate.harness import run
from q3q.evaluate.harness.documents import read_quickly
from q3q.evaluate.harness.hashes import documents_written_quickly, written
from q3q.evaluate.harness.task_files import tasks_from
from q3q.evaluate.harness.templates import templates_compiled_once
from q3q.evaluate.journal import _content, request_key
from q3q.evaluate.packing import pack_sequences, unpack_sequences
from q3q.evaluate.scorer import score_keys
from q3q.evaluate.scoring import (
    ROUND_TOKENS,
    Effort,
    Request,
    Score,
    pack_requests,
    round_tokens,
    tree_ends,
)
from q3q.evaluate.suites import prepare_batch, score_batch
from q3q.models.checkpoint import load_tokenizer
from q3q.reporter import no_steps
from tests.specs import evaluation_of

CODE = """
def prompt(doc):
    return f"{doc['q']} {len(doc['words'])} words?"

def changing(doc):
    doc["q"] += "?"
    return doc["q"]
"""
PROMPTS = {"doc_to_target": "{{a}}", "test_split": "test", "dataset_path": "json"}
OWN: dict[str, dict[str, Any]] = {
    "talk": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}} <think>",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 7},
        "metric_list": [{"metric": "exact_match"}],
        "repeats": 2,
    },
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "!function code.prompt",
        "doc_to_choice": ["a b", "c", "d"],
        "fewshot_split": "test",
        "doc_to_target": "{{1}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{words | join(' ')}} {{q * 200}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "change": {
        "output_type": "loglikelihood",
        "doc_to_text": "!function code.changing",
        "doc_to_target": "{{' ' + a}}",
        "metric_list": [{"metric": "acc"}],
    },
}
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[me] "
MODEL: Any = SimpleNamespace(
    facts=SimpleNamespace(max_positions=256),
    streamed=False,
    device=torch.device("cpu"),
    activations=None,
)


@pytest.fixture
def tokenizer():
    return load_tokenizer(DEMO_MODELS / "dense")


@pytest.fixture
def own(tmp_path):
    """A folder with a user's tasks of every kind, and their data."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"q": f"Q{k}", "a": str(k), "words": ["x", "y"] * k} for k in range(1, 5)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "code.py").write_text(CODE, encoding="utf-8")
    for name, task in OWN.items():
        data = {"data_files": {"test": str(folder / "rows.jsonl")}}
        lines = {"task": name, "dataset_kwargs": data, **PROMPTS, **task}
        text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items())
        text = text.replace('"!function code.prompt"', "!function code.prompt")
        text = text.replace('"!function code.changing"', "!function code.changing")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


class Trials:
    """Trials of a model whose scores cost nothing, and all that was asked of it."""

    def __init__(self, tokenizer, data, folder):
        self.tokenizer, self.data, self.folder = tokenizer, data, folder
        self.asked = []
        self.count = 0

    def score(self, model, requests, budget):
        self.asked += [
            (one.inputs.dtype, one.inputs.tobytes(), one.targets.tobytes(), one.task)
            for one in requests
        ]
        scores = [Score(-1.0 - int(one.targets.sum()) % 89 / 7, False) for one in requests]
        yield list(enumerate(scores)), Effort(len(requests))

    def generate(self, model, contexts, most, ended, budget):
        self.asked += [(ids.dtype, ids.tobytes(), most) for ids in contexts]
        for number, ids in enumerate(contexts):
            yield number, ids[:most].tolist()

    def evaluation(self, tasks, include, **settings):
        evaluation = evaluation_of(tasks=tasks, **settings)
        library = Library(self.data, settle=True)
        shots = {task.name: task.shots or 0 for task in evaluation.tasks}
        limits = dict.fromkeys(tasks, 6) | {STUDY_MMLU: 2}
        resolve_data_sets(tasks, library, shots=shots, limits=limits, include=include)
        data, digest = library.identities, None if include is None else folder_digest(include)
        return replace(evaluation, data=data, include=digest)

    def prepare(self, tasks, shelf, include=None, seed=0, **settings):
        """Prepare what a trial will ask."""
        evaluation = self.evaluation(tasks, include, **settings)
        for batch in batches(evaluation):
            prepare_batch(
                MODEL.facts,
                self.tokenizer,
                evaluation,
                batch,
                Library(self.data, dict(evaluation.data), include=include),
                include=include,
                seed=seed,
                shelf=shelf,
                wait=lambda: pytest.fail("another process makes it"),
            )

    def run(self, tasks, shelf, include=None, seed=0, **settings):
        """Return what a trial asked, and its metrics, results and samples."""
        evaluation = self.evaluation(tasks, include, **settings)
        self.asked, parts = [], []
        for batch in batches(evaluation):
            self.count += 1
            part = score_batch(
                MODEL,
                self.tokenizer,
                evaluation,
                batch,
                Library(self.data, dict(evaluation.data), include=include),
                include=include,
                seed=seed,
                journal=self.folder / str(self.count),
                identity="a model that costs nothing",
                steps=no_steps,
                shelf=shelf,
            )
            parts.append(json.loads(json.dumps(part.to_json())))
        return self.asked, parts


@pytest.fixture
def trials(tokenizer, study_data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = Trials(tokenizer, study_data, tmp_path / "journals")
    monkeypatch.setattr(scorer, "score", found.score)
    monkeypatch.setattr(harness, "generate", found.generate)
    task = TASKS[STUDY_MMLU]
    few = replace(task, data=task.data[:3], questions=task.questions[:3])
    monkeypatch.setitem(TASKS, STUDY_MMLU, few)
    return found


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "prepared", "a tokenizer")


def no_prompts(patch):
    """Let nothing make a prompt, nor encode one."""
    for name in ("fewshot_context", "construct_requests"):
        patch.setattr(ConfigurableTask, name, lambda *_, **__: pytest.fail("a prompt is made"))
    patch.setattr(mmlu_paper, "prompt", lambda *_: pytest.fail("a prompt is made"))
    patch.setattr(LineEncoder, "__call__", lambda *_, **__: pytest.fail("a text is encoded"))


@pytest.mark.parametrize(
    ("tasks", "settings"),
    [
        (["piqa", "arc_easy", "winogrande"], {}),
        (["hellaswag"], {"quick": True, "task_limit": 3}),
        (["wikitext"], {}),
        ([STUDY_MMLU], {}),
        ([STUDY_MMLU], {"quick": True, "task_limit": 1}),
        (["talk"], {}),
        (["talk", "choose"], {"chat": "template"}),
        (["choose", "read"], {"shots": {"choose": 2}}),
    ],
    ids="+".join,
)
def test_a_later_trial_asks_for_the_same_and_makes_no_prompt(
    trials, own, shelf, monkeypatch, tasks, settings
):
    """Of every kind: multiple choice, whole texts, generation, a user's tasks, the study's MMLU."""
    trials.tokenizer.chat_template = CHAT_TEMPLATE
    include = own if set(tasks) & set(OWN) else None
    plain = trials.run(tasks, None, include, **settings)
    first = trials.run(tasks, shelf, include, **settings)
    no_prompts(monkeypatch)
    later = trials.run(tasks, shelf, include, **settings)
    assert plain[0]
    assert first == plain
    assert later == plain
    with pytest.raises(pytest.fail.Exception):
        trials.run(tasks, replace(shelf, tokenizer="another"), include, **settings)


@pytest.mark.parametrize(
    ("tasks", "settings"),
    [
        (["talk", "choose"], {"chat": "template"}),
        (["arc_easy"], {"quick": True, "task_limit": 3}),
        ([STUDY_MMLU], {}),
    ],
    ids="+".join,
)
def test_what_is_prepared_ahead_is_what_a_trial_asks_for(
    trials, own, shelf, monkeypatch, tasks, settings
):
    """Without a model: nothing is asked, and no journal begins."""
    trials.tokenizer.chat_template = CHAT_TEMPLATE
    include = own if set(tasks) & set(OWN) else None
    plain = trials.run(tasks, None, include, **settings)
    trials.asked = []
    trials.prepare(tasks, shelf, include, **settings)
    assert trials.asked == []
    no_prompts(monkeypatch)
    trials.prepare(tasks, shelf, include, **settings)  # it is there
    assert trials.run(tasks, shelf, include, **settings) == plain


def test_seeds_share_requests_unless_examples_may_be_drawn(trials, own, shelf, monkeypatch):
    for tasks in (["arc_easy"], ["choose"]):
        trials.run(tasks, shelf, own)
    no_prompts(monkeypatch)
    trials.run(["arc_easy"], shelf, own, seed=1)
    with pytest.raises(pytest.fail.Exception, match="a prompt is made"):
        trials.run(["choose"], shelf, own, seed=1)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_prompt_whose_code_changes_its_document_is_made_once(
    trials, own, shelf, monkeypatch, ahead
):
    plain = trials.run(["change"], None, own)
    trials.prepare(["change"], shelf, own) if ahead else trials.run(["change"], shelf, own)
    no_prompts(monkeypatch)
    assert trials.run(["change"], shelf, own) == plain


def test_a_document_that_no_file_can_hold_has_its_prompt_made_each_time(trials, own, shelf):
    code = own / "code.py"
    code.write_text(CODE.replace('doc["q"] += "?"', 'doc["words"] = tuple(doc["words"])'))
    plain = trials.run(["change"], None, own)
    for _ in range(2):
        assert trials.run(["change"], shelf, own) == plain
    assert not [*shelf.folder.glob("*.safetensors")]


def test_what_may_be_other_next_time_is_not_kept(trials, own, shelf, tokenizer, monkeypatch):
    """Data without an identity, and a chat template that writes the date."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE + "{{ strftime_now('%d') }}")
    trials.run(["choose"], shelf, own, chat="template")
    monkeypatch.undo()
    index = tasks_from([own], ["choose"])
    keeping = run.Keeping(shelf, {}, lambda: False)
    assert run._shelf_of(keeping, index, CHATS["none"], tokenizer) is None
    keeping = run.Keeping(shelf, {}, lambda: True)
    assert run._shelf_of(keeping, index, CHATS["none"], tokenizer) == shelf
    index.loading_by_themselves = frozenset({"choose"})
    assert run._shelf_of(keeping, index, CHATS["none"], tokenizer) is None
    assert not [*shelf.folder.glob("*.safetensors")]


def test_damaged_requests_are_built_anew(trials, own, shelf, capfd):
    plain = trials.run(["choose"], shelf, own)
    [path] = shelf.folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert trials.run(["choose"], shelf, own) == plain
    assert f"{path} cannot be read" in capfd.readouterr().err
    assert path.with_name(f"{path.name}.damaged").is_file()


def test_an_error_while_requests_are_built_ends_the_turn(trials, own, shelf, monkeypatch):
    """So that the next trial, which may be another's, does not wait for it."""

    def broken(*_, **__):
        raise ConfigError("a continuation has 0 tokens")

    with monkeypatch.context() as patch:
        patch.setattr(scorer.Scorer, "request", broken)
        with pytest.raises(ConfigError, match="0 tokens"):
            trials.run(["choose"], shelf, own)
    waited = []
    with shelf.turn({}, lambda: waited.append(1)):
        trials.run(["choose"], shelf, own)
    assert not waited
    assert len([*shelf.folder.glob("*.safetensors")]) == 1


def test_each_template_is_compiled_once_and_lm_evals_environment_is_left_as_it_was(monkeypatch):
    compiled = []
    plain = type(env).compile

    def counted(self, source, *arguments):
        compiled.append(source)
        return plain(self, source, *arguments)

    monkeypatch.setattr(type(env), "compile", counted)
    documents = [{"a": k, "b": "é\n"} for k in range(5)]
    one, other = "{{a}} and {{b}}\n", "{% if a > 2 %}many{% endif %}{{b | upper}}"
    expected = [apply_template(text, doc) for doc in documents for text in (one, other)]
    assert len(compiled) == 10
    compiled.clear()
    with templates_compiled_once():
        found = [apply_template(text, doc) for doc in documents for text in (one, other)]
        with templates_compiled_once():
            apply_template(one, documents[0])
        apply_template(one, documents[0])
    assert found == expected
    assert compiled == [one, other]
    with pytest.raises(ZeroDivisionError), templates_compiled_once():
        raise ZeroDivisionError
    assert "from_string" not in vars(env)


def test_documents_are_those_of_lm_eval_and_processed_once(own):
    index = tasks_from([own], ["choose"])
    task = TaskManager.load(index, ["choose"])["tasks"]["choose"]
    ways: list[dict[str, Any]] = [
        {"limit": None},
        {"limit": 2},
        {"limit": None, "samples": [0, 3]},
        {"limit": 0},
    ]
    expected = [list(Task.doc_iterator(task, **way)) for way in ways]
    processed: list[int] = []

    def process(rows):
        processed.append(1)
        return rows

    task.config.process_docs = process
    read_quickly(task)
    assert [list(task.doc_iterator(**way)) for way in ways] == expected
    (_, first), *_ = task.doc_iterator(limit=None)
    first["words"].append("changed by a task's code")
    assert list(task.doc_iterator(limit=None)) == expected[0]
    assert not processed  # lm-eval did it when it loaded the task

    task.config.process_docs = lambda rows: list(process(rows))
    task.task_docs = list(task.task_docs)
    task.test_docs = partial(ConfigurableTask.test_docs, task)
    read_quickly(task)
    for _ in range(2):  # objects in a list would be changed for good
        (_, first), *_ = task.doc_iterator(limit=None)
        assert first == expected[0][0][1]
        first["words"].append("changed by a task's code")
    assert len(processed) == 2


def sequences(count=60):
    dice = np.random.default_rng(0)
    stems = [dice.integers(0, 9, 40).astype(np.int32) for _ in range(4)]
    return [
        np.concatenate((stems[k % 4][: k % 41], dice.integers(0, 3, k % 5).astype(np.int32)))
        for k in range(count)
    ]


def test_packed_sequences_are_the_same_again():
    given = [*sequences(), *sequences()]
    arrays, number = pack_sequences(given)
    distinct = unpack_sequences(arrays)
    assert len(distinct) == len({ids.tobytes() for ids in given})
    for ids, place in zip(given, number, strict=True):
        assert np.array_equal(distinct[place], ids)
        assert distinct[place].dtype == np.int32
    assert len(arrays["ids"]) < sum(map(len, distinct)) / 2
    assert unpack_sequences(pack_sequences([])[0]) == []


def test_keys_of_a_journal_are_those_of_whole_requests():
    inputs, other = sequences(2)[1], sequences(9)[8]
    targets = [np.array([k, k], np.int32) for k in range(3)]
    requests = [Request(ids, ends, "t") for ids in (inputs, other, inputs) for ends in targets]
    assert score_keys(requests) == [
        request_key(b"score", one.inputs.tobytes(), one.targets.tobytes()) for one in requests
    ]


def requests_of(shared, count, own, target=2):
    """Return requests whose inputs share so many tokens, and have so many of their own."""
    stem = np.arange(shared, dtype=np.int32)
    return [
        Request(np.concatenate((stem, np.full(own, 1000 + k, np.int32))), stem[:target], "t")
        for k in range(count)
    ]


def test_a_gangs_rounds_are_sized_by_tokens_that_run(monkeypatch):
    """MMLU's questions ask for sixteen times the tokens that their tree has."""
    requests = [request for request in requests_of(90, 50, 10) for _ in range(4)]
    tree, _ = pack_requests(requests)
    ordered = sorted(requests, key=lambda one: one.inputs.tolist())
    assert tree_ends([one.inputs for one in ordered])[-1] == len(tree) == 90 + 50 * 10
    rounds = []

    def run_on_all(call, number, requests_by_rank):
        rounds.append(requests_by_rank)
        return [
            ([(k, Score(-float(one.inputs[-1]), True)) for k, one in enumerate(share)], Effort())
            for share in requests_by_rank
        ]

    most = 300
    team = SimpleNamespace(size=2, leads=True, run_on_all=run_on_all)
    model: Any = SimpleNamespace(team=team, number=0)
    monkeypatch.setattr(scoring, "pass_tokens", lambda model: most)
    scores: dict[int, Score] = {}
    for completed, _ in scoring.score(model, requests, TokenBudget()):
        scores.update(completed)
    assert scores == {n: Score(-float(one.inputs[-1]), True) for n, one in enumerate(requests)}
    assert len(rounds) == 2  # 590 tokens run, 20,000 are asked for: these were 67 rounds
    for share in (share for shares in rounds for share in shares):
        assert len(pack_requests(share)[0]) <= most
        assert len(share) > 20


@pytest.mark.parametrize(("most", "longest"), [(1 << 22, 500), (2000, 1500), (2000, 100), (10, 50)])
def test_a_share_of_a_round_leaves_room_for_its_longest_input(most, longest):
    room = round_tokens(most, requests_of(0, 1, longest))
    assert 1 <= room <= ROUND_TOKENS
    assert room + longest <= most or room == 1


@pytest.mark.parametrize(
    "document",
    [
        {"a": 'é "\n', "b": 3, "c": ["x", "y\u2028"]},
        {"a": [], "b": None},
        {"a": 1.5},
        {"a": True},
        {"a": {"b": ["c"]}},
        {"a": [1, "b"]},
        {1: "a"},
        {},
        ["a"],
    ],
)
def test_documents_are_written_as_lm_eval_writes_them(document):
    settings: dict[str, Any] = {"indent": 2, "default": str, "ensure_ascii": False}
    expected = json.dumps(document, **settings)
    assert written(document, **settings) == expected
    with documents_written_quickly():
        assert evaluator.json.dumps(document, **settings) == expected
        assert evaluator.json.dumps(document) == json.dumps(document)
    assert evaluator.json is json


def test_a_documents_target_is_made_once_unless_its_task_may_change_it(own):
    index = tasks_from([own], ["choose"])
    for changes, count in ((False, 1), (True, 2)):
        task = TaskManager.load(index, ["choose"])["tasks"]["choose"]
        made: list[Any] = []
        make = task.doc_to_target
        task.doc_to_target = lambda doc, *rest, made=made, make=make: (
            made.append(1),
            make(doc, *rest),
        )[1]
        if changes:
            task.config.process_results = lambda doc, results: {}
        read_quickly(task)
        one, other = (doc for _, doc in islice(task.doc_iterator(limit=2), 2))
        expected = make(one)
        assert [task.doc_to_target(one) for _ in range(2)] == [expected, expected]
        assert len(made) == count
        assert task.doc_to_target(other) == make(other)
        assert task.doc_to_target(one, "a target") == make(one, "a target")


@pytest.mark.parametrize(
    "score", [[-1.5, True], [-0.1, False], [math.inf, True], [1, True], [-1.5, 1], {"a": 1}, "m"]
)
def test_a_journals_lines_are_json(score):
    for key in ("0af3", "12", 'a "b"', "ä", ""):
        assert _content(key, score) == json.dumps([key, score])

"""Every file that a user's task reads is part of a trial's identity, wherever it lies."""

import os
import sys
from types import SimpleNamespace

import datasets
import pytest

from q3q.data.pinned import FILES, check_files
from q3q.data.questions import Library, serving
from q3q.data.repositories import DataSet
from q3q.errors import ConfigError
from q3q.evaluate.data_sets import resolve_data_sets
from q3q.evaluate.harness.sources import source_files

TASK = """
task: mine
test_split: test
output_type: multiple_choice
doc_to_choice: ["yes", "no"]
doc_to_target: g
metric_list:
  - metric: acc
"""
FORMS = {
    "one file in a dictionary": "dataset_path: json\n"
    "dataset_kwargs: {data_files: {test: OUT/a.jsonl}}",
    "two files in a list": "dataset_path: json\n"
    "dataset_kwargs: {data_files: {test: [OUT/a.jsonl, OUT/b.jsonl]}}",
    "a pattern": "dataset_path: json\ndataset_kwargs: {data_files: {test: 'OUT/*.jsonl'}}",
    "a plain name": "dataset_path: json\ndataset_kwargs: {data_files: OUT/a.jsonl}",
    "a folder of a reader": "dataset_path: json\ndataset_kwargs: {data_dir: OUT/folder}",
    "a folder": "dataset_path: OUT/folder",
    "a name from the working folder": "dataset_path: json\n"
    "dataset_kwargs: {data_files: {test: ../out/a.jsonl}}",
    "a link to a folder": "dataset_path: json\n"
    "dataset_kwargs: {data_files: {test: IN/link/a.jsonl}}",
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder with task files, and one outside of it with all that they name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    inside, out = tmp_path / "tasks", tmp_path / "out"
    (out / "folder").mkdir(parents=True)
    inside.mkdir()
    for path in (out / "a.jsonl", out / "b.jsonl", out / "folder" / "test.jsonl"):
        path.write_text('{"q": "one", "g": 0}\n{"q": "two", "g": 1}\n', encoding="utf-8")
    (inside / "link").symlink_to(out)
    monkeypatch.chdir(inside)
    return inside, out


def written(folders, form, more="doc_to_text: q"):
    inside, out = folders
    form = form.replace("OUT", str(out)).replace("IN", str(inside))
    split = "train" if "data_files: OUT" in form or "data_files: /" in form else "test"
    text = TASK.replace("test_split: test", f"test_split: {split}")
    (inside / "mine.yaml").write_text(f"{text}{form}\n{more}\n", encoding="utf-8")


def identities(inside):
    library = Library(None, settle=True, include=inside)
    resolve_data_sets(["mine"], library, include=inside)
    return library.identities


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_data_file_that_lies_elsewhere_is_part_of_the_trial(folders, form):
    inside, out = folders
    written(folders, form)
    before = identities(inside)
    assert before
    assert all(name.startswith(f"{FILES}") for name in before)
    assert identities(inside) == before
    check_files(before, inside)
    changed = out / ("folder/test.jsonl" if "folder" in form else "a.jsonl")
    stat = changed.stat()
    changed.write_text(changed.read_text("utf-8").replace("one", "1st"), encoding="utf-8")
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` does
    after = identities(inside)
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in before) == 1
    with pytest.raises(ConfigError, match=f"{changed.name}, which a task reads, changed since"):
        check_files(before, inside)
    data = {"test": [str(inside / "link" / "a.jsonl" if "link" in form else changed)]}
    library = Library(None, before, include=inside)
    with pytest.raises(ConfigError, match="is not what it was"), serving(library, print):
        datasets.load_dataset("json", data_files=data)
    with serving(Library(None, after, include=inside), print):
        found = datasets.load_dataset("json", data_files=data)
    assert found["test"]["q"][0] == "1st"  # and not what is in the cache of `datasets`


def test_a_file_that_a_pattern_finds_since_is_refused(folders):
    inside, out = folders
    written(folders, FORMS["a pattern"])
    before = identities(inside)
    (out / "c.jsonl").write_text('{"q": "three", "g": 1}\n', encoding="utf-8")
    assert identities(inside).keys() - before.keys() == {f"{FILES}../out/c.jsonl"}
    library = Library(None, before, include=inside)
    with pytest.raises(ConfigError, match="is not what it was"), serving(library, print):
        datasets.load_dataset("json", data_files={"test": f"{out}/*.jsonl"})


def test_the_folders_own_files_are_in_its_digest_and_change_no_id(folders):
    inside, out = folders
    (inside / "rows.jsonl").write_bytes((out / "a.jsonl").read_bytes())
    (inside / "code.py").write_text("def text(doc):\n    return doc['q']\n", encoding="utf-8")
    (inside / "base").write_text("doc_to_text: !function code.text\n", encoding="utf-8")
    form = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {inside}/rows.jsonl}}}}"
    written(folders, form, "include: base")
    assert identities(inside) == {}


def test_a_plan_of_an_older_version_has_no_files_and_still_runs(folders):
    inside, out = folders
    with serving(Library(None, {}, include=inside), print):
        found = datasets.load_dataset("json", data_files={"test": str(out / "a.jsonl")})
    assert len(found["test"]) == 2


@pytest.mark.parametrize(
    "more",
    [
        "include: OUT/base.yaml",
        "include: [../out/base.yaml]",
        "doc_to_text: !function user_code.text",
    ],
)
def test_what_a_task_is_made_of_is_part_of_the_trial_wherever_it_lies(folders, monkeypatch, more):
    inside, out = folders
    code = "import user_helper\n\n\ndef text(doc):\n    return doc['q'] + user_helper.END\n"
    (out / "user_code.py").write_text(code, encoding="utf-8")
    (out / "user_helper.py").write_text("END = '?'\n", encoding="utf-8")
    (out / "base.yaml").write_text("doc_to_text: !function user_code.text\n", encoding="utf-8")
    monkeypatch.syspath_prepend(out)
    form = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {inside}/rows.jsonl}}}}"
    (inside / "rows.jsonl").write_bytes((out / "a.jsonl").read_bytes())
    written(folders, form, more.replace("OUT", str(out)))
    before = identities(inside)
    named = {"base.yaml"} if "include" in more else set()
    named |= {"user_code.py", "user_helper.py"}
    assert before.keys() == {f"{FILES}../out/{name}" for name in named}
    for name in sorted(named):
        path = out / name
        path.write_text(path.read_text(encoding="utf-8") + "\n# other\n", encoding="utf-8")
        after = identities(inside)
        assert after != before
        with pytest.raises(ConfigError, match=f"{name}, which a task reads, changed"):
            check_files(before, inside)
        before = after
    for module in ("user_code", "user_helper"):
        sys.modules.pop(module, None)


def test_a_file_of_prompts_is_a_source(folders):
    inside, out = folders
    (out / "prompts.yaml").write_text("prompts: {}\n", encoding="utf-8")
    (inside / "mine.yaml").write_text(f"task: mine\nuse_prompt: {out}/prompts.yaml:one\n", "utf-8")
    assert source_files(inside) == {inside / "mine.yaml", out / "prompts.yaml"}


def test_installed_code_is_known_by_its_version(folders):
    inside, _ = folders
    (inside / "code.py").write_text("import numpy\nimport json\nimport lm_eval.utils\n", "utf-8")
    (inside / "one.yaml").write_text("task: one\ndoc_to_text: !function code.text\n", "utf-8")
    (inside / "two.yaml").write_text("task: two\ndoc_to_text: !function numpy.mean\n", "utf-8")
    assert source_files(inside) == {inside / name for name in ("code.py", "one.yaml", "two.yaml")}


def test_what_cannot_be_pinned_is_named(folders, monkeypatch):
    inside, _ = folders

    config = SimpleNamespace(data_files={"test": ["https://example.org/rows.jsonl"]})
    builder = SimpleNamespace(config=config)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    library = Library(None, settle=True, include=inside)
    assert library.files.load(lambda *given, **_: given, "json", None, {}) == ("json", None)
    assert library.files.not_pinned == {"https://example.org/rows.jsonl"}
    assert library.identities == {}
    (inside / "code.py").write_text(
        "import datasets\n\n\ndef rows(**_):\n"
        "    table = datasets.Dataset.from_list([{'q': 'one', 'g': 0}])\n"
        "    return datasets.DatasetDict({'test': table})\n",
        encoding="utf-8",
    )
    written(folders, "custom_dataset: !function code.rows")
    resolve_data_sets(["mine"], library, include=inside)
    assert "the data of mine, which its own code loads," in library.files.not_pinned


def test_a_data_set_of_the_hub_is_not_the_tasks_own_file(folders):
    asked = []
    with serving(Library(None), lambda data, options: asked.append((data, options))):
        datasets.load_dataset("someone/rows", "part", data_files="a.jsonl")
    assert asked == [(DataSet("someone/rows", "part"), {"data_files": "a.jsonl"})]

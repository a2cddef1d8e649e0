"""A name that a person gives is a name on disk, and never a path."""

import pytest

from q3q.record import Sweep
from q3q.storage.names import MOST_BYTES, file_name

ORDINARY = ["demo", "rtn+gptq+awq", "my study", "Größe_2.0", "a=1,b=2", "seeds (2)", "模型"]
ODD = [
    "../../x",
    "/abs",
    "a/b",
    "a-b/",
    "a\\b",
    "..",
    ".",
    ".hidden",
    "",
    " ",
    "-",
    "C:x",
    "a\nb",
    "a\0b",
    "\x1b[31mred",
    "x" * 300,
    "é" * 300,
    "x" * 99 + "é",
    "\udcff",
    "*?<>|\"'`$;&#%~{}[]",
    "trailing.",
]


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_name_is_its_own(name):
    assert file_name(name) == name


@pytest.mark.parametrize("name", ODD)
def test_any_other_name_is_one_word_in_its_folder(name, tmp_path):
    made = file_name(name)
    assert len(made.encode()) <= MOST_BYTES + 7
    path = tmp_path / f"{made}_0123456789.json"
    path.write_text("")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert not made.startswith(".")
    assert made.isprintable()


def test_two_names_are_two_files():
    assert len({*map(file_name, [*ORDINARY, *ODD])}) == len([*ORDINARY, *ODD])


@pytest.mark.parametrize("name", ODD)
def test_a_sweep_is_filed_in_its_storage_and_keeps_its_name(name, tmp_path):
    sweep = Sweep(id="0123456789", name=name, command="", config="", trials=())
    sweep.save(tmp_path / "storage")
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path.parent == tmp_path / "storage" / "sweeps"
    assert Sweep.load(path).name == name

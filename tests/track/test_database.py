"""The database beside the records: damaged, of another MLflow, or in a folder of an odd name."""

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from q3q.config.schema import tracking_uri
from q3q.errors import EXIT_MISUSED, TrackingError
from q3q.track.mlflow import MlflowTracker
from tests.commands import python
from tests.damage import a_folder, a_link
from tests.track.test_mlflow import children, saved, sweep, synced


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with two records, and a database that knows them."""
    folder = tmp_path_factory.mktemp("filled")
    sweep(*saved(folder, 2, 3)).save(folder)
    assert synced(folder) == 0
    return folder


def in_its_own_process(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Sync in a new process: MLflow keeps a file that was renamed open."""
    return python("-m", "q3q.track", "sync", "--storage", folder, *options)


def truncate(path: Path) -> None:
    os.truncate(path, 100_000)


def zero_middle(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(40_000))


def text(path: Path) -> None:
    path.write_text("these are notes\n" * 99)


# tests/track/test_idle.py has an empty file.
DAMAGE = [truncate, zero_middle, text, a_folder, a_link]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_what_is_no_database_is_put_aside_and_filled_again(
    damage: Callable[[Path], None],
    filled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(filled, storage, ignore=shutil.ignore_patterns("mlflow.db*", "storage.json"))
    path = storage / "mlflow.db"
    shutil.copy(filled / "mlflow.db", path)
    damage(path)
    (storage / "mlflow.db.damaged").touch()  # an earlier one stays
    assert synced(storage) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert f"it is now {path}.damaged2." in line
    assert f"python -m q3q.track sync --storage {storage}" in line
    aside = storage / "mlflow.db.damaged2"
    assert aside.is_symlink() or aside.exists()
    assert len(children(MlflowTracker(f"sqlite:///{path}", str(storage)))) == 2


def test_a_database_that_another_process_writes_is_not_damaged(filled: Path) -> None:
    path = filled / "mlflow.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingError, match="locked"):
            MlflowTracker(f"sqlite:///{path}", str(filled)).check()
    assert not list(filled.glob("mlflow.db.damaged*"))


@pytest.mark.parametrize("damage", [truncate, text], ids=lambda damage: damage.__name__)
def test_a_file_that_the_user_named_is_never_renamed(
    damage: Callable[[Path], None], filled: Path, tmp_path: Path
) -> None:
    path = tmp_path / "my data.db"
    shutil.copy(filled / "mlflow.db", path)
    damage(path)
    content = path.read_bytes()
    with pytest.raises(TrackingError) as refusal:
        MlflowTracker(f"sqlite:///{path}", str(filled)).check()
    assert path.read_bytes() == content
    assert "rename the file" in str(refusal.value)
    command = f"python -m q3q.track sync --storage {filled} --uri 'sqlite:///{path}'"
    assert command in str(refusal.value)
    assert "\n" not in str(refusal.value)


def with_version(path: Path, version: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
        connection.commit()


def test_a_database_of_another_mlflow_is_left_and_the_advice_fits(
    filled: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.db"
    shutil.copy(filled / "mlflow.db", path)
    for version, advice in (
        ("451aebb31d03", r"older MLflow made it: copy the file, then `mlflow db upgrade"),
        ("ffffffffffff", r"a newer MLflow made this database.*pip install --upgrade mlflow"),
    ):
        with_version(path, version)
        content = path.read_bytes()
        for storage in (None, str(tmp_path)):
            with pytest.raises(TrackingError, match=advice) as refusal:
                MlflowTracker(f"sqlite:///{path}", storage).check()
            assert "\n" not in str(refusal.value)
        assert path.read_bytes() == content


def test_a_database_of_another_program_gets_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    content = path.read_bytes()
    with pytest.raises(TrackingError, match=r"another program's \(its tables are songs\)"):
        MlflowTracker(f"sqlite:///{path}", str(tmp_path)).check()
    assert path.read_bytes() == content


NAMES = ["50 %25 a#b a&b=c größe 名前", "what?uri=true", "it's? a@b:c #1 100 %"]


def test_folders_of_any_name_hold_a_database_and_artifacts(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        shutil.copytree(filled, tmp_path / name, ignore=shutil.ignore_patterns("artifacts"))
        (tmp_path / name / "storage.json").unlink()
        os.truncate(tmp_path / name / "mlflow.db", 0)  # it names the old folder
        for storage in (name, str(tmp_path / name)):
            assert synced(Path(storage)) == 0
            config = OmegaConf.create({"track": {"uri": None}, "storage": storage})
            tracker = MlflowTracker(tracking_uri(config), storage)
            assert "--uri" not in tracker.sync
            assert len(children(tracker)) == 2
        assert len(list((tmp_path / name / "artifacts").rglob("record.json"))) == 2
    made = {path.name for path in tmp_path.iterdir()}
    assert made == set(NAMES)


def test_a_uri_in_an_odd_folder_is_read_as_it_is_written(tmp_path: Path) -> None:
    storage = tmp_path / "what? 100%"
    storage.mkdir()
    config = OmegaConf.create({"track": {"uri": None}, "storage": str(storage)})
    uri = tracking_uri(config)
    assert MlflowTracker(uri).uri == uri
    with pytest.raises(TrackingError, match=re.escape("sqlite+pysqlite:////folder/a%3Fb.db")):
        MlflowTracker(f"sqlite:///{storage}/mlflow.db")


@pytest.mark.slow
def test_mlflows_own_server_opens_the_printed_uri(tmp_path: Path) -> None:
    """As `mlflow ui --backend-store-uri URI` does, in a process that does not know q3q."""
    storage = tmp_path / "what? 100% #1"
    sweep(*saved(storage, 2, 3)).save(storage)
    done = in_its_own_process(storage)
    assert done.returncode == 0, done.stderr
    uri = MlflowTracker(
        tracking_uri(OmegaConf.create({"track": {"uri": None}, "storage": str(storage)}))
    ).uri
    script = (
        "import sys; from mlflow import MlflowClient; c = MlflowClient(sys.argv[1]); "
        "[e] = [e for e in c.search_experiments() if e.name == 'q3q']; "
        "print([c.list_artifacts(r.info.run_id)[0].path "
        "for r in c.search_runs([e.experiment_id])])"
    )
    shown = python("-c", script, uri, cwd=tmp_path)
    assert "record.json" in shown.stdout, shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == [storage.name]


def test_misuse_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 2)
    assert synced(tmp_path, "--uri", "htp://x") == EXIT_MISUSED
    assert capsys.readouterr().err.count("\n") == 1

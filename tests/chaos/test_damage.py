"""Whatever is done to a file of a storage folder, the same command gives the same numbers.

Each kind of file is torn, emptied, zeroed, flipped in a bit, replaced by another trial's, by a
folder, by a link to nothing and by a FIFO. MLflow's database and exports have tests of their own.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from q3q.attempt import finished_record
from q3q.errors import ConfigError
from tests.chaos.faults import end_of, in_child
from tests.chaos.studies import make_quick, run, trials_of
from tests.damage import a_circle, a_fifo, a_folder, a_link, emptied, flipped, torn, zeroed


def swapped(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


CONTENTS = [torn, emptied, zeroed, flipped, swapped]
PLACES = [a_folder, a_link, a_circle, a_fifo]

# Where each kind lies: in a finished storage, and in one that was stopped as each trial came to its
# record. {a} and {b} are the trials of RTN at 4 and 3 bits, {n} is the unquantized model's, {q} and
# {p} are the quantizations of the first two.
FINISHED = {
    "record": ("trials/{a}/record.json", "trials/{b}/record.json"),
    "samples": ("trials/{a}/samples.parquet", "trials/{b}/samples.parquet"),
    "record of the unquantized": ("trials/{n}/record.json", "trials/{b}/record.json"),
    "samples of the unquantized": ("trials/{n}/samples.parquet", "trials/{b}/samples.parquet"),
    "memo of digests": ("trials/digests/digests.json", "trials/{a}/record.json"),
    "sweep": ("sweeps/*.json", "trials/{a}/spec.json"),
    "sweep's claim": ("running/*.claim.*", "trials/{a}/trial.claim.*"),
    "status": ("running/*.json", "trials/{a}/spec.json"),
    "report": ("reports/*/report.html", "reports/*/results.csv"),
}
# These are read when the trial is evaluated again, as its record is gone.
EVALUATED_AGAIN = {
    "spec": ("trials/{a}/spec.json", "trials/{b}/spec.json"),
    "log": ("trials/{a}/trial.log", "trials/{b}/trial.log"),
    "claim": ("trials/{a}/trial.claim.*", "trials/{b}/trial.claim.*"),
    "kept block": ("trials/blocks/{q}/block_001.safetensors",) * 2,
    "kept block's facts": ("trials/blocks/{q}/block_001.json",) * 2,
    "baseline's manifest": ("baselines/*/manifest.json", "trials/{a}/spec.json"),
    "baseline's window": (
        "baselines/*/window_00000.safetensors",
        "trials/blocks/{q}/block_001.safetensors",
    ),
    "baseline's claim": ("baselines/*.claim.*", "trials/{b}/trial.claim.*"),
    "prepared windows": (
        "prepared/*.safetensors",
        "trials/blocks/{q}/block_001.safetensors",
    ),
    "prepared windows' claim": ("prepared/*.claim.*", "trials/{b}/trial.claim.*"),
}
STOPPED = {
    "block": ("trials/blocks/{q}/block_001.safetensors",) * 2,
    "block's facts": ("trials/blocks/{q}/block_001.json",) * 2,
    "measurement": ("trials/{a}/evaluations/1_stories.json",) * 2,
    "journal": ("trials/{a}/evaluations/windows_stories.jsonl",) * 2,
    "failure": ("trials/{a}/failed.json", "trials/{b}/spec.json"),
    "unfinished samples": ("trials/{a}/samples.parquet", "trials/{b}/spec.json"),
}
FOLDERS = [
    "trials/{a}",
    "trials/{a}/evaluations",
    "trials/{a}/blocks",
    "trials/blocks",
    "trials/blocks/{q}",
    "trials/digests",
    "baselines",
    "baselines/{e}",
    "prepared",
    "sweeps",
    "running",
    "reports",
    "reports/*",
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """The storage of an undisturbed study, whose driver is gone."""
    storage = tmp_path_factory.mktemp("finished")
    assert end_of(in_child(lambda: run(tiny, storage))) == 0
    return storage


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory) -> Path:
    """The storage of a study whose trials were each stopped when they came to their records."""
    storage = tmp_path_factory.mktemp("stopped")

    def stop() -> None:
        from q3q import trial

        for one in trials_of(tiny, storage)[0].values():

            def report(event) -> None:
                if event.phase == "record":
                    raise KeyboardInterrupt

            try:
                trial.attempt_trial(one, report)
            except KeyboardInterrupt:
                continue
            raise AssertionError("the trial was not stopped")

    assert end_of(in_child(stop)) == 0
    return storage


@pytest.fixture(scope="module")
def whole(tiny, finished, tmp_path_factory) -> dict[str, dict]:
    """Return what an undisturbed study says; check that a second start of it changes nothing."""
    copy = tmp_path_factory.mktemp("whole") / "storage"
    shutil.copytree(finished, copy)
    before = states(copy)
    numbers = run(tiny, copy)
    assert states(copy) == before
    assert all(numbers[name]["comparisons"] for name in ("rtn4", "rtn3"))
    assert all("kl/stories" in numbers[name]["metrics"] for name in ("rtn4", "rtn3"))
    return numbers


def states(storage: Path) -> dict[str, int]:
    return {
        path.parent.name: path.stat().st_mtime_ns for path in storage.glob("trials/*/record.json")
    }


class Case:
    """A copy of a storage folder, in which one thing is damaged."""

    def __init__(self, tiny: Path, template: Path, storage: Path) -> None:
        self.tiny, self.storage = tiny, storage
        shutil.copytree(template, storage)
        self.trials, _ = trials_of(tiny, storage)
        quantizations = {name: trial.spec.quantization_id for name, trial in self.trials.items()}
        self.words = {
            "a": self.trials["rtn4"].id,
            "b": self.trials["rtn3"].id,
            "n": self.trials["none"].id,
            "q": quantizations["rtn4"],
            "p": quantizations["rtn3"],
            "e": next((path.name for path in storage.glob("baselines/*/")), ""),
        }

    def path(self, pattern: str, swap: bool = False) -> Path:
        """Return what a pattern names; of the other trial, if they are swapped."""
        words = self.words
        if swap:
            words = words | {"a": words["b"], "b": words["a"], "q": words["p"], "p": words["q"]}
        wanted = pattern.format(**words)
        return next(iter(sorted(self.storage.glob(wanted))), self.storage / wanted)

    def put(self, name: str, damage: Callable[..., None], kinds: dict) -> Path:
        mine, other = kinds[name]
        path = self.path(mine)
        theirs = self.path(other, swap=mine == other)
        if name == "failure":
            shutil.copyfile(theirs, path)
        elif name == "unfinished samples":
            shutil.copyfile(self.path("trials/{a}/spec.json"), path)
        elif name == "baseline's claim":  # it is taken where the baseline is to be computed
            self.path("baselines/{e}/manifest.json").unlink()
        elif name == "prepared windows' claim":  # it is taken where there are no windows
            self.path("prepared/*.safetensors").unlink()
        elif name == "journal":  # it is read where the measurement was not finished
            self.path("trials/{a}/evaluations/1_stories.json").unlink()
        if damage is swapped:
            swapped(path, theirs)
        else:
            damage(path)
        return path

    def again(self) -> dict[str, dict]:
        return run(self.tiny, self.storage)

    def holds(self, path: Path, said: str, aside: bool) -> None:
        """Check what a run left: files again, and nothing to do for the next one.

        aside: what was at `path` must have been put aside, and said so.
        """
        assert path.is_file() or not os.path.lexists(path)
        put_aside = os.path.lexists(f"{path}.damaged")
        assert put_aside or not aside
        assert (f"{path} " in said) == put_aside, said
        for trial in self.trials.values():  # so the next start has nothing to do
            assert finished_record(trial) is not None


@pytest.fixture
def case(tiny, tmp_path):
    def make(template: Path, forget: bool = False) -> Case:
        made = Case(tiny, template, tmp_path / "storage")
        if forget:
            made.path("trials/{a}/record.json").unlink()
        return made

    return make


# These pairs are quick enough for every run of the tests; the others are slow only by their number.
QUICK = {
    ("record", torn),
    ("samples", flipped),
    ("memo of digests", flipped),
    ("sweep", a_folder),
    ("kept block", flipped),
    ("baseline's claim", a_folder),
    ("block's facts", swapped),
    ("journal", a_fifo),
}
# Kinds whose content no number depends on: each meets one damage, which the order chooses.
HARMLESS = (
    "spec",
    "log",
    "sweep's claim",
    "baseline's claim",
    "prepared windows' claim",
    "claim",
    "status",
    "report",
    "failure",
)


def cells(kinds: dict, damages: list) -> list:
    """Return the pairs of a kind and a damage."""
    return [
        pytest.param(
            name,
            damage,
            id=f"{name}, {damage.__name__}",
            marks=[] if (name, damage) in QUICK else [pytest.mark.slow],
        )
        for row, name in enumerate(kinds)
        for column, damage in enumerate(damages)
        if (name, damage) in QUICK
        or (row + column) % len(damages) == 0
        or (name not in HARMLESS and damage not in (emptied, a_circle, a_fifo))
    ]


def few(names: list[str], *quick: str) -> list:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


# Content that is written anew at each start, or holds no number, is not checked before.
UNCHECKED = ("spec", "log", "claim", "status", "report", "journal", "failure")


def checked(name: str, damage: Callable) -> bool:
    if name == "memo of digests" and damage is swapped:  # true of the files that it names
        return False
    return damage in PLACES or not name.endswith((*UNCHECKED, "unfinished samples"))


@pytest.mark.parametrize(("name", "damage"), cells(FINISHED, CONTENTS + PLACES))
def test_damage_in_a_finished_storage_changes_no_number(case, finished, whole, name, damage, capfd):
    one = case(finished)
    path = one.put(name, damage, FINISHED)
    assert one.again() == whole
    aside = checked(name, damage) and name not in ("status", "sweep's claim")
    one.holds(path, capfd.readouterr().err, aside)


@pytest.mark.parametrize(("name", "damage"), cells(EVALUATED_AGAIN, CONTENTS + PLACES))
def test_damage_to_what_a_new_evaluation_reads_changes_no_number(
    case, finished, whole, name, damage, capfd
):
    one = case(finished, forget=True)
    path = one.put(name, damage, EVALUATED_AGAIN)
    assert one.again() == whole
    if name.startswith("baseline's") and not name.endswith("claim"):
        path = path.parent  # an entry is put aside as a whole
        assert Path(f"{path}.damaged").is_dir()
        assert one.path("baselines/{e}/manifest.json").is_file()
        assert f"{path} is damaged" in capfd.readouterr().err
    else:
        one.holds(path, capfd.readouterr().err, checked(name, damage))


@pytest.mark.parametrize(("name", "damage"), cells(STOPPED, CONTENTS + PLACES))
def test_damage_to_what_a_stopped_trial_left_changes_no_number(
    case, stopped, whole, name, damage, capfd
):
    one = case(stopped)
    path = one.put(name, damage, STOPPED)
    assert one.again() == whole
    said = capfd.readouterr().err
    if checked(name, damage):
        assert f"{path} " in said
    assert all(finished_record(trial) is not None for trial in one.trials.values())


@pytest.mark.parametrize("name", few(FOLDERS, "reports", "trials/{a}"))
def test_a_file_in_a_folders_place_is_put_aside(case, finished, whole, name, capfd):
    one = case(finished, forget=True)
    path = one.path(name)
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("not a folder", encoding="utf-8")
    assert one.again() == whole
    assert Path(f"{path}.damaged").read_text(encoding="utf-8") == "not a folder"
    assert f"{path} is a file, not a folder" in capfd.readouterr().err


@pytest.mark.parametrize("name", few(["trials", "sweeps", "running", "reports"], "trials"))
def test_a_link_to_a_folder_that_is_not_there_is_named_and_stays(case, finished, whole, name):
    """It may be a disk that is not mounted: to begin anew beside it would lose what is there."""
    one = case(finished)
    path, disk = one.path(name), one.storage.parent / "disk"
    path.rename(disk)
    path.symlink_to(disk)
    assert one.again() == whole
    disk.rename(disk.with_name("away"))
    with pytest.raises(
        ConfigError, match=f"{path} is a link to {disk}, which does not exist: mount"
    ):
        one.again()
    disk.with_name("away").rename(disk)
    assert one.again() == whole

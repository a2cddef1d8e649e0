"""A power cut at any moment loses nothing that is finished; the same command completes the rest."""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from q3q.record import TrialRecord
from q3q.storage import claim, files
from tests.chaos.faults import end_of, in_child
from tests.chaos.power import Disk, Image, restore
from tests.chaos.studies import TRIALS, make_quick, run


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> dict[str, dict]:
    """Return what an undisturbed study says."""
    return run(tiny, tmp_path_factory.mktemp("whole"))


def records_in(image: Image) -> dict[str, dict]:
    """Return an image's records by trial. They are whole, or this raises ValueError."""
    return {
        name.split("/")[1]: files.unsealed(content, strict=True)
        for name, content in image.items()
        if name.startswith("trials/") and name.endswith("/record.json")
    }


def records_on(storage: Path) -> dict[str, dict]:
    paths = storage.glob("trials/*/record.json")
    return records_in({str(path.relative_to(storage)): path.read_bytes() for path in paths})


def check_records(image: Image) -> None:
    """Check that each record of an image is whole, and so is each file that it names."""
    for trial, record in records_in(image).items():
        assert record["files"]
        for name, digest in record["files"].items():
            content = image.get(f"trials/{trial}/{name}", b"")
            assert hashlib.sha256(content).hexdigest() == digest, f"{name}, {len(content)} bytes"


def watched(tiny: Path, storage: Path, patch: pytest.MonkeyPatch) -> tuple[Disk, list[Image]]:
    """Run the study; return its disk at the end, and two images of it at each new record."""
    shots: list[Image] = []
    seen: dict[str, int] = {"least": 0, "names_first": 0}

    def look(disk: Disk) -> None:
        for kind, before in seen.items():
            image = getattr(disk, kind)()
            check_records(image)
            if (count := len(records_in(image))) > before:
                seen[kind] = count
                shots.append(image)

    disk = Disk(storage, look)
    with patch.context() as inner:
        inner.setattr(os, "fsync", disk.fsync)
        run(tiny, storage)
    return disk, shots


def test_at_each_record_all_that_is_finished_is_on_the_disk(tiny, whole, tmp_path, monkeypatch):
    storage = tmp_path / "storage"
    storage.mkdir()
    disk, shots = watched(tiny, storage, monkeypatch)
    assert len(shots) == 2 * len(TRIALS)
    for image in (*shots[:2], shots[-1]):  # at the first record and at the last
        before = records_in(image)
        left = restore(image, tmp_path / "left")
        with monkeypatch.context() as patch:
            patch.setattr(claim, "_place", lambda: "this machine, after the cut")
            assert run(tiny, left) == whole
        after = records_on(left)
        for trial, record in before.items():  # it was not run again
            assert after[trial]["environment"]["started"] == record["environment"]["started"]
    # At the end, what later studies use is there too.
    image = disk.least()
    disk.close()
    kept = [path for path in storage.glob("trials/blocks/*/*") if path.is_file()]
    kept += [path for path in storage.glob("baselines/*/*") if path.is_file()]
    kept += storage.glob("prepared/*.safetensors")
    kept += [*storage.glob("sweeps/*.json"), *storage.glob("trials/digests/*.json")]
    assert len(kept) > 12 + 4
    for path in kept:
        assert image[str(path.relative_to(storage))] == path.read_bytes()


@pytest.mark.parametrize("missing", ["the content", "the name"])
def test_a_flush_that_is_missing_is_noticed(tiny, tmp_path, monkeypatch, missing):
    """Of the samples, as q3q once wrote them, or of their folder."""
    storage = tmp_path / "storage"
    storage.mkdir()
    really = files.write_atomically

    def carelessly(path, content, *, wait=True):
        if path.name != "samples.parquet":
            return really(path, content, wait=wait)
        with monkeypatch.context() as patch:
            patch.setattr(files, "flush_folder", lambda folder: None)
            return really(path, content, wait=missing == "the name")

    monkeypatch.setattr("q3q.evaluate.samples.write_atomically", carelessly)
    if missing == "the name":  # the record's flush would bring it along
        disk = Disk(storage)
        monkeypatch.setattr(os, "fsync", disk.fsync)
        monkeypatch.setattr(files, "flush_folder", lambda folder: None)
        run(tiny, storage)
        assert not records_in(disk.least())
        disk.close()
        return
    with pytest.raises(AssertionError, match=r"samples\.parquet, 0 bytes"):
        watched(tiny, storage, monkeypatch)


@pytest.fixture
def ext4(tmp_path) -> Iterator[tuple[Path, Path]]:
    """A small disk in a file, and the folder where it is mounted."""
    if os.geteuid() != 0 or platform.system() != "Linux" or shutil.which("mkfs.ext4") is None:
        pytest.skip("only root can mount a disk, on Linux, with e2fsprogs")
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mount(image, folder)
    yield image, folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(image: Path, folder: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-o", "loop", image, folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")


@pytest.mark.slow
def test_a_real_disk_that_is_cut_off_at_each_record_goes_on(tiny, whole, tmp_path, ext4):
    image, folder = ext4

    def work() -> None:
        save, count = TrialRecord.save, 0

        def save_and_cut(record: TrialRecord) -> None:
            nonlocal count
            save(record)
            count += 1
            subprocess.run(["cp", "--sparse=always", image, tmp_path / f"{count}.img"], check=True)

        TrialRecord.save = save_and_cut  # type: ignore[method-assign,assignment]
        run(tiny, folder / "storage")

    assert end_of(in_child(work)) == 0
    shots = sorted(tmp_path.glob("[0-9]*.img"))
    assert len(shots) >= len(TRIALS)
    for shot in shots:
        subprocess.run(["fsck.ext4", "-p", shot], capture_output=True, check=False)
        place = tmp_path / shot.stem
        place.mkdir()
        mount(shot, place)
        try:
            assert records_on(place / "storage")
            assert run(tiny, place / "storage") == whole
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)

"""A list of tensors, part of it on disk."""

import errno
import gc
import pickle
from pathlib import Path

import pytest
import torch

from q3q.errors import Q3QError
from q3q.models.spool import Spool


def various_tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return [
        base,
        base[2:4],
        base.T,
        torch.tensor(2.5),
        base.bfloat16(),
        torch.zeros(0, 3),
        base[:, ::2].long(),
    ]


@pytest.mark.parametrize("memory", [None, 0, 200, 10**6])
@pytest.mark.parametrize("pinned", [0, 300, 10**6])
def test_tensors_come_back_as_they_were(tmp_path, memory, pinned):
    tensors = various_tensors()
    tensors[0][0, 0] = float("nan")  # bit for bit, whatever the bits mean
    with Spool(memory, tmp_path, pinned=pinned) as spool:
        for tensor in tensors:
            spool.append(tensor)
        assert len(spool) == len(tensors)
        for original, read in zip(tensors, spool, strict=True):
            assert read.dtype == original.dtype
            assert torch.equal(read.nan_to_num(9), original.nan_to_num(9))
            assert read.isnan().sum() == original.isnan().sum()


def test_no_more_than_memory_allows_is_held_and_the_first_stay(tmp_path):
    with Spool(100, tmp_path) as spool:
        for k in range(5):
            spool.append(torch.full((10,), float(k)))  # 40 bytes each
        assert spool.spilled == 3
        [folder] = tmp_path.iterdir()
        assert sorted(file.name for file in folder.iterdir()) == ["2", "3", "4"]
        # Exchanged in order, as a block's inputs are for its outputs.
        for k in range(5):
            spool[k] = spool[k] + 10
        assert spool.spilled == 3
        assert [float(tensor[0]) for tensor in spool] == [10, 11, 12, 13, 14]
        spool[0] = torch.zeros(30)  # does not fit beside the other one any more
        assert spool.spilled == 4
        assert spool[0].shape == (30,)
        assert float(spool[-1][0]) == 14
    assert not list(tmp_path.iterdir())


def test_what_memory_does_not_hold_goes_to_main_memory_before_files(tmp_path):
    with Spool(100, tmp_path, pinned=130) as spool:
        for k in range(6):
            spool.append(torch.full((10,), float(k)))  # 40 bytes each, in lines of 64
        assert (spool.moved, spool.spilled) == (2, 2)
        assert sorted(file.name for file in tmp_path.glob("*/*")) == ["4", "5"]
        before = list(spool)
        for k in range(6):
            spool[k] = spool[k] + 10  # into the same places
        assert (spool.moved, spool.spilled) == (2, 2)
        assert [float(tensor[0]) for tensor in spool] == [10, 11, 12, 13, 14, 15]
        assert [float(tensor[0]) for tensor in before] == [0, 1, 2, 3, 4, 5]
        spool[2] = torch.zeros(30)  # another shape finds no room beside the others
        assert (spool.moved, spool.spilled) == (1, 3)
        assert spool[2].shape == (30,)
    assert not list(tmp_path.iterdir())
    with spool:  # all of it is free again
        spool.extend(torch.ones(10) for _ in range(4))
        assert (spool.moved, spool.spilled) == (2, 0)


def test_in_another_process_it_is_what_it_was_with_files_of_its_own():
    tensors = various_tensors()
    with Spool(200, pinned=128) as spool:
        for tensor in tensors:
            spool.append(tensor)
        content = pickle.dumps(spool)
    with pickle.loads(content) as copy:
        assert 0 < copy.spilled < len(copy)
        assert copy.moved > 0
        assert all(
            torch.equal(read, original) for read, original in zip(copy, tensors, strict=True)
        )


def test_what_one_holds_another_takes_over():
    tensors = various_tensors()
    with Spool(200) as spool, Spool(0) as other:
        spool.append(tensors[0])
        for tensor in tensors[1:]:
            other.append(tensor)
        spool.take(other)
        assert len(other) == 0
        assert 0 < spool.spilled < len(spool)
        assert all(
            torch.equal(read, original) for read, original in zip(spool, tensors, strict=True)
        )


def test_unbounded_it_makes_no_file(tmp_path):
    with Spool(None, tmp_path) as spool:
        for tensor in various_tensors():
            spool.append(tensor)
        assert spool.spilled == 0
        assert not list(tmp_path.iterdir())


def test_a_view_does_not_keep_what_it_is_a_view_of():
    base = torch.zeros(1000)
    spool = Spool(10**6)
    spool.append(base[:10])
    assert spool[0].untyped_storage().nbytes() == 40


def test_its_files_go_when_nobody_holds_it(tmp_path):
    spool = Spool(0, tmp_path)
    spool.append(torch.ones(3))
    assert list(tmp_path.iterdir())
    del spool
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_off_is_an_error_and_not_other_numbers(tmp_path):
    with Spool(0, tmp_path) as spool:
        spool.append(torch.ones(3))
        [file] = [file for file in tmp_path.rglob("*") if file.is_file()]
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(Q3QError, match="11 bytes instead of 12"):
            spool[0]


def test_a_full_scratch_disk_is_said_in_a_line_with_its_folder(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with Spool(0, tmp_path) as spool, pytest.raises(Q3QError) as refused:
        spool.append(torch.ones(3))
    said = str(refused.value)
    assert said.startswith(f"activations cannot be written to {tmp_path}")
    assert "No space left on device. TMPDIR=" in said
    assert "\n" not in said


def test_beyond_its_end_is_an_index_error():
    spool = Spool()
    spool.append(torch.ones(3))
    with pytest.raises(IndexError):
        spool[1]
    with pytest.raises(IndexError):
        spool[1] = torch.ones(3)

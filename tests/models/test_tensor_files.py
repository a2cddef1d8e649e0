"""Tensors are read by several threads, to the same bytes."""

import pytest
import torch

from q3q.errors import CheckpointError
from q3q.models import tensor_files
from q3q.models.tensor_files import encode_tensors, read_header, read_tensors


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "READ_AT_ONCE", 1000)
    monkeypatch.setattr(tensor_files, "readers", lambda: 3)
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(70, 33, generator=draw),
        "half": torch.randn(9, 301, generator=draw).bfloat16(),
        "small": torch.arange(7),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "tensors.safetensors"
    path.write_bytes(b"".join(map(bytes, encode_tensors(tensors))))
    return path, tensors


def test_tensors_are_what_was_written_whole_and_by_rows(file):
    path, tensors = file
    read = read_tensors(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(read_header(path)["large"].read(11, 40), tensors["large"][11:51])


def test_an_end_that_comes_too_early_is_noticed_by_whichever_thread_reads_it(file):
    path, _ = file
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match="ends too early"):
        [tensor.read() for tensor in header.values()]
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        header["large"].read()

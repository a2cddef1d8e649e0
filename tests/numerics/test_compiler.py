"""Triton is tried once, in a child process, and plain kernels serve where it fails."""

import sys
import tempfile
from importlib.util import find_spec

import pytest
import torch

from q3q.environment import COMMAND_ID
from q3q.numerics.kernels import compiler
from q3q.numerics.kernels.compiler import compiler_fault, fault_of, has_fused
from q3q.numerics.kernels.logsum import logsum, logsum_plain
from q3q.numerics.levels import IntegerLevels
from q3q.quantize.kernels.columns import block_solver, solve_block

GPU = torch.device("cuda")
NO_COMPILER = "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
NO_HEADER = "fatal error: Python.h: No such file or directory"


def child(code):
    return [sys.executable, "-S", "-E", "-c", code]


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Return tried(code), which makes the code stand for the first kernel; it counts its runs."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(compiler, "find_spec", lambda name: find_spec("sys"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "TRY", tmp_path / "first.py")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(COMMAND_ID, raising=False)
    runs = tmp_path / "runs"
    compiler_fault.cache_clear()

    def put(code):
        (tmp_path / "first.py").write_text(f"open({str(runs)!r}, 'a').write('x')\n{code}\n")
        return lambda: len(runs.read_text())

    yield put
    compiler_fault.cache_clear()


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (f"raise RuntimeError({NO_COMPILER!r})", "there is no C compiler: install gcc"),
        (f"import sys; sys.exit({NO_HEADER!r})", "Python's headers are missing: install python3-"),
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("import os; os.kill(os.getpid(), 11)", "its process ended with signal 11"),
        ("raise SystemExit(3)", "its process ended with code 3"),
        ("import sys; sys.exit('x' * 1000)", "x" * 200),
    ],
)
def test_a_failure_is_told_in_a_line_with_what_helps(code, fault):
    said = fault_of(child(code))
    assert said is not None
    assert said.startswith(fault)
    assert len(said) <= 200


def test_a_compiler_that_hangs_is_given_up():
    assert fault_of(child("import time; time.sleep(600)"), seconds=0.2) == (
        "a first kernel was not compiled within 0.2 s"
    )
    assert "no process could be started" in str(fault_of(["/nowhere/python"]))


def test_where_triton_fails_plain_kernels_serve_and_it_is_tried_once(tried):
    runs = tried(f"raise RuntimeError({NO_COMPILER!r})")
    assert not has_fused(GPU)
    assert block_solver(GPU, IntegerLevels(4, True)) is solve_block
    assert runs() == 1
    compiler_fault.cache_clear()  # in another process it may be repaired
    assert not has_fused(GPU)
    assert runs() == 2


def test_a_failure_is_remembered_for_the_processes_of_one_command(tried, monkeypatch):
    runs = tried(f"raise RuntimeError({NO_COMPILER!r})")
    monkeypatch.setenv(COMMAND_ID, "first")
    said = []
    for _ in range(2):
        said.append(compiler_fault())
        compiler_fault.cache_clear()
    assert runs() == 1
    assert said == ["there is no C compiler: install gcc, or name one in CC"] * 2
    for setting, value, count in (("CC", "/another", 2), (COMMAND_ID, "next", 3)):
        monkeypatch.setenv(setting, value)
        assert not has_fused(GPU)
        assert runs() == count
        compiler_fault.cache_clear()


def test_where_triton_works_fused_kernels_serve_and_no_process_tries_again(tried, monkeypatch):
    runs = tried("")
    for _ in range(2):
        assert has_fused(GPU)
        compiler_fault.cache_clear()
    assert runs() == 1
    monkeypatch.setenv("CC", "/another/compiler")
    assert has_fused(GPU)
    assert runs() == 2


def test_without_a_gpu_nothing_is_tried(tried):
    tried("raise SystemExit(1)")
    compiler_fault.cache_clear()
    assert not has_fused(torch.device("cpu"))
    assert torch.equal(logsum(torch.ones(2, 3))[0], logsum_plain(torch.ones(2, 3))[0])
    assert compiler_fault.cache_info().currsize == 0

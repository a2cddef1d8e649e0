"""The fast column loops against the plain one; the fused kernel runs in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from q3q.numerics.levels import IntegerLevels, levels_of
from q3q.quantize.kernels.columns import SUB_BLOCK, block_solver, solve_block, solve_block_plain
from q3q.quantize.methods.gptq import gptq_round
from q3q.spec import Scheme

AGAINST_PLAIN = """
import torch
from q3q.quantize.kernels.columns import solve_block_plain
from q3q.quantize.kernels.fused import solve_block_fused
from tests_problem import problem
for shape in ((1, 8, 16, 1), (2, 24, 21, 3), (1, 8, 16, 1, "mxfp4"), (2, 9, 21, 3, "fp8_e4m3")):
    weight, *rest = problem(*shape)
    codes, error = solve_block_plain(weight.clone(), *rest)
    fused_codes, fused_error = solve_block_fused(weight, *rest)
    assert torch.equal(codes, fused_codes)
    torch.testing.assert_close(fused_error, error, rtol=1e-4, atol=1e-5)
    assert codes.unique().numel() > 4
"""


def problem(experts, columns, rows, grids, form="int"):
    """Return a block from the middle of a larger weight, its factor and its grids."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, columns + 16, rows, generator=generator)
    factor = torch.eye(columns) + 0.3 * torch.randn(
        experts, columns, columns, generator=generator
    ).triu(1)
    scale = torch.rand(experts, grids, rows, generator=generator) + 0.1
    zero = torch.randint(0, 8, (experts, grids, rows), generator=generator).float()
    return (
        weight[:, 8 : 8 + columns],
        factor,
        scale,
        zero,
        [i * grids // columns for i in range(columns)],
        levels_of(form, 3, -1, symmetric=False),
    )


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("columns", [1, 20, SUB_BLOCK, 3 * SUB_BLOCK - 5])
@pytest.mark.parametrize("form", ["int", "mxfp4", "fp8_e5m2"])
def test_few_calls_equal_the_plain_loop(doubles, experts, columns, form):
    weight, *rest = problem(experts, columns, 40, 1 if columns == 1 else 4, form)
    plain, plain_error = solve_block_plain(weight.clone(), *rest)
    codes, error = solve_block(weight.clone(), *rest)
    assert torch.equal(codes, plain)
    torch.testing.assert_close(error, plain_error, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_whole_method_gives_the_same_codes_with_either(doubles, act_order):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, 96, generator=generator) @ torch.randn(2, 96, 96, generator=generator)
    weight, scheme = (
        torch.randn(2, 24, 96, generator=generator),
        Scheme(bits=3, group_size=32, symmetric=False),
    )
    plain, fast = (
        gptq_round(
            weight, x.mT @ x, scheme, act_order=act_order, block_size=48, solver=solver
        ).weight
        for solver in (solve_block_plain, solve_block)
    )
    assert torch.equal(plain.codes_EOI, fast.codes_EOI)


def test_a_cpu_takes_the_loop_of_few_calls():
    assert block_solver(torch.device("cpu"), IntegerLevels(4, True)) is solve_block


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed: the fused kernel is not tested here",
)
def test_the_fused_kernel_equals_the_plain_loop(tmp_path):
    """In a process of its own, since Triton reads TRITON_INTERPRET once, when it is imported."""
    (tmp_path / "tests_problem.py").write_text(
        "from importlib.util import spec_from_file_location, module_from_spec\n"
        f"spec = spec_from_file_location('problems', {__file__!r})\n"
        "module = module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\nproblem = module.problem\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", AGAINST_PLAIN]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr

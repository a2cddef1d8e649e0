"""The sum over logits: plain, and the fused kernels in Triton's interpreter, a norm's too."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from q3q.numerics.kernels.logsum import logsum

AGAINST_PLAIN = """
import torch
from q3q.numerics.kernels import first_kernel, fused
from q3q.numerics.kernels.logsum import logsum_plain
first_kernel.main()
fused.BLOCK_COLUMNS = 64
for columns in (3, 64, 150):
    for dtype in (torch.float32, torch.bfloat16):
        logits = (5 * torch.randn(4, columns, generator=torch.Generator().manual_seed(0))).to(dtype)
        logits[1, 1:] = -torch.inf
        before = logits.clone()
        logsum, highest = fused.logsum_fused(logits)
        assert torch.equal(logits, before)
        expected, expected_highest = logsum_plain(before)
        torch.testing.assert_close(logsum, expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(highest, expected_highest)

from q3q.numerics.kernels import fused_norm
from q3q.numerics.kernels.norm import rms_norm_plain
fused_norm.NUMBERS = 64
draw = torch.Generator().manual_seed(0)
for shape in ((5, 16), (2, 3, 33), (7, 64), (2, 100), (0, 8)):
    # The interpreter cuts bfloat16 off where a GPU rounds, twice in a norm.
    for dtype, rtol, least in (
        (torch.float32, 1e-6, 0), (torch.float16, 2**-10, 0.99), (torch.bfloat16, 2**-6, 0)
    ):
        for offset in (0.0, 1.0):
            x = (30 * torch.randn(shape, generator=draw)).to(dtype)
            gain = torch.randn(shape[-1], generator=draw).to(dtype)
            before, strided = x.clone(), x.repeat_interleave(2, -1)[..., ::2]
            expected = rms_norm_plain(x, gain, 1e-6, offset)
            for given in (x, strided):
                found = fused_norm.rms_norm_fused(given, gain, 1e-6, offset)
                assert found.dtype == dtype and found.shape == x.shape
                torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
                assert x.numel() == 0 or (found == expected).float().mean() >= least, (
                    shape, dtype, offset, (found == expected).float().mean()
                )
            assert torch.equal(x, before)
"""


def test_the_sum_is_that_of_the_formula():
    logits = 50 * torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    result, highest = logsum(logits.clone())
    torch.testing.assert_close(result, logits.double().exp().sum(1).log().float())
    assert torch.equal(highest, logits.max(1).values)
    assert logsum(torch.tensor([[1.0, torch.nan]]))[0].isnan().all()


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed: the fused kernel is not tested here",
)
def test_the_fused_kernels_equal_the_plain_ones():
    """In a process of its own, since Triton reads TRITON_INTERPRET once, when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", AGAINST_PLAIN]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr

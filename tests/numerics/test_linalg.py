"""Linear algebra of the Hessian, against float64 and plain products."""

import math

import pytest
import torch

from q3q.numerics import linalg
from q3q.numerics.linalg import (
    add_gram,
    all_finite,
    invert_upper_triangular,
    mirror,
    quadratic_form_E,
    reverse,
)


def tokens(count, columns, seed=0):
    """Return correlated tokens, a few of whose channels are a hundred times the others, as in a
    transformer.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    x = x + torch.randn(count, columns, generator=generator)
    x[:, :: columns // 4] *= 100
    return x


def gram(x):
    upper = torch.zeros(x.shape[1], x.shape[1])
    for part in x.split(512):
        add_gram(upper, part)
    mirror(upper[None])
    return upper


def error(result, x):
    exact = x.double().T @ x.double()
    return float((result - exact).norm() / exact.norm())


@pytest.mark.parametrize("columns", [1, 64, 200, 300, 700])
def test_panels_make_the_whole_symmetric_matrix(columns):
    x = torch.randn(1100, columns, generator=torch.Generator().manual_seed(0))
    result = gram(x)
    assert torch.equal(result, result.T)
    torch.testing.assert_close(result, x.T @ x, rtol=1e-4, atol=1e-3)


def kept_bits(x, bits):
    """Round a float32's mantissa to so many bits (TF32 keeps 10, bfloat16 7)."""
    unit = 2.0 ** (x.abs().log2().floor() - bits)
    return (x / unit).round() * unit


@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)]
)
def test_products_of_two_16_bit_numbers_are_exact_in_float32_and_tf32_changes_neither(dtype, exact):
    x = tokens(64, 64).to(dtype)
    assert torch.equal(kept_bits(x.float(), 10), x.float()) == exact
    left, right = x.flatten()[:, None], x.flatten()[None, ::7]
    product = left.float() * right.float()
    assert torch.equal(product.double(), left.double() * right.double()) == exact


def test_the_sum_of_16_bit_tokens_is_as_close_to_float64_as_that_of_float32s():
    """They are converted to float32 first, where nothing multiplies them as they are."""
    x = tokens(4096, 256)
    narrow = x.bfloat16()
    assert torch.equal(gram(narrow), gram(narrow.float()))
    assert error(gram(narrow), narrow) < 1e-6


def test_error_of_float32_sums_and_of_narrower_products_against_float64():
    """Inputs rounded as a tensor core reads them; products are summed in float32 in all three
    cases.
    """
    x = tokens(4096, 256)
    assert torch.equal(kept_bits(x, 7), x.bfloat16().float())
    errors = {
        name: error(gram(kept_bits(x, bits)), x)
        for name, bits in {"fp32": 23, "tf32": 10, "bf16": 7}.items()
    }
    assert errors["fp32"] < 1e-6
    assert 20 * errors["fp32"] < errors["tf32"] < 2e-4
    assert 4 * errors["tf32"] < errors["bf16"] < 2e-3


def test_a_quadratic_form_is_the_trace():
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(3, 5, 300, generator=generator),
        torch.randn(3, 50, 300, generator=generator),
    )
    symmetric = x.mT @ x
    expected = torch.stack(
        [torch.trace(w @ s @ w.T) for w, s in zip(weight, symmetric, strict=True)]
    )
    torch.testing.assert_close(quadratic_form_E(weight, symmetric), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 517])
def test_inverse_by_halves_equals_float64s(columns):
    generator = torch.Generator().manual_seed(0)
    upper = (
        torch.eye(columns) + torch.randn(2, columns, columns, generator=generator).triu() / columns
    )
    result = upper.clone()
    invert_upper_triangular(result)
    assert torch.equal(result, result.triu())
    torch.testing.assert_close(
        result.double(), torch.linalg.inv(upper.double()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("columns", [1, 2, 5, 8])
def test_reversing_in_place_flips_both_axes(columns, monkeypatch):
    monkeypatch.setattr(linalg, "REVERSED_AT_ONCE", 3)
    matrix = torch.arange(2.0 * columns**2).view(2, columns, columns)
    result = matrix.clone()
    reverse(result)
    assert torch.equal(result, matrix.flip(-1, -2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (7,), (5, 4), (2, 3, 4), (3, 67)])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(shape, dtype):
    numbers = torch.linspace(-5e4, 5e4, math.prod(shape)).view(shape).to(dtype)
    assert all_finite(numbers)
    for i in range(numbers.numel()):
        for wrong in (math.nan, math.inf, -math.inf):
            flat = numbers.flatten().clone()
            flat[i] = wrong
            assert not all_finite(flat.view(shape))
            assert not all_finite(flat.view(shape).transpose(0, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_nan_among_many_numbers_is_found_by_all_threads_together(dtype):
    numbers = torch.zeros(300_000, dtype=dtype)
    for i in (0, 1, 99_999, 150_000, 299_999):
        numbers[i] = math.nan
        assert not all_finite(numbers)
        numbers[i] = 0
    assert all_finite(numbers)

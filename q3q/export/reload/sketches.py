"""Small numbers in which any change of a large tensor shows, to compare two processes' tensors."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WIDE_NUMBERS = 1 << 22  # entries of a matrix widened at a time to be sketched


def sketch(weight: "Tensor") -> list[float]:
    """Return [u^T W v, |W|] in float64, for fixed random u and v: any change of a weight moves it.

    The difference of two sketches over the norm estimates the weights' relative difference.
    """
    rows = max(1, WIDE_NUMBERS // max(1, weight[0].numel()))
    return sketch_rows(weight.shape, weight.split(rows))


def sketch_rows(shape: Sequence[int], parts: Iterable["Tensor"]) -> list[float]:
    """Return the `sketch` of a weight that comes in parts along its first axis."""
    import torch

    vectors = [
        torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(7 + axis))
        for axis, size in enumerate(shape)
    ]
    total, square, start = 0.0, 0.0, 0
    for part in parts:
        value = wide = part.detach().cpu().double()
        for vector in reversed(vectors[1:]):
            value = value @ vector
        total += float(value @ vectors[0][start : start + len(part)])
        square += float(wide.square_().sum())
        start += len(part)
    return [total, square**0.5]


def projection(x: "Tensor") -> "Tensor":
    """Return each token's dot product with a fixed random vector (mean square: |token|^2)."""
    import torch

    generator = torch.Generator().manual_seed(11)
    direction = torch.randn(x.shape[-1], dtype=torch.float64, generator=generator)
    return x.detach().cpu().double().flatten(0, -2) @ direction

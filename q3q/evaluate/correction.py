"""Families of comparisons: of a hundred tests at 5 %, five find a difference where there is none.

A family is the set of tests of which a reader would report the best: all pairs of methods by one
measure, or each trial against the unquantized model. Its p-values are corrected together, so that
the chance of a single false difference in the whole family is at most LEVEL.
"""

from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key")


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Return the corrected p-values, in the order of the given ones.

    Holm (Scandinavian Journal of Statistics 6, 1979): the i-th smallest of m p-values, i = 0, 1,
    ..., is multiplied by m - i, and none is less than one before it. It holds whatever the tests
    have in common, and finds all that Bonferroni's correction finds. A single test stays as it is.

    Raises:
        ValueError: one of them is not a probability.
    """
    wrong = {key: p for key, p in p_values.items() if not 0 <= p <= 1}
    if wrong:
        raise ValueError(f"p-values must lie between 0 and 1: {wrong}")
    corrected: dict[Key, float] = {}
    largest, count = 0.0, len(p_values)
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (count - rank) * p_values[key]))
        corrected[key] = largest
    return {key: corrected[key] for key in p_values}

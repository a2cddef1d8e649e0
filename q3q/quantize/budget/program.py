"""Which width each unit gets: the exact integer program, and its rule for ties.

Minimize the sum of the chosen costs, where each unit gets one width and the chosen sizes stay
within the limit (the multiple-choice knapsack problem). All numbers in the program are whole:
sensitivities are rounded to `DIGITS` significant digits, then to whole parts of what a greedy
allotment costs, of which it has `PARTS`. What the solver returns is checked in whole numbers. Among
allotments of equal cost the smallest wins, and among those the one that gives the earlier units
less. So equal inputs give equal widths, whatever path the solver takes on a machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from q3q.errors import IntegrityError

DIGITS = 4  # significant, of a sensitivity
PARTS = 10**5  # of the greedy allotment's cost: the unit of costs in the program
TOGETHER = 6  # units whose ties are broken by one program
Numbers = Sequence[Sequence[int]]


def rounded(value: float) -> float:
    """Round a sensitivity to the digits that count; what rounding made negative is 0."""
    return float(f"{max(0.0, value):.{DIGITS - 1}e}")


def allot(costs: Sequence[Sequence[float]], sizes: Numbers, limit: int) -> list[int]:
    """Return the number of each unit's width.

    Args:
        costs: of each unit at each width, 0 or more.
        sizes: likewise, in bits.
        limit: of the sum of the chosen sizes.

    Raises:
        ValueError: no allotment stays within the limit.
        IntegrityError: the solver did not end.
    """
    least = sum(map(min, sizes))
    if least > limit:
        raise ValueError(f"the smallest allotment takes {least} bits, and the limit is {limit}")
    whole = _whole(costs)
    whole = _in_parts(
        whole, sum(row[w] for row, w in zip(whole, _greedy(whole, sizes, limit), strict=True))
    )
    program = _Program(whole, sizes, limit)
    best = program.least(whole)
    cost = program.total(whole, best)
    program.bound(whole, cost)
    best = program.least(sizes)
    program.bound(sizes, program.total(sizes, best))
    other = program.another(best)
    if other is None:
        return best
    # Lexicographic: some units at a time, each worth more than all later ones together.
    ranks = [[sorted(set(row)).index(size) for size in row] for row in sizes]
    width = max(map(len, sizes))
    for start in range(0, len(sizes), TOGETHER):
        part = range(start, min(start + TOGETHER, len(sizes)))
        weights = [
            [rank * width ** (part.stop - 1 - u) if u in part else 0 for rank in row]
            for u, row in enumerate(ranks)
        ]
        best = program.least(weights)
        program.bound(weights, program.total(weights, best))
    return best


def _whole(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """Return costs as whole numbers of one power of ten, exactly as they are rounded."""
    exact = [[Decimal(f"{max(0.0, cost):.{DIGITS - 1}e}") for cost in row] for row in costs]
    powers = [int(cost.as_tuple().exponent) for row in exact for cost in row if cost != 0]
    shift = Decimal(10) ** -min(powers, default=0)
    return [[int(cost * shift) for cost in row] for row in exact]


def _in_parts(costs: list[list[int]], total: int) -> list[list[int]]:
    """Return costs in parts of the total that one allotment costs, rounded.

    A width that alone costs more than that is in no best allotment; its cost is cut off.
    """
    if total == 0:
        return [[min(cost, 1) for cost in row] for row in costs]
    return [
        [min((2 * PARTS * cost + total) // (2 * total), PARTS + 1) for cost in row] for row in costs
    ]


def _greedy(costs: list[list[int]], sizes: Numbers, limit: int) -> list[int]:
    """Return an allotment that fits: from the smallest on, the step that gains most a bit."""
    chosen = [min(range(len(row)), key=lambda w: (row[w], w)) for row in sizes]
    left = limit - sum(row[w] for row, w in zip(sizes, chosen, strict=True))
    while True:
        best: tuple[tuple[float, int, int], int, int] | None = None
        for u, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
            for w in range(len(size)):
                gain, more = cost[chosen[u]] - cost[w], size[w] - size[chosen[u]]
                if gain <= 0 or more > left:
                    continue
                key = (-gain / more if more > 0 else -math.inf, u, w)
                if best is None or key < best[0]:
                    best = key, u, w
        if best is None:
            return chosen
        _, u, w = best
        left -= sizes[u][w] - sizes[u][chosen[u]]
        chosen[u] = w


@dataclass
class _Program:
    """Zero-one variables, one for each unit and width, and rows that bound sums of them."""

    costs: Numbers
    sizes: Numbers
    limit: int
    rows: list[tuple[list[int], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts = list(np.cumsum([0, *map(len, self.sizes)]))
        self.bound(self.sizes, self.limit)

    def total(self, numbers: Numbers, chosen: Sequence[int]) -> int:
        return sum(row[w] for row, w in zip(numbers, chosen, strict=True))

    def bound(self, numbers: Numbers, most: int) -> None:
        """Let the sum of the chosen numbers be at most this.

        Each unit's least number is taken from both sides, and both are divided by what divides all
        that is left: the same bound in small numbers.
        """
        least = [min(row) for row in numbers]
        flat = [number - low for row, low in zip(numbers, least, strict=True) for number in row]
        divisor = math.gcd(*flat) or 1
        self.rows.append(([number // divisor for number in flat], (most - sum(least)) // divisor))

    def another(self, chosen: Sequence[int]) -> list[int] | None:
        """Return an allotment within all bounds that is not this one; None if there is none."""
        same = [
            [int(w == own) for w in range(len(row))]
            for row, own in zip(self.sizes, chosen, strict=True)
        ]
        self.bound(same, len(self.sizes) - 1)
        try:
            return self._solve([0] * self.starts[-1])
        finally:
            self.rows.pop()

    def least(self, numbers: Numbers) -> list[int]:
        """Return the allotment with the least sum within all bounds."""
        allotment = self._solve([number for row in numbers for number in row])
        if allotment is None:
            raise IntegrityError("the integer program found no allotment where there is one")
        return allotment

    def _solve(self, objective: Sequence[int]) -> list[int] | None:
        # Most trials allot nothing, and this import takes most of a second.
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        count, units = self.starts[-1], len(self.sizes)
        unit_of = np.repeat(np.arange(units), [len(row) for row in self.sizes])
        each = csr_array((np.ones(count), (unit_of, np.arange(count))), shape=(units, count))
        # Sums of whole numbers: the half keeps a solver's tolerance from either side.
        bounds = [
            LinearConstraint(np.array([row], dtype=float), -np.inf, most + 0.5)
            for row, most in self.rows
        ]
        result = milp(
            np.array(objective, dtype=float),
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(each, 1, 1), *bounds],
            options={"mip_rel_gap": 0.0},
        )
        if result.status == 2:  # infeasible
            return None
        if result.x is None or result.status != 0:
            raise IntegrityError(f"the integer program did not end: {result.message}")
        chosen = [
            int(np.argmax(result.x[start:stop]))
            for start, stop in zip(self.starts, self.starts[1:], strict=False)
        ]
        for row, most in self.rows:
            picked = (row[start + w] for start, w in zip(self.starts, chosen, strict=False))
            if sum(picked) > most:
                raise IntegrityError("the integer program's allotment exceeds a bound")
        return chosen

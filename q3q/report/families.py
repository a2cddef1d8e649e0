"""Which differences of a study are more than chance, in families that are corrected together.

Every "best", "cannot be told apart" and "no significant difference" of a report, of a terminal's
last lines and of a tracker's note comes from here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

from q3q.evaluate.correction import holm
from q3q.evaluate.power import LEVEL
from q3q.evaluation import is_perplexity
from q3q.formatting import plural, significant
from q3q.report.changes import Change, change, change_between, p_of_pair
from q3q.report.measures import short
from q3q.report.pools import Pool
from q3q.report.tables import Table

CERTAIN = 0.0001  # a corrected p-value below it needs no row of its own
Pair = frozenset[str]  # the names of two pools
NOTE = (
    "p: how often chance alone gives such a difference. Corrected: by Holm's method over all tests "
    "of the table, so that the chance of a single false difference among them is at most 5 %. "
    "Below 0.05 a difference counts."
)


@dataclass(frozen=True)
class Family:
    """Tests that are corrected together.

    name: what they compare, in words.
    p_values: of each test alone, None where it could not be made; by the names of what it compares.
    changes: what changes to the first name from the second; None where it is unknown.
    """

    name: str
    p_values: Mapping[Pair, float | None]
    changes: Mapping[tuple[str, str], Change | None]

    @property
    def size(self) -> int:
        """The number of tests that were made."""
        return len(self.corrected)

    @cached_property
    def corrected(self) -> Mapping[Pair, float]:
        return holm({key: p for key, p in self.p_values.items() if p is not None})

    def same(self, key: Pair) -> bool | None:
        """Return True if chance explains a difference, None if it was not tested."""
        p_value = self.corrected.get(key)
        return None if p_value is None else p_value >= LEVEL

    def table(self) -> Table:
        """Return a row for each test with a corrected p of at least CERTAIN, the clearest first."""
        tests = [
            (frozenset(names), *names, change_of_pair)
            for names, change_of_pair in self.changes.items()
        ]
        made = [test for test in tests if test[0] in self.corrected]
        made.sort(key=lambda test: (self.p_values[test[0]] or 0.0, sorted(test[0])))
        certain = sum(p < CERTAIN for p in self.corrected.values())
        rows = tuple(
            (
                f"{first} against {second}",
                "-" if change_of_pair is None else change_of_pair.amount,
                probability(self.p_values[key] or 0.0),
                probability(self.corrected[key]),
                "the same within chance" if self.same(key) else "different",
            )
            for key, first, second, change_of_pair in made
            if self.corrected[key] >= CERTAIN
        )
        note = f"{certain} of these differ with a corrected p below {CERTAIN}." if certain else ""
        columns = ("compared", "difference", "p", "p, corrected", "verdict")
        return Table(self.name, columns, rows, note)


@dataclass(frozen=True)
class Families:
    """The tests of one answer: of trials that may be compared.

    pairs: each two choices, by metric; of the first metric at all widths, of the others at one.
    changes: each choice from the unquantized model, corrected, by metric and its name.
    of_changes: the family that those are corrected in, by metric.
    """

    pairs: Mapping[str, Family]
    changes: Mapping[str, Mapping[str, Change]]
    of_changes: Mapping[str, Family]

    def same(self, first: Pool, second: Pool, metric: str) -> bool | None:
        """Return True if chance explains the difference of two pools, None if it is unknown."""
        if first.cell(metric) == second.cell(metric):
            return True
        return self.pairs[metric].same(pair(first, second))

    def change(self, pool: Pool, metric: str) -> Change | None:
        return self.changes[metric].get(pool.name)

    def tables(self) -> list[Table]:
        every = [*self.pairs.values(), *self.of_changes.values()]
        return [family.table() for family in every if family.size]


def pair(first: Pool, second: Pool) -> Pair:
    return frozenset((first.name, second.name))


def families(tried: Sequence[Pool], reference: Pool | None, metrics: Sequence[str]) -> Families:
    """Test all pairs of choices and all changes, by each metric.

    Args:
        tried: quantized choices that may be compared.
        metrics: the one that ranks first.
    """
    pairs, changes, of_changes = {}, {}, {}
    for number, metric in enumerate(metrics):
        measured = [pool for pool in tried if isinstance(pool.cell(metric), float)]
        both = [(a, b) for a, b in combinations(measured, 2) if number == 0 or a.bits == b.bits]
        where = "of choices" if number == 0 else "of choices of one width"
        by = _by(metric)
        between = {(a.name, b.name): change_between(a, b, metric) for a, b in both}
        p_values = {
            pair(a, b): p_of_pair(a, b, reference, between[a.name, b.name]) for a, b in both
        }
        pairs[metric] = Family(f"{plural(len(both), 'pair')} {where}, by {by}", p_values, between)
        by_pool = {pool.name: change(pool, reference, metric) for pool in measured}
        tested = {name: each for name, each in by_pool.items() if each is not None}
        name = reference.name if reference else "the unquantized model"
        tests = {frozenset((key, name)): _p_of_change(each) for key, each in tested.items()}
        family = Family(
            f"{plural(len(tested), 'change')} from the unquantized model, by {by}",
            tests,
            {(key, name): each for key, each in tested.items()},
        )
        of_changes[metric] = family
        changes[metric] = {
            key: _corrected(each, family.same(frozenset((key, name))))
            for key, each in tested.items()
        }
    return Families(pairs, changes, of_changes)


def corrected(changes: Iterable[Change | None]) -> list[Change | None]:
    """Return changes of one family, each with what its corrected test says."""
    every = list(changes)
    p_values = {
        number: p
        for number, each in enumerate(every)
        if each is not None and (p := _p_of_change(each)) is not None
    }
    verdicts = {number: p >= LEVEL for number, p in holm(p_values).items()}
    return [
        None if each is None else _corrected(each, verdicts.get(number))
        for number, each in enumerate(every)
    ]


def _corrected(test: Change, same: bool | None) -> Change:
    return test if same is None else replace(test, distinguishable=not same)


def _p_of_change(test: Change) -> float | None:
    if test.p_value is not None or test.distinguishable is None:
        return test.p_value
    return 0.0 if test.distinguishable else 1.0


def _by(metric: str) -> str:
    words = short(metric).removesuffix(", %")
    return words.replace("perplexity, ", "perplexity of ") if is_perplexity(metric) else words


def probability(p_value: float) -> str:
    return f"< {CERTAIN}" if p_value < CERTAIN else significant(p_value, 2) if p_value < 1 else "1"

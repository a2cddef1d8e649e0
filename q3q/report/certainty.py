"""How sure differences are: flipped answers, what the questions could show, equivalence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import TYPE_CHECKING

from q3q.evaluate.correction import holm
from q3q.evaluate.power import (
    LEVEL,
    effective_discordance,
    effective_questions,
    smallest_difference,
)
from q3q.evaluation import change_unit, is_accuracy, is_perplexity
from q3q.formatting import percent, plural
from q3q.report.families import Families, probability
from q3q.report.measures import ABSENT
from q3q.report.pairs import flips_of_tasks
from q3q.report.pools import Pool
from q3q.report.tables import Table
from q3q.spec import MEAN_ACCURACY

if TYPE_CHECKING:
    from q3q.evaluate.flips import Flips

FLIPS_NOTE = (
    "Flipped: answers that changed from right to wrong or from wrong to right, of all answers, "
    "with a 95 % interval (arXiv 2407.09141). Smallest difference: what these questions find in "
    "80 % of studies, given how many answers flipped and how many changes are tested together."
)


@dataclass(frozen=True)
class Certainty:
    """What is known of one answer's differences beside its tests.

    tried, reference: its choices, and the unquantized model.
    metrics: its measures.
    tests: its corrected tests.
    margin: how much may be lost, in percent of a perplexity and in points of an accuracy; None if
        the reader has not said it.
    """

    tried: tuple[Pool, ...]
    reference: Pool | None
    metrics: tuple[str, ...]
    tests: Families
    margin: float | None = None

    @property
    def accuracy(self) -> str | None:
        """The measure that is an accuracy, if any."""
        return next((metric for metric in self.metrics if is_accuracy(metric)), None)

    @cached_property
    def flips(self) -> Mapping[str, "Flips"]:
        """The flips of each choice's answers, by its name, where samples are there."""
        return {name: reduce(add, tasks.values()) for name, tasks in self._by_task.items()}

    @cached_property
    def _by_task(self) -> Mapping[str, Mapping[str, "Flips"]]:
        if self.accuracy is None or self.reference is None:
            return {}
        flips = {p.name: flips_of_tasks(p, self.reference, self.accuracy) for p in self.tried}
        return {name: tasks for name, tasks in flips.items() if tasks is not None}

    def smallest_loss(self, pool: Pool) -> float | None:
        """Return the smallest difference in accuracy that could have been shown, as a share.

        The changes from the unquantized model are one family, of which Holm's method holds the
        clearest to the level divided by their number. What passes that, passes.
        """
        tasks = self._by_task.get(pool.name)
        if tasks is None or self.accuracy is None:
            return None
        counts = [self._asked(pool, flips) for flips in tasks.values()]
        return smallest_difference(
            effective_questions(counts),
            effective_discordance([flips.share for flips in tasks.values()], counts),
            level=LEVEL / max(1, self.tests.of_changes[self.accuracy].size),
        )

    @property
    def asked(self) -> int:
        """How many questions a trial was asked."""
        counts = (self._asked(p, flips) for p in self.tried if (flips := self.flips.get(p.name)))
        return max(counts, default=0)

    def _asked(self, pool: Pool, flips: "Flips") -> int:
        """Return how many different questions there were: seeds ask the same ones again."""
        return flips.n // max(1, sum(record.completed for record in pool.records))

    @cached_property
    def equivalent(self) -> Mapping[str, Mapping[str, bool]]:
        """Whether each choice is shown to stay within the margin, by measure and name.

        Corrected by Holm's method over the choices. What has no paired interval is left out.
        """
        return {
            metric: {name: p < LEVEL for name, p in holm(p_values).items()}
            for metric, p_values in self._equivalence.items()
        }

    @cached_property
    def _equivalence(self) -> Mapping[str, Mapping[str, float]]:
        from q3q.evaluate.equivalence import equivalence

        if self.margin is None:
            return {}
        result: dict[str, dict[str, float]] = {}
        for metric in self.metrics:
            unit = math.log1p(self.margin / 100) if is_perplexity(metric) else self.margin / 100
            own = result.setdefault(metric, {})
            for pool in self.tried:
                change = self.tests.change(pool, metric)
                if change is not None and change.paired is not None:
                    p_value = equivalence(change.paired, unit)
                    if p_value is not None:
                        own[pool.name] = p_value
        return result

    def unpaired(self, metric: str) -> list[str]:
        """Return the choices whose equivalence cannot be tested, as no samples are paired."""
        tested = self._equivalence.get(metric, {})
        return [
            pool.name
            for pool in self.tried
            if isinstance(pool.cell(metric), float) and pool.name not in tested
        ]

    def tables(self, name: str) -> list[Table]:
        """Return a table of flips, and one of equivalence for each measure; none where unknown."""
        tables = [self._flips_table(name)] if self.flips else []
        if self.margin is not None:
            tables += [self._margin_table(name, metric) for metric in self.metrics]
        return [table for table in tables if table.rows]

    def _flips_table(self, name: str) -> Table:
        rows = []
        for pool in self.tried:
            each = self.flips.get(pool.name)
            if each is None:
                continue
            low, high = each.interval(self._asked(pool, each))
            smallest = self.smallest_loss(pool)
            lost = each.lost_of_right
            rows.append(
                (
                    pool.name,
                    str(each.lost),
                    ABSENT if lost is None else f"{percent(lost)} %",
                    str(each.won),
                    f"{percent(each.share)} % [{percent(low)}, {percent(high)}]",
                    "none" if smallest is None else f"{percent(smallest)} points",
                )
            )
        columns = (
            "choice",
            "right to wrong",
            "of the right answers",
            "wrong to right",
            "flipped of all",
            "smallest difference",
        )
        title = f"{name}: answers that flipped, of {plural(self.asked, 'question')}"
        return Table(title, columns, tuple(rows), FLIPS_NOTE)

    def _margin_table(self, name: str, metric: str) -> Table:
        p_values = self._equivalence.get(metric, {})
        adjusted = holm(p_values)
        unit = change_unit(metric)
        words = in_words(metric)
        rows = tuple(
            (
                pool.name,
                str(self.tests.change(pool, metric)),
                probability(p_values[pool.name]),
                probability(adjusted[pool.name]),
                "yes" if adjusted[pool.name] < LEVEL else "not shown",
            )
            for pool in self.tried
            if pool.name in p_values
        )
        left = self.unpaired(metric)
        note = f"Not tested, as no samples are paired: {', '.join(left)}." if left else ""
        margin = f"{self.margin:g} {unit}"
        title = f"{name}: is the {words} within {margin} of the unquantized model's?"
        return Table(
            title, ("choice", "change", "p", "p, corrected", f"within {margin}"), rows, note
        )


def in_words(metric: str) -> str:
    """Return `perplexity of library`, `mean accuracy`, `accuracy on boolq`."""
    if metric == MEAN_ACCURACY:
        return "mean accuracy"
    if is_perplexity(metric):
        return f"perplexity of {metric.partition('/')[2]}"
    return f"accuracy on {metric.removesuffix('/acc')}"

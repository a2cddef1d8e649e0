"""The best choice for each size: what it loses, what ties with it, and how to export it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from q3q.config.command import export_command
from q3q.formatting import bytes_in_words, plural
from q3q.kv_scheme import CacheShape
from q3q.record import TrialRecord
from q3q.report.changes import UNTESTED, Change
from q3q.report.checkpoints import exported, folder_of
from q3q.report.families import Families
from q3q.report.measures import is_better
from q3q.report.pools import Pool
from q3q.report.sizes import Size, bytes_of, cache_scheme_of, cache_shape_of
from q3q.report.tables import Table

ALIKE = 1.03  # sizes that differ by less share a budget
MOST = 6  # budgets in a table
MOST_NAMED = 4  # methods in a list


@dataclass(frozen=True)
class Memory:
    """What a model takes beside its weights: the cache of one text of so many tokens."""

    shape: CacheShape
    context: int

    @classmethod
    def of(cls, records: Sequence[TrialRecord], context: int | None) -> "Memory | None":
        """Return None without a context, or where nothing knows the model's config.json."""
        shape = None if context is None else cache_shape_of(records)
        return None if shape is None or context is None else cls(shape, context)

    def cache(self, pool: Pool) -> float:
        return self.shape.bytes_at(cache_scheme_of(pool.records[0]), self.context)


@dataclass(frozen=True)
class Choice:
    """The best choice among those that a number of bytes holds.

    budget: bytes, of the weights and of a cache that counts; the largest of the sizes that are
        nearly alike.
    size: of the best choice.
    change: from the unquantized model, by the first measure.
    tied: choices within the budget that cannot be told apart from it.
    untested: those of which that is unknown.
    """

    budget: float
    best: Pool
    size: Size
    change: Change | None
    tied: tuple[Pool, ...]
    untested: tuple[Pool, ...]

    @property
    def command(self) -> str:
        """The command that exports it; empty if it has been exported, or no format holds it."""
        return command_of(self.best)

    @property
    def checkpoint(self) -> str:
        """The folder of its checkpoint; empty if it has not been exported."""
        record = _first(self.best)
        return folder_of(record) if exported([record]) else ""

    @property
    def loses(self) -> str:
        return "unknown" if self.change is None else str(self.change)

    @property
    def ties(self) -> str:
        parts = [by_width(self.tied)] if self.tied else []
        parts += [f"{UNTESTED}: {by_width(self.untested)}"] if self.untested else []
        return "; ".join(parts) or "nothing"


def command_of(pool: Pool) -> str:
    """Return the command that exports a choice; empty if it is exported, or no format holds it."""
    from q3q.export.formats import format_of_choice

    record = _first(pool)
    form = format_of_choice(record.spec)
    return "" if form is None or exported([record]) else export_command(record.trial, form)


def _first(pool: Pool) -> TrialRecord:
    """Return the trial that stands for a choice: its first seed."""
    return next(record for record in pool.records if record.completed)


def size_of(pool: Pool, memory: Memory | None = None) -> Size | None:
    """Return the bytes of a pool's model, and of its cache if that counts."""
    sizes = (size for record in pool.records if (size := bytes_of(record)) is not None)
    size = next(sizes, None)
    if size is None or memory is None:
        return size
    return Size(size.value + memory.cache(pool), size.rule)


def budgets(
    tried: Sequence[Pool],
    tests: Families,
    metric: str,
    chosen: Pool | None = None,
    memory: Memory | None = None,
) -> list[Choice]:
    """Return a choice for each size at which a larger one is better; the smallest first.

    Args:
        chosen: the recommended choice, which has a row also where another is better at its size.
        memory: the cache that counts too.
    """
    sized = [
        (size, pool)
        for pool in tried
        if (size := size_of(pool, memory)) is not None and isinstance(pool.cell(metric), float)
    ]
    sized.sort(key=lambda item: item[0].value)

    def choice(budget: float, best: Pool) -> Choice:
        others = [pool for size, pool in sized if size.value <= budget and pool is not best]
        same = [(pool, tests.same(best, pool, metric)) for pool in others]
        tied = tuple(pool for pool, tie in same if tie)
        untested = tuple(pool for pool, tie in same if tie is None)
        size = next(size for size, pool in sized if pool is best)
        return Choice(budget, best, size, tests.change(best, metric), tied, untested)

    choices: list[Choice] = []
    for budget in _steps([size.value for size, _ in sized]):
        within = [pool for size, pool in sized if size.value <= budget]
        best = best_of(within, metric)
        if best is not None and (not choices or choices[-1].best is not best):
            choices.append(choice(budget, best))
    if all(each.best is not chosen for each in choices):
        choices += [choice(size.value, pool) for size, pool in sized if pool is chosen]
    return sorted(choices, key=lambda each: each.budget)


def best_of(tried: Sequence[Pool], metric: str) -> Pool | None:
    """Return the pool with the best number, the first of equal ones; None if none has one."""
    best: Pool | None = None
    for pool in tried:
        value = pool.cell(metric)
        if isinstance(value, float) and (
            best is None or is_better(value, float(best.cell(metric)), metric)
        ):
            best = pool
    return best


def smallest(able: Sequence[Pool], metric: str, memory: Memory | None = None) -> Pool:
    """Return the smallest pool with a number; of sizes that are nearly alike the best.

    Where a size is unknown the bits of all count instead.
    """
    sizes = [size_of(pool, memory) for pool in able]
    values = [
        float(pool.bits) if None in sizes or size is None else size.value
        for pool, size in zip(able, sizes, strict=True)
    ]
    limit = ALIKE * min(values)
    best = best_of([p for p, value in zip(able, values, strict=True) if value <= limit], metric)
    assert best is not None
    return best


def budget_table(
    title: str,
    choices: Sequence[Choice],
    measure: str,
    chosen: Pool | None = None,
    memory: Memory | None = None,
) -> Table:
    """Return the choices as a row each, the recommended one marked, without their commands."""
    size = "size up to" if memory is None else "model and cache up to"
    columns = (size, "best choice", f"change of {measure}", "cannot be told apart from it")
    rows = tuple(
        (
            bytes_in_words(choice.budget),
            choice.best.name + (" (recommended)" if choice.best is chosen else ""),
            choice.loses,
            choice.ties,
        )
        for choice in choices
    )
    return Table(title, columns, rows)


def _steps(sizes: Sequence[float]) -> list[float]:
    """Return the largest of each group of neighbouring sizes, in at most `MOST` groups.

    Args:
        sizes: in order.
    """
    alike = ALIKE
    while True:
        ends = [
            size for size, following in pairwise([*sizes, float("inf")]) if following > alike * size
        ]
        if len(ends) <= MOST:
            return ends
        alike += ALIKE - 1


def by_width(pools: Sequence[Pool]) -> str:
    """Return `rtn and awq at 2 bits, rtn at 3 bits, rtn budget:3.5`."""
    widths: dict[str, list[Pool]] = {}
    for pool in pools:
        widths.setdefault(at_width(pool), []).append(pool)
    return ", ".join(f"{listed(own)}{at}" for at, own in widths.items())


def at_width(pool: Pool) -> str:
    """Return ` at 4 bits`; of a budget, which has many widths, what the label lacks."""
    budget = pool.spec.budget
    if budget is None:
        return "" if pool.is_reference else f" at {plural(pool.bits, 'bit')}"
    return "" if budget.words in pool.label else f" {budget.words}"


def listed(pools: Sequence[Pool]) -> str:
    """Return the labels as `a, b and c`, or `a, b and 3 others`."""
    words = [pool.label for pool in pools]
    if len(words) > MOST_NAMED:
        words = [*words[: MOST_NAMED - 1], f"{len(words) - MOST_NAMED + 1} others"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

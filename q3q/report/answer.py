"""The answer: for each model and bit width the best method, in a sentence and in a table's row.

Only trials of the same weights and the same evaluation are compared, and a method with several
seeds counts by its mean. The report, the terminal's last lines and a tracker's front page all show
the same `Answer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from q3q.evaluate.metrics import held_out, reads_calibrated_kind, reads_text
from q3q.evaluation import change_unit, is_perplexity
from q3q.formatting import plural
from q3q.record import TrialRecord
from q3q.report.budgets import Choice, Memory, best_of, budgets, smallest
from q3q.report.certainty import Certainty
from q3q.report.changes import SAME, UNTESTED, Change
from q3q.report.families import Families, families
from q3q.report.measures import ABSENT, DIVERGED, FAILED, judged_metrics, short, text_metrics
from q3q.report.pools import Pool, comparable, pools
from q3q.report.tables import MARK, MARKED, Table, other_versions

RULE = (
    "Changes are measured from the unquantized model, in percent for a perplexity (+ is worse) and "
    "in percentage points for an accuracy (- is worse), with 95 % intervals of paired differences "
    "where a trial has them. Methods are ranked by the first measure, which uses text that no "
    'method was calibrated on if there is such text. "No clear winner" means that a different '
    "method is better by a different measure. Two methods do not differ significantly if a paired "
    "test on the same windows and questions cannot tell them apart (p < 0.05, corrected by Holm's "
    "method over all tests of a family); for methods with several seeds the spread over seeds "
    "counts too. An interval covers only its own comparison and is not corrected. A single seed "
    "cannot show how much of a difference is due to the calibration text that was drawn. "
    '"Not tested" means that the scores of each window or question, which a paired test needs, '
    "are missing, or are too few for a test."
)
NO_WINNER = "no clear winner"
FROM = " from the unquantized model"
READ, READ_BY_SOME, UNREAD = "calibrated on", "calibrated on by some", "not calibrated on"
UNKNOWN = "unknown"
ONLY_CALIBRATED = (
    "Every text here is of the kind that was calibrated on, which flatters methods that fit it "
    "closely: evaluate on another text too."
)


@dataclass(frozen=True)
class Rival:
    """A method that is better than the best by another measure.

    tested: True if chance does not explain by how much, None if that is unknown.
    tied: it does not differ significantly from the best by the first measure.
    """

    pool: Pool
    change: Change | None
    metric: str
    tested: bool | None
    tied: bool


@dataclass(frozen=True)
class Verdict:
    """What was found at one bit width.

    best: by the first measure; None if nothing was measured.
    changes: of the best, one for each measure.
    equal, untested: methods that do not differ significantly from the best, and those of which
        that is unknown.
    rivals: methods that are better by another measure.
    alone: no other method was measured at this width.
    outcomes: what became of the trials if nothing was measured.
    """

    bits: int
    best: Pool | None
    changes: tuple[Change | None, ...] = ()
    equal: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    alone: bool = False
    outcomes: tuple[str, ...] = ()

    @property
    def clear(self) -> bool:
        return self.best is not None and all(rival.tied for rival in self.rivals)


@dataclass(frozen=True)
class Answer:
    """The verdicts on one model.

    name: the model's and, where trials were evaluated in several ways, how these were.
    metrics: the measures, the one that ranks the methods first.
    marks: where some text was calibrated on, which ones were, by metric.
    other_code: ids of trials measured by a different version of the code than most.
    tests: what is more than chance.
    tried: all choices, in the order of tables.
    reference: the unquantized model.
    margin: how much may be lost, in percent of a perplexity and in points of an accuracy.
    memory: the cache that sizes count too; None: they are of the weights alone.
    """

    name: str
    metrics: tuple[str, ...]
    marks: dict[str, str]
    verdicts: tuple[Verdict, ...]
    other_code: frozenset[str] = frozenset()
    tests: Families = field(default_factory=lambda: Families({}, {}, {}))
    tried: tuple[Pool, ...] = ()
    reference: Pool | None = None
    margin: float | None = None
    memory: Memory | None = None

    @cached_property
    def certainty(self) -> Certainty:
        return Certainty(self.tried, self.reference, self.metrics, self.tests, self.margin)

    @cached_property
    def best(self) -> Pool | None:
        """The choice with the best number by the first measure."""
        return best_of(self.tried, self.metrics[0])

    @cached_property
    def within(self) -> Pool | None:
        """The smallest choice that is shown to stay within the margin by the first measure."""
        shown = self.certainty.equivalent.get(self.metrics[0], {})
        able = [pool for pool in self.tried if shown.get(pool.name)]
        return smallest(able, self.metrics[0], self.memory) if able else None

    @cached_property
    def chosen(self) -> Pool | None:
        """The recommended choice: the smallest that cannot be told apart from the best.

        With a margin it is the smallest that is shown to stay within it, if there is one.
        """
        if self.best is None or self.within is not None:
            return self.within
        first = self.metrics[0]
        same = (pool for pool in self.tried if self.tests.same(self.best, pool, first))
        return smallest([self.best, *same], first, self.memory)

    @cached_property
    def budgets(self) -> list[Choice]:
        """The best choice for each size, and the recommended one."""
        return budgets(self.tried, self.tests, self.metrics[0], self.chosen, self.memory)

    @property
    def margin_in_words(self) -> str:
        unit = change_unit(self.metrics[0])
        return f"{self.margin:g} {unit} of the unquantized model"

    def at(self, bits: int) -> list[Pool]:
        """Return the choices of one width that have a number by the first measure."""
        return [pool for pool in self.at_all if pool.bits == bits]

    @property
    def at_all(self) -> list[Pool]:
        """The choices of all widths that have a number by the first measure."""
        return [pool for pool in self.tried if isinstance(pool.cell(self.metrics[0]), float)]

    def sentences(self) -> list[str]:
        """Return what was found at each bit width, and what weakens it all."""
        lines = [
            f"{plural(verdict.bits, 'bit')}: {self._said(verdict)}" for verdict in self.verdicts
        ]
        texts = [metric for metric in self.metrics if is_perplexity(metric)]
        flattered = bool(texts) and all(self.marks.get(m) in (READ, READ_BY_SOME) for m in texts)
        several = any(not verdict.alone and verdict.best for verdict in self.verdicts)
        return lines + ([ONLY_CALIBRATED] if flattered and several else [])

    def table(self) -> Table:
        """Return a row for each bit width."""
        several = len(self.metrics) > 1
        columns = (
            "bits",
            f"best method by {short(self.metrics[0])}" if several else "best method",
            *(
                head
                for metric in self.metrics
                for head in (self._marked(short(metric), metric), "change")
            ),
            f"{SAME} from the best",
            *(["better by another measure"] if several else []),
        )
        rows = tuple(self._row(verdict) for verdict in self.verdicts)
        return Table(
            self.name, columns, rows, MARKED if any(MARK in row[1] for row in rows) else ""
        )

    def _said(self, verdict: Verdict) -> str:
        best = verdict.best
        if best is None:
            return f"nothing was measured ({' or '.join(verdict.outcomes) or 'no result'})."
        first, change = self.metrics[0], verdict.changes[0]
        if not verdict.clear:
            leaders = [self._led(first, best, change) + (FROM if change else "")]
            leaders += [
                self._led(rival.metric, rival.pool, rival.change) for rival in verdict.rivals
            ]
            return f"{NO_WINNER}. {'; '.join(leaders)}."
        place = self._in_words(first)
        by = f", {change.amount}{FROM}" if change else ""
        tested = f" ({SAME})" if change is not None and change.distinguishable is False else ""
        if verdict.alone:
            value = f"its {place} is {best.shown(first)}{by}{tested}"
            return f"only {best.label} was measured; {value}."
        text = f"{best.label} has the {lowest(first)} {place}, {best.shown(first)}{by}{tested}."
        better = {
            rival.pool.label: f"{rival.pool.label}, which has the {lowest(rival.metric)} "
            f"{self._in_words(rival.metric)}"
            for rival in verdict.rivals
        }
        if verdict.equal:
            named = "; ".join(better.get(label, label) for label in verdict.equal)
            text += f" No significant difference from it: {named}."
        if verdict.untested:
            text += f" Not tested against it: {', '.join(verdict.untested)}."
        return text

    def _led(self, metric: str, pool: Pool, change: Change | None) -> str:
        by = f", {change.amount}" if change else ""
        return f"{pool.label} has the {lowest(metric)} {self._in_words(metric)}{by}"

    def _row(self, verdict: Verdict) -> tuple[str, ...]:
        several = len(self.metrics) > 1
        best = verdict.best
        if best is None:
            empty = [ABSENT] * (2 * len(self.metrics) + several)
            outcomes = " or ".join(verdict.outcomes) or ABSENT
            return (str(verdict.bits), ABSENT, outcomes, *empty)
        mark = MARK if any(record.spec.id in self.other_code for record in best.records) else ""
        numbers = [
            text
            for metric, change in zip(self.metrics, verdict.changes, strict=True)
            for text in (best.shown(metric), str(change or UNKNOWN))
        ]
        equals = [", ".join(verdict.equal)] if verdict.equal else []
        equals += [f"{UNTESTED}: {', '.join(verdict.untested)}"] if verdict.untested else []
        rivals = [
            f"{rival.pool.label} by {short(rival.metric)}"
            + ("" if rival.tested else f" ({UNTESTED})")
            for rival in verdict.rivals
        ]
        return (
            str(verdict.bits),
            best.label + mark + ("" if verdict.clear else f" ({NO_WINNER})"),
            *numbers,
            "; ".join(equals) or ABSENT,
            *(["; ".join(rivals) or "none"] if several else []),
        )

    def _in_words(self, metric: str) -> str:
        words = short(metric).removesuffix(", %").replace("perplexity, ", "perplexity of ")
        return self._marked(words, metric)

    def _marked(self, text: str, metric: str) -> str:
        mark = self.marks.get(metric)
        return f"{text} ({mark})" if mark else text


def answers(
    records: Sequence[TrialRecord], margin: float | None = None, context: int | None = None
) -> list[Answer]:
    """Return an answer for each model and evaluation that quantized trials measured.

    Args:
        margin: how much may be lost, in percent of a perplexity and in points of an accuracy.
        context: tokens of a text whose cache counts in sizes.
    """
    outliers = other_versions(records)
    candidates = (
        _answer(name, group, outliers, margin) for name, group in comparable(records).items()
    )
    return [
        replace(answer, memory=Memory.of([r for p in answer.tried for r in p.records], context))
        for answer in candidates
        if answer
    ]


def sentences(shown: Sequence[Answer]) -> list[str]:
    """Return the sentences of all answers; where there are several, each with its answer's name."""
    if len(shown) == 1:
        return shown[0].sentences()
    return [f"{answer.name}: {line}" for answer in shown for line in answer.sentences()]


def _answer(
    name: str,
    records: Sequence[TrialRecord],
    outliers: frozenset[str],
    margin: float | None,
) -> Answer | None:
    judged = judged_metrics(records)
    every = pools(records)
    tried = [pool for pool in every if not pool.is_reference]
    if not judged or not tried:
        return None
    references = (p for p in every if p.is_reference and p.records[0].completed)
    reference = next(references, None)
    tests = families(tried, reference, judged)
    verdicts = tuple(
        _verdict(bits, [pool for pool in tried if pool.bits == bits], tests, judged)
        for bits in sorted({pool.bits for pool in tried})
    )
    marks = _marks(judged, records)
    return Answer(
        name, tuple(judged), marks, verdicts, outliers, tests, tuple(tried), reference, margin
    )


def _marks(judged: Sequence[str], records: Sequence[TrialRecord]) -> dict[str, str]:
    """Say which texts are of a kind that was calibrated on, by all or by some of the trials."""
    specs = [record.spec for record in records if reads_text(record.spec)]
    texts = [metric for metric in judged if is_perplexity(metric)]
    unread = [metric for metric in texts if held_out(metric, specs)]
    if len(unread) == len(texts):
        return {}
    marks = dict.fromkeys(unread, UNREAD)
    for metric in texts:
        fitted = [
            spec
            for spec in specs
            for name, text in zip(text_metrics(spec), spec.evaluation.texts, strict=True)
            if name == metric and reads_calibrated_kind(text, spec)
        ]
        if fitted:
            marks[metric] = READ if len(fitted) == len(specs) else READ_BY_SOME
    return marks


def _verdict(bits: int, tried: Sequence[Pool], tests: Families, judged: Sequence[str]) -> Verdict:
    first, *others = judged
    best = best_of(tried, first)
    if best is None:
        outcomes = {str(pool.cell(first)) for pool in tried} & {DIVERGED, FAILED}
        return Verdict(bits, None, outcomes=tuple(sorted(outcomes)))
    measured = [pool for pool in tried if isinstance(pool.cell(first), float)]
    alike = {pool.label: tests.same(best, pool, first) for pool in measured if pool is not best}
    rivals = (_rival(best, tried, tests, metric, alike) for metric in others)
    return Verdict(
        bits=bits,
        best=best,
        changes=tuple(tests.change(best, metric) for metric in judged),
        equal=tuple(label for label, same in alike.items() if same),
        untested=tuple(label for label, same in alike.items() if same is None),
        rivals=tuple(rival for rival in rivals if rival is not None),
        alone=len(measured) == 1,
    )


def _rival(
    best: Pool,
    tried: Sequence[Pool],
    tests: Families,
    metric: str,
    alike: dict[str, bool | None],
) -> Rival | None:
    """Return the best method by another measure; None if it does not differ from `best`."""
    other = best_of(tried, metric)
    if other is None or other is best or other.cell(metric) == best.cell(metric):
        return None
    same = tests.same(best, other, metric) if isinstance(best.cell(metric), float) else False
    if same:
        return None
    tested = None if same is None else True
    change = tests.change(other, metric)
    return Rival(other, change, metric, tested, tied=alike.get(other.label) is True)


def lowest(metric: str) -> str:
    """Return what the best number by a measure is: `lowest` or `highest`."""
    return "lowest" if is_perplexity(metric) else "highest"

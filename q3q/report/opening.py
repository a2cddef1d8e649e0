"""The opening of a report: the answer in three to six sentences, made from the numbers.

The same sentences head the page, a tracker's note and the terminal's last lines.
"""

from collections.abc import Sequence
from itertools import combinations

from q3q.evaluation import change_unit
from q3q.formatting import bytes_in_words, percent, plural, signed
from q3q.report.answer import FROM, ONLY_CALIBRATED, Answer, Verdict, lowest
from q3q.report.budgets import at_width, budget_table, by_width, command_of, listed, size_of
from q3q.report.certainty import Certainty, in_words
from q3q.report.changes import UNTESTED
from q3q.report.escapes import markdown_code, markdown_text
from q3q.report.pools import Pool
from q3q.report.tables import Table

MOST = 6  # sentences
MOST_WIDTHS = 3  # of them, on single widths
MOST_ANSWERS = 3  # of a report of many models that get a sentence
ONLY_ONE = "a single choice was measured, so nothing can be compared with it"


def opening(answers: Sequence[Answer]) -> list[str]:
    """Return the sentences; where there are several answers, each begins with its name."""
    if not answers:
        return []
    if len(answers) == 1:
        [answer] = answers
        remarks = _remarks(answers)
        return [_advice(answer), *_widths(answer, MOST - 1 - len(remarks)), *remarks]
    lines = []
    for answer in answers[:MOST_ANSWERS]:
        lines.append(f"{answer.name}: {_advice(answer)}")
        if len(answers) == 2:
            lines += [f"{answer.name}: {line}" for line in _widths(answer, 1)]
    if (more := len(answers) - MOST_ANSWERS) > 0:
        lines.append(f"{plural(more, 'more answer')} {'stand' if more > 1 else 'stands'} below.")
    return [*lines, *_remarks(answers)]


def _advice(answer: Answer) -> str:
    """Return what to take: the recommended choice, its size, what it costs, and why."""
    pool, metric = answer.chosen, answer.metrics[0]
    if pool is None:
        return _nothing(answer)
    memory, reference = answer.memory, answer.reference
    size, whole = size_of(pool, memory), size_of(reference, memory) if reference else None
    bytes_ = bytes_in_words(size.value) if size else ""
    of = f" of {bytes_in_words(whole.value)}" if size and whole else ""
    if memory is not None:
        of += f", each with the cache of {memory.context:,} tokens"
    change = answer.tests.change(pool, metric)
    cost = (
        f"its {in_words(metric)} is {pool.shown(metric)}"
        if change is None
        else f"its {in_words(metric)} changes by {change.amount}{FROM}"
        + (", which chance explains" if change.distinguishable is False and change.value else "")
    )
    named = f"{_named(pool)}{f' ({bytes_}{of})' if bytes_ else ''}"
    take = "Take " if len(answer.at_all) > 1 else ""
    return f"{take}{named}: {cost}; {_why(answer)}."


def _why(answer: Answer) -> str:
    metric, pool = answer.metrics[0], answer.chosen
    assert pool is not None
    measured = answer.at_all
    if answer.within is not None:
        return f"it is among the smallest that are shown to stay within {answer.margin_in_words}"
    rest = ""
    if answer.margin is not None:
        rest = f". None is shown to stay within {answer.margin_in_words}"
        if len(answer.certainty.unpaired(metric)) == len(measured):
            rest = (
                f". The margin of {answer.margin_in_words} cannot be tested without paired samples"
            )
    if len(measured) == 1:
        return ONLY_ONE + rest
    best = answer.best
    if best is not pool and best is not None:
        if best.cell(metric) == pool.cell(metric):
            return f"{_named(best)} has the same number, and is larger" + rest
        return f"{_named(best)} has a better number, but chance explains that" + rest
    unknown = [p for p in measured if p is not pool and answer.tests.same(p, pool, metric) is None]
    if unknown:
        return "it has the best number, but not all differences could be tested" + rest
    return "no other choice is better by more than chance" + rest


def _nothing(answer: Answer) -> str:
    outcomes = sorted({word for verdict in answer.verdicts for word in verdict.outcomes})
    return f"Nothing was measured ({' or '.join(outcomes) or 'no result'})."


def _widths(answer: Answer, most: int) -> list[str]:
    """Return what was found at each width, the widest first, in at most `most` sentences."""
    verdicts = list(reversed(answer.verdicts))
    if len(answer.at_all) < 2:
        return []
    said = [_width(answer, verdict) for verdict in verdicts]
    per = -(-len(said) // min(most, MOST_WIDTHS))
    groups = ["; ".join(said[k : k + per]) for k in range(0, len(said), per)]
    return [f"{text[0].upper()}{text[1:]}." for text in groups]


def _width(answer: Answer, verdict: Verdict) -> str:
    """Return a clause on one width: `at 4 bits a and b cannot be told apart (+0.9 to +1.4 %)`."""
    best, metric = verdict.best, answer.metrics[0]
    # A budget stands at the smallest width that takes no less.
    allotted = any(pool.spec.budget for pool in answer.at(verdict.bits))
    at = f"at {'up to ' if allotted else ''}{plural(verdict.bits, 'bit')}"
    if best is None:
        return f"{at} nothing was measured"
    by = f" of {in_words(metric)}"
    if verdict.alone:
        return f"{at} only {best.label} was measured ({_range(answer, [best])}{by})"
    if not verdict.clear:
        return (
            f"{at} there is no clear winner: {best.label} has the {lowest(metric)} "
            f"{in_words(metric)} ({_range(answer, [best])}){_led(verdict)}"
        )
    equal = [best, *(pool for pool in answer.at(verdict.bits) if pool.label in verdict.equal)]
    others = {best.label, *verdict.equal, *verdict.untested}
    worse = [pool for pool in answer.at(verdict.bits) if pool.label not in others]
    untested = [pool for pool in answer.at(verdict.bits) if pool.label in verdict.untested]
    if len(equal) == 1:
        is_best = "is best" if worse and not untested else "has the best number"
        said = f"{at} {best.label} {is_best} ({_range(answer, [best])}{by})"
    elif all(answer.tests.same(a, b, metric) for a, b in combinations(equal, 2)):
        said = f"{at} {listed(equal)} cannot be told apart ({_range(answer, equal)}{by})"
    else:
        said = (
            f"{at} {best.label} has the best number ({_range(answer, [best])}{by}), "
            f"{listed(equal[1:])} cannot be told apart from it ({_range(answer, equal[1:])})"
        )
    if worse:
        said += f", {listed(worse)} {_lose(worse)} more ({_range(answer, worse)})"
    return said + (f", {listed(untested)} could not be tested" if untested else "")


def _led(verdict: Verdict) -> str:
    """Return who is better by other measures: `, gptq the highest mean accuracy (not tested)`."""
    led: dict[str, list[str]] = {}
    for rival in (rival for rival in verdict.rivals if not rival.tied):
        untested = "" if rival.tested else f" ({UNTESTED})"
        words = f"the {lowest(rival.metric)} {in_words(rival.metric)}{untested}"
        led.setdefault(rival.pool.label, []).append(words)
    return "".join(f", {label} {' and '.join(words)}" for label, words in led.items())


def _range(answer: Answer, pools: Sequence[Pool]) -> str:
    """Return the change of one choice, or of the least to the most: `+0.9 to +1.4 %`."""
    metric = answer.metrics[0]
    changes = [answer.tests.change(pool, metric) for pool in pools]
    values = sorted(each.value for each in changes if each is not None)
    if len(values) < len(pools):
        return " to ".join(dict.fromkeys(pool.shown(metric) for pool in (pools[0], pools[-1])))
    unit = change_unit(metric)
    ends = dict.fromkeys(_short(value) for value in (values[0], values[-1]))
    return f"{' to '.join(ends)} {unit}"


def _short(value: float) -> str:
    size = abs(100 * value)
    return signed(100 * value, 0 if size >= 100 else 1 if size >= 1 else 2)


def _lose(pools: Sequence[Pool]) -> str:
    return "loses" if len(pools) == 1 else "lose"


def _remarks(answers: Sequence[Answer]) -> list[str]:
    """Return how sure all this is: accuracies, the correction, and what weakens it."""
    lines = []
    if len(answers) == 1:
        lines += _of_accuracy(answers[0])
    if any(ONLY_CALIBRATED in answer.sentences() for answer in answers):
        lines.append(ONLY_CALIBRATED)
    sizes = [answer.tests.pairs[answer.metrics[0]].size for answer in answers if answer.tests.pairs]
    if sum(sizes):
        whole = plural(sizes[0], "comparison") if len(answers) == 1 else "comparisons of a model"
        lines.append(
            f"“Best” and “cannot be told apart” hold for all {whole} together (5 % level, Holm's "
            "correction)."
            if max(sizes) > 1
            else "The only comparison is tested at the 5 % level."
        )
    return lines


def _of_accuracy(answer: Answer) -> list[str]:
    """Return what the questions showed, and what they could have shown."""
    certainty: Certainty = answer.certainty
    metric = certainty.accuracy
    if metric is None or not certainty.flips:
        return []
    pools = [pool for pool in answer.tried if isinstance(pool.cell(metric), float)]
    tested, worse, untested = [], [], []
    for pool in pools:
        change = answer.tests.change(pool, metric)
        if change is None or (change.distinguishable is None and change.value):
            untested.append(pool)
            continue
        tested.append(pool)
        if change.distinguishable and change.value < 0:
            worse.append(pool)
    words = in_words(metric)
    if not tested:
        return [f"Whether any choice loses {words} could not be tested."]
    if not worse:
        first = f"{'None of the tested choices' if untested else 'No choice'} loses {words}"
    elif len(worse) == len(tested):
        first = f"Every {'tested ' if untested else ''}choice loses {words}"
    else:
        only = "Of the tested choices only" if untested else "Only"
        first = f"{only} {by_width(worse)} {_lose(worse)} {words}"
    first += " by more than chance" + (f" ({UNTESTED}: {by_width(untested)})" if untested else "")
    seen = sorted(x for pool in pools if (x := certainty.smallest_loss(pool)) is not None)
    if not seen:
        return [f"{first}; there were too few questions to show any difference."]
    ends = " to ".join(dict.fromkeys(percent(x) for x in (seen[0], seen[-1])))
    asked = plural(certainty.asked, "question")
    return [f"{first}; {asked} could have shown a loss of {ends} points."]


def in_markdown(answers: Sequence[Answer]) -> str:
    """Return the sentences as a list, and the choices for each size with how to export them."""
    parts = ["\n".join(f"- {markdown_text(line)}" for line in opening(answers))]
    for answer in answers:
        if answer.budgets:
            parts += [choices(answer).markdown(), export_lines(answer)]
    return "\n\n".join(part for part in parts if part)


def choices(answer: Answer) -> Table:
    """Return the best choice for each size as a table."""
    title = f"{answer.name}: the best choice for each size"
    return budget_table(
        title, answer.budgets, in_words(answer.metrics[0]), answer.chosen, answer.memory
    )


def export_lines(answer: Answer) -> str:
    """Return the command that exports each choice, in Markdown."""
    return "\n".join(
        f"- {markdown_text(choice.best.name)}: "
        + (
            markdown_code(choice.command)
            if choice.command
            else f"exported already, {markdown_code(choice.checkpoint)}"
            if choice.checkpoint
            else "no format holds it"
        )
        for choice in answer.budgets
    )


def export_hint(answers: Sequence[Answer]) -> str:
    """Return how to export the recommended choice of the first answer that has one."""
    for answer in answers:
        if answer.chosen is not None and (command := command_of(answer.chosen)):
            return f"To export {_named(answer.chosen)}: {command}"
    return ""


def _named(pool: Pool) -> str:
    return pool.label + at_width(pool)

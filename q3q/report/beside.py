"""Studies side by side: in which settings they differ, and their numbers on the same tasks.

Trials of different studies share a row if they differ in nothing but what the studies differ in as
a whole. Numbers are set against each other only if they were measured alike: on the same windows
of the same text, or the same questions asked in the same way.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from q3q.canonical import sha256
from q3q.formatting import plural, printable
from q3q.record import TrialRecord
from q3q.report.changes import Change, change_between
from q3q.report.escapes import markdown_block, markdown_text
from q3q.report.families import corrected
from q3q.report.header import abbreviations
from q3q.report.measures import (
    ABSENT,
    asked_of,
    by_model,
    in_order,
    labels,
    scope_of,
    traits_of,
)
from q3q.report.pools import Pool, pools
from q3q.report.tables import Table, settings_of, topics
from q3q.spec import SELDOM_OF_SCHEME

LONGEST = 40  # characters of a setting's value
MOST = 6  # values of a setting
SAME_TRIAL = "the same trial"
OTHERWISE = "measured otherwise"
NOTE = (
    "Changes are measured from the first study to the other, in percent for a perplexity (+ is "
    "worse) and in percentage points for an accuracy (- is worse), with 95 % intervals of paired "
    "differences where both trials kept the score of each window or question. Significance is "
    "corrected by Holm's method over all changes of a table."
)


@dataclass(frozen=True)
class NamedStudy:
    """A study's records, and what a page says of it."""

    name: str
    command: str
    question: str
    records: tuple[TrialRecord, ...]

    @property
    def counts(self) -> str:
        done = sum(record.completed for record in self.records)
        return f"{plural(len(self.records), 'trial')}, {done} completed."


@dataclass(frozen=True)
class Beside:
    """A page that compares studies.

    differences: a row per setting that differs.
    tables: a table per model and metric that several studies measured.
    """

    studies: tuple[NamedStudy, ...]
    differences: Table
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        return " against ".join(study.name for study in self.studies)

    def markdown(self) -> str:
        parts = [f"# {markdown_text(self.name)}"]
        for study in self.studies:
            about = (
                f"**{markdown_text(study.name)}.** {study.counts} {markdown_text(study.question)}"
            )
            parts += [about.rstrip(), markdown_block(study.command)]
        parts += [f"> **Note:** {markdown_text(warning)}" for warning in self.warnings]
        settings = self.differences.markdown() if self.differences.rows else "No setting differs."
        parts += ["## What differs", settings, "## Side by side"]
        parts += [table.markdown() for table in self.tables]
        parts += map(markdown_text, self.notes)
        return "\n\n".join(parts) + "\n"

    def plain(self) -> str:
        """Return what differs, and the tables, for a terminal."""
        names = [study.name for study in self.studies]
        lines = [
            f"{key}: {'; '.join(map(' in '.join, zip(values, names, strict=True)))}"
            for key, *values in self.differences.rows
        ]
        text = "\n".join(map(printable, lines)) or "No setting differs."
        return "\n\n".join([text, *(table.plain() for table in self.tables)])


def beside(studies: Sequence[NamedStudy], warnings: Iterable[str] = ()) -> Beside:
    """Compare studies, each with its records."""
    every = [record for study in studies for record in study.records]
    tables = tuple(_tables(studies))
    missing = "" if tables else "No metric was measured by more than one of these studies."
    notes = tuple(filter(None, [missing, NOTE, abbreviations(every)]))
    return Beside(tuple(studies), _differences(studies), tables, notes, tuple(warnings))


def _differences(studies: Sequence[NamedStudy]) -> Table:
    """Return a row for each setting whose values are not the same in all studies."""
    values: dict[str, list[dict[str, None]]] = {}
    for number, study in enumerate(studies):
        for record in study.records:
            for key, value in _all_settings(record).items():
                own = values.setdefault(key, [{} for _ in studies])
                own[number][value] = None
    rows = [
        (key, *(_listed(own) for own in columns))
        for key, columns in values.items()
        if len({frozenset(own) for own in columns}) > 1
    ]
    columns = ("setting", *(study.name for study in studies))
    return Table("Settings that differ", columns, tuple(rows))


def _all_settings(record: TrialRecord) -> dict[str, str]:
    spec = record.spec
    scheme = spec.scheme
    own = {"model": spec.model.label, "method": spec.method.name, "seed": spec.seed}
    if scheme is not None:
        stored = ("bits", "group_size", "symmetric", "act_bits", *SELDOM_OF_SCHEME)
        own |= {key: getattr(scheme, key) for key in stored}
    every = own | settings_of(record)
    return {key: _in_words(value) for key, value in every.items()}


def _in_words(value: object) -> str:
    """Return a setting as one would say it: a list of names joined, nothing as `none`."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        parts = json.loads(text)
    except ValueError:  # a name
        return text
    return ("+".join(map(str, parts)) or "none") if isinstance(parts, list) else text


def _listed(values: Iterable[str]) -> str:
    """List values, the first of them; long ones are cut, and what was cut has a digest."""
    words = [
        value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}… ({sha256(value)[:6]})"
        for value in values
    ]
    more = f" and {len(words) - MOST} more" if len(words) > MOST else ""
    return ", ".join(words[:MOST]) + more or ABSENT


def _tables(studies: Sequence[NamedStudy]) -> Iterable[Table]:
    """Yield a table for each model and metric that at least two studies measured."""
    every = in_order(record for study in studies for record in study.records)
    models = [{record.spec.model.label for record in study.records} for study in studies]
    # Studies of one model each, and each of another: the model is what differs.
    apart = all(len(own) == 1 for own in models) and len(set.union(*models)) == len(models)
    groups = (
        {" against ".join(next(iter(own)) for own in models): every} if apart else by_model(every)
    )
    for model, records in groups.items():
        for metric, heading, group in topics(records, everything=True):
            table = _table(f"{model}: {heading}", metric, studies, group)
            if table is not None:
                yield table


def _table(
    title: str, metric: str, studies: Sequence[NamedStudy], group: Sequence[TrialRecord]
) -> Table | None:
    """Return a row per label and bits; None if fewer than two studies have a number in it."""
    names = _labels(studies, group, metric)
    columns: list[dict[tuple[str, int], Pool]] = []
    for study in studies:
        own = [record for record in study.records if record.spec.id in names]
        columns.append({(pool.label, pool.bits): pool for pool in pools(own, metric, names=names)})
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if sum(map(bool, columns)) < 2:
        return None
    changed = len(studies) - 1
    heads = [study.name for study in studies]
    cells = {
        (key, number): _change(key, columns[0], other, metric)
        for key in keys
        for number, other in enumerate(columns[1:])
    }
    # A table's changes are one family of tests.
    changes = [cell for cell in cells.values() if isinstance(cell, Change)]
    tested = iter(corrected(changes))
    words = {
        place: str(next(tested)) if isinstance(cell, Change) else cell
        for place, cell in cells.items()
    }
    rows = tuple(
        (
            label,
            str(bits),
            *(_cell(column.get((label, bits)), metric) for column in columns),
            *(words[(label, bits), number] for number in range(changed)),
        )
        for label, bits in sorted(keys, key=_order(names, group))
    )
    return Table(
        title,
        ("method", "bits", *heads, *(f"change to {name}" for name in heads[1 : 1 + changed])),
        rows,
    )


def _labels(
    studies: Sequence[NamedStudy], group: Sequence[TrialRecord], metric: str
) -> dict[str, str]:
    """Label the trials of all studies alike, without the traits that tell the studies apart."""
    ids = {record.spec.id for record in group}
    values: dict[tuple[str, str], list[set[str]]] = {}
    for number, study in enumerate(studies):
        for record in study.records:
            if record.spec.id in ids:
                own = traits_of(record.spec, metric) | {"model.name": record.spec.model.label}
                for key, value in own.items():
                    place = (scope_of(key, record.spec) if key != "model.name" else "", key)
                    values.setdefault(place, [set() for _ in studies])[number].add(value)
    varied = {key for (_, key), sets in values.items() if any(len(own) > 1 for own in sets)}
    shared = {key for _, key in values} - varied
    specs = [record.spec for record in group]
    named = labels(specs, metric, seeds=False, shared=shared)
    return {spec.id: label for spec, label in zip(specs, named, strict=True)}


def _cell(pool: Pool | None, metric: str) -> str:
    return ABSENT if pool is None else pool.shown(metric)


def _change(
    key: tuple[str, int],
    first: Mapping[tuple[str, int], Pool],
    other: Mapping[tuple[str, int], Pool],
    metric: str,
) -> Change | str:
    """Return the change from one study's number to another's, or why there is none."""
    ours, theirs = other.get(key), first.get(key)
    if ours is None or theirs is None:
        return ABSENT
    if [r.spec.id for r in ours.records] == [r.spec.id for r in theirs.records]:
        return SAME_TRIAL
    asked = [asked_of(pool.spec.evaluation, metric) for pool in (ours, theirs)]
    if asked[0] != asked[1]:
        return OTHERWISE
    change = change_between(ours, theirs, metric)
    return ABSENT if change is None else change


def _order(
    names: Mapping[str, str], group: Sequence[TrialRecord]
) -> Callable[[tuple[str, int]], tuple[int, int]]:
    """Return a sort key: labels as in other tables, then bits."""
    ranks = {
        label: rank for rank, label in enumerate(dict.fromkeys(names[r.spec.id] for r in group))
    }
    return lambda key: (ranks.get(key[0], len(ranks)), key[1])

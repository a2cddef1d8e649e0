"""Published checkpoints beside the original that they were made of: which one is nearest to it.

They are ranked by the KL divergence of the original's next-token distribution from theirs, on the
first text. Two are told apart by a paired test on the same windows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from q3q.evaluate.identities import conditions_of
from q3q.evaluate.metrics import mean_metrics
from q3q.evaluation import CONFIDENCE
from q3q.formatting import bytes_in_words, percent, plural, significant
from q3q.record import JUDGED, TrialRecord
from q3q.report.changes import UNTESTED, Change, change
from q3q.report.divergences import NOISE
from q3q.report.measures import ABSENT, FAILED, in_order
from q3q.report.pairs import difference, flipped
from q3q.report.pools import Pool
from q3q.report.sizes import bytes_of
from q3q.report.tables import Table
from q3q.spec import MEAN_ACCURACY, TrialSpec, digest, text_metric

CARD = "model_card.md"  # a file of the report
# Columns.
OVER_FLOOR, ACCURACY, UNTOLD = "of the noise floor", "mean accuracy", "not told apart from"
RULE = (
    "KL: the mean divergence of the original's next-token distribution from the checkpoint's, in "
    "nats, with 95 % intervals over windows; checkpoints are sorted by it, on the first text. "
    "Noise floor: the KL of the original from itself when it is computed in another type. A "
    "checkpoint is within the noise if a paired test on the same windows (p < 0.05) cannot tell "
    "its KL from the floor. Not told apart: the same test between two checkpoints. "
    "Other tokens: positions where the likeliest token is not the original's. Mean "
    "accuracy: its change with a 95 % interval, and better or worse if a paired test says so. Bits "
    "per weight are those of the linear layers of the blocks, and the size that of all tensors, "
    "counted in the files."
)
CONFIDENCE_RULE = (
    "The KL at positions where the original gives its likeliest token this probability, and in "
    "brackets the share of these positions where the checkpoint's likeliest token is another one. "
    "The column heads give the share of all positions."
)


@dataclass(frozen=True)
class Bench:
    """The checkpoints that were compared with one original, by one evaluation.

    candidates: the nearest to the original first (without a KL, the most accurate), failed ones
        last
    floor: the original in another type; None if that was not run
    """

    original: Pool
    floor: Pool | None
    candidates: tuple[Pool, ...]

    @property
    def name(self) -> str:
        reference = self.spec.reference
        return reference.label if reference is not None else self.spec.model.label

    @property
    def spec(self) -> TrialSpec:
        return self.candidates[0].spec

    @property
    def kl_metrics(self) -> list[str]:
        return [self._of_text("kl", text) for text in self._texts]

    @property
    def _texts(self) -> list[str]:
        """The texts on which the KL was measured."""
        return _texts_of(self.spec)

    def _of_text(self, measure: str, text: str) -> str:
        return text_metric(measure, text, self.spec.evaluation.quick)

    def tables(self) -> list[Table]:
        """Return the verdict, the KL by confidence and the tasks' changes, where measured."""
        tables = [self._verdict(), self._by_confidence(), self._of_tasks()]
        return [table for table in tables if table is not None]

    def findings(self) -> list[str]:
        """Say what is odd about each checkpoint's files, a line each."""
        return [
            f"{pool.label}: {line}"
            for pool in self.candidates
            for record in pool.records
            for line in findings_of(record)
        ]

    def numbers(self) -> dict[str, float]:
        """Return each checkpoint's KL on each text, by names for people."""
        return {
            f"{pool.label}/KL of {text}": value
            for pool in self._measured
            for text, metric in zip(self._texts, self.kl_metrics, strict=True)
            if isinstance(value := pool.cell(metric), float)
        }

    def card(self) -> str:
        """Return a block for a model card, in Markdown."""
        texts = ", ".join(
            f"{text.name} ({text.limit or 'all'} windows of {text.window} tokens)"
            for text in self.spec.evaluation.texts
        )
        lines = [f"- {line}" for line in self.findings()]
        return "\n".join(
            [
                f"## Compared with {self.name}\n",
                self._verdict().markdown(),
                *(table.markdown() for table in self.tables()[1:]),
                f"Measured by q3q on {texts}." if texts else "Measured by q3q.",
                *(["", "Notes on the files:", "", *lines] if lines else []),
                "",
            ]
        )

    def sentence(self) -> str:
        """Say which checkpoint is nearest to the original."""
        measured = self._measured
        if not measured:
            return f"No checkpoint was compared with {self.name}: all failed."
        if not self._texts:
            return f"{plural(len(measured), 'checkpoint')} of {self.name}: no KL was measured."
        best, kl = measured[0], measured[0].cell(self.kl_metrics[0])
        if not isinstance(kl, float):
            return f"No checkpoint has a finite KL from {self.name}."
        same = [pool.label for pool in measured[1:] if self._differ(best, pool) is False]
        noise = " (not more than its own rounding costs)" if self._is_noise(best) else ""
        rest = f" Not told apart from it: {', '.join(same)}." if same else ""
        of = f"{significant(kl, 3)} nats of KL on {self._texts[0]}{noise}"
        return f"{best.label} is nearest to {self.name}, at {of}.{rest}"

    @property
    def _measured(self) -> list[Pool]:
        return [pool for pool in self.candidates if pool.records[0].completed]

    def _differ(self, one: Pool, other: Pool) -> bool | None:
        """Return True if a paired test tells two checkpoints apart by their KL; None if unknown.

        Without the windows' numbers, or with too few windows for a test, intervals that do not
        overlap show a difference.
        """
        kl = self.kl_metrics[0]
        if one.cell(kl) == other.cell(kl):
            return False
        test = difference(one, other, kl)
        # Numbers that are not finite have no difference to test, and are told from finite ones.
        if test is not None and (test.p_value is not None or test.difference is None):
            return test.distinguishable
        ends = [pool.records[0].intervals.get(kl) for pool in (one, other)]
        if ends[0] is None or ends[1] is None:
            return None
        return True if ends[0][0] > ends[1][1] or ends[1][0] > ends[0][1] else None

    def _is_noise(self, pool: Pool) -> bool:
        """Return True if a checkpoint is as near to the original as its own rounding."""
        if self.floor is None:
            return False
        kl = self.kl_metrics[0]
        ours, floor = pool.cell(kl), self.floor.cell(kl)
        if not isinstance(ours, float) or not isinstance(floor, float):
            return False
        return ours <= floor or self._differ(pool, self.floor) is False

    def _verdict(self) -> Table:
        """Return a row for each checkpoint; a phone shows the first columns, so the KL is there."""
        columns = (
            "checkpoint",
            *self._kl_columns,
            *([OVER_FLOOR] if self.floor is not None else []),
            "bits per weight",
            "size",
            *(self._others_columns),
            *([ACCURACY] if self._has_mean else []),
            *([UNTOLD] if len(self._measured) > 1 and self._texts else []),
            "format",
        )
        rows = [
            *(self._candidate(pool) for pool in self.candidates),
            *([self._yardstick(self.floor, "noise floor")] if self.floor is not None else []),
            self._yardstick(self.original, "original"),
        ]
        cells = tuple(tuple(row.get(column, ABSENT) for column in columns) for row in rows)
        return Table(f"Checkpoints of {self.name}, nearest first", columns, cells, RULE)

    @property
    def _kl_columns(self) -> list[str]:
        return [f"KL, {text}" for text in self._texts]

    @property
    def _others_columns(self) -> list[str]:
        return [f"other tokens, {text}, %" for text in self._texts[:1]]

    def _candidate(self, pool: Pool) -> dict[str, str]:
        """Return a checkpoint's cells by their columns."""
        record = pool.records[0]
        if not record.completed:
            return {"checkpoint": pool.label, "format": f"{FAILED}: {record.reason}"}
        tested = {
            str(n): self._differ(pool, other)
            for n, other in enumerate(self._measured, start=1)
            if self._texts and other is not pool
        }
        same = [number for number, differs in tested.items() if differs is False]
        nobody = UNTESTED if None in tested.values() else "none"
        return {
            **self._facts(pool),
            "checkpoint": f"{self._measured.index(pool) + 1}. {pool.label}",
            **({OVER_FLOOR: self._over_floor(pool)} if self.floor is not None else {}),
            **self._distances(pool),
            **({ACCURACY: self._accuracy(pool)} if self._has_mean else {}),
            UNTOLD: ", ".join(same) or nobody,
        }

    def _yardstick(self, pool: Pool, word: str) -> dict[str, str]:
        """Return the cells of the original, as it is or in another type."""
        dtype = pool.spec.model.dtype
        row = {
            **self._facts(pool),
            "checkpoint": f"{self.name} in {dtype} ({word})",
            "format": dtype,
        }
        return row if pool is not self.floor else {**row, **self._distances(pool), OVER_FLOOR: "1"}

    def _distances(self, pool: Pool) -> dict[str, str]:
        kls = (self._kl(pool, metric) for metric in self.kl_metrics)
        others = (self._others(pool, text) for text in self._texts[:1])
        return {
            **dict(zip(self._kl_columns, kls, strict=True)),
            **dict(zip(self._others_columns, others, strict=True)),
        }

    def _facts(self, pool: Pool) -> dict[str, str]:
        record = pool.records[0]
        bits, size = record.metrics.get("bits_per_weight"), bytes_of(record)
        return {
            "format": str(record.notes.get(JUDGED, {}).get("format") or record.spec.model.dtype),
            "bits per weight": ABSENT if bits is None else significant(bits, 3),
            "size": ABSENT if size is None else bytes_in_words(size.value),
        }

    def _accuracy(self, pool: Pool) -> str:
        """Return the change of the mean accuracy, short where no test finds one."""
        accuracy = change(pool, self.original, MEAN_ACCURACY)
        if accuracy is None:
            return ABSENT
        return accuracy.amount if accuracy.distinguishable is False else str(accuracy)

    @property
    def _has_mean(self) -> bool:
        return len(mean_metrics(self.spec)) > 0

    def _kl(self, pool: Pool, metric: str) -> str:
        value, ends = pool.cell(metric), pool.records[0].intervals.get(metric)
        if not isinstance(value, float):
            return value
        if ends is None or not all(map(math.isfinite, ends)):  # of a single window
            return significant(value, 3)
        return f"{significant(value, 3)} [{', '.join(significant(end, 3) for end in ends)}]"

    def _over_floor(self, pool: Pool) -> str:
        assert self.floor is not None
        ours, floor = pool.cell(self.kl_metrics[0]), self.floor.cell(self.kl_metrics[0])
        if self._is_noise(pool):
            return NOISE
        if not isinstance(ours, float) or not isinstance(floor, float) or not floor:
            return ABSENT
        return f"{significant(ours / floor, 3)} times"

    def _others(self, pool: Pool, text: str) -> str:
        agreement = pool.cell(self._of_text("top1_agreement", text))
        return percent(1 - agreement, 2) if isinstance(agreement, float) else agreement

    def _by_confidence(self) -> Table | None:
        """Return a row for each checkpoint and text."""
        several, rows, heads = len(self._texts) > 1, [], dict[str, str]()
        pools = [*self._measured, *([self.floor] if self.floor is not None else [])]
        for text in self._texts:
            for pool in pools:
                of = f", {text}" if several else ""
                floor = " (noise floor)" if pool is self.floor else ""
                cells = [f"{pool.label}{floor}{of}"]
                for low, high in CONFIDENCE:
                    values = [
                        pool.cell(self._of_text(f"{what}_confident_{low}_{high}", text))
                        for what in ("kl", "flips", "share")
                    ]
                    kl, flips, share = (v if isinstance(v, float) else None for v in values)
                    measured = kl is not None and flips is not None
                    cells.append(
                        f"{significant(kl, 3)} ({percent(flips, 1)} %)"  # type: ignore[arg-type]
                        if measured
                        else ABSENT
                    )
                    if share is not None and text == self._texts[0]:
                        heads[f"{low} to {high} %"] = f" ({percent(share, 0)} %)"
                rows.append(tuple(cells))
        if not any(cell != ABSENT for row in rows for cell in row[1:]):
            return None
        names = (f"{low} to {high} %" for low, high in CONFIDENCE)
        columns = ("checkpoint", *(name + heads.get(name, "") for name in names))
        return Table(f"KL by the confidence of {self.name}", columns, tuple(rows), CONFIDENCE_RULE)

    def _of_tasks(self) -> Table | None:
        """Return each task's paired change and flips, a row for each checkpoint."""
        tasks = mean_metrics(self.spec)
        if not tasks or not self._measured:
            return None
        rows = []
        for pool in self._measured:
            cells = [pool.label]
            for task in tasks:
                counts = flipped(pool, self.original, task)
                words = f"; {counts.lost} lost, {counts.won} won" if counts is not None else ""
                cells.append(_changed(pool, self.original, task) + words)
            rows.append(tuple(cells))
        columns = ("checkpoint", *(f"{task.removesuffix('/acc')}" for task in tasks))
        note = (
            "Changes of accuracy from the original in percentage points, by a paired test on the "
            "same questions; lost: right answers that became wrong, and won: wrong ones that "
            "became right."
        )
        return Table(f"Tasks: changes from {self.name}", columns, tuple(rows), note)


def benches(records: Sequence[TrialRecord]) -> list[Bench]:
    """Return a bench for each original and evaluation that checkpoints were judged by."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in in_order(records):
        if (reference := record.spec.reference) is not None:
            evaluation = record.spec.evaluation.to_json()
            groups.setdefault(digest({"r": reference.identity, "e": evaluation}), []).append(record)
    candidates = (_bench(group, records) for group in groups.values())
    return [bench for bench in candidates if bench is not None]


def is_judged(record: TrialRecord) -> bool:
    return record.spec.reference is not None


def findings_of(record: TrialRecord) -> list[str]:
    """Say what is odd about one judged checkpoint's files."""
    note: Mapping[str, object] = record.notes.get(JUDGED, {})
    lines = []
    if count := note.get("plain_count"):
        linears = plural(int(str(count)), "linear layer")
        lines.append(f"{linears} not quantized: {note['plain_linears']}")
    unlike = note.get("unlike") or {}
    assert isinstance(unlike, dict)
    lines += [
        f"{name} has nothing to do with the original's (correlation {significant(value, 2)}): it "
        "is random, rotated or another model's"
        for name, value in unlike.items()
    ]
    for key, words in (("tokenizer", "its tokenizer differs: "), ("doubts", ""), ("inexact", "")):
        remarks = note.get(key) or []
        assert isinstance(remarks, list)
        lines += [f"{words}{line}" for line in remarks]
    return lines + [str(line) for line in record.notes.get("checkpoint", [])]


def _bench(group: Sequence[TrialRecord], records: Sequence[TrialRecord]) -> Bench | None:
    """Return the bench of judged checkpoints; None without the original's own record."""
    spec = group[0].spec
    assert spec.reference is not None
    own = conditions_of(replace(spec, model=spec.reference, reference=None))
    originals = [
        record
        for record in records
        if record.completed and record.spec.rounds_nothing and conditions_of(record.spec) == own
    ]
    floors = [record for record in group if is_floor(record)]
    others = [record for record in group if record not in floors]
    if not originals or not others:
        return None
    texts = _texts_of(spec)
    metric = text_metric("kl", texts[0], spec.evaluation.quick) if texts else MEAN_ACCURACY

    def rank(record: TrialRecord) -> tuple[bool, bool, float]:
        """Order failed ones last, and those without a number before them."""
        value = Pool("", (record,)).cell(metric)
        if not isinstance(value, float):
            return not record.completed, True, 0.0
        return not record.completed, False, value if texts else -value  # accuracy: the more

    names = [_name(record.spec) for record in others]
    labels = [
        f"{name} ({record.spec.id})" if names.count(name) > 1 else name
        for name, record in zip(names, others, strict=True)
    ]
    pools = [Pool(label, (record,)) for label, record in zip(labels, others, strict=True)]
    pools.sort(key=lambda pool: rank(pool.records[0]))
    floor = next((record for record in floors if record.completed), None)
    return Bench(
        Pool(spec.reference.label, (originals[0],)),
        None
        if floor is None
        else Pool(f"{spec.reference.label} in {floor.spec.model.dtype}", (floor,)),
        tuple(pools),
    )


def _texts_of(spec: TrialSpec) -> list[str]:
    """Return the texts on which a trial measures the KL, by name."""
    texts = spec.evaluation.texts if spec.evaluation.drift is not None else ()
    return [text.name for text in texts]


def is_floor(record: TrialRecord) -> bool:
    """Return True for the original in another type.

    In its own type, or with a rounded cache, it was given as one of the checkpoints.
    """
    spec, original = record.spec, record.spec.reference
    if original is None or spec.kv is not None:
        return False
    return spec.model.files == original.files and spec.model.dtype != original.dtype


def _name(spec: TrialSpec) -> str:
    """Return a checkpoint's name, with how its cache is stored if that was asked for."""
    return spec.model.label if spec.kv is None else f"{spec.model.label}, {spec.kv.name}"


def _changed(pool: Pool, original: Pool, metric: str) -> str:
    shift: Change | None = change(pool, original, metric)
    return ABSENT if shift is None else str(shift)

"""The options of a report, and the report once it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from q3q.record import ANSWER
from q3q.report.against import PublishedSet

PLOTS = "plots"  # the folder of each plot as PNG and SVG


@dataclass(frozen=True, kw_only=True)
class About:
    """What a report says besides its records.

    command: starts the study again.
    question, expectation: the study's.
    predicted: the seconds that trials were predicted to take, by id.
    sweeps: the names of the sweeps that a trial belongs to, by id.
    warnings: problems in finding the records.
    context: tokens for which sizes count the cache too; None: sizes are of the weights alone.
    against_paper: speak of the paper even if none of its cells was run.
    against: other published numbers to compare with.
    margin: how much may be lost, in percent of a perplexity and in points of an accuracy; None if
        it was not set.
    """

    name: str
    command: str
    question: str = ""
    expectation: str = ""
    predicted: Mapping[str, float] | None = None
    sweeps: Mapping[str, str] | None = None
    warnings: Sequence[str] = ()
    context: int | None = None
    against_paper: bool = False
    against: PublishedSet | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Report:
    """A report on disk.

    text: the main tables and the answer for a terminal.
    table: the same in Markdown.
    answer: the answer in Markdown, for a front page.
    headline: the numbers that answer the study's question, by name.
    files: content by name.
    """

    folder: Path
    text: str
    table: str
    answer: str
    headline: Mapping[str, float]
    files: Mapping[str, bytes]

    def artifacts(self) -> dict[str, bytes]:
        """Return the files for a tracker, content by name."""
        return {ANSWER: self.answer.encode(), "table.md": self.table.encode(), **self.files}

"""The page: one HTML file without outside references, and the same content in Markdown."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from q3q.config.command import command_of
from q3q.record import TrialRecord
from q3q.report.answer import RULE
from q3q.report.checkpoints import checkpoint_tables
from q3q.report.luck import NOTE as LUCK
from q3q.report.measures import by_model, commit_of, in_order, seconds
from q3q.report.paper import Compared, paper_table, share_reproduced
from q3q.report.plots.drawing import Plot
from q3q.report.plots.looks import COLOURS
from q3q.report.tables import Table, result_tables

PARTS = Path(__file__).parent  # the folder of page.html.j2, page.css and page.js
VERDICTS = ("failed", "diverged", "reproduced", "close", "different")  # shown in colour
# Colours of the figures and the page's variables that replace them.
VARIABLES = {
    **{colour.lower(): f"--c{number}" for number, colour in enumerate(COLOURS)},
    "#595959": "--soft",
    "#e6e6e6": "--grid",
    "#b3b3b3": "--none",
}


@dataclass(frozen=True)
class Contents:
    """The contents of a report.

    command: starts the whole sweep again.
    answers, luck: the tables of `answer` and `luck`.
    published: cells of the paper that were run; None if the report does not speak of it.
    warnings: what a reader must know before trusting the numbers.
    """

    name: str
    command: str
    question: str
    expectation: str
    records: Sequence[TrialRecord]
    answers: Sequence[Table]
    luck: Sequence[Table]
    plots: Sequence[Plot]
    published: Sequence[Compared] | None
    warnings: Sequence[str]

    @property
    def counts(self) -> str:
        failed = sum(not record.completed for record in self.records)
        return (
            f"{len(self.records)} trials: {len(self.records) - failed} completed, {failed} failed."
        )


class Cell(NamedTuple):
    """A table cell's parts: a verdict in front, text, an interval (with what follows it) behind."""

    verdict: str = ""
    text: str = ""
    interval: str = ""


def versions(records: Sequence[TrialRecord]) -> dict[str, int]:
    """Count the records of each commit."""
    return dict(sorted(Counter(map(commit_of, records)).items()))


def html(contents: Contents) -> str:
    """Render the whole page. Styles, script and plots are inside, so it makes no request."""
    environment = Environment(
        loader=FileSystemLoader(PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(brief=_brief, cost=_cost, reason=_reason)
    environment.globals.update(
        cell_parts=_cell_parts,
        checkpoint_tables=checkpoint_tables,
        command_of=command_of,
        commit_of=commit_of,
        inline_svg=_inline_svg,
        paper_table=paper_table,
        result_tables=result_tables,
        share_reproduced=share_reproduced,
    )
    return environment.get_template("page.html.j2").render(
        report=contents,
        models=by_model(in_order(contents.records)),
        commits=versions(contents.records),
        answer_rule=RULE,
        luck_note=LUCK,
        style=Markup(PARTS.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(PARTS.joinpath("page.js").read_text(encoding="utf-8")),
    )


def markdown(contents: Contents, files: dict[str, str]) -> str:
    """Render the page's contents in Markdown.

    Args:
        files: path of each plot's image, by the plot's name.
    """
    parts = [f"# {contents.name}"]
    for word, text in (("Question", contents.question), ("Expectation", contents.expectation)):
        if text:
            parts.append(f"**{word}:** {text}")
    commits = versions(contents.records)
    code = f" Code: {', '.join(commits)}." if commits else ""
    parts += [f"```\n{contents.command}\n```", contents.counts + code]
    parts += [f"> **Note:** {warning}" for warning in contents.warnings]
    if contents.answers:
        parts += ["## Answer", "\n".join(table.markdown() for table in contents.answers), RULE]
    if contents.published is not None:
        parts += ["## Against the paper", share_reproduced(contents.published)]
        if contents.published:
            parts.append(paper_table(contents.published).markdown())
    if contents.luck:
        parts.append("## How much is luck")
        parts += ["\n".join(table.markdown() for table in contents.luck), LUCK]
    parts.append("## Results")
    parts += [
        f"![{_alt(plot)}]({files[plot.name]})" + (f"\n\n{plot.caption}" if plot.caption else "")
        for plot in contents.plots
    ]
    tables = result_tables(contents.records, everything=True, intervals=True)
    parts.append("\n".join(table.markdown() for table in tables) or "Nothing was measured.")
    parts += [
        f"## Checkpoints\n\n{table.markdown()}" for table in checkpoint_tables(contents.records)
    ]
    failed = [f"{_named(r)}: {_reason(r)}" for r in contents.records if not r.completed]
    diverged = [
        f"{_named(r)}: {', '.join(r.diverged)}"
        for r in contents.records
        if r.completed and r.diverged
    ]
    for word, lines in (("Failed", failed), ("Diverged", diverged)):
        if lines:
            parts.append(f"## {word}\n\n" + "\n".join(f"- {line}" for line in lines))
    parts.append("## Trials\n\n" + "\n".join(map(_trial_line, contents.records)))
    return "\n\n".join(parts) + "\n"


def _cell_parts(text: str) -> Cell:
    match = re.fullmatch(r"(.*?) (\[[^\]]*\].*)", text)
    if match:
        return Cell(text=match[1], interval=match[2])
    word = text.partition(" ")[0]
    if word in VERDICTS:
        return Cell(verdict=word, text=text.removeprefix(word))
    return Cell(text=text)


def _inline_svg(plot: Plot) -> Markup:
    """Return a plot's SVG in the page's colours, its ids made unique within the page."""
    svg = plot.svg().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<title>[^<]*</title>", "", svg)  # the page shows these words itself
    prefix = re.sub(r"\W", "_", plot.name)
    svg = re.sub(r'\b(id="|href="#)|(url\(#)', rf"\g<0>{prefix}-", svg)
    width = float(re.search(r'<svg[^>]*?width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    style = f'style="max-width:{width * 1.5:.0f}px" role="img" aria-label="{escape(_alt(plot))}"'
    svg = svg.replace("<svg", f"<svg {style}", 1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)


def _brief(commit: str) -> str:
    """Shorten a commit's hash and keep what follows a plus, its uncommitted changes."""
    name, plus, changes = commit.partition("+")
    return name[:12] + plus + changes


def _cost(record: TrialRecord) -> str:
    total = seconds(record)
    if total is None:
        return "no time measured"
    peaks = [value for name, value in record.metrics.items() if name.startswith("peak_bytes/")]
    memory = f", {max(peaks) / 1e9:.2g} GB at most" if peaks else ""
    return f"{total:.0f} s{memory}"


def _trial_line(record: TrialRecord) -> str:
    status = "completed" if record.completed else "FAILED"
    code = f"code {_brief(commit_of(record))}"
    return f"- {_named(record)}, {status}, {_cost(record)}, {code}: `{command_of(record.trial)}`"


def _named(record: TrialRecord) -> str:
    return f"{record.spec.name} · {record.spec.model.label} (`{record.spec.id}`)"


def _reason(record: TrialRecord) -> str:
    return " ".join(record.reason.split()) or "no reason given"


def _alt(plot: Plot) -> str:
    return f"{plot.title}, {plot.model}" if plot.model else plot.title

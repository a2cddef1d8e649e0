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
from q3q.formatting import bytes_in_words, plural, printable, significant
from q3q.record import TrialRecord
from q3q.report.against import Against
from q3q.report.answer import RULE, Answer, sentences
from q3q.report.beside import Beside
from q3q.report.certainty import in_words
from q3q.report.checkpoints import checkpoint_tables
from q3q.report.domains import NOTE as DOMAINS
from q3q.report.escapes import markdown_block, markdown_code, markdown_text
from q3q.report.families import NOTE as TESTS
from q3q.report.header import abbreviations, facts
from q3q.report.judged import Bench
from q3q.report.luck import NOTE as LUCK
from q3q.report.measures import by_model, commit_of, in_order, seconds
from q3q.report.opening import in_markdown, opening
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
    records: of all trials.
    shown: these, and what `with_baselines` adds for tables and plots.
    answers, luck, domains: what `answer` found, and the tables of `luck` and `domains`.
    against: the comparison with other published numbers than the paper's, if it was asked for.
    tests: of how sure the differences are.
    judged: published checkpoints beside their originals.
    divergences: the choices' KLs, and what budgets change at equal bytes.
    floors: sentences on the noise of a KL, where it was measured.
    pictures: of the answer, one for each of `answers` that can be drawn.
    published: cells of the paper that were run; None if the report does not speak of it.
    warnings: what a reader must know before trusting the numbers.
    """

    name: str
    command: str
    question: str
    expectation: str
    records: Sequence[TrialRecord]
    shown: Sequence[TrialRecord]
    answers: Sequence[Answer]
    luck: Sequence[Table]
    domains: Sequence[Table]
    against: Against | None
    tests: Sequence[Table]
    divergences: Sequence[Table]
    floors: Sequence[str]
    judged: Sequence[Bench]
    pictures: Sequence[Plot]
    plots: Sequence[Plot]
    published: Sequence[Compared] | None
    warnings: Sequence[str]

    @property
    def counts(self) -> str:
        failed = sum(not record.completed for record in self.records)
        trials = plural(len(self.records), "trial")
        return f"{trials}: {len(self.records) - failed} completed, {failed} failed."


class CellParts(NamedTuple):
    """A table cell's parts: a verdict in front, text, an interval (with what follows it) behind."""

    verdict: str = ""
    text: str = ""
    interval: str = ""


def versions(records: Sequence[TrialRecord]) -> dict[str, int]:
    """Count the records of each commit."""
    return dict(sorted(Counter(map(commit_of, records)).items()))


def html(contents: Contents) -> str:
    """Render the whole page. Styles, script and plots are inside, so it makes no request."""
    environment = _environment()
    environment.filters.update(brief=_brief, cost=_cost, reason=_reason)
    environment.globals.update(
        checkpoint_tables=checkpoint_tables,
        command_of=command_of,
        in_words=in_words,
        bytes_in_words=bytes_in_words,
        commit_of=commit_of,
        paper_table=paper_table,
        result_tables=result_tables,
        share_reproduced=share_reproduced,
    )
    return environment.get_template("page.html.j2").render(
        report=contents,
        models=by_model(in_order(contents.shown)),
        commits=versions(contents.records),
        answer_rule=RULE,
        test_note=TESTS,
        opening=[*(bench.sentence() for bench in contents.judged), *opening(contents.answers)],
        sentences=sentences(contents.answers),
        facts=facts(contents.records),
        abbreviations=abbreviations(contents.records),
        luck_note=LUCK,
        domains_note=DOMAINS,
        **_own_parts(),
    )


def html_of_studies(page: Beside) -> str:
    """Render the page of studies side by side."""
    template = _environment().get_template("studies.html.j2")
    return template.render(page=page, **_own_parts())


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(cell_parts=_cell_parts, inline_svg=_inline_svg)
    return environment


def _own_parts() -> dict[str, Markup]:
    parts = {"style": "page.css", "script": "page.js"}
    return {
        name: Markup(PARTS.joinpath(file).read_text(encoding="utf-8"))
        for name, file in parts.items()
    }


def markdown(contents: Contents, files: dict[str, str]) -> str:
    """Render the page's contents in Markdown.

    Args:
        files: path of each plot's image, by the plot's name.
    """
    parts = [f"# {markdown_text(contents.name)}"]
    if contents.question:
        parts.append(f"**Question:** {markdown_text(contents.question)}")
    parts += [f"> **Note:** {markdown_text(warning)}" for warning in contents.warnings]
    if contents.answers:
        parts += ["## Answer", in_markdown(contents.answers)]
        parts += [_image(plot, files) for plot in contents.pictures]
        parts.append("## The best method at each bit width")
        parts.append("\n".join(f"- {markdown_text(line)}" for line in sentences(contents.answers)))
        parts.append("\n".join(answer.table().markdown() for answer in contents.answers))
        parts += [markdown_text(text) for text in (RULE, abbreviations(contents.records)) if text]
    for bench in contents.judged:
        parts += [f"## Checkpoints of {markdown_text(bench.name)}", markdown_text(bench.sentence())]
        parts += ["\n".join(table.markdown() for table in bench.tables())]
        parts += ["\n".join(f"- {markdown_text(line)}" for line in bench.findings())]
    parts.append("## How it was run")
    if contents.expectation:
        parts.append(f"**Expectation:** {markdown_text(contents.expectation)}")
    parts += [markdown_text(line) for line in facts(contents.records)]
    commits = versions(contents.records)
    code = f" Code: {', '.join(map(markdown_text, commits))}." if commits else ""
    parts += [markdown_block(contents.command), contents.counts + code]
    parts += _published(contents)
    if contents.domains:
        parts.append("## What each calibration costs")
        parts += ["\n".join(table.markdown() for table in contents.domains), DOMAINS]
    if contents.luck:
        parts.append("## How much is luck")
        parts += ["\n".join(table.markdown() for table in contents.luck), LUCK]
    if contents.divergences or contents.floors:
        parts.append("## How far from the unquantized model")
        parts += [markdown_text(line) for line in contents.floors]
        parts += ["\n".join(table.markdown() for table in contents.divergences)]
    if contents.tests:
        parts.append("## How sure the differences are")
        parts += ["\n".join(table.markdown() for table in contents.tests), markdown_text(TESTS)]
    parts.append("## Results")
    parts += [_image(plot, files) for plot in contents.plots]
    tables = result_tables(contents.shown, everything=True, intervals=True)
    parts.append("\n".join(table.markdown() for table in tables) or "Nothing was measured.")
    parts += [
        f"## Checkpoints\n\n{table.markdown()}" for table in checkpoint_tables(contents.records)
    ]
    failed = [
        f"{_named(r)}: {markdown_text(_reason(r))}" for r in contents.records if not r.completed
    ]
    diverged = [
        f"{_named(r)}: {markdown_text(', '.join(r.diverged))}"
        for r in contents.records
        if r.completed and r.diverged
    ]
    for word, lines in (("Failed", failed), ("Diverged", diverged)):
        if lines:
            parts.append(f"## {word}\n\n" + "\n".join(f"- {line}" for line in lines))
    parts.append("## Trials\n\n" + "\n".join(map(_trial_line, contents.records)))
    return "\n\n".join(parts) + "\n"


def _image(plot: Plot, files: dict[str, str]) -> str:
    alt = re.sub(r"([\[\]])", r"\\\1", markdown_text(_alt(plot)).replace("\\]", "]"))
    caption = f"\n\n{markdown_text(plot.caption)}" if plot.caption else ""
    return f"![{alt}]({files[plot.name]}){caption}"


def _published(contents: Contents) -> list[str]:
    """Return the comparisons with published numbers in Markdown."""
    parts = []
    if contents.published is not None:
        parts += ["## Against the paper", markdown_text(share_reproduced(contents.published))]
        if contents.published:
            parts.append(paper_table(contents.published).markdown())
    if contents.against is not None:
        parts += [f"## {markdown_text(contents.against.title)}"]
        parts.append(markdown_text(contents.against.sentence()))
        if contents.against.compared:
            parts.append(contents.against.table().markdown())
    return parts


def _cell_parts(text: str) -> CellParts:
    match = re.fullmatch(r"(.*?) (\[[^\]]*\].*)", text)
    if match:
        return CellParts(text=match[1], interval=match[2])
    word = text.partition(" ")[0]
    if word in VERDICTS:
        return CellParts(verdict=word, text=text.removeprefix(word))
    return CellParts(text=text)


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
    memory = f", {significant(max(peaks) / 1e9, 2)} GB at most" if peaks else ""
    return f"{total:.0f} s{memory}"


def _trial_line(record: TrialRecord) -> str:
    status = "completed" if record.completed else "FAILED"
    code = f"code {markdown_text(_brief(commit_of(record)))}"
    command = markdown_code(command_of(record.trial))
    return f"- {_named(record)}, {status}, {_cost(record)}, {code}: {command}"


def _named(record: TrialRecord) -> str:
    return f"{markdown_text(record.spec.label)} (`{record.spec.id}`)"


def _reason(record: TrialRecord) -> str:
    return printable(record.reason) or "no reason given"


def _alt(plot: Plot) -> str:
    return f"{plot.title}, {plot.model}" if plot.model else plot.title

"""The page: one HTML file that needs nothing else, and the same in Markdown."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from q3q.config.command import command_of
from q3q.record import TrialRecord
from q3q.report.answer import RULE
from q3q.report.drawing import COLOURS, Plot
from q3q.report.luck import NOTE as LUCK
from q3q.report.measures import by_model, commit_of, in_order, model_name, seconds
from q3q.report.paper import Compared, paper_table, share_reproduced
from q3q.report.tables import Table, result_tables

WIDE = 4.5  # inches; wider pictures get more room, or are scrolled
PARTS = Path(__file__).parent  # page.css and page.js lie beside


@dataclass(frozen=True)
class Contents:
    """What a report tells.

    command: of the whole sweep. answers, luck: tables of `answer` and `luck`. warnings: what a reader must know before
    believing it.
    """

    name: str
    command: str
    question: str
    expectation: str
    records: Sequence[TrialRecord]
    answers: Sequence[Table]
    luck: Sequence[Table]
    plots: Sequence[Plot]
    compared: Sequence[Compared] | None
    warnings: Sequence[str]

    @property
    def counts(self) -> str:
        failed = sum(not record.completed for record in self.records)
        return (
            f"{len(self.records)} trials: {len(self.records) - failed} completed, {failed} failed."
        )


def versions(records: Sequence[TrialRecord]) -> dict[str, int]:
    """The commits that measured these records, and how many each."""
    return dict(sorted(Counter(map(commit_of, records)).items()))


def html(contents: Contents) -> str:
    """The whole page. No request leaves it: styles, script and pictures are inside."""
    style, script = (
        PARTS.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    body = [_header(contents), _answer(contents)]
    if contents.compared is not None:
        body.append(_paper(contents.compared))
    if contents.luck:
        tables = "".join(map(_table, contents.luck))
        body.append(
            f'<section class="luck"><h2>How much is luck</h2><div class="tables">{tables}</div>'
            f'<p class="quiet">{escape(LUCK)}</p></section>'
        )
    body += [
        _model(model, mine, contents.plots)
        for model, mine in by_model(in_order(contents.records)).items()
    ]
    over = [plot for plot in contents.plots if not plot.model]
    if over:
        body.append(f"<section><h2>Over all trials</h2>{_plots(over)}</section>")
    body.append(_trials(contents.records))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Without it a browser asks the server for one.
        '<link rel="icon" href="data:,">'
        f"<title>{escape(contents.name)} · q3q</title><style>\n{style}</style></head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f'\n</main>\n<div id="tip" role="status" hidden></div>\n<script>\n{script}</script>\n</body></html>\n'
    )


def markdown(contents: Contents, files: dict[str, str]) -> str:
    """The page's twin. files: where each plot's picture is, by its name."""
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
    if contents.compared is not None:
        parts += ["## Against the paper", share_reproduced(contents.compared)]
        if contents.compared:
            parts.append(paper_table(contents.compared).markdown())
    if contents.luck:
        parts += [
            "## How much is luck",
            "\n".join(table.markdown() for table in contents.luck),
            LUCK,
        ]
    parts.append("## Results")
    parts += [
        f"![{_alt(plot)}]({files[plot.name]})" + (f"\n\n{plot.caption}" if plot.caption else "")
        for plot in contents.plots
    ]
    tables = result_tables(contents.records, everything=True, intervals=True)
    parts.append("\n".join(table.markdown() for table in tables) or "Nothing was measured.")
    for word, some in (
        ("Failed", _failed(contents.records)),
        ("Diverged", _diverged(contents.records)),
    ):
        if some:
            parts.append(f"## {word}\n\n" + "\n".join(f"- {line}" for line in some))
    parts.append("## Trials\n\n" + "\n".join(map(_trial_lines, contents.records)))
    return "\n\n".join(parts) + "\n"


def _header(contents: Contents) -> str:
    commits = versions(contents.records)
    lines = [f"<h1>{escape(contents.name)}</h1>"]
    for word, text in (("Question", contents.question), ("Expectation", contents.expectation)):
        if text:
            lines.append(f'<p class="{word.lower()}"><b>{word}.</b> {escape(text)}</p>')
    lines.append(_command(contents.command))
    code = (
        f" Code: {', '.join(f'<code>{escape(_brief(commit))}</code>' for commit in commits)}."
        if commits
        else ""
    )
    lines.append(f'<p class="quiet">{escape(contents.counts)}{code}</p>')
    lines += [f'<p class="warning">{escape(warning)}</p>' for warning in contents.warnings]
    return f"<header>{''.join(lines)}</header>"


def _brief(commit: str) -> str:
    """A commit as people quote it, with what git did not know."""
    name, plus, changes = commit.partition("+")
    return name[:12] + plus + changes


def _answer(contents: Contents) -> str:
    if not contents.answers:
        return "<section><h2>Answer</h2><p>No quantized trial measured anything.</p></section>"
    shown = "".join(map(_table, contents.answers))
    return f'<section class="answer"><h2>Answer</h2>{shown}<p class="quiet">{escape(RULE)}</p></section>'


def _paper(compared: Sequence[Compared]) -> str:
    table = _table(paper_table(compared)) if compared else ""
    share = f'<p class="share">{escape(share_reproduced(compared))}</p>'
    return f'<section class="paper"><h2>Against the paper</h2>{share}{table}</section>'


def _model(model: str, records: Sequence[TrialRecord], plots: Sequence[Plot]) -> str:
    mine = [plot for plot in plots if plot.model == model]
    tables = "".join(
        _table(table) for table in result_tables(records, everything=True, intervals=True)
    )
    shown = f'<details open><summary>Tables</summary><div class="tables">{tables}</div></details>'
    return f"<section><h2>{escape(model)}</h2>{_plots(mine)}{shown}</section>"


def _plots(plots: Sequence[Plot]) -> str:
    """Narrow pictures three beside each other, wide ones two."""
    wide = [plot.figure.get_figwidth() > WIDE for plot in plots]
    grids = [
        (
            kind,
            "".join(_plot(plot) for plot, one in zip(plots, wide, strict=True) if one == of_kind),
        )
        for kind, of_kind in (("plots", False), ("plots wide", True))
    ]
    return "".join(f'<div class="{kind}">{figures}</div>' for kind, figures in grids if figures)


def _plot(plot: Plot) -> str:
    caption = f'<span class="quiet">{escape(plot.caption)}</span>' if plot.caption else ""
    return (
        f'<figure id="{escape(plot.name)}">{_inline(plot)}'
        f"<figcaption><b>{escape(plot.title)}</b> {caption}</figcaption></figure>"
    )


def _inline(plot: Plot) -> str:
    """The SVG in the page's colours. Ids are made the plot's own: all pictures share one document."""
    svg = plot.svg().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<title>[^<]*</title>", "", svg)  # the page shows these words itself
    prefix = re.sub(r"\W", "_", plot.name)
    svg = re.sub(r'\b(id=")', rf"\1{prefix}-", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", svg)
    width = float(re.search(r'<svg[^>]*?width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    style = f'style="max-width:{width * 1.5:.0f}px" role="img" aria-label="{escape(_alt(plot))}"'
    svg = svg.replace("<svg", f"<svg {style}", 1)
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour.lower(), f"var(--c{number})")
    for colour, name in (("#595959", "--soft"), ("#e6e6e6", "--grid"), ("#b3b3b3", "--none")):
        svg = svg.replace(colour, f"var({name})")
    return svg


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join(
        f"<tr><th>{_cell(row[0])}</th>"
        + "".join(
            f'<td data-head="{escape(name)}">{_cell(text)}</td>'
            for name, text in zip(table.columns[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    note = "".join(
        f'<p class="quiet">{escape(part)}</p>' for part in table.note.split("\n\n") if part
    )
    return (
        f'<div class="table"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(text: str) -> str:
    """Intervals smaller than their number; words that are verdicts as marks."""
    found = re.fullmatch(r"(.*?) (\[[^\]]*\])(.*)", text)
    if found:
        return f"{escape(found[1])} <small>{escape(found[2])}{escape(found[3])}</small>"
    word = text.partition(" ")[0]
    if word in ("failed", "diverged", "reproduced", "close", "different"):
        return f'<span class="{word}">{escape(word)}</span>{escape(text.removeprefix(word))}'
    return escape(text)


def _command(command: str) -> str:
    return f'<div class="command"><pre>{escape(command)}</pre><button type="button">Copy</button></div>'


def _trials(records: Sequence[TrialRecord]) -> str:
    items = []
    for record in records:
        status = "completed" if record.completed else "failed"
        reason = f"<p>{escape(_reason(record))}</p>" if not record.completed else ""
        if record.diverged:
            reason += f"<p>Not a finite number: {escape(', '.join(record.diverged))}</p>"
        items.append(
            f"<details><summary>{escape(record.spec.name)} · {escape(model_name(record.spec))} "
            f'<span class="{status}">{status}</span> <span class="quiet">{_cost(record)}</span></summary>'
            f'{reason}{_command(command_of(record.spec))}<p class="quiet">Trial <code>{record.spec.id}</code>, code '
            f"<code>{escape(_brief(commit_of(record)))}</code></p></details>"
        )
    return f'<section class="trials"><h2>Trials</h2>{"".join(items)}</section>'


def _cost(record: TrialRecord) -> str:
    total = seconds(record)
    if total is None:
        return "no time measured"
    peaks = [value for name, value in record.metrics.items() if name.startswith("peak_bytes/")]
    memory = f", {max(peaks) / 1e9:.2g} GB at most" if peaks else ""
    return f"{total:.0f} s{memory}"


def _trial_lines(record: TrialRecord) -> str:
    status = "completed" if record.completed else "FAILED"
    code = f"code {_brief(commit_of(record))}"
    return f"- {_named(record)}, {status}, {_cost(record)}, {code}: `{command_of(record.spec)}`"


def _failed(records: Sequence[TrialRecord]) -> list[str]:
    return [f"{_named(record)}: {_reason(record)}" for record in records if not record.completed]


def _diverged(records: Sequence[TrialRecord]) -> list[str]:
    return [f"{_named(r)}: {', '.join(r.diverged)}" for r in records if r.completed and r.diverged]


def _named(record: TrialRecord) -> str:
    return f"{record.spec.name} · {model_name(record.spec)} (`{record.spec.id}`)"


def _reason(record: TrialRecord) -> str:
    return " ".join(record.reason.split()) or "no reason given"


def _alt(plot: Plot) -> str:
    return f"{plot.title}, {plot.model}" if plot.model else plot.title

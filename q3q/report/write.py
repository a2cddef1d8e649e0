"""Write a report: the page, the same in Markdown, its numbers as CSV and LaTeX, and its plots."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from q3q.record import ANSWER, TrialRecord
from q3q.report.answer import answers
from q3q.report.headline import headline
from q3q.report.latex import latex
from q3q.report.luck import luck_tables
from q3q.report.measures import in_order
from q3q.report.page import Contents, html, markdown, versions
from q3q.report.paper import Compared, compare_with_paper, paper_table, share_reproduced
from q3q.report.plots import perplexity_against_bits, site_error_heatmap, study_plots
from q3q.report.tables import result_tables, sites_csv, trial_table
from q3q.storage.files import write_atomically

HTML = "report.html"
FORMATS = {"html": HTML, "md": "results.md", "csv": "results.csv", "latex": "results.tex"}
PERPLEXITY = "perplexity.png"
PLOTS = "plots"  # the folder of each plot as PNG and SVG


@dataclass(frozen=True, kw_only=True)
class About:
    """What a report says besides its records.

    command: starts the study again.
    question, expectation: the study's.
    predicted: the seconds that trials were predicted to take, by id.
    warnings: problems in finding the records.
    against_paper: speak of the paper even if none of its cells was run.
    """

    name: str
    command: str
    question: str = ""
    expectation: str = ""
    predicted: Mapping[str, float] | None = None
    warnings: Sequence[str] = ()
    against_paper: bool = False


@dataclass(frozen=True)
class Report:
    """A report on disk.

    text: the main tables for a terminal.
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


def write_report(records: Sequence[TrialRecord], folder: Path, about: About) -> Report:
    """Write the page, its Markdown, CSV, LaTeX and plots, each atomically."""
    records = in_order(records)
    main = result_tables(records, everything=False)
    contents = _contents(records, about)
    images = {plot.name: f"{PLOTS}/{plot.name}.png" for plot in contents.plots}
    files = {
        HTML: html(contents).encode(),
        FORMATS["md"]: markdown(contents, images).encode(),
        FORMATS["csv"]: _csv(records, None),
        FORMATS["latex"]: latex(records).encode(),
        PERPLEXITY: perplexity_against_bits(records),
        **{f"{PLOTS}/{plot.name}.svg": plot.svg() for plot in contents.plots},
        **{f"{PLOTS}/{plot.name}.png": plot.png() for plot in contents.plots},
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    text = "\n\n".join(table.plain() for table in main) or "No results: no trial measured anything."
    if contents.published:
        text += f"\n\nAgainst the paper: {share_reproduced(contents.published)}"
    table = "\n".join(table.markdown() for table in main)
    answer = "\n".join(table.markdown() for table in contents.answers) or table
    return Report(folder, text, table, answer, headline(records), files)


def one_format(records: Sequence[TrialRecord], about: About, kind: str) -> bytes:
    """Return the report in one of `FORMATS`.

    Markdown comes without plots. CSV of a report against the paper lists the paper's cells.
    """
    records = in_order(records)
    if kind == "latex":
        return latex(records).encode()
    if kind == "csv":
        return _csv(records, compare_with_paper(records) if about.against_paper else None)
    contents = _contents(records, about, plots=kind == "html")
    return (html(contents) if kind == "html" else markdown(contents, {})).encode()


def trial_artifacts(record: TrialRecord) -> dict[str, bytes]:
    """Return one trial's files for a tracker, content by name."""
    files = {"record.json": _json(record.to_json())}
    if record.sites:
        files["sites.csv"] = sites_csv(record).encode()
        files["heatmap.png"] = site_error_heatmap(record)
    if record.results:
        files["lm_eval.json"] = _json(record.results)
    paths = {name: record.trial.folder / name for name in record.files}
    return files | {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def _contents(records: Sequence[TrialRecord], about: About, plots: bool = True) -> Contents:
    compared = compare_with_paper(records)
    warnings = list(about.warnings)
    if len(commits := versions(records)) > 1:
        counts = ", ".join(f"{count} by {commit}" for commit, count in commits.items())
        warnings.append(
            f"These trials were measured by {len(commits)} versions of the code: {counts}."
        )
    return Contents(
        name=about.name,
        command=about.command,
        question=about.question,
        expectation=about.expectation,
        records=records,
        answers=answers(records),
        luck=luck_tables(records),
        plots=study_plots(records, about.predicted) if plots else [],
        published=compared if compared or about.against_paper else None,
        warnings=warnings,
    )


def _csv(records: Sequence[TrialRecord], compared: Sequence[Compared] | None) -> bytes:
    if compared is None:
        return trial_table(records).to_csv(index=False, lineterminator="\n").encode()
    text = io.StringIO()
    table = paper_table(compared)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return text.getvalue().encode()


def _json(data: object) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()

"""Write a report: the page, the same in Markdown, its numbers as CSV and LaTeX, and its plots."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from q3q.evaluate.samples import damaged_files
from q3q.formatting import printable
from q3q.record import TrialRecord
from q3q.report.about import PLOTS, About, Report
from q3q.report.against import compare
from q3q.report.answer import Answer, answers
from q3q.report.baselines import with_baselines
from q3q.report.beside import Beside
from q3q.report.divergences import divergence_tables, equal_bytes_tables, noise_floors
from q3q.report.domains import domain_tables
from q3q.report.escapes import csv_cell, markdown_text
from q3q.report.headline import headline
from q3q.report.judged import CARD, benches, is_judged
from q3q.report.latex import latex
from q3q.report.luck import luck_tables
from q3q.report.measures import in_order
from q3q.report.opening import MOST_ANSWERS, export_hint, in_markdown, opening
from q3q.report.page import Contents, html, html_of_studies, markdown, versions
from q3q.report.paper import compare_with_paper, misnamed, paper_table, share_reproduced
from q3q.report.plots import (
    Plot,
    perplexity_against_bits,
    site_error_heatmap,
    study_plots,
    with_own_names,
)
from q3q.report.plots.choice import picture_of_answer
from q3q.report.plots.looks import Looks, study_looks
from q3q.report.tables import Table, csv_text, result_tables, sites_csv, trial_table
from q3q.storage.files import read_file, write_atomically

HTML = "report.html"
FORMATS = {"html": HTML, "md": "results.md", "csv": "results.csv", "latex": "results.tex"}
PERPLEXITY = "perplexity.png"
TERMINAL_WIDTH = 100


def write_report(records: Sequence[TrialRecord], folder: Path, about: About) -> Report:
    """Write the page, its Markdown, CSV, LaTeX and plots, each atomically."""
    records = in_order(records)
    contents = _contents(records, about)
    judged = [bench.tables()[0] for bench in contents.judged]
    main = [*judged, *result_tables(contents.shown, everything=False)]
    drawn = [*contents.pictures, *contents.plots]
    images = {plot.name: f"{PLOTS}/{plot.name}.png" for plot in drawn}
    files = {
        HTML: html(contents).encode(),
        FORMATS["md"]: markdown(contents, images).encode(),
        FORMATS["csv"]: _csv(records, about.sweeps),
        FORMATS["latex"]: latex(records).encode(),
        PERPLEXITY: perplexity_against_bits(contents.shown),
        **{f"{PLOTS}/{plot.name}.svg": plot.svg() for plot in drawn},
        **{f"{PLOTS}/{plot.name}.png": plot.png() for plot in drawn},
    }
    if contents.judged:
        files[CARD] = "\n".join(bench.card() for bench in contents.judged).encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
    text = "\n\n".join(table.plain() for table in main) or _nothing_measured(records)
    if contents.published:
        text += f"\n\nAgainst the paper: {share_reproduced(contents.published)}"
    if contents.against is not None:
        text += f"\n\n{contents.against.title}: {contents.against.sentence()}"
    if lines := [*(bench.sentence() for bench in contents.judged), *opening(contents.answers)]:
        text += "\n\n" + "\n".join(_wrapped(line) for line in lines)
        if hint := export_hint(contents.answers):
            text += f"\n\n{hint}"
    table = "\n".join(table.markdown() for table in main)
    verdicts = [markdown_text(bench.sentence()) for bench in contents.judged]
    answer = in_markdown(contents.answers) if contents.answers else table
    answer = "\n\n".join([*verdicts, answer])
    numbers = headline([record for record in records if not is_judged(record)])
    numbers |= {name: kl for bench in contents.judged for name, kl in bench.numbers().items()}
    return Report(folder, text, table, answer, numbers, files)


def _nothing_measured(records: Sequence[TrialRecord]) -> str:
    """Say why there is no table of results."""
    if records and all(record.completed for record in records):
        return "Nothing was measured: the trials had no evaluation."
    return "No results: no trial measured anything."


def write_comparison(page: Beside, folder: Path, sweeps: Mapping[str, str]) -> None:
    """Write a page of studies side by side, the same in Markdown, and all their trials as CSV."""
    for kind, name in FORMATS.items():
        write_atomically(folder / name, comparison_in(page, kind, sweeps))


def comparison_in(page: Beside, kind: str, sweeps: Mapping[str, str]) -> bytes:
    """Return a page of studies side by side in one of `FORMATS`."""
    records = in_order(record for study in page.studies for record in study.records)
    if kind == "latex":
        return latex(records).encode()
    if kind == "csv":
        return _csv(records, sweeps)
    return (html_of_studies(page) if kind == "html" else page.markdown()).encode()


def one_format(records: Sequence[TrialRecord], about: About, kind: str) -> bytes:
    """Return the report in one of `FORMATS`.

    Markdown comes without plots. CSV of a report against published numbers lists their cells.
    """
    records = in_order(records)
    if kind == "latex":
        return latex(records).encode()
    if kind == "csv":
        if about.against is not None:
            table = compare(records, about.against).table()
        elif about.against_paper:
            table = paper_table(compare_with_paper(records))
        else:
            return _csv(records, about.sweeps)
        return csv_text([table.columns, *table.rows]).encode()
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
    damaged = damaged_files(record.files, record.trial.folder)
    whole = [name for name in record.files if name not in damaged]
    return files | {name: read_file(record.trial.folder / name) for name in whole}


def _contents(records: Sequence[TrialRecord], about: About, plots: bool = True) -> Contents:
    compared = compare_with_paper(records)
    judged = benches(records)
    shown = [record for record in with_baselines(records) if not is_judged(record)]
    own = [record for record in records if not is_judged(record)]
    warnings = list(about.warnings)
    if len(commits := versions(records)) > 1:
        counts = ", ".join(f"{count} by {commit}" for commit, count in commits.items())
        warnings.append(
            f"These trials were measured by {len(commits)} versions of the code: {counts}."
        )
    if (line := misnamed(records)) is not None:
        warnings.append(line)
    shown_answers = answers(shown, about.margin, about.context)
    pictures = _pictures(shown_answers, study_looks(shown)) if plots else []
    return Contents(
        name=about.name,
        command=about.command,
        question=about.question,
        expectation=about.expectation,
        records=records,
        shown=shown,
        answers=shown_answers,
        luck=luck_tables(own),
        domains=domain_tables(own),
        against=None if about.against is None else compare(records, about.against),
        divergences=[*equal_bytes_tables(records), *divergence_tables(records)],
        tests=[
            table
            for answer in shown_answers
            for table in (
                *answer.certainty.tables(answer.name),
                *_tests(answer, len(shown_answers) > 1),
            )
        ],
        floors=noise_floors(records),
        judged=judged,
        pictures=pictures,
        plots=study_plots(shown, about.predicted, about.context) if plots else [],
        published=compared if compared or about.against_paper else None,
        warnings=warnings,
    )


def _pictures(shown_answers: Sequence[Answer], looks: Looks) -> list[Plot]:
    pictures = [
        picture_of_answer(
            answer.name,
            answer.tried,
            answer.reference,
            answer.tests,
            answer.metrics[0],
            answer.chosen,
            looks,
            answer.memory,
        )
        for answer in shown_answers[:MOST_ANSWERS]
    ]
    return with_own_names([plot for plot in pictures if plot is not None])


def _tests(answer: Answer, several: bool) -> list[Table]:
    tables = answer.tests.tables()
    return [replace(t, title=f"{answer.name}: {t.title}") for t in tables] if several else tables


def _csv(records: Sequence[TrialRecord], sweeps: Mapping[str, str] | None) -> bytes:
    table = trial_table(records, sweeps).map(csv_cell).rename(columns=csv_cell)
    return table.to_csv(index=False, lineterminator="\n").encode()


def _wrapped(line: str) -> str:
    return "\n".join(textwrap.wrap(printable(line), TERMINAL_WIDTH, subsequent_indent="  "))


def _json(data: object) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()

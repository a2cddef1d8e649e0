"""What a sweep leaves for people: a table, a picture, and a page that says how to get them again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from q3q.record import TrialRecord, write_atomically
from q3q.report.plots import perplexity_against_bits, site_error_heatmap
from q3q.report.tables import Table, in_order, model_name, result_tables, sites_csv, trial_table

PAGE, CSV, PICTURE = "results.md", "results.csv", "perplexity.png"


@dataclass(frozen=True)
class Report:
    """A report on disk. text: its main tables, for a terminal. table: the same in Markdown. files: content by name."""

    folder: Path
    text: str
    table: str
    files: Mapping[str, bytes]

    def artifacts(self) -> dict[str, bytes]:
        """What a tracker keeps of it."""
        return {"table.md": self.table.encode(), **self.files}


def write_report(records: Sequence[TrialRecord], folder: Path, command: str) -> Report:
    """Write `results.csv`, `results.md` and `perplexity.png`; each appears whole or not at all.

    command: what a person types to get these results again.
    """
    records = in_order(records)
    main = result_tables(records, everything=False)
    files = {
        CSV: trial_table(records).to_csv(index=False, lineterminator="\n").encode(),
        PICTURE: perplexity_against_bits(records),
        PAGE: _page(records, command).encode(),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    text = "\n\n".join(table.plain() for table in main) or "No results: no trial measured anything."
    return Report(folder, text, _joined(main), files)


def trial_artifacts(record: TrialRecord) -> dict[str, bytes]:
    """One trial's files for a tracker, content by name."""
    files = {"record.json": _json(record.to_json())}
    if record.sites:
        files |= {"sites.csv": sites_csv(record).encode(), "heatmap.png": site_error_heatmap(record)}
    if record.results:
        files["lm_eval.json"] = _json(record.results)
    return files


def _page(records: Sequence[TrialRecord], command: str) -> str:
    failed = [f"- {_name(record)}: {_reason(record)}" for record in records if not record.completed]
    diverged = [f"- {_name(r)}: {', '.join(r.diverged)}" for r in records if r.completed and r.diverged]
    commits = sorted({str(record.environment.get("git_commit") or "") for record in records} - {""})
    count = f"{len(records)} trials: {len(records) - len(failed)} completed, {len(failed)} failed."
    parts = [
        f"# Results\n\n```\n{command}\n```\n\n{count}" + (f" Code: {', '.join(commits)}." if commits else ""),
        f"![Perplexity against bits]({PICTURE})",
        _joined(result_tables(records, everything=True)) or "Nothing was measured.",
    ]
    if failed:
        parts.append("## Failed\n\n" + "\n".join(failed))
    if diverged:
        parts.append("## Diverged\n\nThese are not finite numbers:\n\n" + "\n".join(diverged))
    parts.append(f"Every metric of every trial: [{CSV}]({CSV}).")
    return "\n\n".join(parts) + "\n"


def _joined(tables: Sequence[Table]) -> str:
    return "\n".join(table.markdown() for table in tables)


def _name(record: TrialRecord) -> str:
    return f"{record.spec.name} · {model_name(record.spec)} (`{record.spec.id}`)"


def _reason(record: TrialRecord) -> str:
    return " ".join(record.reason.split()) or "no reason given"


def _json(data: object) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()

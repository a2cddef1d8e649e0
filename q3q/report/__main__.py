"""`python -m q3q.report`: write a report of a study, or of all records in a storage folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from q3q.errors import EXIT_MISUSED, Q3QError
from q3q.report.records import StoredRecords, find_records, predictions
from q3q.report.write import FORMATS, HTML, About, one_format, write_report
from q3q.storage.mirror import refreshed
from q3q.storage.names import file_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, or print it in one format. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m q3q.report", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--study", metavar="NAME", help="name or id of a sweep; default: all records"
    )
    parser.add_argument(
        "--storage", default="mlruns", metavar="DIR", help="or a URL; default: mlruns"
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="print this format instead of writing a folder"
    )
    parser.add_argument(
        "--against",
        choices=["paper"],
        help="compare with published numbers, and say so if none of them was run",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write; default: <storage>/reports/<study>",
    )
    options = parser.parse_args(arguments)
    try:
        storage = refreshed(options.storage)
        stored = find_records(storage, options.study)
    except Q3QError as error:
        print(f"q3q: {error}", file=sys.stderr)
        return EXIT_MISUSED
    for line in stored.damaged:
        print(f"q3q: {line}", file=sys.stderr)
    about = _about(stored, options, storage)
    if options.format:
        sys.stdout.buffer.write(one_format(stored.records, about, options.format))
        return 0
    folder = options.out or storage / "reports" / _folder(stored)
    try:
        report = write_report(stored.records, folder, about)
    except OSError as error:
        print(
            f"q3q: --out {folder} cannot be written ({error}): give another folder", file=sys.stderr
        )
        return EXIT_MISUSED
    print(f"{report.text}\n\nReport: {report.folder / HTML}")
    return 0


def _folder(stored: StoredRecords) -> str:
    """Return the name of the sweep's own report, or of one for several sweeps."""
    if stored.sweep is None:
        return "all"
    return file_name(stored.sweep.name) if stored.merged else stored.sweep.file_name


def _about(stored: StoredRecords, options: argparse.Namespace, storage: Path) -> About:
    warnings = list(stored.damaged)
    if stored.missing:
        total = len(stored.records) + stored.missing
        warnings.append(f"{stored.missing} of the study's {total} trials have no record yet.")
    if stored.merged:
        count, ids = len(stored.merged), ", ".join(stored.merged)
        warnings.append(
            f"This report covers {count} sweeps of this name; --study ID selects one: {ids}."
        )
    sweep = stored.sweep
    return About(
        name=sweep.name if sweep else "All records",
        command=sweep.command if sweep else f"python -m q3q.report --storage {options.storage}",
        question=sweep.question if sweep else "",
        expectation=sweep.expectation if sweep else "",
        predicted=predictions(storage),
        warnings=warnings,
        against_paper=options.against == "paper",
    )


if __name__ == "__main__":
    sys.exit(main())

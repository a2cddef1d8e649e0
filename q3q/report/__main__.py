"""`python -m q3q.report`: a report of any set of records, whenever it is wanted."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from q3q.errors import Q3QError
from q3q.report.records import Found, find_records, predictions
from q3q.report.write import FORMATS, HTML, About, one_format, write_report
from q3q.storage.mirror import refreshed

MISUSED = 2


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
        "--format", choices=FORMATS, help="print this format alone; without it a folder is written"
    )
    parser.add_argument(
        "--against",
        choices=["paper"],
        help="compare with published numbers, and say so if none was run",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write; default: <storage>/reports/<study>",
    )
    given = parser.parse_args(arguments)
    try:
        storage = refreshed(given.storage)
        found = find_records(storage, given.study)
    except Q3QError as error:
        print(f"q3q: {error}", file=sys.stderr)
        return MISUSED
    for line in found.damaged:
        print(f"q3q: {line}", file=sys.stderr)
    about = _about(found, given, storage)
    if given.format:
        sys.stdout.buffer.write(one_format(found.records, about, given.format))
        return 0
    folder = given.out or storage / "reports" / _folder(found)
    try:
        report = write_report(found.records, folder, about)
    except OSError as error:
        print(
            f"q3q: --out {folder} cannot be written ({error}): give another folder", file=sys.stderr
        )
        return MISUSED
    print(f"{report.text}\n\nReport: {report.folder / HTML}")
    return 0


def _folder(found: Found) -> str:
    """That of the sweep's own report, unless this one is of several sweeps."""
    if found.sweep is None:
        return "all"
    return found.sweep.name if found.merged else f"{found.sweep.name}_{found.sweep.id}"


def _about(found: Found, given: argparse.Namespace, storage: Path) -> About:
    warnings = list(found.damaged)
    if found.missing:
        warnings.append(
            f"{found.missing} of the study's {len(found.records) + found.missing} trials have no record yet."
        )
    if found.merged:
        count, ids = len(found.merged), ", ".join(found.merged)
        warnings.append(
            f"{count} sweeps of this name are taken together; --study takes one by its id: {ids}."
        )
    sweep = found.sweep
    return About(
        name=sweep.name if sweep else "All records",
        command=sweep.command if sweep else f"python -m q3q.report --storage {given.storage}",
        question=sweep.question if sweep else "",
        expectation=sweep.expectation if sweep else "",
        predicted=predictions(storage),
        warnings=warnings,
        against_paper=given.against == "paper",
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m q3q.report`: write a report of a study, or of all records in a storage folder.

With several studies (`--study A --study B`), one page compares them side by side.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from q3q.ending import end_well
from q3q.errors import EXIT_MISUSED, Q3QError
from q3q.quoting import module
from q3q.report.about import About
from q3q.report.against import PublishedSet, published_set
from q3q.report.beside import NamedStudy, beside
from q3q.report.drawn import current_report
from q3q.report.records import (
    StoredRecords,
    find_records,
    margin_of,
    predictions,
    sweeps_of_trials,
)
from q3q.report.write import (
    FORMATS,
    HTML,
    comparison_in,
    one_format,
    write_comparison,
)
from q3q.storage.mirror import refreshed
from q3q.storage.names import file_name

PAPER = "paper"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, or print it in one format. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m q3q.report", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--study",
        metavar="NAME",
        action="append",
        default=[],
        help="name or id of a sweep; give it several times to compare; default: all records",
    )
    parser.add_argument(
        "--storage",
        default="mlruns",
        metavar="DIR",
        help="the storage, a folder or a URL; default: mlruns",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="print this format instead of writing a folder"
    )
    parser.add_argument(
        "--against",
        metavar="SET",
        help="compare with published numbers: paper, onecomp, or a CSV file of your own",
    )
    parser.add_argument(
        "--context",
        type=_context,
        metavar="TOKENS",
        help="context length for which the cache is added to the weights; default: the study's",
    )
    parser.add_argument(
        "--margin",
        type=_margin,
        metavar="NUMBER",
        help="the loss that you accept, in percent of a perplexity and in points of an accuracy; "
        "the report says which trials are shown to stay within it; default: the study's",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write; default: <storage>/reports/<study>",
    )
    options = parser.parse_args(arguments)
    names = list(dict.fromkeys(options.study))
    try:
        storage = refreshed(options.storage)
        studies = [find_records(storage, name) for name in names or [None]]
        choice = options.against
        against = None if choice in (None, PAPER) else published_set(choice)
    except Q3QError as error:
        print(f"q3q: {error}", file=sys.stderr)
        return EXIT_MISUSED
    for line in dict.fromkeys(line for stored in studies for line in stored.damaged):
        print(f"q3q: {line}", file=sys.stderr)
    if len(studies) > 1:
        return _compare(names, studies, options, storage)
    [stored] = studies
    about = _about(stored, options, storage, against)
    if options.format:
        sys.stdout.buffer.write(one_format(stored.records, about, options.format))
        return 0
    folder = options.out or storage / "reports" / _folder(stored)
    try:
        report = current_report(stored.records, folder, about)
    except OSError as error:
        return _unwritable(folder, error)
    print(f"{report.text}\n\nReport: {report.folder / HTML}")
    return 0


def _compare(
    names: Sequence[str],
    studies: Sequence[StoredRecords],
    options: argparse.Namespace,
    storage: Path,
) -> int:
    """Write a page of several studies, or print it in one format. Returns the exit code."""
    named = [
        NamedStudy(
            name=name,
            command=stored.sweep.command if stored.sweep else "",
            question=stored.sweep.question if stored.sweep else "",
            records=stored.records,
        )
        for name, stored in zip(names, studies, strict=True)
    ]
    warnings = [line for stored in studies for line in _warnings(stored)]
    page, sweeps = beside(named, dict.fromkeys(warnings)), sweeps_of_trials(storage)
    if options.format:
        sys.stdout.buffer.write(comparison_in(page, options.format, sweeps))
        return 0
    folder = options.out or storage / "reports" / "+".join(map(_folder, studies))
    try:
        write_comparison(page, folder, sweeps)
    except OSError as error:
        return _unwritable(folder, error)
    print(f"{page.plain()}\n\nReport: {folder / HTML}")
    return 0


def _unwritable(folder: Path, error: OSError) -> int:
    print(f"q3q: --out {folder} cannot be written ({error}): give another folder", file=sys.stderr)
    return EXIT_MISUSED


def _folder(stored: StoredRecords) -> str:
    """Return the name of the sweep's own report, or of one for several sweeps."""
    if stored.sweep is None:
        return "all"
    return file_name(stored.sweep.name) if stored.merged else stored.sweep.file_name


def _warnings(stored: StoredRecords) -> list[str]:
    warnings = list(stored.damaged)
    if stored.missing:
        total = len(stored.records) + stored.missing
        warnings.append(f"{stored.missing} of the study's {total} trials have no record yet.")
    if stored.merged:
        count, ids = len(stored.merged), ", ".join(stored.merged)
        warnings.append(
            f"This report covers {count} sweeps of this name; --study ID selects one: {ids}."
        )
    return warnings


def _about(
    stored: StoredRecords,
    options: argparse.Namespace,
    storage: Path,
    against: PublishedSet | None,
) -> About:
    sweep = stored.sweep
    return About(
        name=sweep.name if sweep else "All records",
        command=sweep.command if sweep else module("q3q.report", "--storage", options.storage),
        question=sweep.question if sweep else "",
        expectation=sweep.expectation if sweep else "",
        predicted=predictions(storage),
        sweeps=sweeps_of_trials(storage),
        warnings=_warnings(stored),
        context=options.context or (sweep.context if sweep else None),
        against_paper=options.against == PAPER,
        against=against,
        margin=options.margin or (margin_of(sweep) if sweep else None),
    )


def _context(word: str) -> int:
    """Return a positive number of tokens.

    Raises:
        ArgumentTypeError: the word is none.
    """
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a number of tokens, such as 32768")
    return int(word)


def _margin(text: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = math.nan
    if not 0 < margin < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return margin


if __name__ == "__main__":
    end_well()
    sys.exit(main())

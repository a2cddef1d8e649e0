"""Tell whether the report on the disk is up to date: then nothing is drawn again.

Neither pandas nor matplotlib is imported for a report that is up to date.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from q3q.canonical import sha256
from q3q.environment import packages
from q3q.errors import UNREADABLE
from q3q.evaluate.samples import damaged_files
from q3q.record import Sweep, TrialRecord
from q3q.report.about import About, Report
from q3q.report.baselines import with_baselines
from q3q.report.records import margin_of, predictions
from q3q.spec import Json, digest
from q3q.storage.files import read_file, sealed, unsealed, write_atomically

DRAWN = "drawn.json"  # says from what the report beside it was made
CODE = Path(__file__).parents[1]
LIBRARIES = ("matplotlib", "pandas", "jinja2", "markupsafe", "numpy", "pyarrow")


class TrialFiles(Mapping[str, bytes]):
    """One trial's files for a tracker, made when the first is asked for.

    A tracker that has the record already asks for none, and its heat map is not drawn.
    """

    def __init__(self, record: TrialRecord) -> None:
        self._record = record

    @functools.cached_property
    def _files(self) -> dict[str, bytes]:
        from q3q.report.write import trial_artifacts

        return trial_artifacts(self._record)

    def __getitem__(self, name: str) -> bytes:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def sweep_report(sweep: Sweep, records: Sequence[TrialRecord], storage: Path) -> Report:
    """Return the report of a sweep in its folder of the storage, of the records that it has.

    Raises:
        OSError: it cannot be written.
    """
    total, missing = len(sweep.trials), len(sweep.trials) - len(records)
    warnings = [f"{missing} of the study's {total} trials have no record yet."] if missing else []
    about = About(
        name=sweep.name,
        command=sweep.command,
        question=sweep.question,
        expectation=sweep.expectation,
        predicted=predictions(storage),
        warnings=warnings,
        context=sweep.context,
        margin=margin_of(sweep),
    )
    return current_report(records, storage / "reports" / sweep.file_name, about)


def current_report(records: Sequence[TrialRecord], folder: Path, about: About) -> Report:
    """Return the report in the folder, written again unless it is whole and of just this.

    Raises:
        OSError: it cannot be written.
    """
    made_from = _made_from(records, about)
    current = _found(folder, made_from)
    if current is not None:
        return current
    from q3q.report.write import write_report

    report = write_report(records, folder, about)
    facts: Json = {
        "made_from": made_from,
        "files": {name: sha256(content) for name, content in report.files.items()},
        "text": report.text,
        "table": report.table,
        "answer": report.answer,
        "headline": dict(report.headline),
    }
    write_atomically(folder / DRAWN, sealed(facts))
    return report


def _found(folder: Path, made_from: str) -> Report | None:
    """Return the report on disk; None if it is of something else, damaged or not there."""
    try:
        facts = unsealed(read_file(folder / DRAWN), strict=True)
        if facts["made_from"] != made_from:
            return None
        files = {name: read_file(folder / name) for name in facts["files"]}
    except UNREADABLE:
        return None
    if any(sha256(content) != facts["files"][name] for name, content in files.items()):
        return None
    words = (facts["text"], facts["table"], facts["answer"])
    return Report(folder, *words, facts["headline"], files)


def _made_from(records: Sequence[TrialRecord], about: About) -> str:
    """Return a digest of all that a report depends on: records and their files, words, code."""
    shown = with_baselines(records)
    ids = {record.spec.id for record in shown}
    predicted = {key: value for key, value in (about.predicted or {}).items() if key in ids}
    return digest(
        {
            "records": [_facts_of(record) for record in shown],
            "about": asdict(replace(about, predicted=predicted, warnings=list(about.warnings))),
            "code": _code(),
            "libraries": [packages()["python"], *map(version, LIBRARIES)],
        }
    )


def _facts_of(record: TrialRecord) -> Json:
    # The number of a file that the record has no digest of is its content's.
    folder = record.trial.folder
    unnamed = [name for name, checksum in record.files.items() if checksum is None]
    return {
        "record": record.to_json(),
        "places": [str(folder), str(record.placement.export), str(record.placement.baseline)],
        "damaged": sorted(damaged_files(record.files, folder)),
        "unnamed": {name: _sha_of(folder / name) for name in unnamed},
    }


def _code() -> str:
    """Return a digest of q3q's own files; a report may depend on any of them."""
    sha = hashlib.sha256()
    for path in sorted(CODE.rglob("*")):
        if path.suffix in (".py", ".j2", ".css", ".js", ".csv") and path.is_file():
            sha.update(f"{path.relative_to(CODE)} {_sha_of(path)}\n".encode())
    return sha.hexdigest()


def _sha_of(path: Path) -> str:
    try:
        return sha256(read_file(path))
    except OSError:
        return ""

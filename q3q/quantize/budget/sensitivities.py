"""Sensitivities on disk: one file for all trials that measure the same, resumed unit by unit.

A file is `<storage>/sensitivities/<id>.json`, and its id the digest of all that determines its
numbers. It is written anew after each unit, so a killed measurement goes on at the next one. What
is damaged or another's is put aside, said, and measured again. One process at a time measures,
under a claim, and the others wait for it; to a storage that is a URL, what it has measured is sent
every few seconds. The folder may be deleted at any time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from q3q.errors import UNREADABLE
from q3q.placement import Trial
from q3q.quantize.budget.units import Unit
from q3q.quantize.methods.registry import settings_or_default
from q3q.spec import Json, TrialSpec, digest, without_bits
from q3q.storage.aside import clear_for_folder, put_aside
from q3q.storage.claim import Claim, Holder, claimed
from q3q.storage.files import read_file, sealed, unsealed, write_atomically
from q3q.storage.mirror import mirror_for
from q3q.storage.uploader import uploading

SENSING = "sensitivities"  # a phase of trials with a budget of bits, and the folder of its numbers


def identity_of(spec: TrialSpec, units: Sequence[Unit]) -> Json:
    """Return all that determines a trial's sensitivities: not the budget, nor the evaluation."""
    assert spec.budget is not None
    assert spec.scheme is not None
    budget, scheme = spec.budget, spec.scheme.to_json()
    # An export rounds scales as its format stores them: that changes too little to measure anew.
    for other in ("bits", "scales", "act_bits", "act_format", "act_group_size", "act_scales"):
        scheme.pop(other, None)
    text = ("source", "digest", "samples", "length", "draw")
    observes = settings_or_default(spec.method).observes()  # if not, a text is for factors alone
    return {
        "version": budget.version,
        "model": spec.model.identity,
        "method": spec.method.to_json(),
        "scheme": scheme,
        "overrides": without_bits(spec.overrides),
        "calibration": spec.calibration.to_json() if spec.calibration and observes else None,
        "seed": spec.seed,
        "measure": budget.measure,
        "text": {key: getattr(budget, key) for key in text},
        "widths": list(budget.widths),
        "units": [[unit.name, *unit.weights] for unit in units],
    }


def sharers_of(spec: TrialSpec) -> str:
    """Name the trials that share this one's sensitivities, without the model's config.json."""
    assert spec.budget is not None
    facts = {"unit": spec.budget.unit, "skip": sorted(spec.skip)}
    return f"{SENSING} {digest(identity_of(spec, ()) | facts)[:10]}"


def file_of(storage: Path, identity: Json) -> Path:
    return storage / SENSING / f"{digest(identity)[:16]}.json"


@dataclass
class Sensitivities:
    """What is measured so far: by unit, a number for each width.

    measured: number of units that were measured here, not read
    """

    path: Path
    identity: Json
    rows: dict[str, list[float]] = field(default_factory=dict)
    measured: int = 0

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def units(self) -> list[str]:
        return [unit[0] for unit in self.identity["units"]]

    @property
    def complete(self) -> bool:
        return all(unit in self.rows for unit in self.units)

    def read(self) -> None:
        """Take what the file has; what is no file of these sensitivities is put aside."""
        try:
            self.rows = _content(self.path, self.identity)
        except FileNotFoundError:
            return
        except UNREADABLE as error:
            put_aside(self.path, f"cannot be read ({error}); its sensitivities are measured again")

    def add(self, unit: str, row: Sequence[float]) -> None:
        """Add a unit's numbers, and write the file."""
        self.rows[unit] = list(row)
        self.measured += 1
        write_atomically(self.path, sealed({"identity": self.identity, "rows": self.rows}))

    def table(self) -> list[list[float]]:
        """Return the numbers by unit, in the order of the model."""
        return [self.rows[unit] for unit in self.units]


def kept_units(path: Path, identity: Json) -> int:
    """Return how many units a file has measured, for a plan; 0 if it cannot be read."""
    try:
        return len(_content(path, identity))
    except UNREADABLE:
        return 0


def _content(path: Path, identity: Json) -> dict[str, list[float]]:
    """Return a file's numbers by unit; raise one of `UNREADABLE` if it is not this identity's."""
    facts = unsealed(read_file(path), strict=True)
    if facts["identity"] != identity:
        raise ValueError("it is of another model, method or text")
    return _rows(facts["rows"], len(identity["widths"]), [unit[0] for unit in identity["units"]])


def _rows(
    rows: Mapping[str, Sequence[float]], widths: int, units: Sequence[str]
) -> dict[str, list[float]]:
    """Check what a file has: a number of 0 or more for each width of units that there are.

    Raises:
        ValueError: it is not that.
    """
    for unit, row in rows.items():
        numbers = len(row) == widths and all(isinstance(number, float) for number in row)
        if unit not in units or not numbers or not all(0 <= number < math.inf for number in row):
            raise ValueError(f"{unit} has not {widths} numbers")
    return {unit: list(row) for unit, row in rows.items()}


@contextmanager
def turn_at(
    trial: Trial, units: Sequence[Unit], wait: Callable[[Holder], object]
) -> Iterator[tuple[Sensitivities, Claim | None]]:
    """Yield the trial's sensitivities; incomplete ones with the claim on measuring the rest.

    Args:
        wait: receives the process that measures them now, at every poll; may raise to stop waiting.
    """
    identity = identity_of(trial.spec, units)
    sensitivities = Sensitivities(file_of(trial.placement.storage, identity), identity)
    mirror, name = mirror_for(trial.placement.store), f"{SENSING}/{sensitivities.path.name}"
    clear_for_folder(sensitivities.path.parent)
    sensitivities.read()
    if sensitivities.complete:
        yield sensitivities, None
        return
    where = sensitivities.path.parent if mirror is None else mirror.claim_store(SENSING)
    with claimed(where, sensitivities.id, wait) as claim:
        if mirror is not None:
            mirror.pull(name)
        sensitivities.read()  # another may have measured them meanwhile
        if sensitivities.complete or mirror is None:
            yield sensitivities, None if sensitivities.complete else claim
            return
        # Each unit is sent, so that another machine can go on.
        with uploading(mirror, name, check_claim=claim.check):
            yield sensitivities, claim

"""What a reader must know before the numbers: model, calibration, date, hardware, abbreviations."""

from collections.abc import Iterable, Sequence

from q3q.config.schema import TEXT_NAMES
from q3q.formatting import plural, significant
from q3q.number_formats import INT, own_form
from q3q.record import TrialRecord
from q3q.report.judged import is_floor
from q3q.report.measures import by_model, in_order
from q3q.report.sizes import parameters_of
from q3q.spec import Scheme

MOST = 4  # of one kind in a line
DAY = 10  # characters of a moment, to the day


def facts(records: Sequence[TrialRecord]) -> list[str]:
    """Return a line each for the models, the calibration texts, and when and where trials ran."""
    lines = [_models(records), _calibrations(records), _runs(records)]
    return [line for line in lines if line]


def abbreviations(records: Sequence[TrialRecord]) -> str:
    """Explain the abbreviations that these trials' labels may contain."""
    schemes = [record.spec.scheme for record in records if record.spec.scheme is not None]
    of_rows = [scheme for scheme in schemes if scheme.group_rows == 1]
    groups = sorted({scheme.group_size for scheme in of_rows if scheme.group_size > 0})
    blocks = {scheme.groups: scheme for scheme in schemes if scheme.group_rows != 1}
    activations = sorted(
        {scheme.act_bits for scheme in schemes if scheme.act_bits and scheme.act_format == INT}
    )
    words = []
    if any(scheme.format == INT for scheme in schemes):
        words.append("w4: weights of 4 bits")
    if groups:
        words.append(f"g{groups[-1]}: each {groups[-1]} columns of a row share a scale")
    if any(scheme.group_size == -1 for scheme in of_rows):
        words.append("pc: per channel, a scale for each whole row")
    words += [f"{name}: {_shared(scheme)}" for name, scheme in sorted(blocks.items())]
    if activations:
        words.append(f"a{activations[0]}: activations of {activations[0]} bits, a16: of 16 bits")
    formats = {
        scheme.codes: form for scheme in schemes if (form := own_form(scheme.format)) is not None
    }
    words += [f"{name}: {form.about}" for name, form in formats.items()]
    caches = {kv.name: kv for record in records if (kv := record.spec.kv) is not None}
    words += [f"{name}: {kv.about}" for name, kv in sorted(caches.items())]
    budgets = {budget.words: budget for record in records if (budget := record.spec.budget)}
    words += [f"{name}: {budget.about}" for name, budget in sorted(budgets.items())]
    if len({scheme.symmetric for scheme in schemes}) > 1:
        words.append("sym, asym: codes symmetric around zero, or with zero points")
    return f"{'; '.join(words)}." if words else ""


def _shared(scheme: Scheme) -> str:
    """Say what shares a scale where rows do."""
    if scheme.group_rows == scheme.group_size == -1:
        return "per tensor, a scale for each whole linear"
    rows, columns = (
        "all" if side == -1 else side for side in (scheme.group_rows, scheme.group_size)
    )
    return f"each block of {rows} rows and {columns} columns shares a scale"


def _models(records: Sequence[TrialRecord]) -> str:
    words = []
    for model, trials in by_model(in_order(records)).items():
        sizes = (size for record in trials if (size := parameters_of(record)) is not None)
        parameters = next(sizes, None)
        counted = "" if parameters is None else f"{_count(parameters)} parameters, "
        own = [record for record in trials if not is_floor(record)]
        types = " and ".join(dict.fromkeys(record.spec.model.dtype for record in own or trials))
        source = next((r.spec.model.source for r in trials if r.spec.model.source), None)
        of_hub = f" ({source})" if source and source != model else ""
        words.append(f"{model}{of_hub}, {counted}{types}")
    return f"Model{'s' if len(words) > 1 else ''}: {_listed(words, '; ')}." if words else ""


def _calibrations(records: Iterable[TrialRecord]) -> str:
    texts = dict.fromkeys(
        f"{TEXT_NAMES.get(text.source, text.label)} "
        f"({plural(text.samples, 'window')} of {text.length} tokens)"
        for record in records
        if (text := record.spec.calibration) is not None
    )
    return f"Calibrated on: {_listed([*texts], ', ')}." if texts else ""


def _runs(records: Sequence[TrialRecord]) -> str:
    """Say when and on what hardware the trials ran, as far as their records know."""
    environments = [record.environment for record in records]
    moments = sorted(
        str(moment)
        for each in environments
        for key in ("started", "ended")
        if (moment := each.get(key))
    )
    hardware = [each["hardware"] for each in environments if isinstance(each.get("hardware"), dict)]
    machines = dict.fromkeys(
        str(machine.get("gpu") or f"{machine.get('processor') or 'a CPU'}, without a GPU")
        for machine in hardware
    )
    days = list(dict.fromkeys(moment[:DAY] for moment in (moments[:1] + moments[-1:])))
    when = f" {' to '.join(days)}" if days else ""
    where = f" on {_listed([*machines], '; ')}" if machines else ""
    return f"Ran{when}{where}." if when or where else ""


def _count(number: float) -> str:
    """Return `5.77 M` or `8.19 B`."""
    size, unit = (number / 1e9, "B") if number >= 1e9 else (number / 1e6, "M")
    return f"{significant(size, 3)} {unit}"


def _listed(words: Sequence[str], between: str) -> str:
    more = f" and {len(words) - MOST} more" if len(words) > MOST else ""
    return between.join(words[:MOST]) + more

"""Whether two of the things tried differ by more than chance: sample by sample, and seed by seed."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from q3q.errors import IntegrityError
from q3q.record import Comparison, trial_folder
from q3q.report.pools import Pool
from q3q.spec import MEAN_ACCURACY, mean_metrics

REMEMBERED = 16  # trials whose samples are kept in memory: one of MMLU has tens of megabytes
Scores = Mapping[str, float]


def difference(ours: Pool, theirs: Pool, metric: str) -> Comparison | None:
    """One metric of one thing tried, less another's, on the same samples; of several seeds each sample's mean.

    None where samples are missing, or are not the same ones.
    """
    from q3q.evaluate.compare import compare

    if metric == MEAN_ACCURACY:
        parts = [difference(ours, theirs, one) for one in mean_metrics(ours.spec)]
        return (
            stratified([part for part in parts if part is not None]) if None not in parts else None
        )
    scores = [_scores(pool, metric) for pool in (ours, theirs)]
    if scores[0] is None or scores[1] is None:
        return None
    try:
        return compare(metric, scores[0], scores[1])
    except IntegrityError:
        return None


def stratified(parts: Sequence[Comparison]) -> Comparison | None:
    """The mean over tasks of their paired differences. None if one of them has none.

    Questions of different tasks are independent: the distances of the ends from the differences add in squares (Zou
    and Donner, Statistics in Medicine 27, 2008, which is how the interval of each task is put together too).
    """
    differences = [part.difference for part in parts if part.difference is not None]
    if not parts or len(differences) < len(parts):
        return None
    mean = math.fsum(differences) / len(parts)

    def end(ends: Sequence[float | None], sign: int) -> float | None:
        reach = [
            bound - middle
            for bound, middle in zip(ends, differences, strict=True)
            if bound is not None
        ]
        return mean + sign * math.hypot(*reach) / len(parts) if len(reach) == len(parts) else None

    low, high = end([part.low for part in parts], -1), end([part.high for part in parts], 1)
    return Comparison(
        metric=MEAN_ACCURACY,
        difference=mean,
        low=low,
        high=high,
        distinguishable=low is not None and high is not None and not low <= 0 <= high,
        p_value=None,
        n=sum(part.n for part in parts),
        test="intervals of the tasks, stratified",
    )


def told_by_seeds(ours: Pool, theirs: Pool, metric: str) -> bool | None:
    """Whether the means differ by more than the seeds' spread explains: Welch's test, p < 0.05.

    A method that reads no text has no luck, its number is as it is. None where the luck of one is unknown: it reads
    text, and was tried with one seed.
    """
    from scipy.stats import ttest_1samp, ttest_ind

    from q3q.evaluate.compare import LEVEL

    values = [pool.values(metric) for pool in (ours, theirs)]
    several = [len(mine) > 1 for mine in values]
    exact = [pool.spec.calibration is None for pool in (ours, theirs)]
    if not all(one or other for one, other in zip(several, exact, strict=True)):
        return None
    if all(exact):
        return values[0][0] != values[1][0]
    if any(exact):
        fixed, drawn = (values[0][0], values[1]) if exact[0] else (values[1][0], values[0])
        p_value = ttest_1samp(drawn, fixed).pvalue
    else:
        p_value = ttest_ind(*values, equal_var=False).pvalue
    return bool(p_value < LEVEL)


def _scores(pool: Pool, metric: str) -> Scores | None:
    """Each sample's score, of several seeds its mean."""
    from q3q.evaluate.samples import SAMPLES

    found = []
    for record in (one for one in pool.records if one.completed):
        path = trial_folder(record.spec) / SAMPLES if "trials" in record.spec.places else None
        if path is None or not path.is_file():
            return None
        scores = _read(path, path.stat().st_mtime_ns, bool(record.spec.evaluation.get("quick")))
        if metric not in scores:
            return None
        found.append(scores[metric])
    if len(found) < 2:
        return found[0] if found else None
    if any(one.keys() != found[0].keys() for one in found):
        return None
    return {sample: math.fsum(one[sample] for one in found) / len(found) for sample in found[0]}


@lru_cache(maxsize=REMEMBERED)
def _read(path: Path, changed: int, quick: bool) -> dict[str, dict[str, float]]:
    from q3q.evaluate.samples import SCORED, measured, read_samples

    try:
        return measured(read_samples(path, SCORED), quick)
    except (IntegrityError, KeyError, TypeError):  # damaged: as good as not there
        return {}

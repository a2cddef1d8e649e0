"""Tests of whether two pools differ by more than chance: sample by sample, and seed by seed."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from q3q.errors import IntegrityError
from q3q.evaluate.metrics import mean_metrics
from q3q.record import Comparison
from q3q.report.measures import is_perplexity
from q3q.report.pools import Pool
from q3q.spec import MEAN_ACCURACY
from q3q.storage.files import FileState, file_state

CACHED = 16  # trials whose samples stay in memory; those of MMLU take tens of megabytes each
Scores = Mapping[str, float]


def difference(ours: Pool, theirs: Pool, metric: str) -> Comparison | None:
    """Compare a metric of two pools on the same samples.

    A pool of several seeds counts by each sample's mean.

    Returns:
        None if samples are missing or the two have different ones.
    """
    from q3q.evaluate.compare import compare

    if metric == MEAN_ACCURACY:
        parts = [difference(ours, theirs, task) for task in mean_metrics(ours.spec)]
        complete = [part for part in parts if part is not None]
        return stratified(complete) if len(complete) == len(parts) else None
    sides = [_scores(pool, metric) for pool in (ours, theirs)]
    ways = [ratio for ratio in sides[0] if ratio in sides[1]]
    if not ways:
        return None
    try:
        return compare(metric, sides[0][ways[0]], sides[1][ways[0]], ratio=ways[0])
    except IntegrityError:
        return None


def stratified(parts: Sequence[Comparison]) -> Comparison | None:
    """Return the mean of the tasks' paired differences, None if a task has none.

    Questions of different tasks are independent, so the distances from differences to interval
    ends add in squares (Zou and Donner, Statistics in Medicine 27, 2008; each task's own interval
    is built in the same way).
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


def differ_by_seeds(ours: Pool, theirs: Pool, metric: str) -> bool | None:
    """Return True if the means differ by more than the seeds' spread explains.

    This is Welch's test with p < 0.05. A method that reads no calibration text does not depend on
    the seed, so its number is exact.

    Returns:
        None if a pool's spread is unknown, because it reads text and has a single seed.
    """
    from scipy.stats import ttest_1samp, ttest_ind

    from q3q.evaluate.compare import LEVEL

    values = [pool.values(metric) for pool in (ours, theirs)]
    exact = [pool.spec.calibration is None for pool in (ours, theirs)]
    if not all(len(own) > 1 or fixed for own, fixed in zip(values, exact, strict=True)):
        return None
    if all(exact):
        return values[0][0] != values[1][0]
    if any(exact):
        fixed, drawn = (values[0][0], values[1]) if exact[0] else (values[1][0], values[0])
        p_value = ttest_1samp(drawn, fixed).pvalue
    else:
        p_value = ttest_ind(*values, equal_var=False).pvalue
    return bool(p_value < LEVEL)


def _scores(pool: Pool, metric: str) -> dict[bool, Scores]:
    """Return each sample's score, averaged over seeds, as `samples.explained` does.

    Empty if a seed has no samples, or its number does not follow from them.
    """
    from q3q.evaluate.samples import SAMPLES, explained

    seeds: list[dict[bool, Scores]] = []
    for record in (record for record in pool.records if record.completed):
        path = record.trial.folder / SAMPLES
        if not path.is_file() or metric not in record.numbers:
            return {}
        digest = record.files.get(SAMPLES)
        scores = _read(path, digest, file_state(path), record.spec.evaluation.quick)
        if metric not in scores:
            return {}
        # A text's samples are losses.
        ways = (
            {True: scores[metric]}
            if is_perplexity(metric)
            else explained(scores[metric], record.numbers[metric])
        )
        seeds.append(dict(ways))
    if len(seeds) < 2:
        return seeds[0] if seeds else {}
    return {
        ratio: {
            sample: math.fsum(own[ratio][sample] for own in seeds) / len(seeds)
            for sample in seeds[0][ratio]
        }
        for ratio in seeds[0]
        if all(ratio in own and own[ratio].keys() == seeds[0][ratio].keys() for own in seeds)
    }


@lru_cache(maxsize=CACHED)
def _read(
    path: Path, digest: str | None, state: FileState, quick: bool
) -> dict[str, dict[str, float]]:
    from q3q.evaluate.samples import SCORED, measured, read_samples

    try:
        return measured(read_samples(path, SCORED, digest), quick)
    except (IntegrityError, KeyError, TypeError):  # a damaged file counts as missing
        return {}

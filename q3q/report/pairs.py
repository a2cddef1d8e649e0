"""Tests of whether two pools differ by more than chance: sample by sample, and seed by seed."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING

from q3q.errors import IntegrityError
from q3q.evaluate.metrics import mean_metrics, reads_text
from q3q.evaluation import is_perplexity
from q3q.record import Comparison
from q3q.report.measures import text_metrics
from q3q.report.pools import Pool
from q3q.spec import MEAN_ACCURACY
from q3q.storage.files import FileState, file_state

if TYPE_CHECKING:
    from q3q.evaluate.flips import Flips
    from q3q.evaluate.replicates import Floats

CACHED = 64  # trials whose samples stay in memory: all pairs of a model's are compared
Scores = Mapping[str, float]


def difference(ours: Pool, theirs: Pool, metric: str) -> Comparison | None:
    """Compare a metric of two pools on the same samples.

    Where a pool has several seeds, the seeds are a second source of chance, see
    `compare_replicates`.

    Returns:
        None if samples are missing or the two have different ones.
    """
    from q3q.evaluate.compare import compare

    if any(len(pool.values(metric)) > 1 for pool in (ours, theirs)):
        return _over_seeds(ours, theirs, metric)
    if metric == MEAN_ACCURACY:
        parts = [difference(ours, theirs, task) for task in mean_metrics(ours.spec)]
        complete = [part for part in parts if part is not None]
        return stratified(complete) if len(complete) == len(parts) else None
    aligned = _aligned(ours, theirs, metric)
    if aligned is None:
        return None
    ratio, [first], [second] = aligned
    try:
        return compare(metric, first, second, ratio=ratio)
    except IntegrityError:
        return None


def flips_of_tasks(ours: Pool, theirs: Pool, metric: str) -> "dict[str, Flips] | None":
    """Count the flips of each task that an accuracy is of, as `flipped` does.

    Returns:
        None if a task has none.
    """
    tasks = mean_metrics(ours.spec) if metric == MEAN_ACCURACY else [metric]
    flips_by_task = {task: flipped(ours, theirs, task) for task in tasks}
    counted = {task: each for task, each in flips_by_task.items() if each is not None}
    return counted if counted and len(counted) == len(flips_by_task) else None


def flipped(ours: Pool, theirs: Pool, task: str) -> "Flips | None":
    """Count a task's answers, of all our seeds, that differ from their first seed's.

    Returns:
        None if samples are missing or are not right or wrong answers.
    """
    from q3q.evaluate.flips import flips

    aligned = _aligned(ours, theirs, task)
    if aligned is None:
        return None
    _, seeds, [baseline, *_] = aligned
    total: Flips | None = None
    for scores in seeds:
        counted = flips(scores, baseline)
        if counted is None:
            return None
        total = counted if total is None else total + counted
    return total


def _over_seeds(ours: Pool, theirs: Pool, metric: str) -> Comparison | None:
    import numpy

    from q3q.evaluate.compare import FEWEST_PAIRS
    from q3q.evaluate.replicates import compare_replicates

    sides: tuple[list[Floats], list[Floats]] = ([], [])
    ratio = False
    for task in mean_metrics(ours.spec) if metric == MEAN_ACCURACY else [metric]:
        aligned = _aligned(ours, theirs, task)
        if aligned is None:
            return None
        ratio, *pair = aligned
        keys = sorted(pair[0][0])
        if len(keys) < FEWEST_PAIRS or any(s.keys() != pair[0][0].keys() for p in pair for s in p):
            return None
        for side, seeds in zip(sides, pair, strict=True):
            side.append(numpy.array([[scores[key] for key in keys] for scores in seeds]))
    if not all(bool(numpy.isfinite(scores).all()) for side in sides for scores in side):
        return None
    return compare_replicates(metric, *sides, ratio=ratio)


def _aligned(
    ours: Pool, theirs: Pool, metric: str
) -> tuple[bool, list[Scores], list[Scores]] | None:
    """Return how the metric follows from scores (True: as exp of their mean), and each seed's."""
    sides = [_scores(pool, metric) for pool in (ours, theirs)]
    ways = [ratio for ratio in sides[0] if ratio in sides[1]]
    return (ways[0], sides[0][ways[0]], sides[1][ways[0]]) if ways else None


def stratified(parts: Sequence[Comparison]) -> Comparison | None:
    """Return the mean of the tasks' paired differences, None if a task has none.

    Questions of different tasks are independent, so the distances from differences to interval
    ends add in squares (Zou and Donner, Statistics in Medicine 27, 2008; each task's own interval
    is built in the same way). The p-value is the interval's.
    """
    from q3q.evaluate.equivalence import p_of_interval

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
    bounded = low is not None and high is not None
    return Comparison(
        metric=MEAN_ACCURACY,
        difference=mean,
        low=low,
        high=high,
        distinguishable=low is not None and high is not None and not low <= 0 <= high,
        p_value=p_of_interval(mean, low, high) if bounded else None,  # type: ignore[arg-type]
        n=sum(part.n for part in parts),
        test="intervals of the tasks, stratified",
    )


def p_by_seeds(ours: Pool, theirs: Pool, metric: str) -> float | None:
    """Return how often the seeds' spread alone makes the means differ so: Welch's test.

    A method that reads no text, for itself or for a budget of bits, does not depend on the seed, so
    its number is exact.

    Returns:
        None if a pool's spread is unknown, because it reads text and has a single seed.
    """
    from scipy.stats import ttest_1samp, ttest_ind

    values = [pool.values(metric) for pool in (ours, theirs)]
    exact = [not reads_text(pool.spec) for pool in (ours, theirs)]
    if not all(len(own) > 1 or fixed for own, fixed in zip(values, exact, strict=True)):
        return None
    if all(exact):
        return None if values[0][0] != values[1][0] else 1.0
    if any(exact):
        fixed, drawn = (values[0][0], values[1]) if exact[0] else (values[1][0], values[0])
        return float(ttest_1samp(drawn, fixed).pvalue)
    return float(ttest_ind(*values, equal_var=False).pvalue)


def _scores(pool: Pool, metric: str) -> dict[bool, list[Scores]]:
    """Return each seed's score of each sample, as `samples.explained` does.

    Empty if a seed has no samples, or its number does not follow from them.
    """
    from q3q.evaluate.samples import SAMPLES, explained

    seeds: list[dict[bool, Scores]] = []
    for record in (record for record in pool.records if record.completed):
        path = record.trial.folder / SAMPLES
        if not path.is_file() or metric not in record.numbers:
            return {}
        digest = record.files.get(SAMPLES)
        judged = frozenset((metric, *text_metrics(record.spec), *mean_metrics(record.spec)))
        scores = _read(path, digest, file_state(path), record.spec.evaluation.quick, judged)
        if metric not in scores:
            return {}
        # A text's samples are losses.
        ways = (
            {True: scores[metric]}
            if is_perplexity(metric)
            else explained(scores[metric], record.numbers[metric])
        )
        seeds.append(dict(ways))
    return {
        ratio: [own[ratio] for own in seeds]
        for ratio in (seeds[0] if seeds else ())
        if all(ratio in own and own[ratio].keys() == seeds[0][ratio].keys() for own in seeds)
    }


@lru_cache(maxsize=CACHED)
def _read(
    path: Path, digest: str | None, state: FileState, quick: bool, metrics: frozenset[str]
) -> dict[str, dict[str, float]]:
    """Return each sample's score of these metrics: MMLU's take tens of megabytes a trial."""
    from q3q.evaluate.samples import SCORED, measured, read_samples

    try:
        scores_of_metrics = measured(read_samples(path, SCORED, digest), quick)
    except (IntegrityError, KeyError, TypeError):  # a damaged file counts as missing
        return {}
    # Trials have the same samples, so their names are kept once.
    return {
        metric: {intern(sample): score for sample, score in scores.items()}
        for metric, scores in scores_of_metrics.items()
        if metric in metrics
    }

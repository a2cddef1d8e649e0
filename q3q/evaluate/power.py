"""The smallest difference that a suite can show: how many questions are enough?"""

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.05  # significance level of "distinguishable"
POWER = 0.8  # the chance of finding a difference that is there
# Assumed before anything is measured: the share of questions that only one of two trials answers
# right. Quantizing the demo model flips 2 to 5 % of its answers at 4 bits, 6 to 12 % at 3 bits and
# 12 to 22 % at 2 bits.
DISCORDANCE = 0.1


def smallest_difference(
    questions: float, discordance: float, *, level: float = LEVEL
) -> float | None:
    """Return the smallest difference of two accuracies that a paired test finds with this power.

    Connor (Biometrics 43, 1987) for McNemar's test: n questions find a difference d if d sqrt(n) =
    z_(1 - level/2) sqrt(psi) + z_power sqrt(psi - d^2), with psi the share of questions that only
    one of the two answers right. Solved for d, the larger root of a quadratic equation.

    Args:
        questions: of one task, or what `effective_questions` returns of several.
        discordance: psi of one task, or what `effective_discordance` returns of several.
        level: of the test; of one among m that are corrected together, level / m is sure to do.

    Returns:
        A share. None if no difference can be found, as it would have to exceed the discordance.

    Raises:
        ValueError: there are no questions, or the discordance is not a share.
    """
    if not (questions > 0 and 0 <= discordance <= 1):
        raise ValueError(f"questions={questions} and discordance={discordance} are impossible")
    normal = NormalDist()
    a, b = normal.inv_cdf(1 - level / 2), normal.inv_cdf(POWER)
    if questions + b**2 <= a**2:
        return None
    first = a * math.sqrt(discordance * questions)
    rest = b * math.sqrt(discordance * (questions + b**2 - a**2))
    difference = (first + rest) / (questions + b**2)
    return difference if 0 < difference <= discordance else None


def effective_questions(questions: Sequence[int]) -> float:
    """Return how many questions of a single task tell as much as the mean over these tasks.

    With a common discordance the mean of K tasks has the variance psi sum (1 / n_k) / K^2 (Cochran,
    Sampling Techniques, 1977, chapter 5), as one task of K^2 / sum (1 / n_k) questions.
    """
    return len(questions) ** 2 / math.fsum(1 / count for count in questions)


def effective_discordance(discordances: Sequence[float], questions: Sequence[int]) -> float:
    """Return the discordance of that single task where the tasks' own differ.

    The mean's variance is then sum (psi_k / n_k) / K^2, so a task counts by 1 / n_k: a small one,
    whose answers weigh more, counts more.
    """
    weights = [1 / count for count in questions]
    shares = (psi * weight for psi, weight in zip(discordances, weights, strict=True))
    return math.fsum(shares) / math.fsum(weights)

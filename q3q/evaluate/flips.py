"""Answers that flip: quantization may turn as many answers right as wrong, and hide it in the mean.

Dutta et al., Accuracy is Not All You Need (arXiv 2407.09141), section 3: flips are the answers that
change from right to wrong or from wrong to right. Their share grows with the distance of the two
models where the accuracy may stay as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from q3q.evaluate.compare import share_interval


@dataclass(frozen=True)
class Flips:
    """How many of n answers changed.

    lost: the baseline was right, the trial is wrong.
    won: the baseline was wrong, the trial is right.
    right: the baseline's right answers.
    """

    lost: int
    won: int
    right: int
    n: int

    @property
    def share(self) -> float:
        """The share of all answers that flipped: the paper's metric, and McNemar's discordance."""
        return (self.lost + self.won) / self.n

    @property
    def lost_of_right(self) -> float | None:
        """The share of the baseline's right answers that were lost; None if it had none."""
        return self.lost / self.right if self.right else None

    def interval(self, questions: int) -> tuple[float, float]:
        """Compute the share's 95 % interval (Wilson, JASA 22, 1927).

        Args:
            questions: how many different ones. Seeds that ask the same ones again flip mostly the
                same answers, so n answers would be taken for more than they tell.
        """
        return share_interval(self.share, questions)

    def __add__(self, other: "Flips") -> "Flips":
        return Flips(
            self.lost + other.lost, self.won + other.won, self.right + other.right, self.n + other.n
        )


def flips(ours: Mapping[str, float], baseline: Mapping[str, float]) -> Flips | None:
    """Count the flips of the answers that both have; None if scores are not right or wrong."""
    common = ours.keys() & baseline.keys()
    scores = {value for side in (ours, baseline) for key in common for value in (side[key],)}
    if not common or not scores <= {0.0, 1.0}:
        return None
    return Flips(
        lost=sum(baseline[key] > ours[key] for key in common),
        won=sum(ours[key] > baseline[key] for key in common),
        right=sum(baseline[key] == 1 for key in common),
        n=len(common),
    )

"""How work tells its driver how far it is: one type for the whole way down."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from q3q.record import Progress, Report

Steps = Callable[[int, int], None]  # receives steps done and steps in all


def no_steps(done: int, total: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Reporter:
    """A trial's progress, phase by phase.

    send: receives each event
    system: returns what the process takes, now and then
    """

    trial: str
    send: Report
    system: Callable[[], dict[str, float]] = dict

    def phase(self, name: str, note: str = "", metrics: Mapping[str, float] | None = None) -> Steps:
        """Return what the phase's work calls as its steps end.

        metrics: measured in these steps, by the record's names
        """

        def steps(done: int, total: int) -> None:
            self.send(
                Progress(
                    trial=self.trial,
                    phase=name,
                    done=done,
                    total=total,
                    note=note,
                    metrics=dict(metrics or {}),
                    system=self.system(),
                )
            )

        return steps

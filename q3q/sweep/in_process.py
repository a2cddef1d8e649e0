"""Run a study's trials in this process, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from q3q.record import forget_failure
from q3q.sweep.machines import Machine, ResourceRequest, expected, machine_here
from q3q.sweep.plan import Planned
from q3q.sweep.ray.worker import keep_to
from q3q.sweep.run import Host, with_plan
from q3q.sweep.running import RunningStudy


@dataclass(frozen=True)
class InProcess(Host):
    """This process, on the first GPU of its machine, which it has for itself, or on its cores.

    all_cores: give each trial on cores all of them; else as many as a sweep gives it here, since
        with another number of threads a matrix product may differ in a last bit
    """

    all_cores: bool = True
    where = "this process"

    def machines(self, request: ResourceRequest) -> tuple[list[Machine], ResourceRequest]:
        here = machine_here(request)
        if here.gpus and request.gpus != 0:
            request = replace(request, gpus=request.gpus or 1)
        elif self.all_cores:
            request = replace(request, cpus=request.cpus or here.cpus)
        return expected([replace(here, gpus=min(here.gpus, 1))], request), request

    def run(self, planned: Sequence[Planned], study: RunningStudy) -> None:
        allocations = [entry.allocation for entry in planned if entry.allocation is not None]
        keep_to(allocations[0].cpus, allocations[0].gpus)  # before torch is imported
        from q3q.trial import attempt_trial

        for entry, allocation in zip(planned, allocations, strict=True):
            trial = entry.trial
            keep_to(allocation.cpus, allocation.gpus)
            study.display.started(trial.id, study.name_of(trial.spec))
            # From here on it is a trial that stopped, until it has a new record.
            forget_failure(trial)
            placed = trial.placed(grant=allocation.grant())
            record = with_plan(attempt_trial(placed, partial(study.progressed, trial.spec)), entry)
            record.save()
            study.finished(record)

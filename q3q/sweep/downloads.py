"""Download what trials need on each machine of a cluster, before any trial holds a GPU for it.

A task without GPUs runs on each machine where trials may run. Machines that share a cache of the
Hub's take turns by its locks, and find what the first has fetched. What cannot be had is told; its
trials try again, and say their own error. A machine that joins later downloads in its trials.
"""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from q3q.data.needs import ModelNeed, Need, QuestionsNeed, TextNeed, downloading
from q3q.data.repositories import DataSet
from q3q.data.texts import is_from_hub
from q3q.errors import Q3QError
from q3q.evaluate.catalogue import TASKS
from q3q.masking import masked
from q3q.placement import Trial
from q3q.spec import Json
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Task


def needs_of(trials: Iterable[Trial]) -> list[Need]:
    """Return what trials need from the Hub, with no repeats, but for data of users' tasks."""
    needs: list[Need] = []
    data: dict[str, dict[DataSet, None]] = {}
    folders = {}
    for trial in trials:
        spec, placement = trial.spec, trial.placement
        if spec.model.source is not None:
            needs.append(ModelNeed(spec.model.source, spec.model.revision))
        if spec.calibration is not None and is_from_hub(spec.calibration.source):
            needs.append(TextNeed(spec.calibration.source, "calibration", placement.data))
        needs += [
            TextNeed(str(text.source), "evaluation", placement.data)
            for text in spec.evaluation.texts
            if is_from_hub(str(text.source))
        ]
        for task in spec.evaluation.tasks:
            for one in TASKS[task.name].data if task.name in TASKS else ():
                data.setdefault(one.repository, {})[one] = None
                folders[one.repository] = placement.data
    needs += [QuestionsNeed(name, tuple(found), folders[name]) for name, found in data.items()]
    return list(dict.fromkeys(needs))


def download(trials: Sequence[Json], report: Callable[[str], None]) -> None:
    """Download what is missing here of what trials need; report lines that say how far it is."""
    where = platform.node()
    for need in needs_of(map(Trial.from_json, trials)):
        steps = downloading(f"{where}: {need.name}", report, time.monotonic)
        try:
            if need.missing():
                need.fetch(steps)
        except Q3QError as error:
            report(f"{where}: {need.name} cannot be had now: {masked(str(error))}")


def download_on_each_machine(
    cluster: Cluster,
    trials: Sequence[Trial],
    *,
    gpus: bool,
    say: Callable[[str], object],
    tick: Callable[[], None],
) -> None:
    """Have each machine download what it lacks, and wait for all of them.

    Args:
        gpus: only machines with GPUs will run trials.
        say: receives lines that say how far it is.
        tick: called about once a second; what it raises ends the downloads.
    """
    if not needs_of(trials):
        return
    call = partial(download, [trial.to_json() for trial in trials])
    tasks = [
        Task(key=f"downloads on {node}", call=call, resources=Resources(cpus=0), node=node)
        for node in cluster.node_ids(gpus=gpus)
    ]

    def on_event(key: str, event: object) -> None:
        if isinstance(event, str):
            say(event)

    for outcome in cluster.run(tasks, on_event, on_tick=tick):
        if outcome.error is not None:
            say(f"{outcome.key}: {outcome.error}; its trials download what they need")

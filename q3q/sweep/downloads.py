"""Download what trials need on each machine of a cluster, before any trial holds a GPU for it.

A task without GPUs runs on each machine where trials may run. Machines that share a cache of the
Hub's take turns by its locks, and find what the first has fetched. What cannot be had is told; its
trials try again, and say their own error. A machine that joins later downloads in its trials. A
text is not downloaded where its windows lie prepared: no trial will read it.
"""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from q3q.data.calibration import calibration_identity, drawing
from q3q.data.needs import ModelNeed, Need, QuestionsNeed, TextNeed, downloading
from q3q.data.prepared import FOLDER, kept_identities, tokenizer_digest
from q3q.data.repositories import DataSet
from q3q.data.texts import Split, is_from_hub
from q3q.data.windows import evaluation_identity
from q3q.errors import Q3QError
from q3q.evaluate.catalogue import TASKS
from q3q.evaluate.identities import says_all_of
from q3q.masking import masked
from q3q.models.hub import is_downloaded, locate
from q3q.placement import Trial
from q3q.spec import Json
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Started, Task

# Nothing new may be heard of all downloads for so long. Then they are ended, so that one machine
# that hangs does not keep the sweep from its beginning.
SILENCE_SECONDS = 15 * 60.0


def needs_of(
    trials: Iterable[Trial], is_prepared: Callable[[Trial, Json], bool] = lambda trial, text: False
) -> list[Need]:
    """Return what trials need from the Hub, with no repeats, but for data of users' tasks.

    Args:
        is_prepared: receives a trial and the identity of a text's windows; True: the trial does not
            need the text.
    """
    needs: list[Need] = []
    data: dict[str, dict[DataSet, None]] = {}
    folders = {}
    for trial in trials:
        spec, placement = trial.spec, trial.placement
        for model in spec.models:
            if model.source is not None:
                needs.append(ModelNeed(model.source, model.revision))
        texts: list[tuple[str, Split, Json]] = [
            (source, "calibration", calibration_identity(drawn_spec.calibration, drawn_spec.seed))
            for drawn_spec in drawing(spec)
            if drawn_spec.calibration is not None
            for source in drawn_spec.calibration.sources
        ]
        texts += [
            (str(text.source), "evaluation", evaluation_identity(text, spec.evaluation.quick))
            for text in spec.evaluation.texts
        ]
        needs += [
            TextNeed(source, split, placement.data)
            for source, split, identity in texts
            if is_from_hub(source) and not is_prepared(trial, identity)
        ]
        for task in spec.evaluation.tasks:
            for questions in TASKS[task.name].data if task.name in TASKS else ():
                data.setdefault(questions.repository, {})[questions] = None
                folders[questions.repository] = placement.data
    needs += [QuestionsNeed(name, tuple(files), folders[name]) for name, files in data.items()]
    return list(dict.fromkeys(needs))


def download(trials: Sequence[Json], report: Callable[[str], None]) -> None:
    """Download what is missing here of what trials need; report lines that say how far it is."""
    where, here = platform.node(), [Trial.from_json(trial) for trial in trials]

    def in_order() -> Iterator[Need]:
        """Yield models first: a tokenizer tells which texts are prepared."""
        yield from (need for need in needs_of(here) if isinstance(need, ModelNeed))
        others = needs_of(here, _is_prepared)
        yield from (need for need in others if not isinstance(need, ModelNeed))

    for need in in_order():
        steps = downloading(f"{where}: {need.name}", report, time.monotonic)
        try:
            if not _is_here(need) and need.missing():
                need.fetch(steps)
        except Q3QError as error:
            report(f"{where}: {need.name} cannot be downloaded now: {masked(str(error))}")


def _is_prepared(trial: Trial, identity: Json) -> bool:
    """Return True if a text's windows, as the trial's tokenizer makes them, lie prepared here."""
    kept = kept_identities(trial.placement.storage / FOLDER).values()
    tokenizers = {whole.get("tokenizer") for whole in kept if says_all_of(whole, [identity])}
    return bool(tokenizers) and _tokenizer_of(trial) in tokenizers


def _tokenizer_of(trial: Trial) -> str | None:
    """Return the digest of a trial's tokenizer; None without one, or without a digest."""
    from q3q.models.checkpoint import load_tokenizer  # imports torch, which the driver must not

    model, folder = trial.spec.model, trial.placement.model
    try:
        if folder is None and model.source is not None:
            folder = locate(model.source, model.revision)
        return None if folder is None else tokenizer_digest(load_tokenizer(folder))
    except Q3QError:
        return None


def _is_here(need: Need) -> bool:
    """Return True if a model is whole in the cache: the Hub, which may not answer, is not asked."""
    return isinstance(need, ModelNeed) and is_downloaded(need.source, need.revision)


class _SilenceError(Exception):
    """Nothing new was heard for `SILENCE_SECONDS`."""


def download_on_each_machine(
    cluster: Cluster,
    trials: Sequence[Trial],
    *,
    gpus: bool,
    say: Callable[[str], object],
    tick: Callable[[], None],
) -> None:
    """Have each machine download what it lacks, and wait for all of them, unless they fall silent.

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

    unfinished = {task.key: f"node {task.node}" for task in tasks}
    last: dict[str, object] = {}
    heard = time.monotonic()

    def on_event(key: str, event: object) -> None:
        nonlocal heard
        if event != last.get(key):  # a download that is stuck says the same again and again
            heard, last[key] = time.monotonic(), event
        if isinstance(event, Started):
            unfinished[key] = event.node
        elif isinstance(event, str):
            say(event)

    def on_tick() -> None:
        tick()
        if time.monotonic() - heard > SILENCE_SECONDS:
            raise _SilenceError

    try:
        for outcome in cluster.run(tasks, on_event, on_tick=on_tick):
            heard = time.monotonic()
            del unfinished[outcome.key]
            if outcome.error is not None:
                say(f"{outcome.key}: {outcome.error}; its trials download what they need")
    except _SilenceError:
        say(
            f"The downloads on {', '.join(unfinished.values())} made no progress for "
            f"{SILENCE_SECONDS / 60:.0f} minutes: they are stopped, and trials download what they "
            "need"
        )

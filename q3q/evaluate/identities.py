"""What specs say of the input that trials prepare, and of whether their numbers compare.

A prepared file's identity (`data/prepared`) says all of that and more: the tokenizer, and what is
known only once tasks are loaded.
"""

import json
from collections.abc import Iterable
from dataclasses import replace

from q3q.data.calibration import drawn_identities
from q3q.data.windows import evaluation_identity
from q3q.evaluate.batches import Batch, batches, draws_shots
from q3q.evaluate.catalogue import TASKS
from q3q.spec import Evaluation, Json, TaskRef, TrialSpec


def prepared_identities(spec: TrialSpec) -> list[Json]:
    """Return what a trial says of the input that it prepares: windows, and its tasks' requests."""
    evaluation, identities = spec.evaluation, drawn_identities(spec)
    identities += [evaluation_identity(text, evaluation.quick) for text in evaluation.texts]
    identities += [requests_identity(evaluation, batch, spec.seed) for batch in batches(evaluation)]
    return identities


def says_all_of(whole: Json, identities: Iterable[Json]) -> bool:
    """Return True if a file's identity contains all items of one of these."""
    return any(
        all(key in whole and whole[key] == value for key, value in identity.items())
        for identity in identities
    )


def requests_identity(evaluation: Evaluation, batch: Batch, seed: int) -> Json:
    """Return what a spec says of all that determines a batch's requests."""
    refs = [TaskRef(name=name, shots=batch.shots) for name in batch.tasks]
    data = dict(evaluation.data)
    if all(name in TASKS for name in batch.tasks):
        keys = {data_set.key for name in batch.tasks for data_set in TASKS[name].data}
        data = {key: identity for key, identity in data.items() if key in keys}
    return {
        "requests": list(batch.tasks),
        "shots": batch.shots,
        "limit": batch.limit,
        "quick": evaluation.quick,
        "chat": evaluation.chat,
        "data": data,
        "include": evaluation.include,
        "seed": seed if draws_shots(refs) else None,
        "evaluation": evaluation.version,
    }


def conditions_of(spec: TrialSpec) -> str:
    """Return what two trials must share for their numbers to be compared."""
    # Drift is measured beside the other metrics and changes none of them.
    evaluation = replace(spec.evaluation, drift=None)
    return json.dumps([spec.model.identity, evaluation.to_json()], sort_keys=True)

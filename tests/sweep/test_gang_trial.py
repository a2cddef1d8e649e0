"""A trial shared by two ranks is the trial: the same record, whoever dies on the way."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from q3q.record import Progress, TrialRecord
from q3q.sweep.on_ray import WORKER_ENV, work
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Task, WorkerDiedError
from tests.composed import composed_trial

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "evaluation.tasks=[stories_who,stories_count]",
    "evaluation.texts=[demo]",
    "evaluation.limit=6",
    "calibration.samples=16",
    "calibration.length=256",
    "method=gptq",
    "bits=3",
]
NEVER_EQUAL = ("seconds/", "peak_bytes/")


@pytest.fixture(scope="module")
def cluster():
    with Cluster(cpus=2, gpus=0, env=WORKER_ENV) as started:
        yield started


@pytest.fixture(scope="module")
def trial_of(tmp_path_factory):
    def make(name, *overrides):
        return composed_trial(*SMALL, f"storage={tmp_path_factory.mktemp(name)}", *overrides)

    return make


def record_of(cluster, trial, ranks, call=work, on_event=lambda *_: None):
    """Return a trial's record, and the errors after which it was tried again."""
    retried = []
    task = Task(
        key=trial.id,
        call=partial(call, trial.to_json()),
        resources=Resources(cpus=1, ranks=ranks),
        retries=1,
    )
    [outcome] = cluster.run([task], on_event, lambda _, error: retried.append(error))
    assert outcome.error is None
    return TrialRecord.from_json(outcome.value), retried


@pytest.fixture(scope="module", params=["demo", "demo_moe", "demo_hybrid"])
def alone(request, cluster, trial_of):
    return request.param, record_of(cluster, trial_of("alone", f"model={request.param}"), 1)[0]


def test_a_gang_leaves_the_record_that_one_process_leaves(alone, cluster, trial_of):
    model, expected = alone
    trial = trial_of("gang", f"model={model}")
    record, retried = record_of(cluster, trial, 2)
    assert retried == []
    assert (record.status, record.reason) == ("COMPLETED", "")
    assert record.environment["loading"]["loader"] == "sharded"
    assert record.environment["loading"]["ranks"] == 2
    assert record.sites == expected.sites
    assert record.checks == expected.checks
    phases = {"load", "baseline", "calibrate", "quantize", "evaluate"}
    assert record.notes["rank_0_alone"].keys() == phases  # seconds that only a gang has
    assert {**record.notes, "rank_0_alone": None} == {**expected.notes, "rank_0_alone": None}
    names = {name for name in expected.metrics if not name.startswith(NEVER_EQUAL)}
    assert {name for name in record.metrics if not name.startswith(NEVER_EQUAL)} == names
    assert "perplexity/stories" in names
    for name in names:  # likelihoods of requests are added up in other batches
        assert record.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGKILL, "rank 1 of 2"),
        (signal.SIGTERM, "handed back"),  # a machine that is about to go asks its processes to end
    ],
)
def test_a_rank_that_goes_costs_no_block_that_was_finished(
    alone, cluster, trial_of, tmp_path, number, word
):
    model, expected = alone
    trial = trial_of("left", f"model={model}", "evaluation.tasks=[]")

    def call(trial, report, seat):
        from q3q import team

        team.CHECK_SECONDS = 0.0
        (tmp_path / f"rank_{seat.rank}").write_text(str(os.getpid()))
        return work(trial, report, seat)

    done = []

    def on_event(_, event):
        if isinstance(event, Progress) and event.phase == "quantize" and event.done:
            done.append(event.done)
            if done == [1, 2]:
                os.kill(int((tmp_path / "rank_1").read_text()), number)

    record, retried = record_of(cluster, trial, 2, call, on_event)
    assert [type(error) for error in retried] == [WorkerDiedError]
    assert word in str(retried[0])
    assert record.completed
    assert record.notes.pop("blocks_from_disk") >= 2
    assert record.sites == expected.sites
    assert record.metrics["perplexity/stories"] == expected.metrics["perplexity/stories"]

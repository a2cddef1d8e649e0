"""A trial shared by two ranks is the trial: the same record, whoever dies on the way."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from q3q.config import resolve, schema
from q3q.record import Progress, TrialRecord
from q3q.sweep.on_ray import WORKER_ENV, work
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Task, WorkerDiedError

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
def spec_of(tmp_path_factory):
    schema.register()
    GlobalHydra.instance().clear()

    def make(name, *overrides):
        storage = tmp_path_factory.mktemp(name)
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return resolve.spec_from(compose("config", [*SMALL, f"storage={storage}", *overrides]))

    return make


def record_of(cluster, spec, ranks, call=work, on_event=lambda *_: None):
    retried = []
    task = Task(
        key=spec.id,
        call=partial(call, spec.to_json()),
        resources=Resources(cpus=1, ranks=ranks),
        retries=1,
    )
    [outcome] = cluster.run([task], on_event, lambda _, error: retried.append(error))
    assert outcome.error is None
    return TrialRecord.from_json(outcome.value), retried


@pytest.fixture(scope="module", params=["demo", pytest.param("demo_moe", marks=pytest.mark.slow)])
def alone(request, cluster, spec_of):
    return request.param, record_of(cluster, spec_of("alone", f"model={request.param}"), 1)[0]


def test_a_gang_leaves_the_record_that_one_process_leaves(alone, cluster, spec_of):
    model, wanted = alone
    spec = spec_of("gang", f"model={model}")
    found, retried = record_of(cluster, spec, 2)
    assert retried == []
    assert (found.status, found.reason) == ("COMPLETED", "")
    assert found.environment["loading"]["loader"] == "sharded"
    assert found.environment["loading"]["ranks"] == 2
    assert found.sites == wanted.sites
    assert found.checks == wanted.checks
    assert found.notes == wanted.notes
    names = {name for name in wanted.metrics if not name.startswith(NEVER_EQUAL)}
    assert {name for name in found.metrics if not name.startswith(NEVER_EQUAL)} == names
    assert "perplexity/stories" in names
    for name in names:  # likelihoods of requests are added up in other batches
        assert found.metrics[name] == pytest.approx(wanted.metrics[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGKILL, "rank 1 of 2"),
        pytest.param(
            signal.SIGTERM, "handed back", marks=pytest.mark.slow
        ),  # its machine wants it back
    ],
)
def test_a_rank_that_goes_costs_no_block_that_was_finished(
    alone, cluster, spec_of, tmp_path, number, word
):
    model, wanted = alone
    spec = spec_of("left", f"model={model}", "evaluation.tasks=[]")

    def call(spec, report, seat):
        from q3q import team

        team.HEED_SECONDS = 0.0
        (tmp_path / f"rank_{seat.rank}").write_text(str(os.getpid()))
        return work(spec, report, seat)

    done = []

    def on_event(_, event):
        if isinstance(event, Progress) and event.phase == "quantize" and event.done:
            done.append(event.done)
            if done == [1, 2]:
                os.kill(int((tmp_path / "rank_1").read_text()), number)

    found, retried = record_of(cluster, spec, 2, call, on_event)
    assert [type(error) for error in retried] == [WorkerDiedError]
    assert word in str(retried[0])
    assert found.completed
    assert found.notes.pop("blocks_from_disk") >= 2
    assert found.sites == wanted.sites
    assert found.metrics["perplexity/stories"] == wanted.metrics["perplexity/stories"]

"""The Ray launcher: Hydra's own suites for launchers, and what ours promises besides."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import TaskFunction
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)
from hydra.types import HydraContext, RunMode
from hydra.version import VersionBase

from q3q.errors import Q3QError
from q3q.sweep.launcher import JobPolicy, RayLauncher
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Started, WorkerDiedError

ROOT = Path(__file__).parents[2]

HEAD = """
import sys, ray
ray.init(
    "local",
    num_cpus=2,
    include_dashboard=False,
    logging_level="ERROR",
    object_store_memory=100_000_000,
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def existing_cluster():
    """Start Ray in a process of its own, as `ray start --head` does; RAY_ADDRESS names it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        command = [sys.executable, "-c", HEAD]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as head:
            assert head.stdin is not None
            assert head.stdout is not None
            patch.setenv("RAY_ADDRESS", head.stdout.readline().strip())
            yield
            head.stdin.close()


@pytest.fixture(scope="module")
def connected(existing_cluster):
    with Cluster("auto") as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_version_base():
    """Hydra's suites expect a process in which no version base has been set yet."""
    before: Any = Singleton._instances.pop(VersionBase, None)
    yield
    Singleton._instances.pop(VersionBase, None)
    if before is not None:
        VersionBase.set_instance(before)


@pytest.fixture
def shared_cluster(connected, monkeypatch):
    """Let all launches of this process share a connection, since connecting takes seconds."""
    monkeypatch.setattr(RayLauncher, "cluster", lambda launcher: nullcontext(connected))


@pytest.mark.usefixtures("existing_cluster")
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=q3q_ray", "hydra.launcher.address=auto"])],
)
@pytest.mark.slow
class TestHydraIntegrationSuite(IntegrationTestSuite):
    pass


@pytest.mark.usefixtures("shared_cluster")
@pytest.mark.parametrize(("launcher_name", "overrides"), [("q3q_ray", [])])
@pytest.mark.slow
class TestHydraLauncherSuite(LauncherTestSuite):
    pass


@pytest.mark.usefixtures("shared_cluster")
@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("q3q_ray", ["hydra.sweeper.max_batch_size=2"])]
)
@pytest.mark.slow
class TestHydraBatchedSuite(BatchedSweeperTestSuite):
    pass


@pytest.fixture
def launcher_for(hydra_restore_singletons, tmp_path):
    """Return a function that sets up a launcher for a task function, as Hydra would do it."""

    def build(task_function: TaskFunction, **settings: Any) -> RayLauncher:
        hydra = Hydra.create_main_hydra_file_or_module(
            calling_file=None,
            calling_module="hydra.test_utils.a_module",
            config_path="configs",
            job_name="test",
        )
        config = hydra.compose_config("compose", [f"hydra.sweep.dir={tmp_path}"], RunMode.MULTIRUN)
        launcher = RayLauncher(**settings)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        launcher.setup(hydra_context=context, task_function=task_function, config=config)
        return launcher

    yield build
    GlobalHydra.instance().clear()


JOBS = [["+how=fine"], ["+how=raises"], ["+how=dies"], ["+how=fine"]]


def misbehave(config):
    if config.how == "raises":
        raise LookupError("no such layer")
    if config.how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return HydraConfig.get().job.num


@pytest.mark.usefixtures("shared_cluster")
def test_a_job_that_fails_or_dies_costs_no_other(launcher_for, tmp_path, capsys):
    returns = launcher_for(misbehave).launch(JOBS, initial_job_idx=5)
    assert [job_return.status.name for job_return in returns] == [
        "COMPLETED",
        "FAILED",
        "FAILED",
        "COMPLETED",
    ]
    assert [job_return.overrides for job_return in returns] == JOBS
    assert [job_return.cfg.how for job_return in returns] == ["fine", "raises", "dies", "fine"]
    assert [job_return.hydra_cfg.hydra.job.num for job_return in returns] == [5, 6, 7, 8]
    assert [returns[0].return_value, returns[3].return_value] == [5, 8]
    with pytest.raises(LookupError, match="no such layer"):
        _ = returns[1].return_value
    with pytest.raises(WorkerDiedError, match="job 7 died"):
        _ = returns[2].return_value
    assert {folder.name for folder in tmp_path.iterdir()} == {"5", "6", "7", "8"}


class RecordingPolicy(JobPolicy):
    """Runs something else for odd jobs, and keeps all events and outcomes."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def task(self, job, plain):
        return (
            replace(plain, key=f"odd {job.number}", call=lambda report: report("hello"))
            if job.number % 2
            else plain
        )

    def on_event(self, job, event):
        self.calls.append((job.number, "started" if isinstance(event, Started) else event))

    def on_outcome(self, job, outcome):
        self.calls.append((job.number, outcome.key))
        return JobReturn(status=JobStatus.COMPLETED, _return_value=(job.number, outcome.value))


def test_a_policy_decides_what_runs_and_what_returns(launcher_for, connected):
    launcher = launcher_for(lambda config: "plain")
    jobs = [launcher.compose([], number) for number in range(2)]
    policy = RecordingPolicy()
    returns = launcher.run(jobs, policy, cluster=connected)
    assert returns[0].return_value[0] == 0
    assert returns[0].return_value[1].return_value == "plain"
    assert returns[1].return_value == (1, None)
    assert [event for number, event in policy.calls if number == 0] == ["started", "job 0"]
    assert [event for number, event in policy.calls if number == 1] == ["started", "hello", "odd 1"]


def only_the_first_ends(config):
    if HydraConfig.get().job.num > 0:
        time.sleep(600)


def test_an_error_of_the_policy_stops_the_jobs_and_comes_through(launcher_for, connected):
    class Broken(JobPolicy):
        def on_outcome(self, job, outcome):
            raise Q3QError("disk full")

    launcher = launcher_for(only_the_first_ends)
    with pytest.raises(Q3QError, match="disk full"):
        launcher.run(
            [launcher.compose([], number) for number in range(2)], Broken(), cluster=connected
        )


def test_the_settings_reach_the_tasks(launcher_for, connected):
    class Seeing(JobPolicy):
        def task(self, job, plain):
            settings.append((plain.resources, plain.retries))
            return plain

    settings: list[Any] = []
    launcher = launcher_for(lambda config: "value", cpus_per_job=0.5, retries=3)
    [job_return] = launcher.run([launcher.compose([], 0)], Seeing(), cluster=connected)
    assert job_return.return_value == "value"
    assert settings == [(Resources(cpus=0.5, gpus=0), 3)]


APP = """
import os, hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if config.how == "raises":
        raise LookupError("no such layer")

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_a_launch_starts_ray_and_leaves_nothing_running(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "app.py",
        "-m",
        "hydra/launcher=q3q_ray",
        "hydra.launcher.cpus=2",
        "+how=fine,raises",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "LookupError: no such layer" in done.stderr
    assert "in main" in done.stderr  # the line of the task function that raised
    assert "(raylet)" not in done.stdout + done.stderr
    pids = (tmp_path / "pids").read_text().split()  # the workers' folder is the driver's
    assert len(pids) == 2
    states = subprocess.run(
        ["ps", "-o", "stat=", "-p", ",".join(pids)], capture_output=True, text=True, check=False
    )
    assert [state for state in states.stdout.split() if not state.startswith("Z")] == []

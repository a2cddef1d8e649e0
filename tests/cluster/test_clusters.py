"""One machine as a cluster: two nodes and a job on a real Ray with its token; PostgreSQL."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.chaos.faults import (
    ROOT,
    SMALL,
    freeze,
    last_words,
    launch,
    log_of,
    numbers,
    records,
    runs,
    start,
    wait_until,
)
from tests.chaos.test_tracker_faults import logged_trials
from tests.mlflow_server import free_port, kill, serve

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).parent / "ray")
LATE = "Timed out waiting for node info"
SWEEP = ("method=rtn,gptq", "bits=2,3", "calibration.samples=32", "evaluation.limit=64")


@pytest.fixture(scope="module")
def tokened():
    """Environment of a cluster that wants a token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="module")
def two_nodes(tokened, tmp_path_factory):
    """Two nodes on this machine: address, the dashboard's address, the second one's process id."""
    head = free_port()
    dashboard = free_port()
    started, log = [], (tmp_path_factory.mktemp("nodes") / "log").open("ab")

    def ray_start(*words):
        environment = {**os.environ, **tokened, "PYTHONPATH": str(ROOT)}
        # An agent whose usual port is taken by another test's Ray listens nowhere, and a job may
        # go to it.
        agent = f"--dashboard-agent-listen-port={free_port()}"
        process = subprocess.Popen(
            [
                RAY,
                "start",
                "--block",
                "--disable-usage-stats",
                "--object-store-memory=100000000",
                agent,
                *words,
            ],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        started.append(process)
        return process

    address = f"127.0.0.1:{head}"
    dash = (
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
    )
    ready = [RAY, "status", f"--address={address}"]

    def nodes(count):
        told = subprocess.run(
            ready, env={**os.environ, **tokened}, capture_output=True, text=True, check=False
        )
        return len(re.findall(r"^ 1 node_", told.stdout, re.M)) == count

    try:
        for _ in range(3):  # Ray ends a head that is not up within 30 s, as on a busy machine
            own = ("--node-ip-address=127.0.0.1", f"--port={head}", "--num-cpus=1")
            first = ray_start("--head", *own, *dash)
            wait_until(lambda: nodes(1) or started[-1].poll() is not None, "the head", 90)
            if first.poll() is None or LATE not in Path(log.name).read_text():
                break
        assert first.poll() is None, Path(log.name).read_text()
        second = ray_start(f"--address={address}", "--node-ip-address=127.0.0.1", "--num-cpus=1")
        wait_until(lambda: nodes(2), "the second node", 90)
        yield address, f"http://127.0.0.1:{dashboard}", second
    finally:
        for process in started:
            with_all(process)
        log.close()


def descends(pid, ancestor):
    """Whether a process that runs was started by another, or by one that that one started."""
    while pid > 1 and pid != ancestor and runs(pid):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == ancestor


def with_all(process):
    """Kill a node: `ray start --block` and the processes that it started, nobody else's."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)


def test_a_job_submitted_to_the_head_runs_a_sweep(two_nodes, tokened, tiny, tmp_path):
    address, dashboard, _ = two_nodes
    settings = {one.partition("=")[0]: one for one in (*SMALL, "method=rtn", "bits=4,5")}
    where = [
        f"model.path={tiny}",
        f"storage={tmp_path}",
        "cluster=existing",
        f"cluster.address={address}",
    ]
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        dashboard,
        "--",
        sys.executable,
        str(ROOT / "launch.py"),
        "-m",
    ]

    def submit(words, **environment):
        return subprocess.run(
            words,
            env={**os.environ, **tokened, **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def taken():
        """The head answers before its job agent is there, and then wants to be asked again."""
        return "No available agent" not in submit([*command[:5], "--", "true"]).stderr

    wait_until(taken, "the head's job agent", 90)
    done = submit([*command, *settings.values(), *where])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(records(tmp_path)) == 2
    refused = submit([*command[:5], "--", "true"], RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()


def test_a_gangs_ranks_sit_on_two_nodes(two_nodes, tokened, tiny, tmp_path):
    """Each node has one core, so two ranks of one core each cannot share one."""
    address, _, second = two_nodes
    sweep = ("method=gptq", "bits=3", "calibration.samples=8", "evaluation.limit=8")
    gang = (
        "cluster.ranks_per_trial=2",
        "cluster.cpus_per_trial=1",
        "cluster=existing",
        f"cluster.address={address}",
    )
    process = start(tmp_path / "gang", tiny, *sweep, *gang, **tokened)
    seen = set()

    def ranks():
        """Return the second node's processes that compute, as a gang's leader or follower."""
        for path in Path("/proc").glob("[0-9]*/maps"):
            with suppress(OSError):
                pid = int(path.parent.name)
                if descends(pid, second.pid) and "libtorch" in path.read_text():
                    seen.add(pid)
        return bool(seen) or process.poll() is not None

    wait_until(ranks, "a rank on the second node", 120)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert seen
    assert "on 2 x 1 CPU, sharded" in output
    code, again = launch(tmp_path / "alone", tiny, *sweep)
    assert code == 0, again
    together, alone = (
        {trial: numbers(record) for trial, record in records(tmp_path / name).items()}
        for name in ("gang", "alone")
    )
    assert together == alone


@pytest.fixture
def two_hosts():
    """Two network namespaces that act as two hosts: how to run something there, and addresses."""
    ip, names = shutil.which("ip"), [f"q3q-{secrets.token_hex(3)}" for _ in range(2)]
    if ip is None or os.geteuid() != 0:
        pytest.skip("two hosts are network namespaces: needs root and iproute2")
    ends, addresses = [f"{name}-e" for name in names], ["10.79.31.1", "10.79.31.2"]

    def run(*words, check=True):
        return subprocess.run([ip, *words], capture_output=True, text=True, check=check)

    if run("netns", "add", names[0], check=False).returncode:
        pytest.skip("this machine does not let us make network namespaces")
    try:
        run("netns", "add", names[1])
        run("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            run("link", "set", end, "netns", name)
            run("-n", name, "addr", "add", f"{address}/24", "dev", end)
            run("-n", name, "link", "set", end, "up")
            run("-n", name, "link", "set", "lo", "up")
        yield [[ip, "netns", "exec", name] for name in names], addresses
    finally:
        for name in names:
            run("netns", "del", name, check=False)


def test_a_gangs_ranks_meet_from_host_to_host(two_hosts, tokened, tiny, tmp_path):
    inside, addresses = two_hosts
    environment = {**os.environ, **tokened, "PYTHONPATH": str(ROOT)}
    begin = [
        RAY,
        "start",
        "--block",
        "--disable-usage-stats",
        "--object-store-memory=100000000",
        "--num-cpus=1",
    ]
    head = f"{addresses[0]}:6399"
    nodes = []
    try:
        with (tmp_path / "nodes.log").open("ab") as log:
            for where, own, rest in zip(
                inside, addresses, (["--head", "--port=6399"], [f"--address={head}"]), strict=True
            ):
                command = [*where, *begin, f"--node-ip-address={own}", *rest]
                nodes.append(
                    subprocess.Popen(
                        command, env=environment, stdout=log, stderr=log, start_new_session=True
                    )
                )
                status = [*where, RAY, "status", f"--address={head}"]

                def up(status=status):
                    told = subprocess.run(
                        status, env=environment, capture_output=True, text=True, check=False
                    ).stdout
                    return len(re.findall(r"^ 1 node_", told, re.M)) == len(nodes)

                wait_until(up, f"node {len(nodes)}", 90)
        sweep = ("method=gptq", "bits=3", "calibration.samples=8", "evaluation.limit=8")
        gang = (
            "cluster.ranks_per_trial=2",
            "cluster.cpus_per_trial=1",
            "cluster=existing",
            f"cluster.address={head}",
        )
        code, output = launch(tmp_path / "gang", tiny, *sweep, *gang, inside=inside[0], **tokened)
        assert code == 0, output
        assert "on 2 x 1 CPU, sharded" in output
    finally:
        for node in nodes:
            with_all(node)
    code, again = launch(tmp_path / "alone", tiny, *sweep)
    assert code == 0, again
    together, alone = (
        {trial: numbers(record) for trial, record in records(tmp_path / name).items()}
        for name in ("gang", "alone")
    )
    assert together == alone


def test_a_node_that_is_killed_costs_nothing(two_nodes, tokened, tiny, tmp_path):
    address, _, second = two_nodes
    joined = ("cluster=existing", f"cluster.address={address}")
    process = start(tmp_path, tiny, *SWEEP, *joined, **tokened)
    hit = freeze(tmp_path, "quantize 1 of 3", set(), lambda pid: descends(pid, second.pid))
    with_all(second)
    with suppress(
        ProcessLookupError
    ):  # a machine that is lost is lost with all that stood still on it
        os.kill(hit.pid, signal.SIGKILL)
    wait_until(lambda: not runs(hit.pid), "the end of its worker", 30)
    assert last_words(hit.folder, hit.pid) == hit.words
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    found = records(tmp_path)
    assert len(found) == 4
    assert f"(pid {hit.pid} on " in output
    assert len({step.pid for step in log_of(hit.folder)}) == 2
    assert found[hit.folder.name]["notes"].get("blocks_from_disk", 0) == len(hit.whole) <= 1
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/*/record.json")}
    code, again = launch(tmp_path, tiny, *SWEEP)  # the same command, on what machine is left
    assert code == 0, again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    code, again = launch(tmp_path / "alone", tiny, *SWEEP)
    assert code == 0, again
    alone = {trial: numbers(record) for trial, record in records(tmp_path / "alone").items()}
    assert {trial: numbers(record) for trial, record in found.items()} == alone


@contextmanager
def postgres():
    """A PostgreSQL server of its own, on loopback, whose user has a password; its URI."""
    found = list(Path("/usr/lib/postgresql").glob("*/bin"))
    if (initdb := shutil.which("initdb")) is not None:
        found.append(Path(initdb).parent)
    found = [one for one in found if (one / "initdb").exists() and (one / "pg_ctl").exists()]
    if not found:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip(
        "psycopg", reason="MLflow reaches PostgreSQL through psycopg (cluster/requirements.txt)"
    )
    folder = Path(
        tempfile.mkdtemp(prefix="q3q-postgres-")
    )  # not pytest's, which only its owner may enter
    data, port, password = folder / "data", free_port(), secrets.token_hex(16)
    (folder / "password").write_text(password)
    user: list[str] = []
    if os.geteuid() == 0:  # it refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        shutil.chown(folder / "password", "postgres")
        user = ["runuser", "-u", "postgres", "--"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    make: list[str | Path] = [
        found[0] / "initdb",
        "-D",
        data,
        "-U",
        "q3q",
        "-A",
        "scram-sha-256",
        "--pwfile",
        folder / "password",
    ]
    subprocess.run([*user, *make], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    control: list[str | Path] = [*user, found[0] / "pg_ctl", "-D", data, "-w"]
    subprocess.run(
        [*control, "-o", options, "-l", folder / "log", "start"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield f"postgresql+psycopg://q3q:{password}@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd=folder
        )
        shutil.rmtree(folder)


def test_a_sweep_is_kept_by_an_mlflow_server_on_postgresql_that_passes_artifacts_on(tiny, tmp_path):
    with postgres() as database:
        port = free_port()
        server = serve(tmp_path, port, store=database)
        try:
            uri = f"http://127.0.0.1:{port}"
            arguments = ("method=rtn", "bits=3,4", f"track.uri={uri}")
            for _ in range(2):
                code, output = launch(tmp_path / "storage", tiny, *arguments)
                assert code == 0, output
            found = records(tmp_path / "storage")
            assert len(found) == 2
            assert logged_trials(uri) == sorted(found)
            assert len(list((tmp_path / "served").rglob("record.json"))) == 2
            assert "postgresql" not in output  # the server's password is not the sweep's business
        finally:
            kill(server)

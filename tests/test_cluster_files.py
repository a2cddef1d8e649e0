"""The files for clusters are well formed: Ray's schema, the image, manifests, docs' commands."""

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from q3q.config.guard import refuse_code
from tests.composed import compose

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHED = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
MANIFESTS = list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8")))
PAGE = (ROOT / "docs" / "CLUSTER.md").read_text(encoding="utf-8")
HERE = (
    "ray start",
    "ray job submit",
    "python launch.py",
    "python -m q3q",
    "make ui",
    "export RAY_AUTH_MODE",
)


def composed(command: str):
    words = [word for word in shlex.split(command)[2:] if word != "-m"]
    refuse_code(words)
    return compose("config", [word.partition(",")[0] for word in words])


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_rays_launcher_takes_the_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="wrong_key"):
        validate_config({**config, "wrong_key": 1})


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_launched_machines_have_a_token_and_the_code_and_only_workers_are_spot(path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    spot = {
        name for name, kind in config["available_node_types"].items() if "spot" in str(kind).lower()
    }
    assert spot == {"gpu"}
    assert config["head_node_type"] == "head"
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    assert {"mlruns", ".venv", "**/.git"} <= set(config["rsync_exclude"])
    setup = "\n".join(config["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup
    assert "--constraint constraints.txt" in setup
    starts = [
        line
        for key in ("head", "worker")
        for line in config[f"{key}_start_ray_commands"]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all(line.startswith(". ~/.profile &&") for line in starts)  # where the token's mode is
    assert "--dashboard-host=127.0.0.1" in starts[0]
    for command in [*config["setup_commands"], *starts]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [
        (line.split(None, 1)[0], line.split(None, 1)[1])
        for line in joined.splitlines()
        if line.strip()
    ]


def test_the_image():
    lines = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    verbs = [verb for verb, _ in lines]
    assert set(verbs) <= {
        "ARG",
        "FROM",
        "RUN",
        "USER",
        "WORKDIR",
        "ENV",
        "COPY",
        "VOLUME",
        "CMD",
    }  # no ADD, no secrets
    assert verbs[:2] == ["ARG", "FROM"]
    [base] = [rest for verb, rest in lines if verb == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=nvidia/cuda:[\d.]+-base-ubuntu24\.04", base)  # a tag, and not latest
    user = verbs.index("USER")
    assert lines[user][1] == "q3q"
    assert not any(verb == "USER" for verb in verbs[user + 1 :])
    for number, (verb, rest) in enumerate(lines):
        if verb == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
            assert "sudo" not in rest
            assert "apt-get install" not in rest or (
                "--no-install-recommends" in rest and "/var/lib/apt/lists" in rest
            )
            assert "pip install" not in rest or (number > user and "--no-cache-dir" in rest)
            assert (
                "pip install" not in rest
                or "--constraint constraints.txt" in rest
                or "--no-deps" in rest
            )
        assert not re.search(r"(?i)(token|password|secret)=(?!token\b)\S", rest), rest
    [command] = [rest for verb, rest in lines if verb == "CMD"]
    assert command.startswith("[")  # signals reach Python and not a shell
    for source in [word for verb, rest in lines if verb == "COPY" for word in rest.split()[1:-1]]:
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("name", [".dockerignore", ".rayignore"])
def test_results_environments_and_secrets_stay_at_home(name):
    ignored = {
        line.removeprefix("**/").strip("/")
        for line in (ROOT / name).read_text(encoding="utf-8").split()
    }
    assert {"mlruns", ".venv", ".git", ".env", "*.pem", "*.key", "auth_token"} <= ignored
    assert not ignored & {
        "conf",
        "q3q",
        "cluster",
        "launch.py",
        "pyproject.toml",
        "constraints.txt",
        "hydra_plugins",
    }


def test_what_a_head_needs_beyond_q3q_fits_the_tested_set():
    tested = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            tested[one.name.lower()] = next(iter(one.specifier)).version
    listed = re.findall(
        r"(?ms)^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )[0]
    ours = re.findall('"(.+)"', listed)
    assert len(ours) > 10
    extra = [
        line
        for line in (CLUSTER / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line[0] != "#"
    ]
    for line in [*ours, *extra]:
        need = Requirement(line)
        pinned = tested.get(need.name.lower().replace("_", "-"))
        assert pinned is None or need.specifier.contains(pinned), line
    assert all(Requirement(line).specifier for line in extra)


def of_kind(kind):
    return [one for one in MANIFESTS if one["kind"] == kind]


def pods():
    for manifest in MANIFESTS:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]
        elif manifest["kind"] == "RayJob":
            cluster = manifest["spec"]["rayClusterSpec"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                yield group.get("groupName", "head"), group["template"]["spec"]


def test_manifests_fit_together():
    claims = {one["metadata"]["name"] for one in of_kind("PersistentVolumeClaim")}
    for name, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        volumes = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod.get("volumes", [])
        }
        assert set(volumes.values()) <= claims
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "memory" in container["resources"]["limits"]
            assert container["image"] == "IMAGE" or re.search(r":\S*\d", container["image"])
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)
            for variable in container.get("env", []):
                if re.search("PASSWORD|SECRET|TOKEN", variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "q3q-secrets"
    labels = {
        one["spec"]["template"]["metadata"]["labels"]["app"]
        for one in of_kind("Deployment") + of_kind("StatefulSet")
    }
    for service in of_kind("Service"):
        assert service["spec"]["selector"]["app"] in labels
        assert (
            service["spec"].get("type", "ClusterIP") == "ClusterIP"
        )  # nothing is reachable from outside


def test_the_ray_job_composes_checks_tokens_and_its_head_runs_no_trial():
    [job] = of_kind("RayJob")
    config = composed(job["spec"]["entrypoint"])
    services = {one["metadata"]["name"] for one in of_kind("Service")}
    assert config.track.uri.removeprefix("http://").partition(":")[0] in services
    assert (config.cluster.name, config.storage) == ("existing", "/storage")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pinned = re.findall(r"(?m)^ray==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert [cluster["rayVersion"]] == pinned


def test_the_mlflow_server_answers_to_the_name_that_trials_call_it_by():
    [server] = of_kind("Deployment")
    command = server["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    [job] = of_kind("RayJob")
    host = composed(job["spec"]["entrypoint"]).track.uri.removeprefix("http://")
    assert host in re.findall(r'--allowed-hosts "([^"]+)"', command)[0].split(",")


def test_the_slurm_script():
    text = (CLUSTER / "slurm.sh").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=True)
    assert (CLUSTER / "slurm.sh").stat().st_mode & 0o111
    assert "set -euo pipefail" in text
    assert "export RAY_AUTH_MODE=token" in text
    for flag in ("--nodes", "--requeue", "--time", "--gpus-per-node"):
        assert f"#SBATCH {flag}" in text
    assert re.search(
        r'srun .*--cpus-per-task="\$SLURM_CPUS_PER_TASK" --exact', text
    )  # --exact alone takes one core
    assert "mlflow" not in text or "track.uri=" in text
    assert (
        "$storage" not in re.findall(r"track\.uri=(.*)", text)[0]
    )  # SQLite locks badly on a shared file system


def test_every_command_in_the_page_is_one_that_was_run_or_says_that_it_was_not():
    commands = [
        line
        for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
        for line in block.splitlines()
        if line
    ]
    assert len(commands) > 15
    for line in commands:
        words = line.partition("#")[0]
        subprocess.run(["bash", "-n", "-c", words], check=True)
        assert "(not run here" in line or words.startswith(HERE), line
        for path in re.findall(r"cluster/[\w.]+", words):
            assert (ROOT / path).exists(), path


def test_each_way_takes_three_commands():
    for title in ("AWS", "Google Cloud", "Kubernetes", "Slurm"):
        section = PAGE[PAGE.index(f"## {title}") :]
        block = re.findall(r"```bash\n(.*?)```", section, re.S)[0]
        assert len(block.strip().splitlines()) == 3, title


def test_where_the_first_gpu_is_still_to_come_its_size_is_said():
    [job] = of_kind("RayJob")
    [memory] = re.findall(r"cluster\.gpu_memory=(\S+)", job["spec"]["entrypoint"])
    assert (
        memory
        in (CLUSTER / "kuberay.yaml").read_text(encoding="utf-8").partition("\napiVersion")[0]
    )
    for title, gib in (("AWS", 44), ("Google Cloud", 22)):  # an L40S, and an L4
        block = re.findall(r"```bash\n(.*?)```", PAGE[PAGE.index(f"## {title}") :], re.S)[0]
        [command] = re.findall(r"python launch\.py [^#\n]*", block)
        cluster = composed(command).cluster
        assert (cluster.gpu_memory, cluster.gpus_per_trial, cluster.patience) == (
            f"{gib}GiB",
            "auto",
            1200,
        )


def test_the_pages_options_of_our_own_programs_exist():
    for program in ("q3q.trials", "q3q.track"):
        for arguments in re.findall(rf"python -m {re.escape(program)} ([^#`\n&]*)", PAGE):
            words = shlex.split(arguments.replace("/storage", "."))
            main = import_module(f"{program}.__main__").main
            with pytest.raises(SystemExit) as stop:
                main([*words, "--help"])
            assert stop.value.code == 0

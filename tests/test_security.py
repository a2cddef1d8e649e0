"""Configuration runs no code, secrets stay hidden, Ray needs a token and listens locally only."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from q3q.config import resolve
from q3q.config.guard import refuse_code
from q3q.errors import ConfigError
from q3q.masking import masked
from q3q.models.checkpoint import Checkpoint
from q3q.record import TrialRecord
from q3q.sweep.ray import cluster as cluster_module
from q3q.sweep.ray.cluster import Cluster
from tests.commands import python
from tests.composed import compose
from tests.specs import make_trial

ROOT = Path(__file__).parent.parent
RUNS_CODE = [
    "+method._target_=os.system",
    "+model.x={a:[{_target_:os.system}]}",
    "overrides={},{_target_:os.system}",
    "hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=os.system",
    "+hydra.launcher.x='${oc.create:{_target_:os.system}}'",
    "+hydra.launcher.x={y:1}",
    "+hydra.launcher.x=1,[2]",
    "+hydra.callbacks.x._target_=os.system",
    "+hydra/callbacks=x",
    "+hydra.job_logging.handlers.x={class:subprocess.Popen,args:[true]}",
    "hydra/job_logging=x",
    "hydra.searchpath=[/tmp]",
    "+hydra.job.env_set.LD_PRELOAD=x.so",
    "hydra={}",
    "~hydra.launcher",
    "+model@hydra.callbacks.x=demo",
    "model=../../elsewhere/page",
    "model=demo,../../elsewhere/page",
    "+schema=../../elsewhere/page",
    "hydra/launcher=../page",
    "=../../elsewhere/page",
    "model=/elsewhere/page",
    "model=elsewhere/page",
    "model=page.yaml",
    "model=",
    "model='../../elsewhere/page'",
    'model=demo,"../../elsewhere/page"',
    "model=[../../elsewhere/page]",
    "model=[demo]",
    "model=[demo,[../../elsewhere/page]]",
    "model=demo,[../../elsewhere/page]",
    "model=[demo],[../../elsewhere/page]",
    "model=choice(demo,[../../elsewhere/page])",
    "model=shuffle([../../elsewhere/page])",
    "model=str([../../elsewhere/page])",
    "model={path:../../elsewhere/page}",
    "model={demo:[../../elsewhere/page]}",
    "model=range(1,3)",
    "model=interval(0,1)",
    "model=1",
    "model=null",
    "model=true",
    "model=${oc.env:PAGE}",
    "model=[${oc.env:PAGE}]",
    "model=demo,${oc.env:PAGE}",
    "+study=[../../elsewhere/page]",
    "++study=[../../elsewhere/page]",
    "~study=[../../elsewhere/page]",
    "~study=../../elsewhere/page",
    "evaluation=[../../elsewhere/page]",
    "+elsewhere=[../../elsewhere/page]",
    "schema/method=[../../elsewhere/page]",
    "+hydra/launcher=[../page]",
    "hydra/sweeper=[../page]",
    "+defaults=[../../elsewhere/page]",
    "model@method=../../elsewhere/page",
    "+study@_global_=[../../elsewhere/page]",
    "+model@_here_=demo",
    "+hydra.sweeper.params.model=../../elsewhere/page",
    "+hydra.sweeper.params.model=demo,../../elsewhere/page",
    "+hydra.sweeper.params.model='[../../elsewhere/page]'",
    "+hydra.sweeper.params.study=../../elsewhere/page",
    "hydra.sweeper.rows.0.model=../../elsewhere/page",
    "--config-dir=/tmp",
    "--config-d",
    "--config-path",
    "--config-name",
    "--experimental-rerun",
    "--exp=x.pickle",
    "-cd",
    "-cp",
    "-cn",
]
SETS_VALUES = [
    "-m",
    "--cfg",
    "-c",
    "job",
    "--help",
    "--info",
    "model=demo,qwen3_8b",
    "method=glob(*)",
    "method=glob(*,exclude=b*)",
    "method='gptq'",
    "method=choice(gptq,awq)",
    "method=shuffle(gptq,awq)",
    "method=sort(gptq,awq)",
    "bits=range(2,5)",
    "bits=choice(2,4)",
    "evaluation.texts=[demo],[demo,library]",
    "method.alpha_grid=[0.3,0.5]",
    "name='../../x'",
    "hydra.sweeper.params.model=demo",
    "overrides={blocks.0:{bits:8},*.down:{bits:4}}",
    "skip=[blocks.5.o]",
    "question='why: a/b, ../c?'",
    "storage=../elsewhere",
    "model.path=../../models/mine",
    "track.uri=http://HOST:5000",
    "+study=paper",
    "hydra/launcher=basic",
    "hydra.launcher.cpus=2",
    "hydra.sweep.dir=${storage}/x",
    "~calibration",
]


@pytest.mark.parametrize("argument", RUNS_CODE)
def test_what_could_run_code_is_refused_in_one_line(argument):
    with pytest.raises(ConfigError) as refusal:
        refuse_code(["-m", argument])
    assert argument in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_sets_values_is_taken():
    refuse_code(SETS_VALUES)


# Hydra itself refuses Popen
HANDLER = "+hydra.job_logging.handlers.x={{class:logging.FileHandler,filename:{}}}"
WITHOUT_THE_CHECK = """
import runpy, sys
import q3q.config.guard
q3q.config.guard.refuse_code = lambda arguments: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(*arguments: str, checked: bool = True) -> "subprocess.CompletedProcess[str]":
    start = ["launch.py"] if checked else ["-c", WITHOUT_THE_CHECK, "launch.py"]
    return python(*start, *arguments)


def test_a_real_command_runs_nothing_and_says_so(tmp_path):
    trace, attack = tmp_path / "trace", HANDLER.format(tmp_path / "trace")
    done = launch(attack, "plan=true", f"storage={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"q3q: {attack} is not accepted")
    assert not trace.exists()
    launch(attack, "plan=true", f"storage={tmp_path}", checked=False)
    assert trace.exists()  # without the check Hydra does call it


@pytest.mark.parametrize(
    "arguments",
    [
        ["+study=[{}]"],
        ["-m", "+study=demo", "name=mine", "hydra.sweeper.params.model={}"],
    ],
)
def test_a_page_from_elsewhere_is_not_even_read(arguments, tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "page.yaml").write_text(
        "# @package _global_\nhydra:\n  job_logging:\n    handlers:\n      x:\n"
        f"        class: logging.FileHandler\n        filename: {trace}\n",
        encoding="utf-8",
    )
    page = os.path.relpath(tmp_path / "page", ROOT / "conf" / "study")
    given = [word.format(page) for word in arguments]
    done = launch(*given, "plan=true", f"storage={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"q3q: {given[-1]} is not accepted")
    assert not trace.exists()


SECRET = "lovelace-1815"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://ada:{SECRET}@tracker:5000/x", "http://***@tracker:5000/x"),
        (f"postgresql://ada:p@{SECRET}@db/x", "postgresql://***@db/x"),
        (f"track.password={SECRET} bits=4", "track.password=*** bits=4"),
        (f'{{"api_key": "{SECRET}", "bits": 4}}', '{"api_key": "***", "bits": 4}'),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"https://host/a?sig={SECRET}&b=1", "https://host/a?sig=***&b=1"),
        ("login with hf_abcdefghijklmnopqrstuvwx", "login with ***"),
        (f"the server said {SECRET}", "the server said ***"),  # the environment's
        (f"DB_PASS={SECRET} pw={SECRET}; bits=4", "DB_PASS=*** pw=***; bits=4"),
        (f"{SECRET}-and-more", "***"),  # a secret that begins with another
    ],
)
def test_secrets_are_masked_and_nothing_else(text, shown):
    secrets = {"MLFLOW_TRACKING_PASSWORD": SECRET, "MY_PASS": f"{SECRET}-and-more"}
    assert masked(text, {**secrets, "HOME": "/root/long/enough"}) == shown


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *(
            (name, True)
            for name in ("SMTP_PASS", "PASS", "PGPASSWORD", "MYSQL_PWD", "KEY_PASSPHRASE")
        ),
        *((name, True) for name in ("DJANGO_SECRET_KEY", "STORAGE_KEY", "GITHUB_PAT", "db_creds")),
        *((name, False) for name in ("PWD", "OLDPWD", "SSH_ASKPASS", "BYPASS", "PATH", "MONKEY")),
    ],
)
def test_variables_named_like_a_secret_are_masked(name, secret):
    assert masked(f"said {SECRET}", {name: SECRET}) == ("said ***" if secret else f"said {SECRET}")


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/ada/mlflow.db",
        "python launch.py -m model=qwen3_8b method=gptq,awq bits=2,3,4 seed=0",
        "perplexity per token: 3.2; calibration.length=2048 tokens=512",
        "write to ada@example.org",
        "basic perplexity of key: value",
        "check levels: pass; bypass=true; PWD=/home/ada OLDPWD=/home",
    ],
)
def test_plain_words_stay(text):
    assert masked(text, {"TOKEN": "short", "HOME": "/home/ada"}) == text


def test_records_of_failures_hold_no_secret():
    uri = f"http://ada:{SECRET}@tracker"
    record = TrialRecord.failed(
        make_trial("none"),
        f"no answer from {uri}",
        {"traceback": f"open({uri!r})", "git_commit": None},
    )
    assert SECRET not in json.dumps(record.to_json())
    assert "no answer from http://***@tracker" in record.reason


def test_what_a_sweep_keeps_and_tells_its_tracker_holds_no_secret(tmp_path, monkeypatch, capsys):
    from q3q.config.model import facts_of
    from q3q.sweep.in_process import InProcess
    from q3q.sweep.run import run_study
    from q3q.sweep.settings import StudySettings
    from q3q.track import mlflow
    from tests.trackers import MemoryTracker

    tracker, uri = MemoryTracker(), f"http://ada:{SECRET}@tracker:5000"
    monkeypatch.setattr(tracker, "uri", uri, raising=False)
    monkeypatch.setattr(mlflow, "MlflowTracker", lambda *_: tracker)
    given = [f"track.uri={uri}", f"storage={tmp_path}", "method=none", "evaluation=none"]
    settings = compose("config", given)
    trial, facts = resolve.trial_from(settings), facts_of(settings)

    class Host(InProcess):
        def run(self, planned, study):
            [one] = planned
            record = TrialRecord(spec=one.spec, placement=trial.placement, status="COMPLETED")
            record.save()
            study.finished(record)

    command = f"python launch.py track.uri={uri}"
    run_study([trial], {trial.id: facts}, StudySettings.of(settings), command, Host())
    texts = [
        path.read_text()
        for path in tmp_path.rglob("*")
        if path.suffix in (".json", ".md", ".html", ".yaml")
    ]
    assert any("http://***@tracker:5000" in text for text in texts)
    assert tracker.sweep is not None
    shown = json.dumps(
        [tracker.sweep.to_json(), {name: str(content) for name, content in tracker.closing.items()}]
    )
    assert "http://***@tracker:5000" in shown
    assert SECRET not in "".join([*texts, shown, *capsys.readouterr()])


def test_an_mlflow_that_cannot_be_reached_is_named_without_its_password(tmp_path):
    uri = f"track.uri=http://ada:{SECRET}@127.0.0.1:9"
    done = launch(uri, "method=none", "evaluation=none", f"storage={tmp_path}")
    assert done.returncode == 2
    assert "http://***@127.0.0.1:9" in done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.fixture
def model(tmp_path):
    """The demo model's folder, as links."""
    for path in (ROOT / "q3q/models/demo/dense").iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_a_pickled_checkpoint_is_refused_by_name(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*can run code"):
        Checkpoint(model)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/../../b", "..", "C:\\x", "a\0b"]
)
def test_an_index_cannot_lead_out_of_its_folder(model, shard):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": shard}})
    )
    with pytest.raises(ConfigError, match="beside its index"):
        Checkpoint(model)


@pytest.fixture
def without_token(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("without_token")
def test_a_cluster_is_not_joined_without_a_token_unless_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(cluster_module, "ANSWER_SECONDS", 0.1)
    with (
        Cluster("127.0.0.1:1") as nowhere,
        pytest.raises(ConfigError, match="joined with a token, and none is here"),
    ):
        nowhere.total()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        Cluster("127.0.0.1:1") as nowhere,
        pytest.raises(ConfigError, match="no Ray cluster answers"),
    ):
        nowhere.total()


LOCAL_CLUSTER = """
import json, os, subprocess, sys
import psutil
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Task

def look(report):
    import ray
    return os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]

with Cluster(cpus=1) as cluster:
    [outcome] = cluster.run([Task(key="look", call=look)], lambda *_: None)
    import ray
    me = psutil.Process()
    listening = {
        connection.laddr.ip
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    address = ray.get_runtime_context().gcs_address
    ask = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1]); print('came in')"
    def others(**env):
        done = subprocess.run([sys.executable, "-c", ask, address], env={**os.environ, **env},
                              capture_output=True, text=True, timeout=100)
        return "came in" in done.stdout, "InvalidAuthToken" in done.stderr, done.stderr[-500:]
    print(json.dumps([outcome.value, sorted(listening), others(), others(RAY_AUTH_TOKEN="0" * 64)]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("without_token")
def test_the_sweeps_own_ray_wants_its_token_and_is_on_loopback_alone(tmp_path):
    done = python("-c", LOCAL_CLUSTER, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    (mode, token), listening, with_token, with_another = json.loads(done.stdout.splitlines()[-1])
    assert mode == "token"
    assert len(token) == 64
    assert listening
    assert all(ip.removeprefix("::ffff:") in ("127.0.0.1", "::1") for ip in listening), listening
    assert with_token[0], with_token
    assert with_another[:2] == [False, True], with_another
    assert not (tmp_path / ".ray" / "auth_token").exists()  # it was in memory alone

"""Everything that a command line needs is fetched before trials run, or named at once."""

import json
import math
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from pyarrow import parquet

from q3q import fetch
from q3q.bit_budget import BitBudget
from q3q.cli import explain, run_alone
from q3q.config import model as config_model
from q3q.config import texts as config_texts
from q3q.config.evaluation import _data_sets
from q3q.config.model import DEMO_MODELS
from q3q.config.pages import CONF
from q3q.config.schema import register
from q3q.data import needs
from q3q.data.calibration import OTHER_DRAW, calibration_identity
from q3q.data.needs import ModelNeed, TextNeed, fetch_weights
from q3q.data.prepared import Shelf
from q3q.data.repositories import REPOSITORIES
from q3q.data.texts import _HUB
from q3q.evaluate.identities import prepared_identities
from q3q.models.checkpoint import load_tokenizer
from q3q.models.hub import locate
from q3q.placement import Trial
from q3q.sweep import downloads, progress
from q3q.sweep.downloads import download, download_on_each_machine, needs_of
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.nodes import node_ids
from q3q.sweep.ray.tasks import Outcome, Started
from tests.hub import COMMIT, serving, use
from tests.specs import calibration_of, evaluation_of, hub_model_of, make_spec, make_trial

MODEL, PIQA = "models/Qwen/Qwen3-0.6B", "baber/piqa"
WORDS = [
    "-m",
    "model=qwen3_0_6b",
    "method=gptq,rtn",
    "calibration=wikitext2",
    "evaluation=tasks",
    "evaluation.tasks=[piqa]",
    "evaluation.texts=[wikitext2]",
    "evaluation.window=512",
]


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """Print no line that says how far composing is, as on a quiet machine."""
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", math.inf)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Folders of the repositories that a study of the demo model, as Qwen3-0.6B, needs."""
    root = tmp_path_factory.mktemp("served")
    rows = [{"goal": f"lift {i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(1838)]
    (root / "piqa").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "piqa" / "validation.jsonl").write_text(lines)
    text = _HUB["wikitext2"]
    for split, name in text.files.items():
        file = root / "wikitext" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        count = text.evaluated or 1
        words = [f"{split} has words, and more words, {i} times. " * 5 for i in range(count)]
        parquet.write_table(pa.table({"text": words}), file)
    shutil.copytree(DEMO_MODELS / "dense", root / "model")
    return {
        MODEL: root / "model",
        f"datasets/{PIQA}": root / "piqa",
        f"datasets/{text.repository}": root / "wikitext",
    }


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    """A Hub that has all of it, an empty cache, and nothing remembered from another test."""
    for memo in (config_model._hub_model, config_texts.open_text, _data_sets):
        memo.cache_clear()
    commits = {f"datasets/{name}": one.commit for name, one in REPOSITORIES.items()}
    commits |= {f"datasets/{text.repository}": text.revision for text in _HUB.values()}
    with serving(dict(served), commits) as one:
        use(one, tmp_path / "cache", monkeypatch)
        yield one
    for memo in (config_model._hub_model, config_texts.open_text, _data_sets):
        memo.cache_clear()


def launched(words, storage, capsys):
    """Do what launch.py does, in this process; return the exit code, output and errors."""
    register()
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    sweeps, words = words[0] == "-m", [*words, f"storage={storage}"]
    hydra = Hydra.create_main_hydra2("launch", create_config_search_path(str(CONF)))
    capsys.readouterr()
    code = 0
    try:
        if sweeps:
            hydra.multirun("config", run_alone, words[1:], with_log_configuration=False)
        else:
            _ = hydra.run("config", run_alone, words, with_log_configuration=False).return_value
    except Exception as error:
        code = explain(error)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_was_fetched_needs_no_network(hub, served, tmp_path, capsys):
    assert fetch.main(["--list", *WORDS]) == 0
    said = capsys.readouterr().out
    piqa = (served[f"datasets/{PIQA}"] / "validation.jsonl").stat().st_size
    assert f"data set {PIQA}: {piqa / 1e3:.3g} KB to download" in said
    assert "Qwen/Qwen3-0.6B: 11.8 MB to download" in said
    code, plan, _ = launched([*WORDS, "plan=true"], tmp_path / "st", capsys)
    assert code == 0
    assert "To download: Qwen/Qwen3-0.6B (11.8 MB), calibration text wikitext2 (" in plan
    contents = [*hub.cache.rglob("*.parquet"), *hub.cache.rglob("*.safetensors")]
    assert not contents, "neither a list nor a plan needs any"

    assert fetch.main(WORDS) == 0
    assert "Qwen/Qwen3-0.6B: 11.8 MB downloaded" in capsys.readouterr().out
    hub.close()
    config_model._hub_model.cache_clear()
    assert fetch.main(["--list", *WORDS]) == 0
    assert "Nothing to download" in capsys.readouterr().out
    code, plan, _ = launched([*WORDS, "plan=true"], tmp_path / "st", capsys)
    assert code == 0
    assert "3 to run on this machine" in plan
    assert "To download" not in plan
    assert "Missing" not in plan


def test_a_download_that_was_cut_off_goes_on_with_what_is_missing(hub, capsys):
    words = ["model=qwen3_0_6b", "evaluation=none"]
    assert fetch.main(words) == 0
    [weights] = hub.cache.glob("hub/models--*/snapshots/*/model.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    hub.asked.clear()
    assert fetch.main(words) == 0
    files = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert files == {"model.safetensors"}
    assert weights.read_bytes() == (hub.repositories[MODEL] / "model.safetensors").read_bytes()
    hub.asked.clear()
    assert fetch.main(words) == 0
    assert not [path for path in hub.asked if "/resolve/" in path]
    assert "Qwen/Qwen3-0.6B: is here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("need", "downloads_it", "folder"),
    [
        (ModelNeed("Qwen/Qwen3-0.6B", None), "locate", "models--Qwen--Qwen3-0.6B"),
        (
            TextNeed("wikitext2", "calibration", None),
            "download_text",
            "datasets--Salesforce--wikitext",
        ),
    ],
)
def test_a_download_says_how_far_it_is(hub, monkeypatch, need, downloads_it, folder):
    missing, plain, half_seen = need.missing(), getattr(needs, downloads_it), threading.Event()
    steps = list[tuple[int, int]]()

    def step(done, total):
        steps.append((done, total))
        if done == missing // 2:
            half_seen.set()

    def slow(*arguments):
        partial = hub.cache / "hub" / folder / "blobs" / "half.incomplete"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(bytes(missing // 2))
        assert half_seen.wait(60)
        partial.unlink()
        return plain(*arguments)

    monkeypatch.setattr(needs, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(needs, downloads_it, slow)
    need.fetch(step)
    assert (steps[0], steps[-1]) == ((0, missing), (missing, missing))
    assert need.missing() == 0


def test_weights_come_before_trials_start(hub):
    spec = make_spec(model=hub_model_of("mine", source="Qwen/Qwen3-0.6B"))
    specs = [replace(spec, model=replace(spec.model, revision=COMMIT), seed=k) for k in range(2)]
    said: list[str] = []
    fetch_weights([*specs, make_spec()], said.append)
    assert said == [
        "Qwen/Qwen3-0.6B: 11.8 MB to download",
        "Qwen/Qwen3-0.6B: 11.8 MB downloaded",
    ]
    asked = len(hub.asked)
    fetch_weights(specs, said.append)
    assert len(hub.asked) == asked, "what is here is not asked for"


def test_each_thing_that_cannot_be_had_has_a_line_and_the_others_are_fetched(hub, capsys):
    del hub.repositories[f"datasets/{PIQA}"]
    assert fetch.main(WORDS) == 2
    said = capsys.readouterr()
    assert "Qwen/Qwen3-0.6B: 11.8 MB downloaded" in said.out
    lines = said.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"q3q: data set {PIQA}: ")
    assert lines[1] == "q3q: 1 thing not available"


def test_everything_that_is_missing_is_named_at_once(hub, tmp_path, capsys):
    hub.close()
    words = ["-m", "model=qwen3_0_6b,qwen3_4b", *WORDS[2:]]
    code, _, said = launched([*words, "plan=true"], tmp_path / "st", capsys)
    assert code == 2
    first, *lines = said.strip().splitlines()
    assert first.startswith("q3q: 5 things are missing. Where there is a network, python -m q3q.")
    assert "plan=" not in first
    names = ("3-0.6B ", "calibration=wikitext2", "evaluation=wikitext2", "baber/piqa", "3-4B ")
    for line, name in zip(lines, names, strict=True):
        assert name in line
    assert not (tmp_path / "st" / "trials").exists()


def test_a_plan_says_what_is_not_to_be_had(hub, tmp_path, capsys):
    """A plan needs each model's config.json, and no text and no question."""
    assert fetch.main(["model=qwen3_0_6b", "evaluation=none"]) == 0
    for name in list(hub.repositories):
        if name.startswith("datasets/"):
            del hub.repositories[name]
    code, plan, _ = launched([*WORDS, "plan=true"], tmp_path / "st", capsys)
    assert code == 0
    assert "3 to run on this machine" in plan
    missing = [line for line in plan.splitlines() if line.startswith("Missing: ")]
    assert [("piqa" in line, "wikitext2" in line) for line in missing] == [
        (False, True),
        (False, True),
        (True, False),
    ]


@pytest.mark.slow
def test_a_trial_of_the_hubs_model_downloads_it_before_it_starts(hub, tmp_path, capsys):
    words = ["model=hub", "model.source=Qwen/Qwen3-0.6B", "method=rtn", "dtype=float32"]
    code, _, said = launched([*words, "evaluation=none"], tmp_path / "st", capsys)
    assert code == 0, said
    assert "Qwen/Qwen3-0.6B: 11.8 MB downloaded" in said
    [record] = (tmp_path / "st" / "trials").glob("*/record.json")
    assert json.loads(record.read_text())["spec"]["model"]["name"] == "Qwen3-0.6B"


def test_what_ships_with_q3q_needs_no_fetching(hub, capsys):
    assert fetch.main(["-m", "method=gptq,awq", "bits=2,3"]) == 0
    assert capsys.readouterr().out.startswith("Nothing to fetch")
    assert hub.asked == []


def test_a_command_line_that_launch_would_refuse_is_refused(capsys):
    assert fetch.main(["bits=2,3"]) == 2
    assert "several values need -m" in capsys.readouterr().err
    assert fetch.main(["modle=demo"]) == 2
    assert "modle is not a setting" in capsys.readouterr().err


def test_a_model_without_a_dtype_is_said_to_be_float32(hub, tmp_path, capsys):
    folder = shutil.copytree(hub.repositories[MODEL], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    hub.repositories[MODEL] = folder
    words = ["model=qwen3_0_6b", "evaluation=none", "method=rtn", "plan=true"]
    code, _, said = launched(words, tmp_path / "st", capsys)
    assert code == 0
    assert "the config.json of Qwen/Qwen3-0.6B names no dtype, which means float32" in said


def hub_trials(tmp_path):
    """Two trials of the Hub's model, one of which is asked questions and calibrates on WikiText."""
    spec = make_spec(model=hub_model_of("mine", source="Qwen/Qwen3-0.6B"))
    first = replace(spec, model=replace(spec.model, revision=COMMIT))
    second = replace(
        first,
        calibration=calibration_of("wikitext2"),
        evaluation=evaluation_of("wikitext2", tasks=["piqa"]),
        seed=1,
    )
    placement = make_trial(storage=tmp_path).placement
    return [Trial(first, placement), Trial(second, placement)]


def test_each_machine_downloads_all_that_its_trials_need_and_says_what_is_not_to_be_had(
    hub, served, tmp_path
):
    trials = hub_trials(tmp_path)
    names = [need.name for need in needs_of(trials)]
    assert names == [
        f"Qwen/Qwen3-0.6B ({COMMIT[:12]})",
        "calibration text wikitext2",
        "evaluation text wikitext2",
        f"data set {PIQA}",
    ]
    orders, said = [trial.to_json() for trial in trials], list[str]()
    del hub.repositories[f"datasets/{PIQA}"]
    download(orders, said.append)
    assert [*hub.cache.rglob("model.safetensors")]
    [lost] = [line for line in said if "cannot be downloaded now" in line]
    assert f"data set {PIQA}" in lost
    hub.repositories[f"datasets/{PIQA}"] = served[f"datasets/{PIQA}"]
    download(orders, said.append)
    said.clear()
    hub.asked.clear()
    download(orders, said.append)
    assert hub.asked == []  # it might not answer, and each question takes seconds then
    hub.close()
    download(orders, said.append)
    assert said == []


def test_a_machine_downloads_no_text_whose_windows_are_prepared(hub, tmp_path, monkeypatch):
    trials, asked = hub_trials(tmp_path), list[str]()
    spec, orders = trials[1].spec, [trial.to_json() for trial in trials]
    assert spec.calibration is not None
    fetch_weights([spec], lambda line: None)

    def missing(need):
        asked.append(need.name)
        return 0

    monkeypatch.setattr(TextNeed, "missing", missing)
    shelf = Shelf.of(trials[1], load_tokenizer(locate("Qwen/Qwen3-0.6B", COMMIT)))
    assert shelf is not None
    identity = calibration_identity(spec.calibration, spec.seed)
    texts = ["calibration text wikitext2", "evaluation text wikitext2"]
    for tokenizer, expected in (("another", texts), (shelf.tokenizer, texts[1:])):
        asked.clear()
        replace(shelf, tokenizer=tokenizer).keep(identity, {"windows": np.zeros((1, 1), np.int32)})
        download(orders, lambda line: None)
        assert asked == expected


def test_a_budgets_text_is_downloaded_unless_its_windows_are_prepared(tmp_path):
    budget = BitBudget(
        bits=3.5,
        unit="site",
        widths=(2, 4),
        measure="kl",
        source="wikitext2",
        digest="0",
        samples=2,
        length=16,
        draw="random",
    )
    trial = make_trial("rtn", budget=budget, seed=1, storage=tmp_path)
    [need] = needs_of([trial])
    assert need.name == "calibration text wikitext2"
    [windows, _] = prepared_identities(trial.spec)
    assert (windows["samples"], windows["seed"]) == (2, 1 + OTHER_DRAW)
    assert needs_of([trial], lambda of, text: text == windows) == []


class SilentCluster:
    """Of three machines one ends, one says the same line every ten minutes, and one nothing."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(downloads, "time", SimpleNamespace(monotonic=lambda: self.now))

    def node_ids(self, *, gpus):
        return ["a", "b", "c"]

    def run(self, tasks, on_event, on_tick):
        first, second, _ = tasks
        on_event(second.key, Started(key=second.key, pid=1, node="gpu-2", attempt=1))
        yield Outcome(key=first.key, attempts=1)
        while True:
            self.now += 600
            on_tick()
            on_event(second.key, "gpu-2: 1 GB of 2 GB downloaded")


def test_machines_that_hang_do_not_keep_trials_from_their_beginning(monkeypatch, tmp_path):
    cluster: Any = SilentCluster(monkeypatch)
    said = list[str]()
    trials, ticks = hub_trials(tmp_path), list[float]()
    download_on_each_machine(
        cluster, trials, gpus=True, say=said.append, tick=lambda: ticks.append(cluster.now)
    )
    assert ticks == [600, 1200, 1800]
    assert said[:-1] == ["gpu-2: 1 GB of 2 GB downloaded"] * 2
    assert said[-1] == (
        "The downloads on gpu-2, node c made no progress for 15 minutes: they are stopped, "
        "and trials download what they need"
    )


@pytest.mark.parametrize(("gpus", "expected"), [(False, ["cores", "both"]), (True, ["both"])])
def test_only_machines_where_trials_may_run_download(monkeypatch, gpus, expected):
    """A cluster's head may have no cores for tasks, and its disk no room for a model."""
    table = {"head": {}, "cores": {"CPU": 8.0}, "both": {"CPU": 8.0, "GPU": 1.0}}
    nodes = [
        {"NodeID": name, "Alive": True, "Resources": {"memory": 1e9, **amounts}}
        for name, amounts in table.items()
    ]
    lost = {"NodeID": "lost", "Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, lost])
    assert node_ids(gpus=gpus) == expected


@pytest.mark.slow
def test_in_a_cluster_machines_download_before_trials_hold_gpus(hub, tmp_path):
    """A real Ray: the task that downloads runs while every GPU is free, and trials come later."""
    cache = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    trials, said, free = hub_trials(tmp_path)[:1], list[str](), list[float]()

    def say(line):
        import ray

        said.append(line)
        free.append(ray.available_resources().get("GPU", 0))

    with Cluster(cpus=1, gpus=1, env=cache) as cluster:
        assert len(cluster.node_ids(gpus=True)) == 1
        download_on_each_machine(cluster, trials, gpus=True, say=say, tick=lambda: None)
        assert [*(tmp_path / "home").rglob("model.safetensors")]
        assert said[-1].endswith("11.8 MB downloaded")
        assert set(free) == {1}
        said.clear()
        download_on_each_machine(cluster, trials, gpus=True, say=say, tick=lambda: None)
        assert said == []
        download_on_each_machine(cluster, [make_trial()], gpus=True, say=say, tick=lambda: None)
        assert said == []

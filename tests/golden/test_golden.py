"""Ids, records and every file on disk stay byte for byte what commit 1de2977 made of them.

With Q3Q_WRITE_GOLDEN=1 the expected files are written instead of compared: see README.md.
"""

import hashlib
import json
import math
import os
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests.golden import adapter
from tests.golden.adapter import (
    Sweep,
    TrialRecord,
    attempt_trial,
    find_trials,
    finished_record,
    listed,
    load_trial,
    text_of,
    trial_of,
)

HERE = Path(__file__).parent
STORAGE = HERE / "storage_1de2977"
# What a record says of its machine and its times; its samples' checksum, which depends on pyarrow's
# version; and tags that are digests: of a record with its places, which are another folder's here,
# and of pictures, which matplotlib draws differently elsewhere.
VOLATILE = ("/sha256", "/environment", "/metrics/seconds", "/metrics/peak_bytes", "/files/")
OF_PLACES = ("q3q.record", "q3q.storage", "q3q.files")
STORAGE_WAS, CODE_WAS, TEXT_WAS = "/srv/study", "/home/you/q3q", "/home/you/garden.txt"
COMMIT = "0123456789abcdef" * 2 + "01234567"
ROWS = [line.split(maxsplit=3) for line in (HERE / "ids.txt").read_text().splitlines()[1:]]
HUB_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
TEMPLATE = {
    "chat_template": "{% if enable_thinking is false %}<think></think>{% endif %}{{ messages }}"
}


def same(path, content):
    """Compare with the expected file, or write it."""
    content = content.encode() if isinstance(content, str) else content
    if os.environ.get("Q3Q_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert path.read_bytes().decode() == content.decode()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A Hub cache with two models that nobody released: their config, and a chat template."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, config in (
        ("Qwen3-0.6B", HUB_CONFIG),
        ("Qwen3-8B", HUB_CONFIG | {"tie_word_embeddings": False}),
    ):
        folder = tmp_path / "hub" / f"models--Qwen--{name}" / "snapshots" / COMMIT
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(TEMPLATE), encoding="utf-8")
        (folder / "generation_config.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_ids_and_specs_are_those_of_1de2977(row, tmp_path, study_data, hub_cache, monkeypatch):
    name, trial_id, quantization, command = row
    expected = HERE / "specs" / f"{name}.json"
    skip_if_another_lm_eval_is_in(expected)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    places = {
        "GOLDEN": HERE,
        "DATA": study_data,
        "MODELS": adapter.MODELS,
        "BUCKET": tmp_path / "bucket",
        "STORAGE": tmp_path / "mlruns",
    }
    for word, place in places.items():
        command = command.replace(f"={word}", f"={place}").replace(f"//{word}", f"//{place}")
    if "storage=" not in command:
        command += f" storage={tmp_path / 'mlruns'}"
    trial = trial_of(command.replace("COMMIT", COMMIT))
    text = text_of(trial)
    if name == "store":
        places["MIRROR"] = Path(json.loads(text)["places"]["trials"]).parent
    for word, place in places.items():
        text = text.replace(str(place), word)
    if os.environ.get("Q3Q_WRITE_GOLDEN"):
        table = (HERE / "ids.txt").read_text()
        before, after = (
            f"\n{name}  {first} {second}  "
            for first, second in ((trial_id, quantization), (trial.id, trial.spec.quantization_id))
        )
        (HERE / "ids.txt").write_text(table.replace(before, after))
        trial_id, quantization = trial.id, trial.spec.quantization_id
    assert (trial.id, trial.spec.quantization_id) == (trial_id, quantization)
    same(expected, text + "\n")


def skip_if_another_lm_eval_is_in(path):
    """Skip the test where lm-eval, whose version is part of an id, is another than in a file."""
    version = re.search(r'"lm_eval": "([^"]*)"', path.read_text() if path.exists() else "")
    if version and version[1] != metadata.version("lm_eval"):
        pytest.skip(f"the expected ids have lm-eval {version[1]} in them")


@pytest.fixture
def storage(tmp_path):
    """A copy of the storage folder that 1de2977 wrote, the sweeps' ages in their names' order."""
    folder = tmp_path / "study"
    shutil.copytree(STORAGE, folder)
    for number, path in enumerate(sorted(folder.glob("sweeps/*.json"))):
        os.utime(path, (1_700_000_000 + number, 1_700_000_000 + number))
    return folder


def files(pattern):
    return [str(path.relative_to(STORAGE)) for path in sorted(STORAGE.glob(pattern))]


RECORDS = files("trials/*/record.json") + files("trials/*/failed.json")


def without_seal(text):
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "sha256"})


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_read_and_saved_again_is_the_same_file(name, storage):
    assert adapter.saved_again(STORAGE / name) == (STORAGE / name).read_bytes()
    # In a copied folder its places, and so its checksum, are others, and nothing else is.
    record = TrialRecord.load(storage / name)
    (storage / name).unlink()
    record.save()
    content = (storage / name).read_text(encoding="utf-8").replace(str(storage), STORAGE_WAS)
    assert without_seal(content) == without_seal((STORAGE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", files("trials/*/spec.json"))
def test_a_spec_read_and_written_again_is_the_same_file(name, storage):
    written = text_of(load_trial(storage / name)).replace(str(storage), STORAGE_WAS)
    assert written == (STORAGE / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", files("sweeps/*.json"))
def test_a_sweep_read_and_saved_again_is_the_same_file(name, storage):
    sweep = Sweep.load(storage / name)
    (storage / name).unlink()
    sweep.save(storage)
    written = (storage / name).read_text(encoding="utf-8").replace(str(storage), STORAGE_WAS)
    # All that is new is its checksum.
    assert without_seal(written) == (STORAGE / name).read_text(encoding="utf-8")


def test_the_folder_is_listed_as_1de2977_listed_it(storage):
    text = listed(find_trials(storage), storage)
    same(HERE / "expected" / "trials.txt", text.replace(str(storage), STORAGE_WAS) + "\n")


def again(command, storage):
    """Return the trial that a command of the old folder means in this one."""
    words = command.removeprefix("python launch.py ").replace(STORAGE_WAS, str(storage))
    return trial_of(words.replace(TEXT_WAS, str(HERE / "garden.txt")))


@pytest.mark.parametrize("name", files("sweeps/*.json"))
def test_the_command_of_a_sweep_finds_its_trials_done(name, storage):
    skip_if_another_lm_eval_is_in(STORAGE / name)
    sweep = Sweep.load(storage / name)
    typed = [sweep.command] if len(sweep.trials) == 1 else []
    for trial in sweep.trials:
        assert (storage / "trials" / trial.id).is_dir()
        for command in [*typed, f"{adapter.command_of(trial)} storage={STORAGE_WAS}"]:
            composed = again(command, storage)
            assert composed.spec == trial.spec
            assert composed.spec.quantization_id == trial.spec.quantization_id
            record = finished_record(composed)
            # Its checkpoint, which is too large to lie here, is gone: the trial must run again.
            assert (record is None) == (trial.spec.export is not None)
            if record is not None:
                assert record.completed


STOPPED = (
    "evaluation.texts=[demo] evaluation.window=64 evaluation.limit=4 evaluation.tasks=[] "
    "evaluation.drift_windows=2 calibration.length=64 calibration.samples=4 "
    "method=gptq bits=2 'skip=[*.qkv,*.gate_up,*.down]'"
)


def test_the_stopped_trial_goes_on_from_its_blocks(storage, tmp_path):
    trial = trial_of(f"{STOPPED} storage={storage}")
    assert len(list((storage / "trials" / trial.id / "blocks").glob("*.safetensors"))) == 2
    record = attempt_trial(trial)
    assert record.completed
    assert record.notes["blocks_from_disk"] == 2
    path, machine = (HERE / "expected" / name for name in ("undisturbed.json", "arithmetic.txt"))
    if os.environ.get("Q3Q_WRITE_GOLDEN"):
        undisturbed = trial_of(f"{STOPPED} storage={tmp_path / 'other'}")
        attempt_trial(undisturbed)
        same(path, written(tmp_path / "other" / "trials" / trial.id, tmp_path / "other"))
        same(machine, arithmetic() + "\n")
    numbers, expected = (
        comparable(written(storage / "trials" / trial.id, storage)),
        path.read_text(),
    )
    if machine.read_text().strip() == arithmetic():
        assert numbers == comparable(expected)
    else:  # one code of GPTQ's that falls the other way changes all later ones, and KL by a third
        assert without_arithmetic(numbers) == without_arithmetic(comparable(expected))
        ours, theirs = map(dict, (numbers, comparable(expected)))
        perplexities = [key for key in theirs if "perplexity" in key and "comparisons" not in key]
        assert len(perplexities) > 1
        for key in perplexities:
            assert ours[key] == pytest.approx(theirs[key], rel=0.02), key


def written(folder, storage):
    text = (folder / "record.json").read_text().replace(str(storage), STORAGE_WAS)
    return text.replace(str(adapter.MODELS), f"{CODE_WAS}/q3q/models/demo")


def comparable(record):
    """Return what a record says, in order, but of its machine, its times and that it went on."""

    def flat(value, key):
        if isinstance(value, dict):
            return [leaf for name, inner in value.items() for leaf in flat(inner, f"{key}/{name}")]
        if isinstance(value, list):
            return [leaf for k, inner in enumerate(value) for leaf in flat(inner, f"{key}/{k}")]
        return [(key, "" if key.startswith(VOLATILE) else value)]

    return [leaf for leaf in flat(json.loads(record), "") if leaf[0] != "/notes/blocks_from_disk"]


def without_arithmetic(leaves):
    """Return the leaves of a record with a word for each number and digest that arithmetic made."""

    def kind(value):
        if isinstance(value, float):
            return "finite" if math.isfinite(value) else "not finite"
        return "digest" if re.fullmatch("[0-9a-f]{64}", str(value)) else value

    return [(key, kind(value)) for key, value in leaves]


def arithmetic():
    """Return a digest of what this processor makes of some float32 arithmetic, without q3q."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(192, 256, generator=generator)
    gram = wide.T @ wide + torch.eye(256)
    parts = [gram, torch.linalg.cholesky(gram), torch.cholesky_inverse(torch.linalg.cholesky(gram))]
    parts += [
        wide.exp(),
        wide.softmax(-1),
        torch.nn.functional.silu(wide),
        wide.pow(2).mean(-1).rsqrt(),
    ]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("study", ["all", "grid", "experts"])
def test_a_report_is_the_one_that_1de2977_wrote(study, storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [] if study == "all" else ["--study", study]
    assert adapter.report(["--storage", "study", "--out", "report", *options]) == 0
    for name in ("results.md", "results.csv", "results.tex"):
        same(
            HERE / "expected" / "reports" / study / name, (tmp_path / "report" / name).read_bytes()
        )


@pytest.mark.slow
def test_sync_tells_mlflow_what_1de2977_told_it(storage, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("USER", "you")
    monkeypatch.chdir(tmp_path)
    uri, owner = f"sqlite:///{tmp_path}/mlflow.db", adapter.storage_id("study")
    assert adapter.track(["sync", "--storage", "study", "--uri", uri]) == 0
    told: list[Any] = []
    client = MlflowClient(uri)
    for experiment in client.search_experiments(order_by=["name"]):
        runs = {
            run.info.run_id: run
            for run in client.search_runs([experiment.experiment_id], max_results=1000)
        }
        names = {key: run.info.run_name for key, run in runs.items()}

        def plain(text, names=names):
            for key, name in names.items():
                text = text.replace(key, f"<{name}>")
            return text.replace(str(tmp_path), "").replace(owner, "<storage>")

        tags = {plain(key): plain(value) for key, value in sorted(experiment.tags.items())}
        told.append({"experiment": experiment.name, "tags": tags})
        for run in sorted(runs.values(), key=lambda run: (run.info.start_time, run.info.run_name)):
            assert run.inputs is not None
            history = [
                [metric.key, metric.value, metric.step, metric.timestamp]
                for key in sorted(run.data.metrics)
                for metric in client.get_metric_history(run.info.run_id, key)
            ]
            told.append(
                {
                    "run": run.info.run_name,
                    "status": run.info.status,
                    "start_time": run.info.start_time,
                    "end_time": run.info.end_time,
                    "params": dict(sorted(run.data.params.items())),
                    "tags": {
                        key: plain(value)
                        for key, value in sorted(run.data.tags.items())
                        if key not in OF_PLACES
                    },
                    "metrics": history,
                    "inputs": sorted(
                        [
                            one.dataset.name,
                            one.dataset.digest,
                            one.dataset.source,
                            one.tags[0].value,
                        ]
                        for one in run.inputs.dataset_inputs
                    ),
                    "artifacts": sorted(
                        file.path for file in client.list_artifacts(run.info.run_id)
                    ),
                }
            )
    same(HERE / "expected" / "mlflow.json", json.dumps(told, indent=0) + "\n")

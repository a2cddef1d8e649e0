"""Streamed trials give the resident trial's record, with a peak memory below a bound."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from q3q.errors import ConfigError
from q3q.export.tensors import expected_bytes
from q3q.models.checkpoint import Checkpoint, end_tokens
from q3q.models.facts import read_facts
from q3q.models.footprint import ahead_bytes, need
from q3q.models.loading import load_model
from q3q.models.streaming import StreamedBlocks
from q3q.quantize.methods.settings import SETTINGS
from q3q.trial import run_trial
from tests.commands import python
from tests.composed import composed_trial

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "q3q" / "models" / "demo" / "dense"
SHIPPED = {"demo": "dense", "demo_moe": "moe"}
SMALL = [
    "evaluation.tasks=[]",
    "evaluation.texts=[demo]",
    "evaluation.window=128",
    "evaluation.limit=3",
    "calibration.samples=4",
    "calibration.length=128",
]
# Run a trial for each list of overrides (JSON), one after the other; print their records.
RUN = """
import json, sys
from q3q.trial import run_trial
from tests.composed import composed_trial
trials = [composed_trial(*overrides) for overrides in json.loads(sys.argv[1])]
print(json.dumps([run_trial(trial).to_json() for trial in trials]))
"""


@pytest.fixture
def trial_of(tmp_path):
    def make(*overrides, storage="storage"):
        return composed_trial(*SMALL, f"storage={tmp_path / storage}", *overrides)

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            (
                "model=demo",
                "method=gptq",
                "bits=3",
                "head_bits=4",
                "embedding_bits=4",
                "export=hf",
                "keep=blocks",
                "calibration.samples=2",
            ),
            marks=pytest.mark.slow,
        ),
        (
            "model=demo_moe",
            "method=rtn",
            "bits=4",
            "evaluation.tasks=[stories_who]",
            "evaluation.task_limit=2",
        ),
    ],
    ids=["dense", "moe"],
)
def test_a_streamed_trial_has_the_resident_ones_record(trial_of, overrides):
    resident, streamed = (
        run_trial(trial_of(*overrides, f"loader={loader}", storage=loader))
        for loader in ("resident", "streamed")
    )
    assert resident.spec.id == streamed.spec.id
    for record, loader in ((resident, "resident"), (streamed, "streamed")):
        assert record.completed, record.reason
        assert record.environment["loading"]["loader"] == loader
    timed = ("seconds/", "peak_bytes/")
    ours, theirs = (
        {name: value for name, value in record.metrics.items() if not name.startswith(timed)}
        for record in (streamed, resident)
    )
    assert ours == theirs
    assert streamed.sites == resident.sites
    assert streamed.results == resident.results
    assert [check.name for check in streamed.checks] == [check.name for check in resident.checks]
    if "export=hf" in overrides:
        paths = [Path(record.notes["export"]["path"]) for record in (resident, streamed)]
        for shard in paths[0].glob("*.safetensors"):
            assert shard.read_bytes() == (paths[1] / shard.name).read_bytes()
        assert streamed.notes["export"]["reloaded_by"] == "a plain unpacker, weight by weight"
        assert streamed.notes["export"]["logit_error"] is None
        # Another evaluation of kept blocks quantizes nothing.
        again = run_trial(
            trial_of(*overrides, "evaluation.limit=2", "loader=streamed", storage="streamed")
        )
        assert again.notes["blocks_from_disk"] == len(list(paths[0].glob("*.safetensors"))) - 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo", "demo_moe"])
@pytest.mark.parametrize(
    ("form", "overrides"),
    [
        ("compressed_tensors", ["symmetric=true"]),
        ("gptq", ["symmetric=true"]),
        ("awq", ["group_size=64"]),
    ],
)
def test_a_streamed_model_is_packed_into_the_files_of_the_resident_one(
    trial_of, model, form, overrides
):
    asked = [f"model={model}", "method=rtn", "bits=4", *overrides, f"export={form}"]
    asked += ["evaluation.limit=1", "evaluation.drift=false"]
    paths = []
    for loader in ("resident", "streamed"):
        record = run_trial(trial_of(*asked, f"loader={loader}", storage=loader))
        assert record.completed, record.reason
        assert record.environment["loading"]["loader"] == loader
        assert record.metrics["export_bytes"] == expected_bytes(
            record.spec, read_facts(DEMO.parent / SHIPPED[model])
        )
        paths.append(Path(record.notes["export"]["path"]))
    names = [sorted(path.name for path in folder.iterdir()) for folder in paths]
    assert names[0] == names[1]
    for shard in paths[0].glob("*.safetensors"):
        assert shard.read_bytes() == (paths[1] / shard.name).read_bytes(), shard.name


@pytest.mark.slow
def test_peak_memory_stays_under_a_bound_that_the_resident_model_exceeds(
    random_checkpoint, tmp_path
):
    changes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "head_dim": 128,
    }
    changes |= {"intermediate_size": 4096, "num_hidden_layers": 8, "torch_dtype": "float32"}
    folder = random_checkpoint(max_position_embeddings=2048, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    facts = read_facts(folder)
    bound = (
        need(facts, "float32", method=SETTINGS["rtn"]().memory(), loader="streamed") + 10 * 2**20
    )
    overrides = [
        "model=local",
        f"model.path={folder}",
        "method=rtn",
        "evaluation.tasks=[]",
        "evaluation.texts=[demo]",
    ]
    overrides += ["evaluation.window=64", "evaluation.limit=1", "evaluation.drift=false"]
    # The kernel counts each phase's peak anew, so one process runs both, the smaller trial first.
    both = [
        [*overrides, given, f"storage={tmp_path / given[:3]}"]
        for given in (f"memory={bound}", "loader=resident")
    ]
    done = python("-c", RUN, json.dumps(both))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [record["environment"]["loading"]["loader"] for record in found] == [
        "streamed",
        "resident",
    ]
    records = {record["environment"]["loading"]["loader"]: record["metrics"] for record in found}
    peaks = {
        loader: max(value for name, value in metrics.items() if name.startswith("peak_bytes/"))
        for loader, metrics in records.items()
    }
    assert peaks["streamed"] <= bound
    assert peaks["resident"] > peaks["streamed"] + facts.weight_bytes() // 3
    assert records["streamed"]["perplexity/stories"] == records["resident"]["perplexity/stories"]


def test_the_next_block_is_read_ahead_if_there_is_memory_for_it(trial_of):
    checkpoint = Checkpoint(DEMO)
    method = SETTINGS["rtn"]().memory()
    needs = need(checkpoint.facts, "float32", method=method, loader="streamed")
    ahead = ahead_bytes(checkpoint.facts, "float32")
    for spare, reads in ((0, False), (ahead - 1, False), (ahead, True)):
        trial = trial_of("method=rtn", "loader=streamed", f"memory={needs + spare}")
        model, loading = load_model(checkpoint, trial, "cpu", method)
        assert isinstance(model.blocks, StreamedBlocks)
        assert model.blocks._ahead is reads
        assert loading.needs == needs


def test_settings_of_memory_are_checked_before_anything_runs(trial_of):
    trial = trial_of("memory=2.5GB", "loader=streamed")
    assert trial.placement.memory == 25 * 10**8
    assert trial.placement.loader == "streamed"
    assert trial.id == trial_of().id  # neither changes a number
    assert trial_of().placement.memory is None
    with pytest.raises(ConfigError, match="memory=plenty is not a size"):
        trial_of("memory=plenty")
    with pytest.raises(ConfigError, match="loader=mapped is not known"):
        trial_of("loader=mapped")
    with pytest.raises(ConfigError, match=r"does not fit into 0\.1 GB: streamed it needs"):
        trial_of("memory=100MB")
    with pytest.raises(
        ConfigError, match="memory=100MB is too little for loader=resident: it needs"
    ):
        trial_of("memory=100MB", "loader=resident")


def test_text_is_not_generated_by_a_model_that_is_read_anew_for_each_token(trial_of, tmp_path):
    lines = [
        "task: tiny",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}",
    ]
    lines += [
        "test_split: test",
        "output_type: generate_until",
        'doc_to_text: "{{q}}"',
        'doc_to_target: "{{a}}"',
    ]
    lines += ["generation_kwargs: {until: ['.'], do_sample: false, max_gen_toks: 4}"]
    lines += ["metric_list: [{metric: exact_match}]"]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"q": "One and", "a": "two"}\n' * 3, encoding="utf-8")
    asked = (f"evaluation.include_path={tmp_path / 'tasks'}", "evaluation.tasks=[tiny]")
    trial = trial_of(*asked)
    assert (trial.spec.evaluation.generates, trial.spec.evaluation.ends) == (
        ("tiny",),
        tuple(end_tokens(DEMO)),
    )
    with pytest.raises(
        ConfigError, match="tiny: text is generated token by token, and a streamed model"
    ):
        trial_of(*asked, "loader=streamed")
    with pytest.raises(ConfigError, match="and a sharded model"):
        trial_of(*asked, "loader=sharded")
    # Planned without a place: the machine proves too small, and would stream, when it loads.
    with pytest.raises(ConfigError, match="tiny: text is generated token by token"):
        run_trial(trial.placed(loader="streamed"))

"""Settings and fixtures of all tests: one torch thread, no network, no progress bars."""

import csv
import gc
import json
import logging
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import sys
import time

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Ray's core reads both once in a process, so all of a process's clusters share one token.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}.items():
    os.environ.setdefault(name, value)

# One rank of a gang: runs a pickled call(team) and leaves what it returns.
RANK = """
import os, pickle, socket, sys
sys.path.insert(0, os.getcwd())
import torch
from q3q.team import LOOPBACK, Rendezvous, join_gang
folder, rank, size, port, listener = sys.argv[1], *map(int, sys.argv[2:])
with open(f"{folder}/call", "rb") as file:
    call = pickle.load(file)
taken = socket.socket(fileno=listener) if rank == 0 else None
seat = Rendezvous(rank=rank, size=size, host=LOOPBACK, port=port, own_host=LOOPBACK, listener=taken)
with join_gang(seat) as team:
    value = call(team)
with open(f"{folder}/{rank}", "wb") as file:
    pickle.dump(value, file)
"""

PEOPLE, THINGS = ("Ada", "Ben", "Cleo", "Dan"), ("ball", "cup", "book", "hat")


def pytest_collection_modifyitems(items):
    """Start with the rooms whose tests launch sweeps: one long file at the end idles a worker."""
    long = ("tests/sweep/", "tests/chaos/", "tests/track/", "tests/test_")
    items.sort(key=lambda item: not item.nodeid.startswith(long))


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Spare the garbage collector what is there already: one look at it all takes a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_log():
    """Undo what a sweep in this process does to the log: Hydra sends it to the test's own output.

    That is closed when the test ends, and whatever a later test logs would be an error on stderr.
    """
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(handler)


@pytest.fixture(autouse=True)
def one_thread():
    """Undo what a study in this process sets for its trials: threads, and the GPUs it may see.

    OpenMP's threads do not survive a fork: with more than one, a child that a later test forks
    would wait for them without end.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    before = {name: os.environ.get(name) for name in names}
    yield
    if {name: os.environ.get(name) for name in names} == before:
        return
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Qwen3 of three blocks with the demo's tokenizer: a trial of it takes a second."""
    import torch
    from safetensors.torch import save_file

    from q3q.config.model import DEMO_MODELS
    from q3q.models.facts import read_facts
    from tests.chaos.faults import CONFIG

    folder, demo = tmp_path_factory.mktemp("tiny"), DEMO_MODELS / "dense"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    facts, generator = read_facts(CONFIG), torch.Generator().manual_seed(0)
    weights = {
        "model.embed_tokens.weight": torch.randn(facts.vocab, facts.hidden, generator=generator)
    }
    weights["model.norm.weight"] = torch.ones(facts.hidden)
    for k in range(facts.layers):
        for name, shape in facts.block_shapes(k).items():
            drawn = torch.randn(shape, generator=generator)
            weights[f"model.layers.{k}.{name}"] = (
                1 + 0.1 * drawn if "norm" in name else drawn / shape[-1] ** 0.5
            )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Let a report's pictures be empty: to draw them takes most of a report's time."""
    monkeypatch.setattr(
        "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png",
        lambda self, file, **settings: file.write(b"a picture, which is not drawn"),
    )
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda self, file, **settings: file.write(b'<svg width="1pt" height="1pt"></svg>'),
    )


@pytest.fixture(scope="session")
def study_data(tmp_path_factory):
    """A folder for data.path: the study's data sets in their official schema.

    MMLU is as its authors publish it; the two texts have the official numbers of rows.
    """
    from q3q.evaluate.catalogue import SUBJECTS

    root = tmp_path_factory.mktemp("data")

    def write(name, split, make, count=6):
        (root / name).mkdir(exist_ok=True)
        rows = "".join(
            json.dumps(make(i, PEOPLE[i % 4], THINGS[i % 4])) + "\n" for i in range(count)
        )
        (root / name / f"{split}.jsonl").write_text(rows, encoding="utf-8")

    def arc(i, who, what):
        choices = {"text": [f"the {thing}" for thing in THINGS], "label": list("ABCD")}
        return {
            "question": f"What did {who} find on day {i}?",
            "choices": choices,
            "answerKey": "ABCD"[i % 4],
        }

    def piqa(i, who, what):
        return {
            "goal": f"To lift {i} {what}s",
            "sol1": "use hands.",
            "sol2": "use feet.",
            "label": i % 2,
        }

    def hellaswag(i, who, what):
        endings = [
            f"{verb} the {what}." for verb in ("takes", "drops", "eats [title] up", "sings to")
        ]
        return {
            "activity_label": f"Playing {i}",
            "ctx_a": f"{who} is here.",
            "ctx_b": "she",
            "endings": endings,
            "label": str(i % 4),
        }

    def winogrande(i, who, what):
        sentence = f"{who} gave Eve {i} {what}s because _ was kind."
        return {"sentence": sentence, "option1": who, "option2": "Eve", "answer": str(1 + i % 2)}

    def boolq(i, who, what):
        return {
            "passage": f"{who} has {i} {what}s.",
            "question": "does someone have it",
            "label": i % 2,
        }

    def words(i, who, what):
        return f"{who} has {i} {what}s and gives one to {PEOPLE[i * 3 % 4]} . "

    write("piqa", "validation", piqa)
    write("arc_easy", "test", arc)
    write("arc_challenge", "test", arc)
    write("hellaswag", "validation", hellaswag)
    write("winogrande", "validation", winogrande)
    write("boolq", "validation", boolq)
    write(
        "wikitext",
        "test",
        lambda i, who, what: {"page": f" = {who} = \n" + words(i, who, what) * 3},
    )
    write("wikitext2", "test", lambda i, who, what: {"text": words(i, who, what)}, 4358)
    write(
        "c4",
        "validation",
        lambda i, who, what: {"text": words(i, who, what) * (60 if i % 999 == 0 else 1)},
        45_576,
    )
    for split, count in (("dev", 5), ("test", 2)):
        (root / "mmlu" / split).mkdir(parents=True)
        for number, subject in enumerate(SUBJECTS):
            with (root / "mmlu" / split / f"{subject}_{split}.csv").open(
                "w", newline="", encoding="utf-8"
            ) as file:
                for i in range(count):
                    asked = f'{subject[:9]}: who has "{i}"?'
                    csv.writer(file).writerow(
                        [asked, *(f"{who}, {i}" for who in PEOPLE), "ABCD"[(i + number) % 4]]
                    )
    return root


@pytest.fixture(scope="session")
def gang(tmp_path_factory):
    """Return gang(size, call), which runs call(team), a nested function, on each rank's process."""
    import cloudpickle

    def run(size, call):
        folder = tmp_path_factory.mktemp("gang")
        (folder / "call").write_bytes(cloudpickle.dumps(call))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            seats = [
                [folder, rank, size, listener.getsockname()[1], listener.fileno()]
                for rank in range(size)
            ]
            ranks = [
                subprocess.Popen(
                    [sys.executable, "-c", RANK, *map(str, seat)],
                    pass_fds=[listener.fileno()],
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for seat in seats
            ]
        deadline = time.monotonic() + 900  # against a hang: a busy machine is slow
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):  # the others would wait for it
                break
            time.sleep(0.05)
        for rank in ranks:
            rank.kill()
        words = [rank.communicate()[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(words)
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]

    return run


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 6,  # heads x head_dim = 48, not hidden
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "hidden_act": "silu",
}
SMALL_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


@pytest.fixture
def random_checkpoint(tmp_path):
    """Writes a small random model, dense or moe, a shard a block, and returns its folder."""
    import torch
    from safetensors.torch import save_file

    from q3q.models.disk_names import disk_shapes
    from q3q.models.facts import read_facts

    def make(kind="dense", name="model", *, fused=False, **changes):
        config = SMALL | (SMALL_MOE if kind == "moe" else {}) | changes
        config["model_type"] = "qwen3_moe" if kind == "moe" else "qwen3"
        facts, folder = read_facts(config), tmp_path / name
        dtype, generator = getattr(torch, facts.dtype), torch.Generator().manual_seed(0)

        def weight(name, shape):
            wide = torch.randn(shape, generator=generator)
            return (1 + 0.3 * wide if "norm" in name else wide * 1.5 / shape[-1] ** 0.5).to(dtype)

        shards = [
            {
                f"model.layers.{k}.{name}": shape
                for name, shape in disk_shapes(facts, k, fused).items()
            }
            for k in range(facts.layers)
        ]
        shards[0]["model.embed_tokens.weight"] = (facts.vocab, facts.hidden)
        shards[-1]["model.norm.weight"] = (facts.hidden,)
        if not facts.tied:
            shards[-1]["lm_head.weight"] = (facts.vocab, facts.hidden)
        folder.mkdir()
        weight_map: dict[str, str] = {}
        for k, shapes in enumerate(shards):
            file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: weight(name, shape) for name, shape in shapes.items()}, folder / file)
            weight_map |= dict.fromkeys(shapes, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make

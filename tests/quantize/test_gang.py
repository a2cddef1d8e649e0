"""Two ranks give the codes that one gives, bit for bit.

Every method on dense and MoE demo models; RTN and GPTQ with biases and on hybrids with experts.
"""

from pathlib import Path

import pytest
import torch

import q3q.models.demo
from q3q.models import footprint
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.quantize import sites
from q3q.quantize.methods import gptq
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.methods import built
from tests.models.families import build

DEMO = Path(q3q.models.demo.__file__).parent
# Small parts, so that there are several to divide: batches, experts of a site, and rows.
SMALL = {"BATCH_TOKENS": {"cpu": 256}, "CHUNK_BYTES": 2**20}
CPU_ROWS = 256
GROUPS = Scheme(
    bits=3,
    group_size=64,
    symmetric=False,
    act_bits=4,
    act_format="nvfp4",
    act_group_size=16,
    act_scales="calibrated",
)
CASES = {
    "rtn": (built("rtn"), GROUPS),
    "gptq": (built("gptq"), GROUPS),
    "gptq at once": (built("gptq", true_sequential=False, act_order=True), GROUPS),
    "awq": (built("awq"), GROUPS),
    "smoothquant": (
        built("smoothquant", o_and_down=True),
        Scheme(bits=8, group_size=-1, symmetric=True),
    ),
    "billm": (built("billm"), Scheme(bits=1, group_size=64, symmetric=True)),
}
DEMOS = ("dense", "moe")
OTHERS = ("qwen2", "llama, biases", "qwen3.5 moe", "qwen3-next")
ROWS = Scheme(bits=3, group_size=-1, symmetric=False)
SETTINGS = {(kind, case): setting for kind in DEMOS for case, setting in CASES.items()} | {
    (kind, case): (built(case), ROWS) for kind in OTHERS for case in ("rtn", "gptq")
}


class InMemory:
    """A sink that stores blocks in memory."""

    def __init__(self):
        self.blocks = {}

    def load(self, index):
        return self.blocks.get(index)

    def store(self, block):
        self.blocks[block.index] = block


def some_windows(vocab):
    # Three batches, of lanes 0, 3 and 6: two of rank 0 and one of rank 1.
    return torch.randint(0, vocab, (10, 64), generator=torch.Generator().manual_seed(0))


def facts_of(block):
    """Return a quantized block's tensors by name, its errors and its notes."""
    tensors = {
        f"{name}/{part}": t
        for name, code in block.quantized.items()
        for part, t in code.to_tensors().items()
    }
    return tensors | block.changed, block.errors, block.notes | {"peaks": block.peaks}


FIRST = ("rtn", "gptq", "smoothquant")  # in one run; the rest in another


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the models' folders by name: the demo models, and a random one of other families."""
    folders = {name: DEMO / name for name in DEMOS}
    for kind in OTHERS:
        folders[kind] = tmp_path_factory.mktemp("other") / "model"
        build(kind).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def first(gang, folders):
    return quantized_by(gang, folders, FIRST)


@pytest.fixture(scope="module")
def rest(gang, folders):
    return quantized_by(gang, folders, [name for name in CASES if name not in FIRST])


def quantized_by(gang, folders, names):
    """Quantize all models with two ranks, in each of the named cases that they have.

    Return by (model, case): the blocks' facts; the quantized model's states; after each block, the
    bytes of rank 1's tensors, and of the parameters that each rank keeps.
    """
    settings, sink, windows, facts, small, rows = (
        {pair: setting for pair, setting in SETTINGS.items() if pair[1] in names},
        InMemory,
        some_windows,
        facts_of,
        SMALL,
        CPU_ROWS,
    )

    def lead(team):
        import gc

        import torch

        from q3q.models.checkpoint import Checkpoint
        from q3q.models.sharded import load_sharded
        from q3q.quantize.walk import quantize_model
        from tests.ranks import live_bytes, parameter_bytes

        results = {}
        for (kind, name), (method, scheme) in settings.items():
            model = load_sharded(Checkpoint(folders[kind]), torch.float32, team)
            ids = windows(model.facts.vocab)
            held: list[tuple[int, list[int]]] = []

            def look(done, total, held=held):
                held.append((team.run_on_all(live_bytes)[1], team.run_on_all(parameter_bytes)))

            blocks = quantize_model(model, method, scheme, ids, sink(), look)
            results[kind, name] = (
                [facts(block) for block in blocks],
                list(model.states(ids[:2].split(1))),
                held,
            )
            del model, blocks
            gc.collect()
        team.dismiss()
        return results

    def call(team):
        import torch

        import q3q.models.footprint
        import q3q.quantize.methods.gptq
        import q3q.quantize.sites

        for name, value in small.items():
            home = q3q.quantize.sites if name == "CHUNK_BYTES" else q3q.models.footprint
            setattr(home, name, value)
        q3q.quantize.methods.gptq.CPU_ROWS = rows
        with torch.inference_mode():
            return team.follow() if team.rank else lead(team)

    return gang(2, call)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "case"), SETTINGS)
def test_two_ranks_give_the_codes_of_one(request, monkeypatch, folders, kind, case):
    fixture = "first" if case in FIRST else "rest"
    blocks, their_states, held = request.getfixturevalue(fixture)[kind, case]
    method, scheme = SETTINGS[kind, case]
    for constant, value in SMALL.items():
        home = sites if constant == "CHUNK_BYTES" else footprint
        monkeypatch.setattr(home, constant, value)
    monkeypatch.setattr(gptq, "CPU_ROWS", CPU_ROWS)
    with torch.inference_mode():
        model = load_decoder(Checkpoint(folders[kind]), torch.float32)
        ids = some_windows(model.facts.vocab)
        whole = sum(weight.nbytes for block in model.blocks for weight in block.weights.values())
        alone = quantize_model(model, method, scheme, ids, InMemory())
        states = list(model.states(ids[:2].split(1)))
    assert len(blocks) == len(alone) > 2
    for (tensors, errors, notes), block in zip(blocks, alone, strict=True):
        expected, expected_errors, expected_notes = facts_of(block)
        assert tensors.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(tensors[key], expected[key])] == []
        assert errors == expected_errors
        assert notes == expected_notes
    assert all(torch.equal(a, b) for a, b in zip(their_states, states, strict=True))
    if kind in OTHERS:  # so small that other tensors count
        return
    # Between two blocks a rank has its share of the model, and its activations.
    share = 0.6 * (whole + model.embedding_VH.nbytes)
    assert len(held) == len(alone)
    for all_tensors, parameters in held:
        assert len(parameters) == 2
        assert all(0 < of_rank < share for of_rank in parameters)
        assert all_tensors < share + 0.5 * ids.numel() * model.facts.hidden * 4

"""The disk that a sweep takes: blocks in flight, what stays, and a disk that is too small."""

from dataclasses import replace

import pytest
import torch

from q3q.errors import ConfigError
from q3q.formatting import bytes_in_words
from q3q.models.facts import read_facts
from q3q.models.footprint import stored_bytes
from q3q.number_formats import FLOATS
from q3q.numerics.binary_weights import BinarizedWeight
from q3q.numerics.float_weights import FloatWeight
from q3q.numerics.weights import QuantizedWeight
from q3q.spec import Scheme
from q3q.sweep import disk
from q3q.sweep.machines import Machine
from q3q.sweep.plan import describe, refuse_what_fills_the_disk, simulated
from tests.specs import make_spec, qwen3_config
from tests.sweep.test_plan import NODE, facts, planned_for, trial


def tensor_bytes(weight, bits):
    """Return a weight's bytes with its codes packed to `bits`, and all else as it is."""
    tensors = weight.to_tensors()
    codes = tensors.pop("codes")
    return codes.numel() * bits / 8 + sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("bits", "group"), [(2, 128), (3, 128), (4, 64), (8, 32)])
def test_a_grids_bytes_are_packed_codes_and_its_groups_numbers(bits, group):
    weight = QuantizedWeight(
        torch.zeros(1, 8, 256, dtype=torch.uint8),
        torch.ones(1, 8, 256 // group),
        torch.ones(1, 8, 256 // group),
        bits,
        symmetric=False,
    )
    a_weight = tensor_bytes(weight, bits) / weight.codes_EOI.numel()
    shape = facts("qwen3_8b")
    planned = stored_bytes(shape, bits, group) / shape.linear_parameters
    assert a_weight <= planned <= 1.06 * a_weight


def test_billms_bytes_are_three_bits_a_weight_and_eight_numbers_a_group():
    numbers = torch.zeros(1, 8, 2, 4)
    weight = BinarizedWeight(torch.zeros(1, 8, 256, dtype=torch.uint8), numbers, numbers.clone())
    a_weight = tensor_bytes(weight, 3) / weight.codes_EOI.numel()
    shape = facts("qwen3_8b")
    planned = stored_bytes(shape, 1, 128) / shape.linear_parameters
    assert a_weight <= planned <= 1.06 * a_weight


@pytest.mark.parametrize("name", FLOATS)
def test_a_formats_bytes_are_packed_codes_and_its_groups_scales(name):
    form = FLOATS[name]
    size = form.group_size or -1
    number = torch.float32 if form.scale == "float" else torch.uint8
    weight = FloatWeight(
        torch.zeros(1, 8, 4096, dtype=torch.uint8),
        torch.ones(1, 8, 1 if size == -1 else 4096 // size, dtype=number),
        name,
        global_EO=torch.ones(1, 8) if form.scale == "e4m3" else None,
    )
    a_weight = tensor_bytes(weight, form.bits) / weight.codes_EOI.numel()
    scheme = Scheme(bits=form.bits, group_size=size, symmetric=True, format=name)
    shape = facts("qwen3_8b")
    planned = disk.block_bytes(make_spec("rtn", scheme=scheme), shape) / shape.linear_parameters
    assert a_weight <= planned <= 1.06 * a_weight


@pytest.mark.parametrize("columns", [64, 256])
def test_the_factors_of_narrow_rows_fit(columns):
    """NVFP4's factor lies there for each row, and is shared by few groups where rows are short."""
    weight = FloatWeight(
        torch.zeros(1, 8, columns, dtype=torch.uint8),
        torch.ones(1, 8, columns // 16, dtype=torch.uint8),
        "nvfp4",
        global_EO=torch.ones(1, 8),
    )
    a_weight = tensor_bytes(weight, 4) / weight.codes_EOI.numel()
    scheme = Scheme(bits=4, group_size=16, symmetric=True, format="nvfp4")
    shape = read_facts(qwen3_config(columns, 2, 4, 2, columns, head_dim=columns // 4))
    planned = disk.block_bytes(make_spec("rtn", scheme=scheme), shape) / shape.linear_parameters
    assert a_weight <= planned <= 1.06 * a_weight


def test_blocks_in_flight_are_those_of_trials_that_run_at_the_same_time():
    trials = [trial("qwen3_8b", bits=bits, seed=seed) for bits in (2, 4) for seed in range(4)]
    one_gpu = replace(NODE, gpus=1)
    planned = planned_for([*trials, trial("qwen3_8b", "none")], [one_gpu])
    by_id = {entry.trial.id: entry for entry in planned}
    assert by_id[trials[0].id].blocks < by_id[trials[-1].id].blocks
    assert next(entry for entry in planned if entry.spec.scheme is None).blocks == 0
    at_once = simulated(planned, [one_gpu]).blocks
    assert at_once <= 4 * max(entry.blocks for entry in planned)  # four quarters of a GPU
    everywhere = planned_for(trials, [NODE])
    assert simulated(everywhere, [NODE]).blocks == sum(entry.blocks for entry in everywhere)


def test_blocks_that_are_kept_are_counted_once():
    [kept] = planned_for([trial(keep="blocks")], [NODE])
    [gone] = planned_for([trial()], [NODE])
    assert (kept.disk, kept.blocks) == (gone.disk + gone.blocks, 0)


def test_layers_with_more_bits_or_smaller_groups_are_counted_for_all():
    plain = trial(bits=2)
    mixed = replace(
        plain, spec=replace(plain.spec, overrides={"blocks.0.mlp.down_proj": {"bits": 8}})
    )
    shape = facts("qwen3_8b")
    assert disk.block_bytes(mixed.spec, shape) == stored_bytes(shape, 8, 128)


def test_blocks_that_a_killed_trial_left_need_no_more_room(tmp_path):
    one = trial().moved(tmp_path)
    shape = facts("qwen3_8b")
    whole = disk.running_bytes(one, shape)
    one.blocks_folder.mkdir(parents=True)
    (one.blocks_folder / "block_000.safetensors").write_bytes(bytes(1000))
    assert disk.running_bytes(one, shape) == whole - 1000


def test_a_sweep_that_would_fill_the_disk_is_refused_in_one_line(monkeypatch, tmp_path):
    planned = planned_for([trial(seed=seed, export="hf") for seed in range(8)], [NODE])
    left, blocks = sum(one.disk for one in planned), simulated(planned, [NODE]).blocks
    free = [left + blocks]
    monkeypatch.setattr(disk, "free_disk", lambda folder: free[0])
    refuse_what_fills_the_disk(planned, [NODE], tmp_path)
    free[0] -= 1
    with pytest.raises(ConfigError) as refused:
        refuse_what_fills_the_disk(planned, [NODE], tmp_path)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path} has ")
    assert f"{bytes_in_words(blocks)} for quantized blocks of trials that run at once" in said
    assert f"{bytes_in_words(left)} for what trials leave" in said
    assert "storage=" in said
    assert "\n" not in said


def test_the_free_disk_is_that_of_the_folder_that_will_be_made(tmp_path):
    assert disk.free_disk(tmp_path / "a" / "b") == disk.free_disk(tmp_path)


def test_the_plan_shows_what_runs_and_what_stays(tmp_path):
    planned = planned_for([trial(export="hf"), trial(bits=3)], [NODE])
    shown = describe(planned, machines=[NODE], where="here", storage=tmp_path).splitlines()
    assert "disk while it runs" in shown[0]
    blocks = simulated(planned, [NODE]).blocks
    sizes = bytes_in_words(planned[0].disk), bytes_in_words(blocks)
    assert "{} of disk, {} of disk while".format(*sizes) in shown[-2]


def test_a_sweep_on_cores_counts_its_blocks_too():
    machine = Machine(cpus=64, memory=400_000_000_000)
    planned = planned_for([trial("qwen3_0_6b", seed=seed) for seed in range(3)], [machine])
    assert simulated(planned, [machine]).blocks == sum(entry.blocks for entry in planned) > 0

"""The GPUs that the driver lists, and whether the installed torch can use them; no GPU is here."""

import os
from pathlib import Path

import pytest

from q3q.errors import ConfigError
from q3q.sweep import gpus as gpus_module
from q3q.sweep.gpus import install_line, torch_cuda, visible_gpus
from q3q.sweep.machines import Machine, ResourceRequest, machine_here, refuse_old_cards
from tests.commands import python

ROOT = Path(__file__).parents[2]
ON_GPUS = ResourceRequest()
H100 = ("NVIDIA H100 80GB HBM3", 81559, "9.0")
FAILING = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Return driver(*cards, version=...), which puts an nvidia-smi that lists them on PATH."""
    monkeypatch.setattr(gpus_module, "DEVICES", ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus_module.note_once.cache_clear()

    def put(*cards, version="580.65.06", instances=(), knows_capability=True, fails=""):
        listing, facts = [], []
        for number, (name, memory, capability) in enumerate(cards):
            uuid = f"GPU-{number}a{number}b-d72c-4106-c12f-20bd9faed9f6"
            listing.append(f"GPU {number}: {name} (UUID: {uuid})")
            facts.append((uuid, str(memory), version, capability))
            listing += [
                f"  MIG {profile}     Device  {part}: (UUID: MIG-{number}c{part}d-41b8)"
                for part, profile in enumerate(instances if number == 0 else ())
            ]
        (tmp_path / "listing").write_text("\n".join(listing) + "\n")
        for count in (3, 4):
            rows = [", ".join(row[:count]) for row in facts]
            (tmp_path / f"facts{count}").write_text("\n".join(rows) + "\n")
        whole = f"cat {tmp_path}/facts4" if knows_capability else "echo invalid field; exit 2"
        cases = f"-L) cat {tmp_path}/listing;; *compute_cap*) {whole};; *) cat {tmp_path}/facts3;;"
        script = f'echo "{fails}"; exit 9' if fails else f'case "$1" in {cases} esac'
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


@pytest.fixture
def torch_for(monkeypatch):
    """Return torch_for(cuda, finds), which stands in for the installed build of torch."""

    def put(cuda, finds=False):
        monkeypatch.setattr(gpus_module, "torch_cuda", lambda: cuda)
        monkeypatch.setattr(gpus_module, "_torch_finds_gpus", lambda: finds)

    return put


def test_a_machine_has_the_gpus_that_its_driver_lists(driver, torch_for):
    torch_for("13.0")
    driver(H100, ("NVIDIA A100-SXM4-40GB", 40960, "8.0"))
    here = machine_here(ON_GPUS)
    assert (here.gpus, here.gpu_memory, here.capability) == (2, 40960 * 2**20, (8, 0))
    assert here.name == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        ("2,0", [2, 0]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("1,9,0", [1]),
        ("0,0", []),
        ("GPU-1a", [1]),
        ("GPU-2a2b-d72c-4106-c12f-20bd9faed9f6, GPU-0", [2, 0]),
        ("GPU-", []),
        ("GPU-ffff", []),
        ("nonsense", []),
    ],
)
def test_cuda_visible_devices_counts_as_cuda_reads_it(driver, monkeypatch, visible, numbers):
    driver(H100, H100, H100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [int(gpu.uuid[4]) for gpu in visible_gpus()] == numbers


@pytest.mark.parametrize(
    ("visible", "memories"),
    [
        (None, [10]),
        ("0", [10]),
        ("MIG-0c0d-41b8,MIG-0c1d-41b8", [10, 20]),
        ("MIG-GPU-0a0b-d72c-4106-c12f-20bd9faed9f6/1/0", [None]),
    ],
)
def test_an_instance_of_a_divided_gpu_counts_where_it_is_named(
    driver, monkeypatch, capsys, visible, memories
):
    driver(H100, instances=("1g.10gb", "2g.20gb"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sizes = [None if size is None else size * 2**30 * 95 // 100 for size in memories]
    assert [gpu.memory for gpu in visible_gpus()] == sizes
    advice = "CUDA_VISIBLE_DEVICES=MIG-0c0d-41b8,MIG-0c1d-41b8"
    assert (advice in capsys.readouterr().err) == (visible is None)


def test_without_a_driver_there_is_no_gpu_and_no_word(driver, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    assert machine_here(ON_GPUS).gpus == 0
    assert capsys.readouterr().err == ""


def test_a_driver_that_does_not_answer_is_named(driver, capsys):
    driver(fails=FAILING)
    assert visible_gpus() == []
    assert f"Note: nvidia-smi lists no GPU: {FAILING}\n" == capsys.readouterr().err


def test_a_driver_without_its_tool_is_counted_by_torch(driver, monkeypatch, tmp_path):
    import torch

    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpus_module, "DEVICES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert len(visible_gpus()) == 2


@pytest.mark.parametrize(
    ("version", "card", "cuda", "advice"),
    [
        ("570.86.15", H100, "13.0", r"driver here, 570.86.15, is too old .*whl/cu126 torch; or"),
        ("470.82", H100, "13.0", "Update the driver to 580 or newer; or"),
        ("470.82", H100, "12.6", "needs driver 525 or newer. Update"),
        ("570.86.15", ("NVIDIA B200", 183359, "10.0"), "13.0", "Update the driver to 580"),
        (
            "580.65.06",
            ("Tesla V100", 16160, "7.0"),
            "13.0",
            r"no code for Tesla V100 .*7\.0.*cu126",
        ),
        ("580.65.06", ("NVIDIA B200", 183359, "10.0"), "12.6", "no code for NVIDIA B200.*cu130"),
    ],
)
def test_a_torch_that_cannot_use_the_gpus_is_refused_with_what_to_install(
    driver, torch_for, version, card, cuda, advice
):
    driver(card, card, version=version)
    torch_for(cuda)
    with pytest.raises(ConfigError, match=advice) as refusal:
        machine_here(ON_GPUS)
    assert "\n" not in str(refusal.value)
    assert "cluster.gpus_per_trial=0" in str(refusal.value)
    # Trials on cores, or on other machines, need no driver.
    assert machine_here(ResourceRequest(gpus=0)).gpus == machine_here().gpus == 2
    torch_for(cuda, finds=True)  # with cuda-compat, torch runs on such a driver
    assert machine_here(ON_GPUS).gpus == 2


@pytest.mark.parametrize(
    ("version", "cuda"), [("580.65.06", "13.0"), ("570.86.15", "12.6"), ("560.28", "12.8")]
)
def test_a_driver_that_is_new_enough_is_not_refused(driver, torch_for, version, cuda):
    driver(H100, version=version, knows_capability=False)
    torch_for(cuda)
    assert machine_here(ON_GPUS).gpus == 1


def test_a_torch_without_cuda_computes_on_the_processor_and_says_so(driver, torch_for, capsys):
    driver(H100, H100, version="570.86.15")
    torch_for(None)
    here = machine_here(ON_GPUS)
    assert (here.gpus, here.gpu_memory) == (0, None)
    said = capsys.readouterr().err
    assert said.startswith("Note: this machine has 2 GPUs, and the installed torch computes on the")
    assert "https://download.pytorch.org/whl/cu126 torch" in said
    assert said.count("\n") == 1


def test_torchs_cuda_is_read_without_importing_torch():
    asks = (
        "import sys; from q3q.sweep.gpus import torch_cuda; "
        "print(torch_cuda(), 'torch' in sys.modules)"
    )
    done = python("-c", asks)
    import torch

    assert done.stdout.split() == [str(torch.version.cuda), "False"], done.stderr
    assert torch_cuda() == torch.version.cuda


@pytest.mark.parametrize(
    ("machine", "dtype", "refused"),
    [
        (Machine(cpus=8, gpus=1, name="Tesla T4", capability=(7, 5)), "bfloat16", True),
        (Machine(cpus=8, gpus=1, kind="V100"), "bfloat16", True),
        (Machine(cpus=8, gpus=1, name="Tesla T4", capability=(7, 5)), "float32", False),
        (Machine(cpus=8, gpus=1, name="NVIDIA A100", capability=(8, 0)), "bfloat16", False),
        (Machine(cpus=8, gpus=1, kind="Unheard"), "bfloat16", False),
        (Machine(cpus=8, gpus=0, kind="V100"), "bfloat16", False),
    ],
)
def test_a_card_that_is_too_old_for_bfloat16_is_refused(machine, dtype, refused):
    if not refused:
        refuse_old_cards([dtype], [machine])
        return
    with pytest.raises(
        ConfigError, match=r"(T4|V100) .*does not compute in bfloat16.*dtype=float32"
    ):
        refuse_old_cards([dtype], [machine])


TORCH_CUDA = "13.0"  # that torch on PyPI is built for, at the version in constraints.txt


def test_the_image_the_readme_and_the_constraints_agree_on_cuda():
    """torch at the pinned version comes from PyPI with this CUDA, and needs its driver."""
    image, readme = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", "README.md")
    )
    [base] = [line for line in image.splitlines() if line.startswith("ARG BASE=")]
    assert base.startswith(f"ARG BASE=nvidia/cuda:{TORCH_CUDA}.")
    assert install_line("12.6") in readme
    assert install_line("12.6").split()[-2] in image
    assert f"built for CUDA {TORCH_CUDA}" in " ".join(readme.split())
    assert f"CUDA {TORCH_CUDA}, the one that torch on PyPI is built for" in image
    least = gpus_module.LEAST_DRIVER[int(float(TORCH_CUDA))]
    assert f"driver {least} or newer" in " ".join(readme.split())
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "torch==2.13." in constraints  # PyPI's build of which is for TORCH_CUDA

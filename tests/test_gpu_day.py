"""The script for a GPU's owner runs: all of its phases, on a CPU with tiny shapes."""

import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks, gpu_day
from q3q.evaluate import prefixes
from q3q.models.attention import TreeAttention


def rows(text):
    return [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_checks_and_phases_run_on_a_cpu_and_pass(capsys):
    parts = ("checks", "0.6B", "30B-A3B", "memory")
    assert gpu_day.main(["--small", "--only", *parts]) == 0
    printed = capsys.readouterr().out
    told = rows(printed)
    checks = [result for row in told if (result := row[1]) in ("yes", "NO")]
    assert len(checks) == len(gpu_checks.CHECKS) + 1
    assert "NO" not in checks
    for shape in ("0.6B", "30B-A3B"):
        assert f"| {shape} | blocks | 2 | 2 |" in printed
        phases = " ".join(row[1] for row in told if row[0] == f"| {shape}")
        for phase in (
            "load",
            "forward",
            "Gram",
            "factors",
            "columns",
            "store",
            "AWQ",
            "perplexity",
        ):
            assert phase in phases
    assert "BiLLM" in printed
    assert "left out" not in printed
    assert printed.splitlines()[-1].startswith("0 failed")


def test_what_does_not_fit_the_minutes_is_left_out_and_named(capsys):
    """No part begins that has no time left, nor a phase that takes longer than is left."""
    assert gpu_day.main(["--small", "--minutes", "0.0001"]) == 0
    printed = capsys.readouterr().out
    assert {line for line in printed.splitlines() if "left out" in line} == {
        f"{part}: left out for want of time" for part in gpu_day.PARTS
    }
    scale = gpu_day.SMALL_SCALE(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        two = gpu_day.Subject("8B", scale, 2, Path(scratch) / "two")
        seconds = dict.fromkeys(two.phases(), 0.0) | {"AWQ": 600.0, "store": 600.0}
        rows = list(two.run(gpu_day.Deadline.after(900.0), seconds))
    assert not any(row.phase.startswith("AWQ") for row in rows)
    assert any(row.phase.startswith("store") for row in rows)  # one block, however many there are
    assert rows[-1].phase == "left out for want of time: AWQ"


@pytest.mark.parametrize(
    ("share", "left", "blocks"),
    [(100, 400, 28), (10, 400, 10), (3, 400, 4), (3, 3.5, 3), (0.5, 0.5, 1)],
)
def test_as_many_blocks_as_fit_are_timed_but_not_fewer_than_four_if_those_fit(share, left, blocks):
    assert gpu_day.blocks_that_fit(float, least=4, most=28, share=share, left=left) == blocks


def test_a_fast_path_that_is_wrong_or_fails_is_told_and_fails_the_script(capsys, monkeypatch):
    def wrong(upper_II, tokens_TI, *, fresh=False):
        upper_II += 1

    def forgets(own, shared, *rest, **more):
        return TreeAttention(own, [], *rest, **more)

    def fails(rows_RI, weight_EOI, groups):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_checks, "add_gram", wrong)
    monkeypatch.setattr(prefixes, "TreeAttention", forgets)
    monkeypatch.setattr(gpu_checks, "grouped_linear", fails)
    assert gpu_day.main(["--small", "--only", "checks"]) == 1
    failed = [row for row in rows(capsys.readouterr().out) if row[1] == "NO"]
    assert [row[0] for row in failed] == [
        "| scores along a tree of prefixes",
        "| Gram matrix of bfloat16 tokens",
        "| Gram matrices of padded experts",
        "| grouped products of experts",
    ]
    assert "RuntimeError: no kernel image" in failed[-1][2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert gpu_day.main([]) == 2
    [line] = capsys.readouterr().out.splitlines()
    assert "there is no GPU here" in line


@pytest.mark.slow
def test_tasks_share_a_machine_under_ray_and_one_is_tried_again_with_more(capsys):
    assert gpu_day.main(["--small", "--only", "ray"]) == 0
    assert capsys.readouterr().out.count("| yes |") == 2

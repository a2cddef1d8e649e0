"""The script for a GPU's owner runs: all of its phases, on a CPU with tiny shapes."""

import pytest
import torch

from benchmarks import gpu_checks, gpu_day


def rows(text):
    return [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_checks_and_phases_run_on_a_cpu_and_pass(capsys):
    parts = ("checks", "0.6B", "30B-A3B", "memory")
    assert gpu_day.main(["--small", "--only", *parts]) == 0
    printed = capsys.readouterr().out
    told = rows(printed)
    checks = [result for row in told if (result := row[1]) in ("yes", "NO")]
    assert len(checks) == 15 + 1
    assert "NO" not in checks
    for shape in ("0.6B", "30B-A3B"):
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
    assert printed.splitlines()[-1].startswith("0 failed")


def test_a_fast_path_that_is_wrong_or_fails_is_told_and_fails_the_script(capsys, monkeypatch):
    def wrong(upper_II, tokens_TI, *, fresh=False):
        upper_II += 1

    def fails(rows_RI, weight_EOI, groups):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_checks, "add_gram", wrong)
    monkeypatch.setattr(gpu_checks, "grouped_linear", fails)
    assert gpu_day.main(["--small", "--only", "checks"]) == 1
    failed = [row for row in rows(capsys.readouterr().out) if row[1] == "NO"]
    assert [row[0] for row in failed] == [
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

"""Products of groups of rows: one call for all, and its twin group by group."""

import math

import pytest
import torch

from q3q.numerics import grouped as module
from q3q.numerics import linalg
from q3q.numerics.grouped import (
    MOST_PADDING,
    GroupedRows,
    Groups,
    grouped_linear_plain,
    padded_runs,
)
from q3q.numerics.linalg import FiniteCheck, add_gram, add_grams

COUNTS = [5, 0, 9, 300, 1, 0]


def grouped(counts=COUNTS, columns=16, dtype=torch.float32, seed=0):
    group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), columns, generator=generator).to(dtype)
    return GroupedRows(rows, Groups.of_sorted(group, len(counts)))


def test_rows_are_read_group_by_group_whichever_way():
    rows = grouped()
    parts = rows.rows_RI.split(COUNTS)
    assert rows.groups.counts == COUNTS
    for part, own, at in zip(parts, rows, range(len(rows)), strict=True):
        assert torch.equal(part, own)
        assert torch.equal(part, rows[at])
    some = rows[2:5]
    assert [len(part) for part in some] == COUNTS[2:5]
    assert torch.equal(some.rows_RI, torch.cat(parts[2:5]))
    assert some.groups.ends_E.tolist() == [9, 309, 310]
    assert torch.equal(rows[-3], parts[3])
    with pytest.raises(IndexError):
        rows[6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_product_equals_its_plain_twin(dtype):
    rows = grouped(dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(len(COUNTS), 24, 16, generator=generator).to(dtype)
    one_by_one = torch.cat([part @ own.T for part, own in zip(rows, weight, strict=True)])
    plain = grouped_linear_plain(rows.rows_RI, weight, rows.groups)
    together = torch.nn.functional.grouped_mm(rows.rows_RI, weight.mT, offs=rows.groups.ends_E)
    narrow = dtype == torch.bfloat16  # whose results may be rounded either way
    rtol, atol = (2**-7, 1e-3) if narrow else (1e-5, 1e-5)
    torch.testing.assert_close(plain, one_by_one, rtol=rtol, atol=atol)
    torch.testing.assert_close(together, plain, rtol=rtol, atol=atol)


@pytest.mark.parametrize("counts", [COUNTS, [0, 0], [7], [3] * 40, [1, 1, 1, 1, 50]])
def test_runs_hold_all_rows_and_little_padding(counts, monkeypatch):
    rows, seen = grouped(counts), []
    for run, padded in padded_runs(rows):
        real = counts[run]
        assert padded.shape == (len(real), max(real), 16)
        assert padded.shape[0] * padded.shape[1] <= max(MOST_PADDING * sum(real), *real)
        for part, count in zip(padded, real, strict=True):
            seen.append(part[:count])
            assert not part[count:].any()
    assert [len(part) for part in seen] == counts
    assert torch.equal(torch.cat(seen), rows.rows_RI)
    assert len(list(padded_runs(grouped([3] * 40)))) == 1
    monkeypatch.setattr(module, "MOST_PADDED", 16 * 3 * 10)
    assert [run.stop for run, _ in padded_runs(grouped([3] * 40))] == [10, 20, 30, 40]


@pytest.mark.parametrize("columns", [16, 200])  # one panel, or two
def test_grams_of_padded_groups_equal_those_one_by_one(columns):
    rows = grouped(columns=columns)
    sums = torch.full((2, len(COUNTS), columns, columns), math.nan)
    for fresh in (True, False):
        for e, part in enumerate(rows):
            add_gram(sums[0, e], part, fresh=fresh)
        for run, padded in padded_runs(rows):
            add_grams(sums[1, run], padded, fresh=fresh)
    linalg.mirror(sums[0])
    linalg.mirror(sums[1])
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_check_remembers_one_number_that_is_not_finite(dtype, wrong):
    largest = torch.finfo(dtype).max
    good, bad = torch.tensor([-largest, largest], dtype=dtype), torch.ones(5, 2, dtype=dtype)
    bad[3, 1] = wrong
    check = FiniteCheck()
    assert check.passed()
    for tensor in (good, torch.empty(0, 3, dtype=dtype), good):
        check.note(tensor)
    assert check.passed()
    for tensor in (bad, good):
        check.note(tensor)
        assert not check.passed()

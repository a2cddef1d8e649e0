"""Products of grouped rows: each expert's tokens with a matrix of its own.

On a GPU a few calls serve all groups, so that their number does not grow with that of the experts.
Each has a plain twin here or in `linalg`, which a CPU runs, group by group.

Shapes: E groups; R rows of all groups, one group after the other; I in features, O out features; T
rows of the longest group in a run of n groups.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

# A run of groups, padded to its longest, has at most so many times as many rows as are real, and so
# many numbers (half a gigabyte in 16 bits), unless it is one group.
MOST_PADDING, MOST_PADDED = 4, 2**28
# Bytes to which the kernel of grouped products aligns rows.
ALIGNED = 16


class Groups:
    """The groups that rows are divided among.

    ends_E: where each group's rows end, int32, on the rows' device.
    """

    def __init__(self, ends_E: Tensor, counts: Sequence[int] | None = None) -> None:
        self.ends_E = ends_E
        self._counts = None if counts is None else list(counts)

    @classmethod
    def of_sorted(cls, group_R: Tensor, groups: int) -> "Groups":
        """Return the groups of rows that are sorted by their group's number."""
        number_E = torch.arange(groups, device=group_R.device)
        return cls(torch.searchsorted(group_R, number_E, right=True, out_int32=True))

    @property
    def counts(self) -> list[int]:
        """Each group's number of rows; the first reading waits for the device."""
        if self._counts is None:
            ends = self.ends_E.tolist()
            self._counts = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
        return self._counts


class GroupedRows(Sequence[Tensor]):
    """Rows of all groups [R, I], read as a sequence of each group's rows, which are views."""

    def __init__(self, rows_RI: Tensor, groups: Groups) -> None:
        self.rows_RI, self.groups = rows_RI, groups

    def __len__(self) -> int:
        return len(self.groups.ends_E)

    @overload
    def __getitem__(self, group: int) -> Tensor: ...

    @overload
    def __getitem__(self, group: slice) -> "GroupedRows": ...

    def __getitem__(self, group: int | slice) -> "Tensor | GroupedRows":
        bounds = [0, *accumulate(self.groups.counts)]
        if isinstance(group, slice):
            first, last, _ = group.indices(len(self))
            start, stop = bounds[first], bounds[max(first, last)]
            ends_E = self.groups.ends_E[first:last] - start
            part = Groups(ends_E, self.groups.counts[first:last])
            return GroupedRows(self.rows_RI[start:stop], part)
        group = range(len(self))[group]
        return self.rows_RI[bounds[group] : bounds[group + 1]]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows_RI.split(self.groups.counts))


def multiplies_grouped(rows_RI: Tensor, weight_EOI: Tensor) -> bool:
    """Return True if one call multiplies all groups: bfloat16 on NVIDIA's Ampere or newer."""
    aligned = all(size * rows_RI.element_size() % ALIGNED == 0 for size in weight_EOI.shape[1:])
    return (
        rows_RI.device.type == "cuda"
        and rows_RI.dtype == weight_EOI.dtype == torch.bfloat16
        and torch.version.hip is None
        and torch.cuda.get_device_capability(rows_RI.device) >= (8, 0)
        and aligned
    )


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, groups: Groups) -> Tensor:
    """Multiply each group's rows by its own matrix, as `linear` does [R, O]."""
    if multiplies_grouped(rows_RI, weight_EOI):
        return grouped_mm(rows_RI, weight_EOI.mT, offs=groups.ends_E)
    return grouped_linear_plain(rows_RI, weight_EOI, groups)


def grouped_linear_plain(rows_RI: Tensor, weight_EOI: Tensor, groups: Groups) -> Tensor:
    """Compute `grouped_linear` group by group: its plain twin."""
    out_RO = rows_RI.new_empty(len(rows_RI), weight_EOI.shape[1])
    parts = rows_RI.split(groups.counts), weight_EOI, out_RO.split(groups.counts)
    for rows_rI, weight_OI, out_rO in zip(*parts, strict=True):
        if len(rows_rI):
            torch.mm(rows_rI, weight_OI.T, out=out_rO)
    return out_RO


def pads_groups(device: torch.device) -> bool:
    """Return True if padded groups are multiplied together; a CPU takes them one by one."""
    return device.type == "cuda"


def padded_runs(grouped: GroupedRows) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of groups, and each run's rows padded with zeros to its longest group [n, T, I].

    A group much longer than its neighbours is a run of its own (`MOST_PADDING`, `MOST_PADDED`).
    """
    rows_RI, counts = grouped.rows_RI, grouped.groups.counts
    end_E = grouped.groups.ends_E
    for run in _runs(counts, MOST_PADDED // rows_RI.shape[1]):
        longest = max(counts[run])
        place_T = torch.arange(longest, dtype=torch.int32, device=rows_RI.device)
        start = sum(counts[: run.start])
        end_n = end_E[run]
        start_n = torch.cat([end_n.new_full((1,), start), end_n[:-1]])
        row_nT = start_n[:, None] + place_T
        padding_nT = row_nT >= end_n[:, None]
        padded_nTI = rows_RI[row_nT.clamp_(max=max(0, len(rows_RI) - 1))]
        yield run, padded_nTI.masked_fill_(padding_nT[..., None], 0)


def _runs(counts: Sequence[int], most_rows: int) -> list[slice]:
    """Divide groups into runs, from the first on, each as long as padding allows."""
    runs, start = [], 0
    for stop in range(1, len(counts) + 1):
        longer = counts[start : stop + 1]
        padded = len(longer) * max(longer)
        if stop == len(counts) or padded > min(MOST_PADDING * sum(longer), most_rows):
            runs.append(slice(start, stop))
            start = stop
    return runs

"""Token sequences as a few arrays: each distinct one once, without what it shares with another.

Sorted, neighbours share the longest beginnings: the questions of a subject have their examples in
common. So a sequence is stored as the number of tokens that it shares with the one before it, and
the tokens behind them.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from q3q.data.prepared import Arrays
from q3q.evaluate.prefixes import Ids, common_prefix


def pack_sequences(sequences: Sequence[Ids]) -> tuple[Arrays, NDArray[np.int32]]:
    """Return the distinct sequences as arrays for `unpack_sequences`, and each one's number."""
    numbers: dict[bytes, list[int]] = {}
    for place, key in enumerate(sort_keys(sequences)):
        numbers.setdefault(key, []).append(place)
    number = np.zeros(len(sequences), np.int32)
    distinct = [sequences[numbers[key][0]] for key in sorted(numbers)]
    for rank, key in enumerate(sorted(numbers)):
        number[numbers[key]] = rank
    before = [np.zeros(0, np.int32), *distinct]
    shared = [common_prefix(a, b) for a, b in zip(before, distinct, strict=False)]
    new = [ids[common:] for ids, common in zip(distinct, shared, strict=True)]
    return {
        "shared": np.array(shared, np.int32),
        "length": np.array([len(ids) for ids in distinct], np.int32),
        "ids": np.concatenate(new) if new else np.zeros(0, np.int32),
    }, number


def unpack_sequences(arrays: Mapping[str, NDArray[np.generic]]) -> list[Ids]:
    """Return the distinct sequences; equal ones of a request were one array, and are again."""
    sequences: list[Ids] = []
    ids, begin = arrays["ids"].astype(np.int32, copy=False), 0
    last = np.zeros(0, np.int32)
    shared, length = arrays["shared"].tolist(), arrays["length"].tolist()
    for common, count in zip(shared, length, strict=True):
        stop = begin + count - common
        last = np.concatenate((last[:common], ids[begin:stop]))
        sequences.append(last)
        begin = stop
    return sequences


def sort_keys(sequences: Iterable[Ids]) -> list[bytes]:
    """Return bytes that sort as the sequences' tokens do; one object for each array."""
    keys: dict[int, tuple[Ids, bytes]] = {}  # with the array, so that its id stays its own
    ordered = []
    for ids in sequences:
        if id(ids) not in keys:
            keys[id(ids)] = ids, ids.astype(">u4").tobytes()
        ordered.append(keys[id(ids)][1])
    return ordered

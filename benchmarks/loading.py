"""How fast a checkpoint's tensors are read from the page cache, by the number of threads.

    python benchmarks/loading.py --gigabytes 2

Writes a file of random bfloat16 tensors, reads it once so that it is cached, then with 1, 2 and 4
threads, twice in turns; prints the best of three. With both of two cores in use by other work, all
three reach 1.7 GB/s; more cores were not measured yet.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from q3q.models import tensor_files
from q3q.models.tensor_files import encode_tensors, read_header

SHAPE = (12288, 4096)  # an up projection of an 8B model: 100 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", help="where to write the file; default: the temporary folder")
    options = parser.parse_args()
    count = max(1, round(options.gigabytes * 1e9 / (2 * SHAPE[0] * SHAPE[1])))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        weight = torch.randn(SHAPE).bfloat16()
        with path.open("wb") as file:
            file.writelines(encode_tensors({f"{k:03d}": weight for k in range(count)}))
        for count in (0, 1, 2, 4, 1, 2, 4):  # the first round fills the cache
            with patch.object(tensor_files, "readers", partial(max, 1, count)):
                best = min(_seconds_to_read(path) for _ in range(3))
            if count:
                print(f"{count} threads: {path.stat().st_size / best / 1e9:.2f} GB/s")


def _seconds_to_read(path: Path) -> float:
    started = time.perf_counter()
    for stored in read_header(path).values():
        stored.read()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

"""What `benchmarks/methods.py` hands to each contender's script, and what it gets back.

Imported in every contender's own environment, so it may use torch and safetensors alone.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """A quantization: a checkpoint, a file of calibration token ids, settings, a folder to fill.

    options: knobs of the contender's own, over those its script sets.
    """

    model: str
    tokens: str
    output: str
    method: str
    bits: int
    group_size: int
    damping: float
    grid: int
    threads: int
    options: dict[str, Any]

    @classmethod
    def given(cls) -> "Job":
        """The job whose file is this process's argument; sets the threads."""
        job = cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        torch.set_num_threads(job.threads)
        return job

    def windows(self) -> Tensor:
        """Calibration token ids [windows, tokens]."""
        return load_file(self.tokens)["calibration"]

    def run(self, quantize: Callable[[], Any]) -> None:
        """Do the work that counts, and note its wall and processor seconds."""
        wall, processor = time.perf_counter(), time.process_time()
        quantize()
        self._leave({"seconds": time.perf_counter() - wall, "cpu": time.process_time() - processor})

    def finish(
        self,
        knobs: dict[str, Any],
        weights: dict[str, Tensor],
        phases: dict[str, float] | None = None,
    ) -> None:
        """Write the knobs, the blocks' weights in full by checkpoint name, and seconds by phase."""
        whole = {
            name: weight.detach().to(torch.float32).contiguous() for name, weight in weights.items()
        }
        save_file(whole, Path(self.output) / "weights.safetensors")
        self._leave({"knobs": knobs, "phases": phases})

    def _leave(self, facts: dict[str, Any]) -> None:
        path = Path(self.output) / "result.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(before | facts), encoding="utf-8")

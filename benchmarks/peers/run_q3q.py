"""One quantization by q3q, as a trial does it but for the blocks, which stay in memory."""

import sys
import threading
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import FrameType, TracebackType

import torch
from job import Job

from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.methods.settings import SETTINGS
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme

SAMPLE_SECONDS = 0.01
# What a sample of the stack counts as: the search or accumulator that is in it, else the innermost
# frame decides.
WHOLE = {
    "q3q/quantize/methods/awq.py": "search",
    "q3q/quantize/search.py": "search",
    "q3q/quantize/statistics.py": "observe",
}
INNERMOST = {
    "q3q/numerics/linalg.py:quadratic_form": "errors",  # each linear's error, for the record
    "q3q/numerics/linalg.py": "factor",
    "q3q/quantize/kernels/": "solve",
    "q3q/quantize/methods/": "solve",
    "q3q/models/": "forward",
}


class Phases:
    """Samples the stack of the thread that opens it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._done = threading.Event()
        self._thread = threading.Thread(
            target=self._sample, args=(threading.get_ident(),), daemon=True
        )

    def __enter__(self) -> "Phases":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def share(self) -> dict[str, float]:
        """Share of the samples by phase, largest first."""
        return {phase: count / self.counts.total() for phase, count in self.counts.most_common()}

    def _sample(self, watched: int) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.counts[phase_of(sys._current_frames()[watched])] += 1


def phase_of(frame: FrameType | None) -> str:
    """The phase that a stack is in."""
    calls = []
    while frame is not None:
        calls.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}".replace("\\", "/"))
        frame = frame.f_back
    for part, phase in WHOLE.items():
        if any(part in call for call in calls):
            return phase
    for call in calls:
        for part, phase in INNERMOST.items():
            if part in call:
                return phase
    return "rest"


class Memory:
    """A sink that keeps nothing: the walk returns the blocks anyway."""

    def load(self, index: int) -> QuantizedBlock | None:
        return None

    def store(self, block: QuantizedBlock) -> None:
        pass


def main() -> None:
    job = Job.given()
    if job.method == "gptq":
        knobs = {
            "damping": job.damping,
            "act_order": True,
            "static_groups": True,
            "true_sequential": False,
        }
    else:
        knobs = {"grid": job.grid, "clip": False}
    knobs |= job.options
    settings = SETTINGS[job.method](**knobs)
    module, _, name = settings.implementation.partition(":")
    method = getattr(import_module(module), name)(settings)
    scheme = Scheme(bits=job.bits, group_size=job.group_size, symmetric=False)
    windows = job.windows()
    with torch.inference_mode():
        model = load_decoder(Checkpoint(Path(job.model)), torch.float32)
        with Phases() as phases:
            job.run(lambda: quantize_model(model, method, scheme, windows, Memory()))
    weights = {
        f"model.layers.{k}.{n}": w
        for k, block in enumerate(model.blocks)
        for n, w in block.weights.items()
    }
    job.finish(knobs, weights, phases.share())


if __name__ == "__main__":
    main()

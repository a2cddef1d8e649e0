"""The memory and time that a checkpoint took a public loader, as the proof's process measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from q3q.formatting import bytes_in_words
from q3q.spec import Json


@dataclass(frozen=True, kw_only=True)
class UseOnDevice:
    """A short greedy generation on one device.

    device: `cpu`, or a GPU's name
    threads: of a CPU; 0 on a GPU
    idle_bytes: peak resident memory of the process before it loaded the checkpoint; None if unknown
    peak_bytes: the same after it had loaded it and generated; on a GPU what torch allocated there
    prompt, tokens: given and generated
    seconds: for all generated tokens, the prompt included
    """

    device: str
    threads: int
    idle_bytes: int | None
    peak_bytes: int | None
    prompt: int
    tokens: int
    seconds: float

    @property
    def speed(self) -> str:
        return f"{self.tokens / self.seconds:.3g}" if self.seconds > 0 else "not measured"

    @property
    def place(self) -> str:
        """`CPU, 2 threads` or a GPU's name."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"CPU, {threads}" if self.device == "cpu" else self.device


@dataclass(frozen=True)
class Use:
    """What one public loader took."""

    loader: str
    runs: tuple[UseOnDevice, ...]

    @classmethod
    def of(cls, loader: str, runs: Sequence[Mapping[str, Any]]) -> "Use | None":
        """Return it; None if nothing was measured."""
        return cls(loader, tuple(UseOnDevice(**run) for run in runs)) if runs else None

    @classmethod
    def of_note(cls, note: Any) -> "Use | None":
        """Read a record's note of any version; None if there is none."""
        try:
            return cls.of(str(note["loader"]), note["runs"])
        except (KeyError, TypeError):
            return None

    def to_json(self) -> Json:
        return {"loader": self.loader, "runs": [asdict(run) for run in self.runs]}

    @property
    def memory_in_words(self) -> str:
        return "; ".join(_memory(run) for run in self.runs)

    @property
    def speed_in_words(self) -> str:
        return "; ".join(f"{run.speed} ({run.place})" for run in self.runs)

    def sentences(self) -> list[str]:
        """Return a sentence for each device, for a model card."""
        return [
            f"{self.loader} on {run.place}: {_memory(run)}; {run.speed} tokens/s when it generated "
            f"{run.tokens} tokens greedily after a prompt of {run.prompt}."
            for run in self.runs
        ]


def _memory(run: UseOnDevice) -> str:
    if run.peak_bytes is None:
        return "memory not measured"
    if run.device != "cpu":
        return f"{bytes_in_words(run.peak_bytes)} allocated on the GPU at most"
    idle = (
        "" if run.idle_bytes is None else f", {bytes_in_words(run.idle_bytes)} of it before loading"
    )
    return f"{bytes_in_words(run.peak_bytes)} resident at most{idle}"

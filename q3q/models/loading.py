"""Open a trial's checkpoint and load its model where and how its share of the machine allows."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from q3q.errors import ConfigError, IntegrityError
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.footprint import (
    AUTO,
    PROCESS_BYTES,
    Device,
    ahead_bytes,
    choose,
    free_memory,
    in_gb,
    need,
    refuse_generation,
)
from q3q.models.hub import locate
from q3q.models.sharded import load_sharded
from q3q.models.streaming import StreamedDecoder
from q3q.spec import TrialSpec
from q3q.team import SOLO, Team

LEAST_ACTIVATIONS = 64 * 2**20  # bytes that hidden states may take however little is left for them


def open_checkpoint(spec: TrialSpec) -> Checkpoint:
    """The model's folder, downloaded if it is a hub's; refused if it is not what the spec says."""
    source, revision = spec.places.get("model"), spec.model.get("revision")
    checkpoint = Checkpoint(locate(source or spec.model["source"], revision))
    wanted = spec.model.get("digest")
    if wanted is not None and checkpoint.digest(Path(spec.places["trials"]) / "digests") != wanted:
        raise IntegrityError(
            f"the files in {checkpoint.folder} changed since the trial was planned; start it again"
        )
    return checkpoint


def device_of(spec: TrialSpec) -> Device:
    """Where the trial computes: as its plan says; without one on a GPU, if there is one.

    Raises:
        ConfigError: it was planned on a GPU, and torch has none.
    """
    gpus, there = spec.places.get("share", {}).get("gpus"), torch.cuda.is_available()
    if gpus and not there:
        built = (
            "no GPU is to be seen" if torch.version.cuda else "this torch was built without CUDA"
        )
        raise ConfigError(
            f"this trial was planned on a GPU, and on {platform.node()} {built}: install a torch for its driver there "
            "(README, A real Qwen3), or give cluster.gpus_per_trial=0"
        )
    return "cuda" if there and gpus != 0 else "cpu"


def keep_to_share(gpus: float) -> None:
    """Let torch allocate no more than this share of the GPU, so that it takes nothing from those beside it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, gpus - PROCESS_BYTES["cuda"] / total))


@dataclass(frozen=True)
class Loading:
    """How the model is held: by which loader, bytes that the trial may take (of a GPU's memory, if it has one), that it
    is predicted to take, and that hidden states may take of them; of a gang, each of its ranks."""

    loader: str
    memory: int
    needs: int
    activations: int
    ranks: int = 1

    @property
    def told(self) -> str:
        return f"{self.loader}, {in_gb(self.needs)} of {in_gb(self.memory)}"


def load_model(
    checkpoint: Checkpoint, spec: TrialSpec, kind: Device, team: Team = SOLO
) -> tuple[Decoder, Loading]:
    """The model as the trial's share and its places say or, where they say nothing, as fits into the memory that is
    free; a gang divides it.

    Raises:
        ConfigError: it does not fit, or it is streamed and a task generates text.
    """
    facts, dtype = checkpoint.facts, spec.model["dtype"]
    method, share = (
        None if spec.scheme is None else str(spec.method["name"]),
        spec.places.get("share", {}),
    )
    bounds = [one["memory"] for one in (spec.places, share) if "memory" in one]
    memory = (
        min(bounds) if bounds else torch.cuda.mem_get_info()[0] if kind == "cuda" else free_memory()
    )
    loader = share.get("loader", spec.places.get("loader", AUTO)) if team.size == 1 else "sharded"
    if kind == "cuda" and share.get("gpus", 1) < 1:
        keep_to_share(share["gpus"])
    if loader == AUTO:
        loader = choose(facts, dtype, method=method, memory=memory, device=kind, heads=spec.heads)
    elif loader not in ("resident", "streamed") and team.size == 1:
        raise ConfigError(
            f"loader={loader} is for a gang of processes (cluster.ranks_per_trial=2 or more); one alone takes resident "
            "or streamed"
        )
    needs = need(
        facts, dtype, method=method, loader=loader, ranks=team.size, device=kind, heads=spec.heads
    )
    spare = memory - needs
    ahead = loader == "streamed" and spare >= ahead_bytes(facts, dtype)
    spare -= ahead_bytes(facts, dtype) if ahead else 0
    loading = Loading(loader, memory, needs, max(spare, LEAST_ACTIVATIONS), team.size)
    if loader == "resident":
        model = load_decoder(checkpoint, getattr(torch, dtype), kind)
        model.activations = loading.activations
        return model, loading
    refuse_generation(spec.evaluation, loader)
    if loader == "sharded":
        return load_sharded(
            checkpoint, getattr(torch, dtype), team, activations=loading.activations
        ), loading
    dtype_read = getattr(torch, dtype)
    return StreamedDecoder(
        checkpoint, dtype_read, kind, activations=loading.activations, ahead=ahead
    ), loading

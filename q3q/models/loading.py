"""Open a trial's checkpoint and load its model where and how its share of the machine allows."""

import os
import platform
from dataclasses import dataclass, replace

import torch

from q3q.errors import ConfigError, IntegrityError
from q3q.formatting import in_gb
from q3q.limits import free_memory
from q3q.models.cards import refuse_card
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.families.registry import package_of
from q3q.models.footprint import (
    AUTO,
    PROCESS_BYTES,
    Device,
    MethodMemory,
    ahead_bytes,
    choose,
    need,
    refuse_generation,
)
from q3q.models.hub import locate
from q3q.models.sharded import load_sharded
from q3q.models.streaming import StreamedDecoder
from q3q.placement import Trial
from q3q.team import SOLO, Team

LEAST_ACTIVATIONS = 64 * 2**20  # bytes for hidden states, however little memory is left


def open_checkpoint(trial: Trial) -> Checkpoint:
    """Return the model's folder, downloaded if it is on the Hub.

    Raises:
        IntegrityError: its files are not those that the trial was planned with.
        ConfigError: its family is of another package, or another version, than it was planned with.
    """
    model, local = trial.spec.model, trial.placement.model
    if local is None or not local.is_file():  # a file is a GGUF file
        local = locate(str(local or model.source), model.revision)
    checkpoint = Checkpoint(local)
    if model.digest is not None and checkpoint.digest(trial.placement.digests) != model.digest:
        raise IntegrityError(
            f"the files in {checkpoint.folder} changed since the trial was planned; start it again"
        )
    here = package_of(checkpoint.facts.family)
    if model.package is not None and model.package != here:
        raise ConfigError(
            f"this trial needs the model's family of {model.package} on this machine; here is "
            f"that of {here or 'q3q'}"
        )
    return checkpoint


def original_of(trial: Trial) -> Trial:
    """Return the trial of the original that a judged checkpoint is compared with; else itself."""
    spec, placement = trial.spec, trial.placement
    if spec.reference is None:
        return trial
    spec = replace(spec, model=spec.reference, reference=None)
    return Trial(spec, replace(placement, model=placement.reference, reference=None))


def load_original(checkpoint: Checkpoint, trial: Trial, device: Device) -> StreamedDecoder:
    """Return the unquantized model, or a judged checkpoint's original.

    None of its blocks is read before it runs.
    """
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else free_memory()
    dtype = getattr(torch, original_of(trial).spec.model.dtype)
    activations = max(free // 4, LEAST_ACTIVATIONS)
    return StreamedDecoder(checkpoint, dtype, device, activations=activations, ahead=False)


def device_of(trial: Trial) -> Device:
    """Return where the trial computes: as its plan says, else on a GPU if there is one.

    Raises:
        ConfigError: it was planned on a GPU, and torch has none, or the GPU does not compute in
            the trial's type.
    """
    grant, available = trial.placement.grant, torch.cuda.is_available()
    if grant is not None and grant.gpus and not available:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        which = "" if seen is None else f" (CUDA_VISIBLE_DEVICES={seen})"
        reason = f"finds no GPU{which}" if torch.version.cuda else "was built without CUDA"
        raise ConfigError(
            f"this trial was planned on a GPU, and torch on {platform.node()} {reason}: nvidia-smi "
            "there lists its GPUs. If one is gone, plan without it; otherwise install a torch for "
            "its driver there (README, A real Qwen3), or give cluster.gpus_per_trial=0"
        )
    if not available or (grant is not None and grant.gpus == 0):
        return "cpu"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    refuse_card(trial.spec.model.dtype, name, capability)
    _known_gpu[:] = [name, _uuid()]
    return "cuda"


_known_gpu: list[str] = []  # name and UUID: a GPU that failed is asked nothing any more


def this_gpu() -> str:
    """Return words for this process's GPU: its number and, once it has computed, name and UUID."""
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    facts = ", ".join(filter(None, _known_gpu))
    return f"GPU {number}{f' ({facts})' if facts else ''}"


def _uuid() -> str:
    """Return the GPU's UUID as nvidia-smi writes it; nothing if torch does not know it."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return "" if uuid is None else f"GPU-{uuid}"


def keep_to_share(gpus: float) -> None:
    """Let torch allocate this share of the GPU at most, so that other trials keep theirs."""
    share = 1.0  # given back where an earlier trial of this process had less
    if gpus < 1:
        share = gpus - PROCESS_BYTES["cuda"] / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, share))


@dataclass(frozen=True)
class Loading:
    """How the model is loaded; of a gang, on each of its ranks.

    memory: bytes that the trial may take, of a GPU's memory if it has one
    needs: bytes that it is predicted to take
    activations: bytes that hidden states may take
    """

    loader: str
    memory: int
    needs: int
    activations: int
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.loader}, {in_gb(self.needs)} of {in_gb(self.memory)}"


def load_model(
    checkpoint: Checkpoint,
    trial: Trial,
    device: Device,
    method: MethodMemory | None,
    team: Team = SOLO,
) -> tuple[Decoder, Loading]:
    """Load the model as the plan or the user says, else as the free memory allows.

    Raises:
        ConfigError: it does not fit, or it is streamed and a task generates text.
    """
    spec, placement, grant = trial.spec, trial.placement, trial.placement.grant
    facts, dtype = checkpoint.facts, spec.model.dtype
    bounds = [placement.memory, grant.memory if grant else None]
    memory = min(filter(None, bounds), default=0)
    memory = memory or (torch.cuda.mem_get_info()[0] if device == "cuda" else free_memory())
    loader = (grant.loader if grant else placement.loader) or AUTO
    if team.size > 1:
        loader = "sharded"
    if device == "cuda" and grant is not None:
        keep_to_share(grant.gpus)
    if loader == AUTO:
        loader = choose(facts, dtype, method=method, memory=memory, device=device, heads=spec.heads)
    elif loader not in ("resident", "streamed") and team.size == 1:
        raise ConfigError(
            f"loader={loader} is for a gang of processes (cluster.ranks_per_trial=2 or more); one "
            "alone takes resident or streamed"
        )
    if loader != "resident":
        refuse_generation(spec.generates, loader)
    needs = need(
        facts, dtype, method=method, loader=loader, ranks=team.size, device=device, heads=spec.heads
    )
    spare = memory - needs
    ahead = loader == "streamed" and spare >= ahead_bytes(facts, dtype)
    spare -= ahead_bytes(facts, dtype) if ahead else 0
    loading = Loading(loader, memory, needs, max(spare, LEAST_ACTIVATIONS), team.size)
    computed, activations = getattr(torch, dtype), loading.activations
    model: Decoder
    if loader == "sharded":
        model = load_sharded(checkpoint, computed, team, activations=activations)
    elif loader == "streamed":
        model = StreamedDecoder(checkpoint, computed, device, activations=activations, ahead=ahead)
    else:
        model = load_decoder(checkpoint, computed, device)
        model.activations = activations
    if device == "cuda" and grant is not None:
        model.pinned = grant.pinned
    return model, loading

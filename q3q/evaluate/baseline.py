"""The unquantized model's outputs on a text, kept on disk and shared by all trials of that model.

A trial's drift is measured against the unquantized model's next-token distributions. These are too
large to keep (151,936 numbers a position), so an entry keeps the final hidden states, which go
through the model's own head again, and each window's negative log-likelihood, for paired
differences of perplexity.

An entry is a folder `<baselines>/<key>`: one safetensors file a window in the model's own dtype,
bit for bit, and a manifest with the SHA-256 of each file and of itself. The key is the content hash
of all that determines the numbers. An entry is written beside its final place and renamed when it
is complete; every byte is checked when it is opened, and again when it is read. A damaged entry is
computed again. One process at a time computes an entry, under a claim; if it is killed, the next
one goes on from the windows that are intact. The folder may be deleted at any time.

Shapes: N windows, T tokens of one, P = T - 1 positions that predict one of its tokens, H hidden.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.canonical import sha256
from q3q.environment import processor
from q3q.errors import UNREADABLE, IntegrityError
from q3q.models.facts import DTYPE_BYTES
from q3q.reporter import Steps, no_steps
from q3q.spec import Json, digest
from q3q.storage.aside import clear_for_folder, put_aside
from q3q.storage.claim import Claim, ClaimLostError, Holder, claimed
from q3q.storage.files import flush_folder, make_folder, read_file, write_atomically

if TYPE_CHECKING:  # a plan asks for sizes, and must not load torch for them
    import torch
    from torch import Tensor

    from q3q.models.decoder import Decoder

VERSION = 2  # of an entry's numbers: raised when the forward pass or the likelihoods change
# 256 windows of 2048 tokens take 1.0 GiB at 0.6B (1024 wide, bfloat16), 4.3 GB at 8B (4096 wide).
# Where all take more than SMALL_BYTES, FEW_WINDOWS are kept: 65,504 positions.
SMALL_BYTES = 1 << 30
FEW_WINDOWS = 32
JOURNAL = "journal.jsonl"  # of the finished windows, while an entry is computed


def kept_windows(
    windows: int, tokens: int, hidden: int, dtype: str, most: int | None = None
) -> int:
    """Return how many of a text's windows the drift is measured on.

    Args:
        most: upper limit; if None, all where they take at most SMALL_BYTES, else FEW_WINDOWS.
    """
    if most is None:
        fits = baseline_bytes(windows, tokens, hidden, dtype) <= SMALL_BYTES
        most = windows if fits else FEW_WINDOWS
    return min(windows, most)


def baseline_bytes(kept: int, tokens: int, hidden: int, dtype: str) -> int:
    """Return the bytes of the hidden states of `kept` windows; the rest of an entry is small."""
    return kept * (tokens - 1) * hidden * DTYPE_BYTES[dtype]


def kept_rows(windows: int, kept: int) -> tuple[int, ...]:
    """Return the numbers of the kept windows, which are spread evenly from the first on."""
    return tuple(k * windows // kept for k in range(kept))


def windows_digest(windows_NT: Tensor) -> str:
    """Return the SHA-256 (hex) of the windows' token ids and shape, which tell tokenizers apart."""
    import torch

    ids = windows_NT.to(device="cpu", dtype=torch.int64).contiguous()
    content = f"{tuple(ids.shape)}".encode() + ids.numpy().astype("<i8").tobytes()
    return sha256(content)


def rounding_of(device: torch.device, dtype: torch.dtype) -> str:
    """Name all that decides how numbers of a type are rounded on a device.

    Other kernels round differently, and a trial would take their rounding for drift: in 16 bits as
    much of it as 8-bit weights cause. So a baseline belongs to a GPU's or processor's model and to
    torch's release. In float32 on a processor, rounding is five digits below what drift shows.
    """
    import torch

    if device.type == "cpu" and dtype == torch.float32:
        return "cpu"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{device.type}: {name}, torch {torch.__version__}"


class BeingComputedError(Exception):
    """An entry is not there yet, and another process computes it."""


@dataclass(frozen=True, kw_only=True)
class BaselineIdentity:
    """All that determines an entry's numbers.

    model: a TrialSpec's model entry without its name: the files' digest or Hub revision; dtype.
    text: digest of the text.
    windows: `windows_digest`.
    kept: number of windows whose hidden states are kept.
    device: `rounding_of` the device that computes them.
    version: `VERSION`.
    """

    model: Json
    text: str
    windows: str
    kept: int
    device: str
    version: int = VERSION

    @classmethod
    def of(
        cls, model: Json, text: str, windows_NT: Tensor, kept: int, device: str
    ) -> BaselineIdentity:
        if not 1 <= kept <= len(windows_NT):
            raise ValueError(f"kept={kept} of {len(windows_NT)} windows")
        model = {key: value for key, value in model.items() if key != "name"}
        windows = windows_digest(windows_NT)
        return cls(model=model, text=text, windows=windows, kept=kept, device=device)

    @property
    def key(self) -> str:
        """Name of the entry's folder: 32 hex digits."""
        return digest(asdict(self))[:32]


@dataclass(frozen=True)
class Baseline:
    """An intact entry.

    rows: numbers of the windows whose hidden states it has.
    nll_N: each window's mean negative log-likelihood, float64, nats per token.
    checksums: SHA-256 of each window's file.
    """

    folder: Path
    identity: BaselineIdentity
    rows: tuple[int, ...]
    nll_N: Tensor
    vocab: int
    hidden_size: int
    dtype: str
    checksums: dict[int, str]

    def hidden(self, row: int) -> Tensor:
        """Load the final hidden states [P, H] of window `row` to the CPU, in the model's own dtype.

        Raises:
            IntegrityError: the file has changed since the entry was opened.
        """
        from safetensors.torch import load

        path = self.folder / _file(row)
        content = _content(path, self.checksums[row])
        if content is None:
            raise IntegrityError(
                f"{path} changed while it was in use; run the trial again, which computes it anew"
            )
        return load(content)["hidden"]

    def check_fits(self, model: Decoder, windows_NT: Tensor) -> None:
        """Raise IntegrityError unless it is of this model's vocabulary and of these tokens."""
        facts = model.facts
        if (facts.vocab, facts.hidden) != (self.vocab, self.hidden_size):
            raise IntegrityError(
                f"the baseline in {self.folder} has {self.vocab} tokens and hidden size "
                f"{self.hidden_size}, the model {facts.vocab} and {facts.hidden}: it is not this "
                "model's"
            )
        if int(windows_NT.max()) >= self.vocab:
            raise IntegrityError(
                f"token {int(windows_NT.max())} of the text is not among the baseline's "
                f"{self.vocab}: the text was encoded by another tokenizer"
            )
        if windows_digest(windows_NT) != self.identity.windows:
            raise IntegrityError(
                f"the baseline in {self.folder} was computed on other tokens than the text's: "
                "another tokenizer encoded them, or the windows were cut differently"
            )


def find_baseline(folder: Path, identity: BaselineIdentity) -> Baseline | None:
    """Return the entry, or None if it is missing, damaged or another identity's."""
    import torch

    entry = folder / identity.key
    try:
        manifest = json.loads(read_file(entry / "manifest.json"))
        body: dict[str, Any] = manifest["body"]
        if manifest["sha256"] != digest(body) or body["identity"] != asdict(identity):
            return None
        checksums = {int(row): sha for row, sha in body["windows"].items()}
        baseline = Baseline(
            folder=entry,
            identity=identity,
            rows=tuple(checksums),
            nll_N=torch.tensor(body["nll"], dtype=torch.float64),
            vocab=body["vocab"],
            hidden_size=body["hidden"],
            dtype=body["dtype"],
            checksums=checksums,
        )
    except UNREADABLE:
        return None
    intact = all(_content(entry / _file(row), sha) is not None for row, sha in checksums.items())
    return baseline if intact else None


def baseline_for(
    folder: Path,
    identity: BaselineIdentity,
    model: Decoder,
    windows_NT: Tensor,
    steps: Steps = no_steps,
    fetch: Callable[[str], object] = lambda key: None,
    *,
    wait: bool = True,
    original: Callable[[], Decoder] | None = None,
) -> Baseline:
    """Return the entry. Without an intact one, one process computes it and others wait.

    Args:
        model: the *unquantized* model; it runs only if the entry has to be computed.
        steps: receives the windows done and in all, also while waiting; may raise.
        fetch: may bring the entry of that key from elsewhere, before it is computed.
        wait: for another process that computes the entry.
        original: loads the unquantized model again, where `model` is quantized by now.

    Raises:
        BeingComputedError: it is to be waited for, and `wait` is False.
        IntegrityError: the entry does not fit the model or the windows, the model's likelihoods are
            not finite, or what was written cannot be read back.
    """
    if identity.windows != windows_digest(windows_NT):
        raise IntegrityError("the windows are not those that the baseline was to be computed for")

    def on_wait(holder: Holder) -> None:
        if not wait:
            raise BeingComputedError(f"{holder} computes {folder / identity.key}")
        steps(0, len(windows_NT))

    baseline, lost = find_baseline(folder, identity), True
    while baseline is None and lost:  # who loses the claim waits for the process that took it
        with claimed(folder, identity.key, on_wait) as claim:
            fetch(identity.key)
            baseline = find_baseline(folder, identity)  # another may have computed it meanwhile
            if baseline is None:
                runs = model if original is None else original()
                with suppress(ClaimLostError):
                    _compute(folder, identity, runs, windows_NT, claim, steps)
                baseline = find_baseline(folder, identity)
            lost = claim.lost
    if baseline is None:
        raise IntegrityError(
            f"{folder / identity.key} does not read back as it was written: check the disk"
        )
    baseline.check_fits(model, windows_NT)
    return baseline


def _compute(
    folder: Path,
    identity: BaselineIdentity,
    model: Decoder,
    windows_NT: Tensor,
    claim: Claim,
    steps: Steps,
) -> None:
    """Compute the entry beside its final place, going on from what a killed process left.

    Raises:
        ClaimLostError: another process has taken over.
    """
    from safetensors.torch import save

    from q3q.evaluate.journal import Journal
    from q3q.evaluate.perplexity import scored_windows

    entry, partial = folder / identity.key, folder / f"{identity.key}.partial"
    clear_for_folder(entry)
    if entry.is_dir():
        put_aside(entry, "is damaged or another model's or text's")
    clear_for_folder(partial)
    make_folder(partial)
    rows = set(kept_rows(len(windows_NT), identity.kept))
    with closing(Journal(partial / JOURNAL, identity.key)) as journal:
        # Each window's nll and, if its hidden states are kept, its file's SHA-256.
        results = _intact(partial, journal.consecutive())
        for row, hidden_PH in scored_windows(model, windows_NT, len(results)):
            scores_P, _ = model.log_likelihoods(hidden_PH, windows_NT[row, 1:])
            content = save({"hidden": hidden_PH.cpu().contiguous()}) if row in rows else None
            sha = None if content is None else sha256(content)
            claim.confirm()
            if content is not None:
                write_atomically(partial / _file(row), content)
            results.append([-float(scores_P.double().mean()), sha])
            journal.add([(str(row), results[row])])
            steps(row + 1, len(windows_NT))
    nlls = [nll for nll, _ in results]
    claim.confirm()
    if not all(nll < float("inf") for nll in nlls):  # false for nan, too
        shutil.rmtree(partial)
        raise IntegrityError(
            "the unquantized model's likelihoods of the text are not finite: "
            "nothing to compare with"
        )
    body = {
        "identity": asdict(identity),
        "vocab": model.facts.vocab,
        "hidden": model.facts.hidden,
        "dtype": str(model.norm_H.dtype).removeprefix("torch."),
        "windows": {str(row): sha for row, (_, sha) in enumerate(results) if sha is not None},
        "nll": nlls,
    }
    manifest = json.dumps({"sha256": digest(body), "body": body}, indent=1, allow_nan=False)
    write_atomically(partial / "manifest.json", manifest.encode())
    (partial / JOURNAL).unlink()
    partial.rename(entry)
    flush_folder(folder)


def _intact(partial: Path, results: list[Any]) -> list[Any]:
    """Return the results before the first window whose file is not what was written."""
    for row, (_, sha) in enumerate(results):
        if sha is not None and _content(partial / _file(row), sha) is None:
            return results[:row]
    return results


def _file(row: int) -> str:
    return f"window_{row:05d}.safetensors"


def _content(path: Path, checksum: str) -> bytes | None:
    """Return a file's bytes if they have this checksum, else None."""
    try:
        content = read_file(path)
    except OSError:
        return None
    return content if sha256(content) == checksum else None

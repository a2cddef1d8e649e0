"""What the unquantized model says about a text, kept on disk and shared by all trials of that model.

A trial that is measured against the unquantized model needs that model's next-token distributions. They are not kept
(151,936 numbers a position), but what determines them: the final hidden states, which go through the model's own head
again. Beside them lies each window's negative log-likelihood, for paired differences of perplexity.

An entry is a folder `<baselines>/<key>`: one safetensors file a window in the model's own dtype, bit for bit, and a
manifest with the SHA-256 of each, and of itself. Its key is the content hash of all that determines it. It is written
beside its place and renamed when it is whole; every byte is checked when it is opened, and again when it is read. One
that is not whole, or not what its name says, is computed again; one that a killed process was at is gone on with, from
the windows that are whole. The folder may be deleted at any time.

Shapes: N windows, T tokens of one, P = T - 1 positions that predict one of its tokens, H hidden.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import IntegrityError
from q3q.spec import Json

if TYPE_CHECKING:  # a plan asks for sizes, and must not load torch for them
    from torch import Tensor

    from q3q.models.decoder import Decoder

Progress = Callable[[int, int], None]

VERSION = 2  # of the numbers in an entry: raised when the forward pass or the likelihoods are computed otherwise
# 256 windows of 2048 tokens take 1.0 GiB at 0.6B (1024 wide, bfloat16), 4.3 GB at 8B (4096 wide). Where all take more
# than SMALL_BYTES, FEW_WINDOWS are kept: 65,504 positions.
SMALL_BYTES = 1 << 30
FEW_WINDOWS = 32
JOURNAL = "journal.jsonl"  # of the windows that have ended, while an entry is computed
PATIENCE = (
    3600.0  # seconds without a sign of life after which another process's turn is not waited for
)
_POLL = 0.2  # seconds
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


# ---------------------------------------------------------------------------------------------- what it takes


def kept_windows(
    windows: int, tokens: int, hidden: int, dtype: str, wanted: int | None = None
) -> int:
    """How many of a text's windows the drift is measured on.

    Args:
        windows, tokens: N and T. hidden, dtype: the model's.
        wanted: at most so many; if None, all where they take at most SMALL_BYTES, else FEW_WINDOWS.
    """
    if wanted is None:
        wanted = (
            windows
            if baseline_bytes(windows, tokens, hidden, dtype) <= SMALL_BYTES
            else FEW_WINDOWS
        )
    return min(windows, wanted)


def baseline_bytes(kept: int, tokens: int, hidden: int, dtype: str) -> int:
    """Bytes on disk of the hidden states of `kept` windows of `tokens` tokens; the rest of an entry is small."""
    return kept * (tokens - 1) * hidden * _BYTES[dtype]


def kept_rows(windows: int, kept: int) -> tuple[int, ...]:
    """Which windows are kept: spread evenly over the text, the first among them."""
    return tuple(k * windows // kept for k in range(kept))


# ---------------------------------------------------------------------------------------------- what it is


def windows_digest(windows_NT: Tensor) -> str:
    """SHA-256 (hex) of token ids and how they are cut. A different tokenizer gives different ids."""
    import torch

    ids = windows_NT.to(device="cpu", dtype=torch.int64).contiguous()
    return hashlib.sha256(
        f"{tuple(ids.shape)}".encode() + ids.numpy().astype("<i8").tobytes()
    ).hexdigest()


@dataclass(frozen=True, kw_only=True)
class BaselineIdentity:
    """All that determines an entry's numbers.

    model: digest of the files, or Hub source and revision; and dtype (a TrialSpec's model entry; its name is for
    people). text: digest of the text. windows: `windows_digest`. kept: windows whose hidden states are kept.
    device: type of what computed them; kernels round differently, and what a CPU says a GPU's trial would take for
    drift.
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
        return cls(
            model=model, text=text, windows=windows_digest(windows_NT), kept=kept, device=device
        )

    @property
    def key(self) -> str:
        """Its folder's name: 32 hex digits."""
        return _digest(asdict(self))[:32]


@dataclass(frozen=True)
class Baseline:
    """An entry that was found whole. rows: the windows whose hidden states it has. nll_N: float64, nats per token."""

    folder: Path
    identity: BaselineIdentity
    rows: tuple[int, ...]
    nll_N: Tensor
    vocab: int
    hidden_size: int
    dtype: str
    checksums: dict[int, str]

    def hidden(self, row: int) -> Tensor:
        """Final hidden states [P, H] of window `row`, on the CPU, in the model's own dtype.

        Raises:
            IntegrityError: the file changed since the entry was opened.
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
        """Is this the baseline of this vocabulary and of these tokens?

        Raises:
            IntegrityError: it is not.
        """
        facts = model.facts
        if (facts.vocab, facts.hidden) != (self.vocab, self.hidden_size):
            raise IntegrityError(
                f"the baseline in {self.folder} has {self.vocab} tokens and hidden size {self.hidden_size}, "
                f"the model {facts.vocab} and {facts.hidden}: it is not this model's"
            )
        if int(windows_NT.max()) >= self.vocab:
            raise IntegrityError(
                f"token {int(windows_NT.max())} of the text is not among the baseline's {self.vocab}: "
                "the text was encoded by another tokenizer"
            )
        if windows_digest(windows_NT) != self.identity.windows:
            raise IntegrityError(
                f"the baseline in {self.folder} is of other tokens than the text's: "
                "encoded by another tokenizer, or cut otherwise"
            )


# ---------------------------------------------------------------------------------------------- finding and making it


def find_baseline(folder: Path, identity: BaselineIdentity) -> Baseline | None:
    """The entry, every byte of it checked, or None if it is not there, damaged, or not what its name says."""
    import torch

    entry = folder / identity.key
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        body: dict[str, Any] = manifest["body"]
        if manifest["sha256"] != _digest(body) or body["identity"] != asdict(identity):
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = all(_content(entry / _file(row), sha) is not None for row, sha in checksums.items())
    return baseline if whole else None


def baseline_for(
    folder: Path,
    identity: BaselineIdentity,
    model: Decoder,
    windows_NT: Tensor,
    progress: Progress = lambda done, total: None,
    fetch: Callable[[str], object] = lambda key: None,
) -> Baseline:
    """The entry, computed with `model` if it is not there whole. Other processes that want it wait for the first.

    Args:
        folder: where entries lie.
        identity: of the entry.
        model: the *unquantized* model; it runs only if the entry has to be computed.
        windows_NT: token ids.
        progress: told windows done and in all.
        fetch: may bring the entry of that key from elsewhere, before it is computed.

    Raises:
        IntegrityError: the entry does not fit the model or the windows, the model's likelihoods are not finite, or what
            was written cannot be read back.
    """
    if identity.windows != windows_digest(windows_NT):
        raise IntegrityError("the windows are not those that the baseline was to be computed for")
    baseline = find_baseline(folder, identity)
    if baseline is None:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder / f"{identity.key}.lock", lambda: progress(0, len(windows_NT))) as turn:
            fetch(identity.key)
            baseline = find_baseline(folder, identity)  # it may have come while we waited
            if baseline is None:
                _compute(folder, identity, model, windows_NT, turn, progress)
                baseline = find_baseline(folder, identity)
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
    turn: _Turn,
    progress: Progress,
) -> None:
    """Write the entry beside its place, then rename it. Who finds another there was slower, with the same numbers."""
    from safetensors.torch import save

    from q3q.evaluate.journal import Journal
    from q3q.evaluate.perplexity import scored_windows

    entry = folder / identity.key
    shutil.rmtree(entry, ignore_errors=True)  # damaged
    partial = turn.workplace(folder, identity.key)
    rows, ended = set(kept_rows(len(windows_NT), identity.kept)), False
    try:
        with closing(Journal(partial / JOURNAL, identity.key)) as journal:
            found = _whole(
                partial, journal.counted()
            )  # of each window its nll and, if it is kept, its file's SHA-256
            for row, hidden_PH in scored_windows(model, windows_NT, len(found)):
                scores_P, _ = model.log_likelihoods(hidden_PH, windows_NT[row, 1:])
                sha = None
                if row in rows:
                    content = save({"hidden": hidden_PH.cpu().contiguous()})
                    (partial / _file(row)).write_bytes(content)
                    sha = hashlib.sha256(content).hexdigest()
                found.append([-float(scores_P.double().mean()), sha])
                journal.add([(str(row), found[row])])
                turn.alive()
                progress(row + 1, len(windows_NT))
        nlls = [nll for nll, _ in found]
        if not all(nll < float("inf") for nll in nlls):  # false of nan, too
            ended = True
            raise IntegrityError(
                "the unquantized model's likelihoods of the text are not finite: nothing to compare with"
            )
        body = {
            "identity": asdict(identity),
            "vocab": model.facts.vocab,
            "hidden": model.facts.hidden,
            "dtype": str(model.norm_H.dtype).removeprefix("torch."),
            "windows": {str(row): sha for row, (_, sha) in enumerate(found) if sha is not None},
            "nll": nlls,
        }
        manifest = json.dumps({"sha256": _digest(body), "body": body}, indent=1, allow_nan=False)
        (partial / "manifest.json").write_text(manifest, encoding="utf-8")
        (partial / JOURNAL).unlink()
        ended = True
        # Nothing is synced to disk: what a power cut tears has another checksum, and is computed again.
        try:
            partial.rename(entry)
        except OSError:
            if not entry.exists():
                raise
    finally:
        if ended or not turn.mine:  # else whoever comes next goes on with it
            shutil.rmtree(partial, ignore_errors=True)


def _whole(partial: Path, found: list[Any]) -> list[Any]:
    """The windows up to the first whose file is not what was written."""
    for row, (_, sha) in enumerate(found):
        if sha is not None and _content(partial / _file(row), sha) is None:
            return found[:row]
    return found


# ---------------------------------------------------------------------------------------------- one at a time


class _Turn:
    """Who computes an entry. mine: nobody else who keeps to the lock does. It saves work; renaming keeps it right."""

    def __init__(self, lock: Path, mine: bool) -> None:
        self.lock = lock
        self.mine = mine

    def alive(self) -> None:
        """A sign of life, for those that wait."""
        if self.mine:
            os.utime(self.lock)

    def workplace(self, folder: Path, key: str) -> Path:
        """A folder to write in: an empty one or, under the lock, what a killed process left."""
        if not self.mine:
            return Path(tempfile.mkdtemp(prefix=f"{key}.partial.", dir=folder))
        partial = folder / f"{key}.partial"
        partial.mkdir(exist_ok=True)
        return partial


@contextmanager
def _turn(lock: Path, on_wait: Callable[[], None]) -> Iterator[_Turn]:
    """Wait for the lock, which the kernel takes from a process that dies, however it dies. on_wait: told at every look,
    and may raise.

    A holder that lives and shows no sign of it for PATIENCE seconds is not waited for, nor is a file system without
    locks: then both compute.
    """
    with lock.open("ab") as file:
        yield _Turn(lock, _acquire(file.fileno(), lock, on_wait))


def _acquire(descriptor: int, lock: Path, on_wait: Callable[[], None]) -> bool:
    sign, heard = (
        0,
        0.0,
    )  # the holder's last one, and when it was first seen, on this process's own monotonic clock
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if sign != (sign := lock.stat().st_mtime_ns):
                heard = time.monotonic()
            if time.monotonic() - heard > PATIENCE:
                return False
            on_wait()
            time.sleep(_POLL)
        except OSError:
            return False
        else:
            os.utime(lock)
            return True


def _file(row: int) -> str:
    return f"window_{row:05d}.safetensors"


def _content(path: Path, sha256: str) -> bytes | None:
    """A file's bytes if they are what they were, else None."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def _digest(body: Json) -> str:
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()

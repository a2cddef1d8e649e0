"""Where a trial's quantized blocks lie; trials that share a quantization make it once.

With `keep=auto` and `keep=blocks` they lie where all trials of the quantization look, from the
first block on. Whoever makes them has a claim on the quantization; another trial waits for it, and
goes on at the last block if the maker died. With `keep=none` they lie in the trial's own folder.

In a storage that is a URL, blocks and claims are in the store, and each machine works on copies of
the blocks in its mirror. So it makes no difference on which machines the trials run.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from q3q.placement import Trial
from q3q.quantize.block_store import BlockStore
from q3q.quantize.methods.source import differ, source_of
from q3q.record import forget_progress
from q3q.spec import Json
from q3q.storage.block_cache import BLOCKS
from q3q.storage.claim import Holder, claimed
from q3q.storage.mirror import mirror_for
from q3q.storage.uploader import uploading

SOURCE = "method_source"  # beside the blocks: the code that made them


@contextmanager
def blocks_of(
    trial: Trial,
    count: int,
    wait: Callable[[Holder], object] = lambda holder: None,
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[BlockStore]:
    """Yield the trial's store of blocks; at the end, all blocks that it received are on the disk.

    If blocks are missing, no other process makes them before the end.

    Args:
        wait: receives the process that makes them now, at every poll; may raise to stop waiting.
        say: receives a line if blocks are not used because the method's code changed.

    Raises:
        ClaimLostError: this process was silent too long, and another one makes the blocks now.
        OSError: a block could not be written.
    """
    kept, shares = trial.kept_blocks_folder, trial.placement.shares_blocks
    if trial.spec.schemes is None:
        yield BlockStore(trial.blocks_folder)
        return
    if not shares and not kept.is_dir():
        with _usable(trial, say=say) as store:
            yield store
        return
    name, mirror = trial.spec.quantization_id, mirror_for(trial.placement.store)
    with ExitStack() as held:
        claim = held.enter_context(claimed(trial.placement.block_cache.claims, name, wait))
        if mirror is not None:  # another machine may have made some meanwhile
            mirror.pull(f"{BLOCKS}/{name}")
        store = _usable(trial, claim.check, say)
        if mirror is not None and shares:
            held.enter_context(uploading(mirror, f"{BLOCKS}/{name}", check_claim=claim.confirm))
        if store.holds(count):
            held.close()  # they only have to be read; `BlockCache.trim` sees that the trial runs
        with store:
            yield store


def _usable(
    trial: Trial,
    check_claim: Callable[[], object] = lambda: None,
    say: Callable[[str], object] = lambda line: None,
) -> BlockStore:
    """Return the trial's store, but with no blocks that other code of a package's method made.

    Scores of such blocks are forgotten with them. q3q's own methods raise `version` instead.
    """
    own, kept, identity = trial.blocks_folder, trial.kept_blocks_folder, trial.spec.quantization_id
    source = None if trial.spec.method.package is None else source_of(trial.spec.method)
    stale = [folder for folder in (own, kept) if _is_stale(folder, identity, source)]
    if stale:
        say("its method's code changed: no block of the old code is used")
    if own in stale:
        forget_progress(trial)
    if not trial.placement.shares_blocks:
        store = BlockStore(own, None if kept in stale else kept, identity, check_claim)
    else:
        store = BlockStore(kept, None, identity, check_claim)
        if kept in stale:
            forget_progress(trial)
            store.delete()
        cache = trial.placement.block_cache
        if trial.placement.caches_blocks:
            cache.use(identity)
        else:
            cache.keep(identity)
        BlockStore(own, kept, identity).keep()  # of an earlier attempt that was to share none
    if source is not None:
        store.remember(SOURCE, source)
    return store


def _is_stale(folder: Path, identity: str, source: Json | None) -> bool:
    return differ(BlockStore(folder, identity=identity).recall(SOURCE), source)

"""Where a trial's quantized blocks lie; trials that share a quantization make it once.

With `keep=auto` and `keep=blocks` they lie where all trials of the quantization look, from the
first block on. Whoever makes them has a claim on the quantization; another trial waits for it, and
goes on at the last block if the maker died. With `keep=none` they lie in the trial's own folder.

With `keep=auto` in a storage that is a URL, they lie in the trial's own folder too, so that another
machine can go on with them. Once all are made, they get further names in this machine's cache. Its
trials wait for each other as above; another machine makes its own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from q3q.placement import Trial
from q3q.quantize.block_store import BlockStore
from q3q.quantize.methods.source import differ, source_of
from q3q.record import forget_progress
from q3q.spec import Json
from q3q.storage.claim import ClaimStore, Holder, claimed
from q3q.storage.mirror import Mirror, mirror_for

SOURCE = "method_source"  # beside the blocks: the code that made them


@contextmanager
def blocks_of(
    trial: Trial,
    count: int,
    wait: Callable[[Holder], object] = lambda holder: None,
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[BlockStore]:
    """Yield the trial's store of blocks; all that it was given are on the disk at the end.

    If not all blocks are there already, nobody else makes them meanwhile.

    Args:
        wait: receives whoever makes them now, again and again; may raise to stop waiting.
        say: receives a line if blocks are not used because the method's code changed.

    Raises:
        ClaimLostError: this process was silent too long, and another one makes the blocks now.
        OSError: a block could not be written.
    """
    kept, mirror = trial.kept_blocks_folder, mirror_for(trial.placement.store)
    if trial.spec.schemes is None:
        yield BlockStore(trial.blocks_folder)
        return
    if not trial.placement.shares_blocks and not kept.is_dir():
        cached = trial.placement.caches_blocks_here
        with _from_cache(trial, count, wait, say) if cached else _usable(trial, say=say) as store:
            yield store
        return
    with ExitStack() as held:
        name = trial.spec.quantization_id
        claim = held.enter_context(claimed(_claims(kept.parent, mirror), name, wait))
        if mirror is not None:  # another machine may have made some meanwhile
            mirror.pull(f"trials/blocks/{name}")
        store = _usable(trial, claim.check, say)
        if store.holds(count):
            held.close()  # they only have to be read; `BlockCache.trim` sees that the trial runs
        with store:
            yield store
        if mirror is not None and trial.placement.shares_blocks:
            mirror.push(f"trials/blocks/{name}", sure=claim.check)


@contextmanager
def _from_cache(
    trial: Trial,
    count: int,
    wait: Callable[[Holder], object],
    say: Callable[[str], object],
) -> Iterator[BlockStore]:
    """`blocks_of` where a machine has a cache of its own."""
    cache, name = trial.placement.block_cache, trial.spec.quantization_id
    with ExitStack() as held:
        claim = held.enter_context(claimed(cache.folder, name, wait))
        store = _usable(trial, claim.check, say)
        cache.forget_older(name, trial.placement.fresh)
        cache.use(name)
        if store.holds(count):
            held.close()
        with store:
            yield store
        try:
            store.share()
        except OSError as error:
            say(f"this machine keeps no quantized blocks for later evaluations: {error}")


def _usable(
    trial: Trial,
    sure: Callable[[], object] = lambda: None,
    say: Callable[[str], object] = lambda line: None,
) -> BlockStore:
    """Return the trial's store, but with no blocks that other code of a package's method made.

    Scores of such blocks are forgotten with them. q3q's own methods raise `version` instead.
    """
    own, kept, identity = trial.blocks_folder, trial.kept_blocks_folder, trial.spec.quantization_id
    if trial.placement.caches_blocks_here and not kept.is_dir():
        kept = trial.cached_blocks_folder
    source = None if trial.spec.method.package is None else source_of(trial.spec.method)
    stale = [folder for folder in (own, kept) if _is_stale(folder, identity, source)]
    if stale:
        say("its method's code changed: no block of the old code is used")
    if own in stale:
        forget_progress(trial)
    if not trial.placement.shares_blocks:
        if kept in stale and kept == trial.cached_blocks_folder:
            BlockStore(kept).delete()
            stale.remove(kept)
        store = BlockStore(own, None if kept in stale else kept, identity, sure)
    else:
        store = BlockStore(kept, None, identity, sure)
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


def _claims(folder: Path, mirror: Mirror | None) -> Path | ClaimStore:
    return folder if mirror is None else mirror.claim_store("trials/blocks")

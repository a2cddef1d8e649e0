"""The disk that a sweep takes: what its trials leave, and their blocks while they run.

A quantizing trial keeps its quantized blocks until it has been evaluated. So a sweep takes at one
time what finished trials left, and the blocks of all trials that run at that time.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from q3q.errors import ConfigError
from q3q.evaluate.baseline import baseline_bytes, kept_windows
from q3q.formatting import bytes_in_words
from q3q.models.facts import ModelFacts
from q3q.models.footprint import stored_bytes
from q3q.number_formats import own_form
from q3q.placement import Trial
from q3q.spec import AUTO_DRIFT, Scheme, TrialSpec
from q3q.storage.files import bytes_below
from q3q.sweep.costs import text_windows

Left = dict[tuple[str, ...], int]


def block_bytes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return the bytes of a trial's quantized blocks; 0 if it quantizes nothing."""
    if spec.scheme is None:
        return 0
    schemes = [spec.scheme.bits, *(int(own.get("bits", 0)) for own in spec.overrides.values())]
    sizes = [
        spec.scheme.group_size,
        *(int(own["group_size"]) for own in spec.overrides.values() if "group_size" in own),
    ]
    smallest = min((size for size in sizes if size > 0), default=-1)
    bits = spec.scheme.bits if spec.scheme.bits == 1 else max(schemes)
    return stored_bytes(facts, bits, smallest, group_bytes=_group_bytes(spec.scheme, facts))


def _group_bytes(scheme: Scheme, facts: ModelFacts) -> float | None:
    """Return the bytes of a group's scale in a block's file; None for whole numbers' groups."""
    form = own_form(scheme.format)
    if form is None:
        return None
    # E4M3 has a float32 factor for each row, which the groups of the narrowest share among them.
    groups = max(1, min(min(widths) for widths in facts.columns.values()) // scheme.group_size)
    # A block's groups have a byte each, and share two; as many again where they have offsets.
    return {"float": 4, "e8m0": 1, "e4m3": 1 + 4 / groups, "block": 4}[form.scale]


def running_bytes(trial: Trial, facts: ModelFacts) -> int:
    """Return the bytes that a trial's blocks take only while it runs, and that are not there yet.

    Blocks that it keeps count among what it leaves. Those that stay while there is room for them
    (`keep=auto`) give way to other trials', and so count while it runs alone.
    """
    if trial.placement.keeps_blocks:
        return 0
    present = max(map(bytes_below, trial.block_folders))
    return max(0, block_bytes(trial.spec, facts) - present)


def left_behind(trial: Trial, facts: ModelFacts) -> Left:
    """Return the bytes that a finished trial leaves, by what they are; several trials may share it.

    What drift is measured against belongs to a model and a text, kept blocks to a quantization, an
    export to the trial.
    """
    spec, dtype = trial.spec, trial.spec.model.dtype
    left: Left = {}
    if (drift := spec.evaluation.drift) is not None:
        most = None if drift == AUTO_DRIFT else int(drift)
        for text in spec.evaluation.texts:
            windows = kept_windows(text_windows(text), text.window, facts.hidden, dtype, most)
            size = baseline_bytes(windows, text.window, facts.hidden, dtype)
            name = ("baseline", spec.model.files, dtype, text.name, str(text.window), str(size))
            left[name] = size
    if spec.scheme is None:
        return left
    blocks = block_bytes(spec, facts)
    if trial.placement.keeps_blocks:
        left["blocks", spec.quantization_id] = blocks
    if spec.export:
        plain, weights = facts.weight_bytes(dtype), facts.linear_parameters
        others = plain // facts.parameters * (facts.parameters - weights)
        own = plain if spec.export == "hf" else blocks + others
        left["export", spec.id] = own + facts.carried_bytes
    return left


def left_by_each(
    trials: Sequence[Trial], done: Sequence[Trial], facts: Mapping[str, ModelFacts]
) -> list[int]:
    """Return what each trial leaves; what several of them share counts for the first alone.

    Args:
        done: trials that have left theirs already.
    """
    present: set[tuple[str, ...]] = set()
    for trial in done:
        present |= left_behind(trial, facts[trial.id]).keys()
    counted = []
    for trial in trials:
        left = left_behind(trial, facts[trial.id])
        counted.append(sum(size for name, size in left.items() if name not in present))
        present |= left.keys()
    return counted


def refuse_full_disk(folder: Path, left: int, running: int) -> None:
    """Refuse a sweep that needs more disk than its storage folder has free.

    Args:
        running: most bytes of blocks of trials that run at the same time.

    Raises:
        ConfigError: it does; the message says how much is there and what would help.
    """
    free = free_disk(folder)
    if free is None or left + running <= free:
        return
    uses = ((running, "quantized blocks of trials that run at once"), (left, "what trials leave"))
    parts = [f"{bytes_in_words(size)} for {what}" for size, what in uses if size]
    advice = "free some, or give storage= on a larger disk"
    if left and not running:
        advice += ", or leave out keep=blocks or export="
    raise ConfigError(
        f"{folder} has {bytes_in_words(free)} of disk free, and this needs "
        f"{bytes_in_words(left + running)}: {', and '.join(parts)}; {advice}"
    )


def free_disk(folder: Path) -> int | None:
    """Return the bytes free where a folder is, or will be; None if the system does not tell."""
    for place in (folder.absolute(), *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None

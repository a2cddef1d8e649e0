"""Watch a running sweep from another terminal."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from q3q.errors import EXIT_FAILED, UNREADABLE, ConfigError
from q3q.storage.mirror import Mirror
from q3q.storage.status import POLL_SECONDS, SILENT_SECONDS, SweepStatus, sweep_statuses
from q3q.storage.uploader import DRIVER_SECONDS
from q3q.sweep.screen import Screen, count, picture
from q3q.trials.stored import running_sweeps


def watch(storage: Path, name: str | None, mirror: Mirror | None = None) -> int:
    """Show a running sweep until it ends: a live picture on a terminal, else its lines.

    Args:
        mirror: of a storage that is a URL, asked every DRIVER_SECONDS.

    Returns:
        0 when the sweep is over; 1 if it vanished (its machine or process died).

    Raises:
        ConfigError: no sweep runs, or none of that name, or it is not clear which.
    """
    running = [status for status in running_sweeps(storage, mirror) if name in (None, status.name)]
    if not running:
        earlier = [status for status in sweep_statuses(storage) if name in (None, status.name)]
        end = "has ended" if earlier and earlier[0].over else "died"
        last = f" The last one, {earlier[0].name}, {end}." if earlier else ""
        named = f" named {name}" if name else ""
        raise ConfigError(f"no sweep{named} runs with storage={storage}.{last}")
    names = sorted({status.name for status in running})
    if len(names) > 1:
        raise ConfigError(f"several sweeps run there, name one: {', '.join(names)}")
    status, path = running[0], storage / "running" / f"{running[0].key}.json"
    print(
        f"{status.name} on {status.holder.host}, process {status.holder.pid}: {status.command}",
        flush=True,
    )
    latest = {"status": status}
    screen = _screen(latest) if sys.stdout.isatty() else None
    shown, pulled, changed = 0, time.monotonic(), time.monotonic()
    try:
        while True:
            for number, line in status.lines:
                if number > shown:
                    screen.say(line) if screen else print(line, flush=True)
                    shown = number
            lives = status.lives()
            silent = time.monotonic() - changed > SILENT_SECONDS
            if lives is False or (lives is None and silent):
                break
            time.sleep(POLL_SECONDS)
            if mirror is not None and time.monotonic() - pulled > DRIVER_SECONDS:
                mirror.pull("running")
                pulled = time.monotonic()
            before = status.updated
            with suppress(*UNREADABLE):  # gone or torn: silence too
                status = latest["status"] = SweepStatus.load(path)
            changed = changed if status.updated == before else time.monotonic()
    finally:
        if screen is not None:
            screen.close()
    end = "it has ended" if status.over else "it died; the same command continues"
    print(f"{status.name}: {count(status.view)}; {end}")
    return 0 if status.over else EXIT_FAILED


def _screen(latest: Mapping[str, SweepStatus]) -> Screen:
    return Screen(sys.stdout, lambda *size: picture(latest["status"].view, *size), lambda _: None)

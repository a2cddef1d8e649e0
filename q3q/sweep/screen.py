"""The live picture of a sweep at the bottom of a terminal."""

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from q3q.formatting import duration
from q3q.storage.status import View

if TYPE_CHECKING:
    from rich.console import RenderableType

FRAME_SECONDS = 0.2  # between two pictures on a terminal
WIDE = 100  # columns of a terminal with room for bars


def count(view: View) -> str:
    """Return how far a sweep is: `3 of 6 done, 1 failed, 40 s left`."""
    failed = f", {view.failed} failed" if view.failed else ""
    going = f", {_left(view.left)}" if view.ended < view.total or view.running else ""
    return f"{view.ended} of {view.total} done{failed}{going}"


def picture(view: View, width: int, height: int) -> "RenderableType":
    """Return a line for each running trial, as many as fit, and one for the sweep."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    shown = view.running[: max(1, height - 3)]
    times = [f"{duration(work.seconds)}, {_left(work.left)}" for work in shown]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, justify="right", min_width=max(map(len, times), default=0))
    for work, passed in zip(shown, times, strict=True):
        bar = [ProgressBar(total=1.0, completed=work.share, width=12)] if width >= WIDE else []
        table.add_row(Text(work.name), Text(work.doing), Text(passed), *bar)
    more = f"and {len(view.running) - len(shown)} more, " if len(view.running) > len(shown) else ""
    return Group(table, Text(f"{more}{count(view)}, {duration(view.seconds)} so far", style="bold"))


class Screen:
    """A live picture at the bottom of a terminal, and lines that scroll away above it.

    One thread draws a few times a second, so a thousand quick trials cost a few pictures.
    """

    def __init__(
        self,
        stream: TextIO,
        picture: "Callable[[int, int], RenderableType]",
        on_error: Callable[[Exception], None],
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, highlight=False, emoji=False, markup=False)
        # Other code's prints go above the picture, but not from a pipe into the terminal.
        ours = stream in (sys.stdout, sys.stderr)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=ours and sys.stdout.isatty(),
            redirect_stderr=ours and sys.stderr.isatty(),
        )
        self._picture = picture
        self._on_error = on_error
        self._lines: list[str] = []
        self._closing = threading.Event()
        self._live.start()
        self._thread = threading.Thread(
            target=self._draw_until_closed, name="q3q-display", daemon=True
        )
        self._thread.start()

    def say(self, line: str) -> None:
        self._lines.append(line)

    def close(self) -> None:
        """Print the lines that still wait, and restore the terminal."""
        self._closing.set()
        self._thread.join()
        try:
            self._live.stop()
            self._scroll()
        except Exception as error:
            self._on_error(error)

    def _draw_until_closed(self) -> None:
        while not self._closing.wait(FRAME_SECONDS):
            try:
                self._scroll()
                self._live.update(self._picture(*self._console.size), refresh=True)
            except Exception as error:
                self._on_error(error)

    def _scroll(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._console.print("\n".join(lines))


def _left(seconds: float | None) -> str:
    return "? left" if seconds is None else f"{duration(seconds)} left"

"""A Chromium that is told what to do, and asked what it shows, by its own protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

BROWSER = next(
    (
        path
        for name in ("chromium", "google-chrome", "chromium-browser")
        if (path := shutil.which(name))
    ),
    None,
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
PATIENCE = 120  # seconds until a browser is taken for hung


class Browser:
    """One page of a browser, which ends with the `with` block.

    The DevTools protocol goes over two pipes, whose ends Chromium expects as its files 3 and 4:
    one JSON object after another, a zero byte behind each.
    """

    def __init__(self, folder: Path, width: int, height: int) -> None:
        assert BROWSER is not None
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()
        own = [f"--user-data-dir={folder}/profile", "--remote-debugging-pipe", "about:blank"]
        command = [BROWSER, *FLAGS, *own]
        with (folder / "browser.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "bash", *command],
                pass_fds=(theirs, answers),
                stdout=log,
                stderr=log,
            )
        os.close(theirs)
        os.close(answers)
        self._unread, self._number, self._session = b"", 0, ""
        [page] = [
            target
            for target in self.call("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        ]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.size(width, height)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)  # Chromium ends when nobody can tell it more
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=30)
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return what a method of the protocol returns; events are not looked at."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> bytes:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], PATIENCE)
            part = os.read(self._from, 1 << 16) if ready else b""
            assert part, "the browser has ended, or does not answer"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return message

    def open(self, address: str) -> None:
        """Go to a page, anew even where only what follows the `#` differs."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def ask(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression of JavaScript is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.ask(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)

    def size(self, width: int, height: int) -> None:
        """Give the page so many pixels, as few as a telephone has where wished."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

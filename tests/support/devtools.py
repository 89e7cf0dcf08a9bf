"""A headless Chromium that a test drives: opens pages, looks at them while they live, and notes what they ask for.

It speaks the browser's DevTools protocol over a pipe: JSON objects that end with a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.browser import chromium

PATIENCE_SECONDS = 60.0


class Browser:
    """Use as a context manager; `folder`: for its profile."""

    def __init__(self, folder: Path) -> None:
        program = chromium()
        assert program is not None
        take, self._out = os.pipe()
        self._in, give = os.pipe()
        command = [
            *("bash", "-c", f'exec "$@" 3<&{take} 4>&{give}', "bash", program, "--headless", "--disable-gpu"),
            "--no-sandbox",  # Chromium's own sandbox does not start as root
            "--remote-debugging-pipe",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            "about:blank",
        ]
        self._process = subprocess.Popen(command, pass_fds=(take, give), stderr=subprocess.DEVNULL)
        os.close(take)
        os.close(give)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to one command; what the browser says meanwhile is kept in `events`."""
        self._number += 1
        told = {"id": self._number, "method": method, "params": parameters}
        message = told if session is None else told | {"sessionId": session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self._number:
                assert "error" not in heard, f"{method}: {heard['error']}"
                return dict(heard["result"])
            self.events.append(heard)

    @contextmanager
    def page(self, address: str, *, width: int = 1280, dark: bool = False) -> Iterator[Page]:
        """A page that is open inside."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        opened = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            opened.ask(f"{domain}.enable")
        opened.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        opened.ask("Emulation.setEmulatedMedia", features=[scheme])
        opened.ask("Page.navigate", url=address)
        try:
            yield opened
        finally:
            self.ask("Target.closeTarget", targetId=target)

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        line, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)
        self._process.kill()
        self._process.wait()
        os.close(self._in)


class Page:
    """An open page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command for this page."""
        return self._browser.ask(method, self._session, **parameters)

    def value(self, expression: str) -> Any:
        """What a piece of JavaScript comes to, as JSON."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """What `expression` comes to, once that is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.05)
        return found

    def picture(self, file: Path) -> None:
        """The whole page as a PNG file."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of this name so far."""
        self.value("0")  # takes in what has been said
        return [
            one["params"]
            for one in self._browser.events
            if one.get("sessionId") == self._session and one["method"] == method
        ]

    @property
    def requests(self) -> list[str]:
        """The addresses of all that was asked for."""
        return [one["request"]["url"] for one in self.told("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings in the console, and what the browser itself says against the page."""
        said = [
            str(one["args"])
            for one in self.told("Runtime.consoleAPICalled")
            if one["type"] in ("error", "warning")
        ]
        said += [str(one["exceptionDetails"]) for one in self.told("Runtime.exceptionThrown")]
        return said + [one["entry"]["text"] for one in self.told("Log.entryAdded")]

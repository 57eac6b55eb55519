"""A headless Chromium, driven through its DevTools protocol over two pipes: no driver package, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from helpers.paths import ROOT

UNPACKED = ROOT / ".venv" / "chromium"  # by `make test-browser`
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
READ_END, WRITE_END = 3, 4  # the descriptors that Chromium reads commands from and writes answers to
PATIENCE = 60  # seconds for one answer

# how far a page is too wide, what lies outside of it, and how many texts are too small
READABLE = """(() => { const root = document.documentElement; return {
  overflow: root.scrollWidth - root.clientWidth,
  outside: [...document.body.querySelectorAll("*")].filter(e => e.getClientRects().length && !e.closest(".scroll, svg")
    && (e.getBoundingClientRect().right > root.clientWidth + 1)).map(e => e.outerHTML.slice(0, 80)),
  small: [...document.body.querySelectorAll("p, dd, dt, li, code, span")]
    .filter(e => e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 14).length,
}; })()"""


def find_browser() -> Path | None:
    """The browser that `make test-browser` unpacked, else one that is installed, else None."""
    unpacked = UNPACKED / "usr/lib/chromium/chromium-headless-shell"
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    return unpacked if unpacked.exists() else Path(installed) if installed else None


def _environment(browser: Path) -> dict[str, str]:
    """Libraries that were unpacked beside the browser are not where the loader looks."""
    libraries = browser.parents[1]
    folders = (
        [folder for folder in libraries.glob("*-linux-gnu*") if folder.is_dir()] if UNPACKED in browser.parents else []
    )
    folders += [folder / "pulseaudio" for folder in folders]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders))}


@dataclass
class Visit:
    """What a page did while it was loaded at one width, and what a script measured in it."""

    measured: dict[str, Any]
    screenshot: bytes
    errors: list[str] = field(default_factory=list)  # of the console, of scripts, of loading
    requests: list[str] = field(default_factory=list)  # other than the page itself and data in it


class Browser:
    """One browser process; ``visit`` opens a page in a fresh tab."""

    def __init__(self, executable: Path) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-")
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()

        # in the child: first out of the way, for a pipe may have got one of the two numbers itself
        def place() -> None:
            ends = [os.dup(end) for end in (commands, answers)]
            while any(end in (READ_END, WRITE_END) for end in ends):
                ends = [os.dup(end) for end in ends]
            os.dup2(ends[0], READ_END)
            os.dup2(ends[1], WRITE_END)

        self.process = subprocess.Popen(
            [str(executable), *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
            env=_environment(executable),
            preexec_fn=place,
            pass_fds=(READ_END, WRITE_END),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.buffer, self.number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def visit(self, page: Path, script: str, *, width: int, height: int, mobile: bool = False) -> Visit:
        """Open ``page`` at ``width`` CSS pixels and return what ``script``, an expression, gives in it."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        self.events.clear()
        self._call("Page.navigate", session, url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        answer = self._call("Runtime.evaluate", session, expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"the measuring script failed: {answer['exceptionDetails']}")
        shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=True)["data"]
        visit = Visit(answer["result"]["value"], base64.b64decode(shot), self._errors(), self._requests(page))
        self._call("Target.closeTarget", targetId=target)
        return visit

    def _errors(self) -> list[str]:
        def text(event: dict[str, Any]) -> str | None:
            params = event["params"]
            if event["method"] == "Log.entryAdded":
                return str(params["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                return str(params["args"])
            return str(params) if event["method"] in ("Runtime.exceptionThrown", "Network.loadingFailed") else None

        return [message for event in self.events if (message := text(event)) is not None]

    def _requests(self, page: Path) -> list[str]:
        sent = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if url != page.absolute().as_uri() and not url.startswith("data:")]

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while "id" not in (answer := self._receive()):
            self.events.append(answer)
        if "error" in answer:
            raise AssertionError(f"the browser refused {method}: {answer['error']['message']}")
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        """The next message: the answer to the one command in flight, or an event."""
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self.answers, 1 << 20) if ready else b""
            if not part:
                raise AssertionError(
                    f"the browser ended or said nothing for {PATIENCE} seconds (exit status {self.process.poll()})"
                )
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

"""A page in a real headless browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--enable-logging=stderr",
]


def dumped(url: str, folder: Path, width: int) -> tuple[str, str]:
    """The page as it is when it has loaded, and what the browser says."""
    flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    command = [BROWSER, *flags, "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


_PROBE = """<script>window.addEventListener("load", () => { document.title = JSON.stringify({
    figures: [...document.images].map(i => i.naturalWidth),
    wide: document.documentElement.scrollWidth, screen: window.innerWidth }); });</script>"""


def opened(page: str, width: int, folder: Path) -> tuple[dict, str]:
    """What the page looks like from inside the browser, and what the browser says."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", _PROBE + "</body>"))
    dom, said = dumped(path.as_uri(), folder, width)
    title = re.search(r"<title>(.*?)</title>", dom, re.S)[1]
    return json.loads(title.replace("&quot;", '"')), said


class Tab:
    """A page that stays open, by the browser's debugging protocol over a pair of pipes."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._rest, self._calls, self._session = b"", 0, {}
        self.console: list[str] = []  # what the page complained of
        (target,) = (
            each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"
        )
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        """A command of the protocol, and its answer."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            said = self._next()
            if said.get("id") == self._calls:
                assert "error" not in said, said
                return said["result"]
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(said["params"]))

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            more = os.read(self._from.fileno(), 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """Of JavaScript in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.05)

    def press(self, key: str, code: int, *, text: str = "", modifiers: int = 0) -> None:
        """A key: its name, its number, what it writes; 2 is Ctrl."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Writes the whole page as PNG."""
        self.look(width=width, dark=dark)
        done = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(done["data"]))

    def look(self, *, width: int, dark: bool = False) -> None:
        """Shows the page at a width, in a scheme of colours."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])


@contextmanager
def tab(url: str, folder: Path) -> Iterator[Tab]:
    """Opens a page; the browser ends with the block."""
    reads, to_browser = os.pipe()
    from_browser, writes = os.pipe()
    # The browser wants 3 and 4; the shell puts them there.
    pipes = f'exec "$@" 3<&{reads} 4>&{writes}'
    flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", pipes, "browser", BROWSER, *flags, "about:blank"],
            pass_fds=(reads, writes),
            stdout=log,
            stderr=log,
        )
    os.close(reads)
    os.close(writes)
    try:
        opened = Tab(to_browser, from_browser)
        opened.call("Page.navigate", url=url)
        yield opened
        opened.call("Browser.close")
    finally:
        process.terminate()
        process.wait(20)

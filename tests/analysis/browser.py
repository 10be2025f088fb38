"""A headless Chromium over the pipe of its DevTools protocol: real clicks and keys, and what its console says."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DEADLINE_SECONDS = 120.0
# The browser reads commands from descriptor 3 and writes answers to 4; both may be in use on the way there.
_START = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, " ": 32}


class Browser:
    """One page. `errors`: exceptions, console errors and refusals of the page's policy, in the page's words."""

    def __init__(self, profile: Path) -> None:
        found = [path for path in map(shutil.which, _NAMES) if path]
        if not found:
            raise RuntimeError(
                f"no browser found, expected one of {', '.join(_NAMES)}: the report's tests need it; on Debian: "
                "apt-get install chromium"
            )
        self.errors: list[str] = []
        self._last_id = 0
        self._session: str | None = None
        child_reads, self._write_to = os.pipe()
        self._read_from, child_writes = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--hide-scrollbars"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        start = [sys.executable, "-c", _START, str(child_reads), str(child_writes), found[0], *flags]
        self._log = profile / "chromium.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                start, pass_fds=(child_reads, child_writes), start_new_session=True, stdout=log, stderr=log
            )
        os.close(child_reads)
        os.close(child_writes)
        self._buffer = b""
        # A browser that hangs is ended: reading from it then fails, and so does the test.
        self._watchdog = threading.Timer(_DEADLINE_SECONDS, self._kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its answer; what the page reports meanwhile is kept."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Show a file, and wait until its scripts have run."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.run(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )
        self.settle()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def settle(self) -> None:
        """Until what the page does after a pause or before the next frame is done."""
        self.run("new Promise(done => setTimeout(() => requestAnimationFrame(() => setTimeout(done)), 200))")

    def click(self, selector: str) -> None:
        """A click in the middle of the element."""
        x, y = self.middle_of(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        """A finger that touches and leaves."""
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.settle()
        self.call("Emulation.setTouchEmulationEnabled", enabled=False)

    def middle_of(self, selector: str) -> tuple[float, float]:
        """In the window, which is scrolled there."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())"
        )
        return box[0], box[1]

    def key(self, key: str) -> None:
        """A key pressed where the focus is."""
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key], **text
            )

    def type(self, text: str) -> None:
        """Text where the focus is."""
        self.call("Input.insertText", text=text)
        self.settle()

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._watchdog.cancel()
        self._kill()
        self._process.wait()
        for descriptor in (self._write_to, self._read_from):
            os.close(descriptor)

    def _kill(self) -> None:
        """With all its processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read_from, 1 << 20)
            if not part:
                log = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"the browser ended, or took over {_DEADLINE_SECONDS:g} seconds:\n{log}")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in told["args"]]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])

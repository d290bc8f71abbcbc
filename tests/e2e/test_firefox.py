"""The page in Debian's Firefox, driven by Marionette, its own remote control: no driver is needed."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_server import PROMPT, serving, wait_until

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")
pytestmark = [
    pytest.mark.skipif(FIREFOX is None, reason="needs Debian's package firefox-esr"),
    pytest.mark.slow,  # starts a server and a browser of its own
    pytest.mark.timeout(900),
]


class Firefox:
    """A session of Marionette: messages are JSON with their length before it, in order."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream, self._count = connection.makefile("rwb"), 0
        self._read()  # a greeting
        self.ask("NewSession")

    def ask(self, command: str, **parameters: Any) -> Any:
        self._count += 1
        message = json.dumps([0, self._count, f"WebDriver:{command}", parameters]).encode()
        self._stream.write(b"%d:%s" % (len(message), message))
        self._stream.flush()
        _, _, error, result = self._read()
        assert error is None, error
        return result

    def js(self, script: str) -> Any:
        return self.ask("ExecuteScript", script=f"return {script}", args=[])["value"]

    def element(self, selector: str) -> str:
        found = self.ask("FindElement", using="css selector", value=selector)["value"]
        return str(next(iter(found.values())))

    def click(self, selector: str) -> None:
        self.ask("ElementClick", id=self.element(selector))

    def write(self, selector: str, text: str) -> None:
        self.ask("ElementSendKeys", id=self.element(selector), text=text)

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def _read(self) -> Any:
        digits = b""
        while (byte := self._stream.read(1)) != b":":
            assert byte, "Firefox has ended"
            digits += byte
        return json.loads(self._stream.read(int(digits)))


@contextmanager
def firefox(profile: Path) -> Iterator[Firefox]:
    profile.mkdir()
    (profile / "user.js").write_text('user_pref("marionette.port", 0);\n')
    command = [str(FIREFOX), "--headless", "--no-remote", "--marionette", "--profile", str(profile)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port = profile / "MarionetteActivePort"
            wait_until(lambda: port.exists() and port.read_text().strip().isdigit())
            with socket.create_connection(("127.0.0.1", int(port.read_text()))) as connection:
                yield Firefox(connection)
        finally:
            process.terminate()


def test_a_prompt_becomes_a_video_that_plays(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server, firefox(tmp_path / "profile") as browser:
        browser.ask("Navigate", url=server.url)
        wait_until(lambda: "· ready" in browser.text("#server"))
        browser.write("#prompt", PROMPT)
        browser.click("[id='preset-Length-1 s']")
        wait_until(lambda: "1.1 s" in browser.text("#plan:not(.waiting)"))
        browser.click("#settings summary")
        browser.ask("ElementClear", id=browser.element("#field-num_inference_steps"))
        browser.write("#field-num_inference_steps", "2")
        wait_until(lambda: "2 steps" in browser.text("#plan:not(.waiting)"))
        browser.click("#generate")
        wait_until(lambda: "Done" in browser.text("#progress"))
        assert browser.text(".details .prompt") == PROMPT
        if browser.js("document.createElement('video').canPlayType('video/mp4; codecs=\"avc1.42E01E\"')"):
            wait_until(lambda: browser.js("document.querySelector('#player').readyState >= 2"))
        assert "Fits" in browser.text("#plan")

"""A real Chromium with an open page of a server, for tests: `open_page(browser, url)`."""

import os
import re
import shutil
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 180.0  # seconds for anything to happen: the machine may be busy with other things
_SHOWN = "(document.querySelector('.details code')?.textContent || '')"
SHOTS = os.environ.get("WANDUET_SCREENSHOTS")  # a folder for pictures of the page


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, headless."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page once it is alive. `page.asked` lists every address that the browser asked for while it was open."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(1000 * PATIENCE)
    asked: list[str] = []
    refused: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("console", lambda message: refused.append(message.text) if "Security Policy" in message.text else None)
    page = context.new_page()
    page.asked, page.refused = asked, refused
    page.goto(url)
    alive(page)
    yield page
    context.close()


def alive(page: Any) -> None:
    """Wait until the page has news from the server, a worker is up, and the plan is known."""
    page.get_by_role("button", name="Generate").wait_for()
    page.locator("#top").get_by_text("· ready").wait_for()
    planned(page)


def strangers(page: Any) -> set[str]:
    """The hosts, other than the page's own, that its browser turned to; also those that the page's policy stopped."""
    own = urlsplit(page.url).netloc
    hosts = {urlsplit(url).netloc for url in page.asked if not url.startswith(("data:", "blob:"))}
    return (hosts - {own}) | set(page.refused)


def planned(page: Any) -> None:
    """Wait until the plan is that of the form as it is."""
    until(page, "() => document.querySelector('#plan:not(.waiting) .message') !== null")


def until(page: Any, condition: str, arg: Any = None) -> None:
    """Wait until a function of JavaScript returns true. Unlike `wait_for_function`, it needs no `eval` in the page."""
    wait(page, lambda: page.evaluate(condition, arg))


def wait(page: Any, condition: Callable[[], Any]) -> None:
    """Wait until a condition is true, while the page's events are handled."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        page.wait_for_timeout(30)


def describe(page: Any, prompt: str, **settings: Any) -> None:
    """Fill the form: the prompt, and settings by their labels."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if settings:
        unfold(page)
    for label, value in settings.items():
        page.get_by_label(label, exact=True).fill(str(value))


def unfold(page: Any) -> None:
    """Show all settings."""
    if not page.get_by_label("Seed", exact=True).is_visible():
        page.get_by_text("All settings").click()


def pick(page: Any, preset: str) -> None:
    """Choose one of the presets by its label."""
    page.get_by_role("radio", name=preset, exact=True).check()


def generate(page: Any) -> str:
    """Press the button; returns the new job's id when the page shows it."""
    before = shown(page)
    page.get_by_role("button", name="Generate").click()
    return wait_for_another(page, before)


def wait_for_another(page: Any, before: str) -> str:
    """Until the page shows another job than `before`; returns its id."""
    until(page, f"before => !['', before].includes({_SHOWN})", before)
    return shown(page)


def wait_for_job(page: Any, job: str) -> None:
    """Until the page shows this job."""
    until(page, f"job => {_SHOWN} === job", job)


def shown(page: Any) -> str:
    """The id of the job that the page shows; empty if none."""
    return str(page.evaluate(f"() => {_SHOWN}"))


def play(page: Any, job: str) -> None:
    """Wait until the video of this job is shown and plays."""
    wait_for_job(page, job)
    until(page, "() => document.querySelector('#player')?.readyState >= 2")


def prompt_becomes(page: Any, text: str) -> None:
    """Wait until the form's prompt is this."""
    until(page, "text => document.querySelector('#prompt').value === text", text)


def shot(page: Any, name: str) -> None:
    """A picture for the documentation, if a folder for them is given."""
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True, animations="disabled")


@contextmanager
def recording_proxy() -> Iterator[tuple[str, list[str]]]:
    """A proxy that connects nobody and notes who was asked for: its address, and the notes."""
    seen: list[str] = []

    class Refuse(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(re.sub(r"\s+", " ", self.rfile.readline(4096).decode("latin-1")).strip())
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()

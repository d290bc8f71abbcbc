"""The page in a real browser, against the real engine: submit, watch, play, reuse, cancel, reload, restart."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_server import PROMPT, Server, serving

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
    pytest.mark.slow,
]
SHOTS = os.environ.get("WANDUET_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page") / "data", "--parallel", "1") as running:
        yield running


def open_page(browser: Any, url: str) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 960})
    page.hosts = set()
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]) if "//" in request.url[:9] else None)
    page.goto(url)
    page.get_by_role("button", name="Generate").wait_for()
    page.get_by_text("ready").wait_for(timeout=60_000)
    return page


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def play(page: Any) -> None:
    page.locator("#player").wait_for(timeout=120_000)
    page.wait_for_function("document.querySelector('#player').readyState >= 2", timeout=20_000)


def test_submit_watch_play_and_use_again(browser: Any, shown: Server, tmp_path: Path) -> None:
    page = open_page(browser, shown.url)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed").fill("11")
    page.get_by_role("button", name="Generate").click()
    page.locator("img.preview").wait_for(timeout=60_000)
    shot(page, "running")
    page.reload()
    play(page)
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT, "the form is remembered"
    assert page.locator(".details dd").all_inner_texts()[-1] == "11"
    shot(page, "done")

    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_role("button", name="Use these settings").click()
    page.wait_for_function(f"document.querySelector('textarea').value === '{PROMPT}'")

    (job,) = shown.http.get("/v1/videos").json()["data"]
    video = tmp_path / "video.mp4"
    video.write_bytes(shown.http.get(f"/v1/videos/{job['id']}/content").content)
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_text("More settings").click()
    page.locator(".upload input").set_input_files(video)
    page.get_by_text("These are the settings of that video.").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT
    assert len(page.hosts) == 1, "nothing is asked of another machine"
    page.close()


def test_the_plan_answers_as_settings_change(browser: Any, shown: Server) -> None:
    page = open_page(browser, shown.url)
    page.get_by_label("Size").fill("128x128")
    page.get_by_label("Size").press("Enter")
    page.locator("#message").get_by_text("Fits:").wait_for(timeout=60_000)
    page.get_by_label("Size").fill("100x100")
    page.get_by_label("Size").press("Enter")
    page.locator("#message").get_by_text("a multiple of 16").wait_for(timeout=20_000)
    shot(page, "plan")
    page.close()


def test_cancel_and_delete(browser: Any, shown: Server) -> None:
    page = open_page(browser, shown.url)
    page.get_by_label("Prompt", exact=True).fill("<b>bold</b> & cancelled")
    page.get_by_role("button", name="Generate").click()
    page.locator(".details .prompt").get_by_text("<b>bold</b> & cancelled").wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Stopped before it was done.").wait_for(timeout=20_000)
    cards = page.locator(".card").count()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_function(f"document.querySelectorAll('.card').length === {cards - 1}")
    page.close()


def test_an_open_page_outlives_a_restart_of_its_server(browser: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(data) as first:
        port = first.url.rsplit(":", 1)[1]
        page = open_page(browser, first.url)
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.get_by_role("button", name="Generate").click()
        page.locator("img.preview").wait_for(timeout=60_000)
        first.process.kill()
        first.process.wait()
    with serving(data, "--port", port) as second:
        page.reload()
        play(page)
        assert [video["status"] for video in second.http.get("/v1/videos").json()["data"]] == ["completed"]
        page.close()


def test_keys_close_the_page(browser: Any, tmp_path: Path) -> None:
    from wanduet.frontends.http_keys import KEYS_FILE, KeyRing

    data = tmp_path / "data"
    key = KeyRing(data / KEYS_FILE).add("ann")
    with serving(data) as closed:
        for path in ("/config", "/gradio_api/queue/data", "/assets/x.js"):
            assert closed.http.get(path).status_code == 401
        assert closed.http.get("/gradio_api/proxy=https://example.com").status_code == 404
        page = browser.new_page()
        page.goto(closed.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_text("not valid").wait_for()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.get_by_role("button", name="Generate").click()
        play(page)
        page.close()

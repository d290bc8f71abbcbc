"""The page in a real browser, against the real engine: everything that a visitor does, and what may go wrong beside."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import (
    CHROMIUM,
    alive,
    chromium,
    describe,
    generate,
    open_page,
    pick,
    planned,
    play,
    prompt_becomes,
    recording_proxy,
    shot,
    shown,
    strangers,
    unfold,
    until,
    wait,
    wait_for_another,
    wait_for_job,
)
from real_server import PROMPT, Server, serving, write_lora

pytest.importorskip("playwright", reason="needs playwright")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium"),
    pytest.mark.timeout(1200),
]
STEPS = 30  # enough for a preview to be seen before the video is there
# Controls without a label or a text, except those that screen readers skip.
UNNAMED = """() => [...document.querySelectorAll('button, input, select, textarea, video')].filter(node =>
  !node.closest('[aria-hidden]') && !node.labels?.length && !node.getAttribute('aria-label') && !node.textContent.trim()
).map(node => node.outerHTML)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page") / "data", "--parallel", "1") as running:
        yield running


@pytest.fixture
def page(browser: Any, served: Server) -> Iterator[Any]:
    with open_page(browser, served.url) as page:
        yield page


@pytest.fixture(scope="module")
def video(served: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished video's file."""
    job = served.wait(served.create(seed="11", negative_prompt="blur")["id"])
    path = tmp_path_factory.mktemp("video") / "fox.mp4"
    path.write_bytes(served.http.get(f"/v1/videos/{job['id']}/content").content)
    return path


def test_submit_watch_reload_and_play(page: Any) -> None:
    describe(page, PROMPT, Seed=11, Frames=17, Steps=STEPS)
    job = generate(page)
    page.locator("img.preview").wait_for()
    shot(page, "page-running")
    page.reload()
    alive(page)
    play(page, job)
    shot(page, "page")
    prompt_becomes(page, PROMPT)
    settings = dict(
        zip(page.locator(".details dt").all_inner_texts(), page.locator(".details dd").all_inner_texts(), strict=True)
    )
    assert settings == {
        "Size": "96 × 96", "Length": "1.1 s", "Frames": "17 at 16 a second", "Steps": str(STEPS), "Guidance": "3",
        "Shift": "3", "Sampler": "unipc", "Seed": "11",
    }  # fmt: skip
    with page.expect_download() as download:
        page.get_by_text("Download the MP4").click()
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"


def test_what_is_half_typed_is_remembered(page: Any) -> None:
    describe(page, "a half-typed thought", Steps=7, Seed=3)
    pick(page, "Tall")
    page.locator("#plan").get_by_text("96 × 160").wait_for()
    page.reload()
    alive(page)
    prompt_becomes(page, "a half-typed thought")
    line = page.locator("#plan")
    line.get_by_text("7 steps").wait_for()
    line.get_by_text("96 × 160").wait_for()
    line.get_by_text("seed 3", exact=False).wait_for()


def test_presets_and_the_plans_answer(page: Any) -> None:
    plan = page.locator("#plan")
    for name, words in {"Draft": "speed draft", "Standard": "speed near", "3 s": "3.1 s", "Wide": "160 × 96"}.items():
        pick(page, name)
        plan.get_by_text(words).wait_for()
    plan.get_by_text("Fits").wait_for()
    assert " of " in page.locator(".memory li").first.inner_text()
    unfold(page)
    size = page.get_by_label("Size", exact=True)
    size.fill("4096x4096")
    plan.get_by_text("is too much for this server").wait_for()
    plan.get_by_role("button", name="Use 1440 × 1440").wait_for()
    size.fill("96x100")
    plan.get_by_text("96 or 112 does").wait_for()
    plan.get_by_role("button", name="Use 96 × 96").click()
    plan.get_by_text("96 × 96").wait_for()
    assert page.get_by_role("radio", name="Square").is_checked()
    assert size.input_value() == "96x96"
    page.get_by_label("Prompt", exact=True).fill("a dog on a skateboard")
    page.locator("#notes").get_by_text("beyond its world").wait_for()


def test_the_plan_is_that_of_the_newest_form_whatever_arrives_last(page: Any) -> None:
    held: list[Any] = []
    plan = page.locator("#plan")
    page.route("**/page/plan", lambda route: route.continue_() if held else held.append(route))
    pick(page, "3 s")
    wait(page, lambda: bool(held))
    pick(page, "1 s")
    assert plan.get_attribute("aria-busy") == "true", "it does not look like the plan of this form"
    held[0].continue_()
    plan.get_by_text("1.1 s").wait_for()
    planned(page)
    assert "3.1 s" not in plan.inner_text()


def test_a_plan_that_takes_long_is_amber_and_says_how_long(page: Any) -> None:
    long = {"kind": "slow", "text": "Fits: about 2 h 7 min", "fixes": [], "memory": [], "work": "", "notes": []}
    page.route("**/page/plan", lambda route: route.fulfill(json=long))
    pick(page, "3 s")
    message = page.locator("#plan .message.slow", has_text="about 2 h 7 min")
    message.wait_for()
    colours = [message.evaluate(f"(node, part) => getComputedStyle(node, part).{name}", part)
               for name, part in (("color", None), ("backgroundColor", "::before"))]  # fmt: skip
    assert colours == ["rgb(146, 64, 14)"] * 2


def test_a_notification_of_what_is_done_for_those_who_asked(page: Any) -> None:
    page.evaluate("""() => {
      window.shown = [];
      window.Notification = class {
        static permission = 'default';
        static async requestPermission() { this.permission = 'granted'; }
        constructor(title, {body}) { shown.push([title, body]); }
      };
      Object.defineProperty(document, 'hidden', {get: () => true});
    }""")
    describe(page, PROMPT, Size="32x32", Frames=5, Steps=2)
    play(page, generate(page))
    assert page.evaluate("shown") == [], "nobody asked for one"
    page.get_by_role("button", name="Notify me").click()
    play(page, generate(page))
    assert page.evaluate("shown") == [["Done: miniature", PROMPT]]
    page.reload()
    page.get_by_role("button", name="Notifying", pressed=True).click()
    page.get_by_role("button", name="Notify me", pressed=False).wait_for()


def test_several_videos_of_one_prompt_and_what_is_wrong_in_words(page: Any, served: Server) -> None:
    describe(page, "a red circle moving left on a black background", Steps=2)
    pick(page, "1 s")
    frames = page.get_by_label("Frames", exact=True)
    frames.fill("16")
    page.locator("#plan").get_by_text("Frames: 16 does not work, 17 or 13 does.").wait_for()
    page.get_by_role("button", name="Generate").click()
    refusal = page.locator("#message").get_by_text("17 or 13")
    refusal.wait_for()
    frames.fill("17")
    refusal.wait_for(state="detached")
    page.locator("#plan").get_by_text("Fits").wait_for()
    page.get_by_label("Videos of this prompt").fill("2")
    page.locator("#plan").get_by_text("2 videos").wait_for()
    job = generate(page)
    play(page, job)
    assert page.locator("#stage video").count() == page.locator("#actions a").count() == 2
    assert served.get(job)["settings"]["num_videos_per_prompt"] == 2


def test_one_video_a_line_then_compared_searched_and_deleted_together(page: Any, served: Server) -> None:
    describe(
        page,
        "a green square growing on a black background\n\na blue star spinning on a gray background",
        Frames=9,
        Steps=2,
    )
    pick(page, "1 s")
    page.get_by_label("One video a line").check()
    page.locator("#plan").get_by_text("for each of the 2 prompts").wait_for()
    page.get_by_role("button", name="Generate 2 videos").click()
    page.get_by_text("2 videos are in the queue.").wait_for()
    made = served.http.get("/v1/videos?limit=2").json()["data"]
    assert sorted(video["prompt"][:6] for video in made) == ["a blue", "a gree"]
    for video in made:
        served.wait(video["id"])
    page.get_by_label("One video a line").uncheck()

    first, second = (page.locator(f"[data-id={video['id']}]") for video in made)
    page.get_by_label("Search videos").fill("green SQUARE")
    first.wait_for(state="detached")
    second.wait_for()
    page.get_by_label("Search videos").fill("")
    first.wait_for()
    first.hover()
    page.locator(".card", has=first).get_by_role("button", name="Favourite").click()
    page.reload()
    alive(page)
    page.get_by_role("button", name="Favourites").click()
    second.wait_for(state="detached")
    first.wait_for()
    page.get_by_role("button", name="Favourites").click()

    page.get_by_role("button", name="Select", exact=True).click()
    page.locator(".card", has=first).get_by_role("checkbox").check()
    second.click()
    page.get_by_role("button", name="Compare").click()
    until(page, "() => document.querySelectorAll('.compare video').length === 2")
    page.get_by_role("button", name="Close").click()
    downloads: list[Any] = []
    page.on("download", lambda download: downloads.append(download))
    page.get_by_role("button", name="Download", exact=True).click()
    wait(page, lambda: len(downloads) == 2)
    assert {one.suggested_filename for one in downloads} == {f"{video['id']}.mp4" for video in made}
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#selection").get_by_role("button", name="Delete").click()
    first.wait_for(state="detached")
    second.wait_for(state="detached")
    assert {served.http.get(f"/v1/videos/{video['id']}").status_code for video in made} == {404}


def test_a_preset_counts_at_once(page: Any, served: Server) -> None:
    """Generate right after a preset: the new value, not the one before."""
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    pick(page, "Draft")
    pick(page, "1 s")
    job = generate(page)
    settings = served.get(job)["settings"]
    assert (settings["speed"], settings["num_frames"]) == ("draft", 17)


def test_a_submission_that_is_answered_late_undoes_no_newer_choice(page: Any, served: Server) -> None:
    chosen = served.create(seed="1")["id"]
    describe(page, PROMPT, Frames=9, Steps=2)
    pick(page, "1 s")
    held: list[Any] = []
    page.route("**/v1/videos", lambda route: held.append(route))
    page.get_by_role("button", name="Generate").click()
    wait(page, lambda: bool(held))
    page.locator(f"[data-id={chosen}]").click()
    wait_for_job(page, chosen)
    held[0].continue_()
    page.locator("#generate:not([aria-disabled])").wait_for()
    newest = served.http.get("/v1/videos?limit=1").json()["data"][0]["id"]
    page.locator(f"[data-id={newest}]").wait_for()
    assert shown(page) == chosen != newest


@pytest.mark.slow  # starts servers of its own
def test_an_example_fills_the_prompt(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path / "data") as fresh, open_page(browser, fresh.url) as page:
        page.get_by_role("button", name="a blue star").click()
        prompt_becomes(page, "a blue star spinning on a gray background")
        page.keyboard.press("Control+Enter")
        wait_for_another(page, "")


def test_cancel_retry_new_seed_and_delete(page: Any, served: Server) -> None:
    prompt = "<b>bold</b> & cancelled"
    describe(page, prompt, Steps=100)
    first = generate(page)
    assert page.locator(".details .prompt").inner_text() == prompt
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Stopped before it was done.").wait_for()
    assert served.get(first)["error"]["code"] == "cancelled"

    page.get_by_role("button", name="Try again").click()
    second = wait_for_another(page, first)
    assert served.get(second)["settings"] == served.get(first)["settings"]

    page.get_by_role("button", name="Cancel, try a new seed").click()
    third = wait_for_another(page, second)
    assert served.get(second)["error"]["code"] == "cancelled"
    seeds = [served.get(job)["settings"].pop("seed") for job in (second, third)]
    assert seeds[0] != seeds[1]

    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Stopped before it was done.").wait_for()
    assert shown(page) == third, "a no is a no"
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete", exact=True).click()
    page.locator(f"[data-id={third}]").wait_for(state="detached")
    assert served.http.get(f"/v1/videos/{third}").status_code == 404

    page.locator(f"[data-id={first}]").click()
    wait_for_job(page, first)
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_role("button", name="Use these settings").click()
    prompt_becomes(page, prompt)


def test_settings_from_a_video_that_is_chosen_or_dropped(page: Any, video: Path) -> None:
    data = base64.b64encode(video.read_bytes()).decode()
    page.evaluate(
        """data => {
          const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], 'fox.mp4', {type: 'video/mp4'}));
          for (const kind of ['dragover', 'drop'])
            document.querySelector('h1').dispatchEvent(
              new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        data,
    )
    page.get_by_role("button", name="Use its settings").click()
    page.get_by_text("These are the settings of fox.mp4.").wait_for()
    prompt_becomes(page, PROMPT)
    page.locator("#plan").get_by_text("32 × 32 · 0.3 s · 2 steps · seed 11").wait_for()
    assert not page.evaluate("document.body.matches('.dropping, .reading')")

    page.get_by_label("Prompt", exact=True).fill("something else")
    page.locator(".upload input").set_input_files(video)
    page.get_by_role("button", name="Use its settings").click()
    prompt_becomes(page, PROMPT)
    unfold(page)
    assert page.get_by_label("Negative prompt").input_value() == "blur"

    page.locator(".upload input").set_input_files({"name": "x.mp4", "mimeType": "video/mp4", "buffer": b"no video"})
    page.get_by_text("it must be a video file").wait_for()


def test_start_from_the_pictures_of_a_video(page: Any, served: Server, video: Path) -> None:
    describe(page, "a blue star spinning on a gray background", Frames=9, Steps=4)
    strength = page.get_by_label("Strength", exact=True)
    assert not strength.is_visible(), "it means nothing without an input video"
    page.locator(".upload input").set_input_files(video)
    page.get_by_role("button", name="Start from its pictures").click()
    page.get_by_text("Starts from the pictures of fox.mp4").wait_for()
    until(page, "() => document.querySelector('.clip video').readyState >= 2")
    page.locator("#plan").get_by_text("96 × 96 · 0.3 s · 4 steps · starts from fox.mp4").wait_for()
    strength.fill("0.5")
    planned(page)
    shot(page, "page-input")
    first = generate(page)
    play(page, first)
    shown_settings = page.locator(".details dl").inner_text()
    assert "Strength\n0.5" in shown_settings
    assert "Made from\nan input video" in shown_settings

    page.get_by_role("button", name="Remove").click()
    strength.wait_for(state="hidden")
    page.get_by_role("button", name="Use these settings").click()
    page.get_by_text("Starts from the pictures of the same input video").wait_for()
    strength.wait_for()
    page.locator("#plan").get_by_text("starts from the same input video").wait_for()
    second = generate(page)
    settings = [served.get(job)["settings"] for job in (first, second)]
    assert settings[0] == settings[1]
    assert (settings[0]["strength"], settings[0]["input_video"][:7]) == (0.5, "sha256:")


def test_lora_are_added_kept_with_the_job_and_restored(page: Any, served: Server, tmp_path: Path) -> None:
    assert not page.locator("#loras").is_visible(), "this server has none"
    folder, mine = served.data / "loras", page.locator(".lora", has_text="style.safetensors")
    write_lora(folder / "style.safetensors", 0.3)
    write_lora(folder / "wide.safetensors", 0.3, dim=64)
    page.reload()
    alive(page)
    choice = page.get_by_role("combobox", name="LoRA")
    assert choice.locator("option", has_text="wide.safetensors (does not fit: ").is_disabled()
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("spinbutton", name="Strength of style.safetensors").fill("0.8")
    page.locator("#plan").get_by_text("style.safetensors 0.8").wait_for()
    assert mine.locator("[type=range]").input_value() == "0.8"
    assert page.evaluate(UNNAMED) == []
    shot(page, "page-lora")
    describe(page, PROMPT, Size="32x32", Frames=5, Steps=2)
    job = generate(page)
    assert served.wait(job)["loras"][0]["strength"] == 0.8
    page.locator(".details dl").get_by_text("style.safetensors 0.8").wait_for()

    page.get_by_role("button", name="Remove style.safetensors").click()
    mine.wait_for(state="detached")
    page.get_by_role("button", name="Use these settings").click()
    mine.wait_for()
    page.get_by_role("button", name="Model's defaults").click()
    mine.wait_for(state="detached")
    video = tmp_path / "fox.mp4"
    video.write_bytes(served.http.get(f"/v1/videos/{job}/content").content)
    page.locator(".upload input").set_input_files(video)
    page.get_by_role("button", name="Use its settings").click()
    mine.wait_for()
    page.reload()
    mine.wait_for()  # remembered

    for file in folder.iterdir():
        file.unlink()
    page.reload()
    alive(page)
    assert not mine.is_visible()
    page.get_by_role("button", name="Use these settings").click()
    page.get_by_text("This server does not have the LoRA style.safetensors any more.").wait_for()
    page.locator(".upload input").set_input_files(video)
    page.get_by_role("button", name="Use its settings").click()
    page.get_by_text("It was made with the LoRA style.safetensors, which this server does not have").wait_for()


def test_a_phone_and_the_dark(browser: Any, served: Server, video: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "color_scheme": "dark"}
    with open_page(browser, served.url, **phone) as page:
        page.locator(".card").first.wait_for()
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) <= 0, "nothing sticks out"
        page.get_by_text("All settings").click()
        assert page.evaluate(wide) <= 0
        assert page.evaluate(UNNAMED) == [], "a screen reader has a name for each control"
        page.get_by_text("All settings").click()
        page.get_by_role("button", name="Use these settings").click()
        in_view = "() => document.querySelector('#prompt').getBoundingClientRect().top >= 0"
        until(page, in_view)  # what the button did can be seen
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        page.locator(".card .pick").last.click()
        until(page, "() => document.querySelector('#player').readyState >= 2")
        planned(page)
        shot(page, "page-phone")


@pytest.mark.slow  # starts servers of its own
def test_without_a_model_the_page_offers_to_fetch_it_or_the_miniature(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(tmp_path / "data", command=("ui", "--no-browser")) as waiting, browser.new_context() as context:
        context.set_default_timeout(180_000)
        page = context.new_page()
        page.goto(waiting.url)
        page.get_by_role("button", name="Fetch Wan2.1-T2V-1.3B (9.8 GB)").wait_for()
        page.get_by_role("radio", name="29 GB").check()
        page.get_by_role("button", name="Fetch Wan2.1-T2V-1.3B (29 GB)").click()
        page.get_by_text("it cannot be fetched from the hub").wait_for()
        assert waiting.http.post("/v1/videos", json={"prompt": PROMPT}).status_code == 503
        page.get_by_role("button", name="Try the miniature").click()
        alive(page)  # without a reload by hand
        assert waiting.http.get("/v1/models").json()["data"][0]["id"] == "miniature"


@pytest.mark.slow  # starts servers of its own
def test_an_open_page_outlives_a_restart_of_its_server(browser: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(data) as first:
        port = first.url.rsplit(":", 1)[1]
        opened = open_page(browser, first.url)
        page = opened.__enter__()
        describe(page, PROMPT, Steps=STEPS)
        job = generate(page)
        page.locator("img.preview").wait_for()
        page.get_by_label("Prompt", exact=True).fill("half typed")
        first.process.kill()
        first.process.wait()
        page.get_by_role("alert").wait_for()
    with serving(data, "--port", port) as second:
        play(page, job)
        prompt_becomes(page, "half typed")
        assert not page.get_by_role("alert").is_visible()
        assert [video["status"] for video in second.http.get("/v1/videos").json()["data"]] == ["completed"]
        opened.__exit__(None, None, None)


@pytest.mark.slow  # starts servers of its own
def test_no_request_leaves_the_machine(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the browser's, all of which are noted, nor the server's, which would go to a proxy that notes them."""
    with recording_proxy() as (proxy, seen):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        with serving(tmp_path / "data") as served, open_page(browser, served.url) as page:
            describe(page, PROMPT, Frames=9, Steps=4)
            first = generate(page)
            play(page, first)
            page.get_by_role("button", name="Same with a new seed").click()
            play(page, wait_for_another(page, first))
            page.reload()
            alive(page)
            assert len(page.asked) > 20
            assert strangers(page) == set()
    assert seen == []


@pytest.mark.slow  # starts servers of its own
def test_keys_close_the_page(browser: Any, tmp_path: Path) -> None:
    from wanduet.doors.http.keys import KEYS_FILE, KeyRing

    data = tmp_path / "data"
    keys = KeyRing(data / KEYS_FILE)
    key = keys.add("ann")
    with serving(data) as closed:
        for path in ("/page/about", "/page/events", "/page/videos?after=x"):
            assert closed.http.get(path).status_code == 401
        context = browser.new_context()
        context.set_default_timeout(180_000)
        page = context.new_page()
        page.goto(closed.url)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_text("not valid").wait_for()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        alive(page)
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        play(page, generate(page))
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        alive(page)
        keys.remove(keys.records()[0].id)
        page.get_by_label("API key").wait_for()  # an open page goes to the door when its key is revoked
        context.close()

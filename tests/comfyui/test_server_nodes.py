"""The nodes of a server: against `wanduet serve` with the miniature, and against a server that does what a test says."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.comfyui.stand_ins import Host, InterruptProcessingException, NodeOutput
from tests.e2e.real_server import Server, serving, wait_until
from wanduet.doors.http.keys import KeyRing

Run = Callable[..., NodeOutput]
PROMPT = "a red circle moving left on a black background"
SMALL = {"prompt": PROMPT, "width": 32, "height": 32, "length": 5, "steps": 2, "guidance": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("served") / "data", "--no-page") as running:
        yield running


def ids(server: Server) -> list[str]:
    return [video["id"] for video in server.http.get("/v1/videos").json()["data"]]


def test_a_video_of_the_server_and_again_the_same_one(run: Run, host: Host, server: Server) -> None:
    there, model = run("WanduetServer", address=server.url).args
    assert model == "miniature"
    video, images = run("WanduetServerVideo", server=there, **SMALL, seed=7, fps=8).args
    (made,) = ids(server)
    assert video.get_stream_source().read() == server.http.get(f"/v1/videos/{made}/content").content
    assert np.array_equal((images.numpy() * 255).round().astype(np.uint8), server.frames(made))
    settings = server.get(made)["settings"]
    assert (settings["width"], settings["num_frames"], settings["num_inference_steps"]) == (32, 5, 2)
    assert (settings["seed"], settings["fps"], settings["guidance_scale"]) == (7, 8, 1.0)
    assert host.shown[-1] == (100, 100)
    assert host.unloaded == 0  # nothing runs here
    run("WanduetServerVideo", server=there, **SMALL, seed=7, fps=8)  # as after a restart of ComfyUI
    assert ids(server) == [made]


def test_an_interrupt_cancels_the_video_on_the_server(run: Run, host: Host, server: Server) -> None:
    there = run("WanduetServer", address=f"{server.url}/").args[0]
    long = {**SMALL, "length": 33, "steps": 140, "seed": 8}
    host.interrupt_at = 0.01
    with pytest.raises(InterruptProcessingException):
        run("WanduetServerVideo", server=there, **long)
    first = ids(server)[0]
    wait_until(lambda: server.get(first)["status"] == "failed")
    assert server.get(first)["error"]["code"] == "cancelled"
    # Queued again, it is made anew: the one that was cancelled does not stay in the way.
    host.interrupt_at = 0.01
    with pytest.raises(InterruptProcessingException):
        run("WanduetServerVideo", server=there, **long)
    assert first not in ids(server)


def test_refusals_are_the_servers_sentences(run: Run, pack: ModuleType, server: Server) -> None:
    there = run("WanduetServer", address=server.url).args[0]
    answer = server.http.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 6})
    with pytest.raises(Exception, match="num_frames=6 is not allowed") as error:
        run("WanduetServerVideo", server=there, **{**SMALL, "length": 6}, seed=1)
    assert str(error.value) == answer.json()["error"]["message"]


def test_a_wrong_key_is_refused_and_the_environments_key_goes_to_its_server_alone(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = KeyRing(server.data / "keys.json").add("comfyui")
    with pytest.raises(Exception, match="key") as error:
        run("WanduetServer", address=server.url, key="wrong")
    assert str(error.value) == server.http.get("/v1/models").json()["error"]["message"]
    with pytest.raises(Exception, match="no key has") as unsendable:
        run("WanduetServer", address=server.url, key=f"{key}\nx")
    assert key not in str(unsendable.value)
    assert run("WanduetServer", address=server.url, key=key).args[1] == "miniature"
    monkeypatch.setenv("WANDUET_API_KEY", key)
    with pytest.raises(Exception, match="key"):
        run("WanduetServer", address=server.url)
    monkeypatch.setenv("WANDUET_SERVER", f"{server.url}/")
    for address in ("", server.url):
        there = run("WanduetServer", address=address).args[0]
        assert there.key == key
        assert key not in repr(there)


class Scripted:
    """A server whose answers a test gives: by method and path, a status, a type and a body, one after the other."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, str, bytes]]] = {}
        self.asked: list[tuple[str, Any, Any]] = []

    def on(self, call: str, *bodies: Any, status: int = 200, kind: str = "application/json") -> None:
        """The last body is repeated; a status may be beside a body."""
        given = [body if isinstance(body, tuple) else (status, body) for body in bodies]
        self.answers[call] = [
            (code, kind, body if isinstance(body, bytes) else json.dumps(body).encode()) for code, body in given
        ]


@pytest.fixture
def scripted() -> Iterator[SimpleNamespace]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            call = f"{self.command} {self.path}"
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            script.asked.append((call, self.headers, json.loads(body) if body else None))
            left = script.answers.get(call, [(404, "text/html", b"<h1>ComfyUI</h1>")])
            status, kind, content = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if status == 308:
                self.send_header("Location", "https://example.org/v1/models")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with listening(Handler) as url:
        yield SimpleNamespace(url=url, on=script.on, asked=script.asked)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_is_no_wanduet_server_is_said(run: Run, scripted: SimpleNamespace) -> None:
    with pytest.raises(Exception, match=r"is no wanduet server: it answers 404"):
        run("WanduetServer", address=scripted.url)
    scripted.on("GET /v1/models", b"hello", kind="text/plain")
    with pytest.raises(Exception, match="its answer is not JSON"):
        run("WanduetServer", address=scripted.url)
    scripted.on("GET /v1/models", {"object": "list"})
    with pytest.raises(Exception, match="it lists no models"):
        run("WanduetServer", address=scripted.url)
    with pytest.raises(Exception, match="is no address of a server"):
        run("WanduetServer", address="ftp://127.0.0.1")
    with listening(BaseHTTPRequestHandler) as gone:
        pass
    with pytest.raises(Exception, match=r"No wanduet server answers at .*Start one with `wanduet serve`"):
        run("WanduetServer", address=gone)


def test_a_redirect_is_named_and_the_key_not_sent_there(run: Run, scripted: SimpleNamespace) -> None:
    scripted.on("GET /v1/models", b"", status=308)
    with pytest.raises(Exception, match=r"refers to https://example\.org/v1/models: use that address"):
        run("WanduetServer", address=scripted.url, key="secret")
    assert len(scripted.asked) == 1


def video(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "video_1", "status": status, "progress": 0, "error": None, **more}


def moving_picture() -> str:
    """A data URI of an animated WebP, whose frames are red, blue and green."""
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "blue", "green")]
    content = io.BytesIO()
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def stream(*events: tuple[str, Any]) -> bytes:
    return b": ping\r\n\r\n" + b"".join(
        f"event: {name}\r\ndata: {json.dumps(data)}\r\n\r\n".encode() for name, data in events
    )


def test_a_lost_stream_is_taken_up_again_and_a_failure_is_said(
    run: Run, host: Host, pack: ModuleType, scripted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{pack.__name__}.client.PAUSE_SECONDS", 0.0)
    failed = video("failed", error={"message": "The job was cancelled."})
    scripted.on("GET /v1/models", {"data": [{"id": "m"}]})
    scripted.on("POST /v1/videos", video("queued"))
    scripted.on(
        "GET /v1/videos/video_1/events",
        stream(("video", video("in_progress", progress=40)), ("preview", {"image": moving_picture()})),
        stream(("done", failed)),
        kind="text/event-stream",
    )
    scripted.on("GET /v1/videos/video_1", (502, b"<h1>Bad gateway</h1>"), video("in_progress"), failed)
    there = run("WanduetServer", address=scripted.url).args[0]
    with pytest.raises(Exception, match=r"^The job was cancelled\.$"):
        run("WanduetServerVideo", server=there, prompt="x", seed=1)
    assert (40, 100) in host.shown
    (picture,) = host.previews
    assert picture.size == (32, 16)
    assert picture.getpixel((16, 8))[2] > 200  # the frame in the middle


def test_a_video_that_is_deleted_meanwhile_is_said(run: Run, scripted: SimpleNamespace) -> None:
    scripted.on("GET /v1/models", {"data": [{"id": "m"}]})
    scripted.on("POST /v1/videos", video("queued"))
    scripted.on("GET /v1/videos/video_1/events", stream(("deleted", {"id": "video_1"})), kind="text/event-stream")
    there = run("WanduetServer", address=scripted.url).args[0]
    with pytest.raises(Exception, match="was deleted on the server before it was finished"):
        run("WanduetServerVideo", server=there, prompt="x", seed=1)


def test_a_body_has_what_is_set_and_the_names_of_loras(run: Run, scripted: SimpleNamespace) -> None:
    refusal = {"error": {"message": "Not today."}}
    scripted.on("GET /v1/models", {"data": [{"id": "m"}]})
    scripted.on("POST /v1/videos", refusal, status=400)
    there = run("WanduetServer", address=scripted.url).args[0]
    loras = run("WanduetServerLora", name="wan/style.safetensors", strength=0.5).args[0]
    keys = []
    for take_up in (True, True, False, False):
        with pytest.raises(Exception, match=r"^Not today\.$"):
            run("WanduetServerVideo", server=there, prompt="x", seed=3, loras=loras, take_up=take_up, speed="fast")
        call, headers, body = scripted.asked[-1]
        assert call == "POST /v1/videos"
        keys.append(headers["Idempotency-Key"])
    assert body == {
        "prompt": "x", "width": 832, "height": 480, "num_frames": 81, "seed": 3, "speed": "fast",
        "loras": [{"name": "style.safetensors", "strength": 0.5, "start": 0.0, "end": 1.0}],
    }  # fmt: skip
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3

"""A client of a wanduet server, with the standard library alone. It knows nothing of ComfyUI."""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlsplit

ANSWER_SECONDS = 60.0  # without a byte from the server; an event stream has a ping every 15 seconds
POLL_SECONDS = 0.25  # between two looks at ComfyUI's interrupt
PAUSE_SECONDS = 2.0  # before a lost connection is tried again
PATIENCE_SECONDS = 300.0  # without a connection, before a running video is given up
MOST_BYTES = 2**26  # of one line of an event stream
FINISHED = ("completed", "failed")
_BUSY = (429, 502, 503, 504)  # statuses of a server, or a proxy before it, that answers later

Video = dict[str, Any]
Event = tuple[str, dict[str, Any]]


class ServerError(Exception):
    """A refusal in the server's own words, or why there is no answer. `status`: of the answer; None without one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Server:
    """Where a server is, and the key for it."""

    address: str
    key: str = field(default="", repr=False)


class Client:
    """Calls one server. Follows no redirects: they would take the key to another address. Raises ServerError."""

    def __init__(self, server: Server) -> None:
        """Checks the address and connects to nothing."""
        text = server.address.strip().rstrip("/").removesuffix("/v1")
        self.address = text if "://" in text else f"http://{text}"
        parts = urlsplit(self.address)
        try:
            self._port = parts.port
        except ValueError:
            self._port = None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"{server.address!r} is no address of a server. Example: http://127.0.0.1:8000")
        if not (server.key.isascii() and server.key.isprintable()):  # an error of the header would quote it
            raise ServerError("The key has characters that no key has.")
        self._host, self._is_secure, self._prefix = parts.hostname, parts.scheme == "https", parts.path
        self._headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}

    def model(self) -> str:
        """Return the name of the server's model."""
        answer = self._json("GET", "/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (LookupError, TypeError):
            raise self._no_server("it lists no models") from None

    def create(self, body: dict[str, Any], key: str) -> Video:
        """Queue a video, or return the one that is there with the same `key` (Idempotency-Key)."""
        return self._json("POST", "/v1/videos", body, {"Idempotency-Key": key})

    def video(self, video_id: str) -> Video:
        """Return a video's state."""
        return self._json("GET", f"/v1/videos/{quote(video_id)}")

    def cancel(self, video_id: str) -> None:
        """Cancel a video; does nothing to one that has ended."""
        self._json("POST", f"/v1/videos/{quote(video_id)}/cancel")

    def delete(self, video_id: str) -> None:
        """Delete a video; its Idempotency-Key is free again."""
        self._json("DELETE", f"/v1/videos/{quote(video_id)}")

    def content(self, video_id: str) -> bytes:
        """Return a finished video's file."""
        return self._bytes("GET", f"/v1/videos/{quote(video_id)}/content")

    def events(self, video_id: str) -> Generator[Event | None, None, None]:
        """Yield a video's events until the stream ends; None whenever POLL_SECONDS pass without one."""
        connected, answer = self._open("GET", f"/v1/videos/{quote(video_id)}/events")
        found: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read_events, args=(answer, found), name="wanduet-events", daemon=True)
        reader.start()
        try:
            while True:
                try:
                    event = found.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            with suppress(OSError):  # it has ended
                connected.shutdown(socket.SHUT_RDWR)  # else the reader would wait for the next event
            reader.join()

    def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        content = self._bytes(method, path, body, headers)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._no_server("its answer is not JSON")
        return answer

    def _bytes(
        self, method: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        _, answer = self._open(method, path, body, headers)
        try:
            with answer:
                return answer.read()
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from error

    def _open(
        self, method: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[socket.socket, HTTPResponse]:
        kind = HTTPSConnection if self._is_secure else HTTPConnection
        connection = kind(self._host, self._port, timeout=ANSWER_SECONDS)
        sent = {"Connection": "close", "Accept": "*/*"} | self._headers | (headers or {})
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        try:
            connection.request(method, self._prefix + path, data, sent)
            used = connection.sock
            answer = connection.getresponse()
            if answer.status < 300:
                return used, answer
            with answer:
                content = answer.read(2**20)
        except (OSError, HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from error
        raise self._refusal(answer, content)

    def _refusal(self, answer: HTTPResponse, content: bytes) -> ServerError:
        """Return the error of an answer that is no success, in the server's words if it is a wanduet server's."""
        if (place := answer.getheader("Location")) is not None and answer.status < 400:
            return ServerError(f"{self.address} refers to {place}: use that address.", answer.status)
        try:
            message = json.loads(content)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            return self._no_server(f"it answers {answer.status} {answer.reason}", answer.status)
        return ServerError(str(message), answer.status)

    def _no_server(self, reason: str, status: int = 200) -> ServerError:
        return ServerError(f"What answers at {self.address} is no wanduet server: {reason}.", status)

    def _unreachable(self, error: Exception) -> ServerError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ServerError(
            f"No wanduet server answers at {self.address} ({reason}). Start one with `wanduet serve`, or correct the address."
        )


Show = Callable[[Video, str | None], None]


def follow(client: Client, video: Video, show: Show, check: Callable[[], None]) -> Video:
    """Wait until a video has ended, and return it.

    `show(video, image)` gets each change, and previews as data URIs. `check` is called a few times a second, and raises
    to end the wait. A server that restarts goes on with its videos: a lost connection is tried again for some minutes.

    Raises ServerError, and what `show` and `check` raise.
    """
    lost = None
    while video["status"] not in FINISHED:
        try:
            video = _followed(client, video, show, check)
            lost = None
        except ServerError as error:
            if error.status is not None and error.status not in _BUSY:
                raise
            lost = time.monotonic() if lost is None else lost
            if time.monotonic() - lost > PATIENCE_SECONDS:
                raise ServerError(
                    f"{error} Queue the same workflow to take up the video {video['id']} again."
                ) from error
        if video["status"] not in FINISHED:
            _pause(check)
    show(video, None)
    return video


def _followed(client: Client, video: Video, show: Show, check: Callable[[], None]) -> Video:
    """Return a video's state when its event stream ends."""
    with closing(client.events(video["id"])) as events:
        for event in events:
            check()
            if event is None:
                continue
            name, data = event
            if name == "deleted":
                raise ServerError("The video was deleted on the server before it was finished.", 404)
            if name == "error":
                raise ServerError(data["error"]["message"], 401)
            if name == "preview":
                show(video, data["image"])
            elif name in ("video", "done"):
                video = data
                show(video, None)
    return client.video(video["id"])


def _pause(check: Callable[[], None]) -> None:
    end = time.monotonic() + PAUSE_SECONDS
    while time.monotonic() < end:
        check()
        time.sleep(POLL_SECONDS)


def _read_events(answer: HTTPResponse, found: "queue.SimpleQueue[Event | None]") -> None:
    """Put the events of a stream into a queue, and None when it ends."""
    try:
        with answer:
            name, data = "", []
            while line := answer.readline(MOST_BYTES):
                label, _, value = line.decode(errors="replace").rstrip("\r\n").partition(":")
                value = value.removeprefix(" ")
                if label == "event":
                    name = value
                elif label == "data":
                    data.append(value)
                elif not label and not value and data:
                    with suppress(ValueError):
                        found.put((name, json.loads("\n".join(data))))
                    name, data = "", []
    except (OSError, HTTPException, ValueError, AttributeError):  # lost, or closed by the other thread
        pass
    finally:
        found.put(None)

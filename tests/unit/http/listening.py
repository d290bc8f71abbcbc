"""A server that listens at a socket, in a thread, and clients that are not polite."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from api import Api
from fastapi import FastAPI

from wanduet.doors.http.listen import Server, listen

WAIT = 120.0  # seconds: for what must happen, on a busy machine too


class Listening:
    """A running server and its address."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.port = 0
        self._app: FastAPI = api.app
        self._ready = threading.Event()
        self.server = Server(self._app, self._announce)
        self._listener = listen("127.0.0.1", 0)
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],))

    def _announce(self, url: str) -> None:
        self.port = int(url.rpartition(":")[2])
        self._ready.set()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(WAIT)

    def ask_to_stop(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def ended(self) -> bool:
        self._thread.join(WAIT)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.ask_to_stop()
        self.ask_to_stop()
        assert self.ended()
        self._listener.close()

    def connect(self, sent: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(WAIT)
        client.connect(("127.0.0.1", self.port))
        client.sendall(sent)
        return client

    def ask(self, method: str, path: str, body: Any = None) -> "Answer":
        """One request of a polite client, on a connection of its own."""
        content = b"" if body is None else json.dumps(body).encode()
        with self.connect(request(method, path, content, "Connection: close")) as client:
            return Answer.read(client)


class Answer:
    """An answer as it came over a socket; `status` 0 if none came."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\r\n\r\n")
        self.head = head.decode().lower()
        self.status = int(head.split()[1]) if head else 0

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])

    @classmethod
    def read(cls, client: socket.socket) -> "Answer":
        """All there is until the server ends the connection."""
        data = b""
        try:
            while part := client.recv(65536):
                data += part
        except ConnectionError:
            pass
        return cls(data)


def request(method: str, path: str, content: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers]
    if content:
        lines += [f"Content-Length: {len(content)}", "Content-Type: application/json"]
    return "\r\n".join([*lines, "", ""]).encode() + content


@contextmanager
def listening(api: Api) -> Iterator[Listening]:
    server = Listening(api)
    server.start()
    try:
        yield server
    finally:
        server.close()

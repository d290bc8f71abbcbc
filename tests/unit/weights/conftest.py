"""A model of a few kilobytes, and a hub on this machine that serves it, well or badly."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

COMMIT, OLDER = "a" * 40, "b" * 40


@dataclass
class Hub:
    """What is served, and how badly. `cut` drops the connection after so many bytes, as often as `cuts` says."""

    files: dict[str, bytes]
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    cut: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    wrong: dict[str, bytes] = field(default_factory=dict)  # sent instead of the published content
    wrong_times: int = 99
    length: dict[str, int] = field(default_factory=dict)  # told instead of the true length
    status: int = 200
    status_after_cut: int | None = None
    url: str = ""

    def is_large(self, name: str) -> bool:
        return name.endswith(".safetensors")

    def etag(self, name: str) -> str:
        data = self.files[name]
        if self.is_large(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        lfs = {"sha256": self.etag(name), "oid": self.etag(name), "size": len(data), "pointerSize": 100}
        return {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": self.etag(name)} | (
            {"lfs": lfs, "blobId": "c" * 40} if self.is_large(name) else {"blobId": self.etag(name)}
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.status != 200:
            return self._json({"error": "out of order"}, hub.status)
        if path.startswith("/api/models/some/gone"):
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/"):
            revision = path.split("/revision/")[1] if "/revision/" in path else "main"
            if "/tree/" in path:
                return self._json([hub.entry(name) for name in hub.files])
            if revision not in ("main", COMMIT, OLDER):
                return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            commit = OLDER if revision == OLDER else COMMIT
            siblings = [hub.entry(name) for name in hub.files]
            return self._json({"id": "some/model", "sha": commit, "siblings": siblings})
        return self._file(*path.split("/resolve/")[1].split("/", 1), body=body)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _file(self, commit: str, name: str, body: bool) -> None:
        hub = self.hub
        if name not in hub.files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data = hub.files[name]
        if body and name in hub.wrong and hub.wrong_times > 0:
            hub.wrong_times -= 1
            data = hub.wrong[name]
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hub.etag(name)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Linked-Size", str(len(hub.files[name])))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(hub.length.get(name, len(data) - start)))
        self.end_headers()
        if not body:
            return None
        piece = data[start:]
        if name in hub.cut and hub.cuts > 0:
            hub.cuts -= 1
            piece = piece[: hub.cut[name]]
            hub.status = hub.status_after_cut or hub.status
        if len(piece) != hub.length.get(name, len(data) - start):
            self.close_connection = True
        hub.sent[name] += len(piece)
        self.wfile.write(piece)
        return None


def model_files() -> dict[str, bytes]:
    """A folder in the Diffusers layout; its tensors belong to no real model."""
    tensor = {"weight": torch.arange(4096.0).reshape(64, 64)}
    configs = {
        "model_index.json": {"_class_name": "WanPipeline"},
        "transformer/config.json": {"num_layers": 2, "text_dim": 4096},
        "vae/config.json": {"base_dim": 16},
        "text_encoder/config.json": {"num_layers": 2},
        "tokenizer/tokenizer.json": {},
    }
    return {
        **{name: json.dumps(value).encode() for name, value in configs.items()},
        "transformer/diffusion_pytorch_model.safetensors": save(tensor),
        "vae/diffusion_pytorch_model.safetensors": save({"weight": tensor["weight"] + 1}),
        "text_encoder/model.safetensors": save({"weight": tensor["weight"] + 2}),
        "README.md": b"not needed",
        "old.bin": b"a pickle",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same model as a folder."""
    for name, data in model_files().items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, and huggingface_hub pointed at it with an empty cache."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import close_session

    served = Hub(model_files())
    handler = type("Handler", (_Handler,), {"hub": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    close_session()
    yield served
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()

"""A server over a store, in this process, and helpers that play its worker."""

from typing import Any

from fastapi.testclient import TestClient

from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.server import create_app
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.records import Lease, OutputFile, StoredJob
from wanduet.jobs.store import JobStore

CONTENT = bytes(range(256)) * 8


class Api:
    """A client of a server over a store, with helpers that play the worker."""

    def __init__(self, store: JobStore, settings: ServerSettings | None = None, **options: Any) -> None:
        self.store = store
        self.app = create_app(store, WAN_1_3B, settings or ServerSettings(stream_poll_seconds=0.01), **options)
        self.context = self.app.state.context
        self.http = TestClient(self.app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)

    def create(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", json={"prompt": "a red circle", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refusal(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", json={"prompt": "a red circle", **fields})
        assert answer.status_code == 400, answer.text
        assert self.store.list().jobs == ()
        return answer.json()["error"]

    def claim(self) -> Lease:
        lease = self.store.claim("w", 30.0)
        assert lease is not None
        return lease

    def finish(self) -> StoredJob:
        lease = self.claim()
        path = self.store.files.work_path(lease.job.id)
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT)
        files: list[OutputFile] = [self.store.files.publish(lease.job.id, lease.token, 0, path)]
        for variant in ("thumbnail", "spritesheet"):
            files.append(self.store.files.publish_bytes(lease.job.id, lease.token, 0, variant, variant.encode()))
        return self.store.complete(lease, files)

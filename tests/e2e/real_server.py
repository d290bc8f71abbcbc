"""A server with the real engine, for tests: `with serving(folder) as server`."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import psutil
from safetensors.numpy import save_file

from wanduet.weights.hub import open_model
from wanduet.weights.manifest import file_sha256

SMALL = {"size": "32x32", "num_frames": "5", "num_inference_steps": "2", "guidance_scale": "1"}
# Long enough to be interrupted: a few seconds on two cores.
LONG = {**SMALL, "num_frames": "17", "num_inference_steps": "100"}
# Long enough to be seen in the middle, on a fast machine too.
LONGER = {**SMALL, "num_frames": "33", "num_inference_steps": "140"}
PATIENCE = 240.0  # seconds for anything to happen: the machine may be busy with other things
PROMPT = "a red circle moving left on a black background"


@dataclass
class Server:
    """`wanduet serve` with the real engine and the miniature, in its own processes."""

    process: "subprocess.Popen[str]"
    url: str
    data: Path
    http: httpx.Client

    def create(self, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/videos", data={"prompt": prompt, **SMALL, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, video_id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/videos/{video_id}").json()

    def wait(self, video_id: str, until: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        until = until or (lambda video: video["status"] in ("completed", "failed"))
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if until(video := self.get(video_id)):
                return video
            time.sleep(0.05)
        raise AssertionError(f"it did not happen in time: {self.get(video_id)}")

    def frames(self, video_id: str) -> np.ndarray:
        content = self.http.get(f"/v1/videos/{video_id}/content").content
        with av.open(io.BytesIO(content)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    def worker(self) -> int:
        """The process id of the worker that lives now."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.http.get("/ready").status_code == 200 and (children := psutil.Process(self.process.pid).children()):
                return children[0].pid
            time.sleep(0.1)
        raise AssertionError("no worker")

    def log(self) -> str:
        return (self.data / "server.log").read_text()


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def write_lora(path: Path, value: float, dim: int | None = None) -> str:
    """A LoRA for the miniature, or for a model of another size, in the folder of a server; returns its hash."""
    spec = open_model("miniature").spec.transformer
    tensors = {}
    for block in range(spec.num_layers):
        name = f"diffusion_model.blocks.{block}.self_attn.q"
        tensors[f"{name}.lora_A.weight"] = np.full((2, dim or spec.dim), value, np.float32)
        tensors[f"{name}.lora_B.weight"] = np.full((dim or spec.dim, 2), value, np.float32)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return file_sha256(path)


@contextmanager
def serving(
    data: Path,
    *flags: str,
    command: tuple[str, ...] = ("serve", "--model", "miniature"),
    threads: int = 2,
    open_files: int | None = None,
) -> Iterator[Server]:
    data.mkdir(exist_ok=True)
    environment = {**os.environ, "WANDUET_DATA_DIR": str(data), "OMP_NUM_THREADS": str(threads)}
    port = () if "--port" in flags else ("--port", "0")
    arguments = [sys.executable, "-m", "wanduet.doors.cli.main", *command, *port, *flags]
    if open_files is not None:
        arguments = ["sh", "-c", f'ulimit -n {open_files} && exec "$@"', "sh", *arguments]
    with (
        open(data / "server.log", "a") as log,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, env=environment, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            with httpx.Client(base_url=url.removesuffix("/v1"), timeout=PATIENCE) as http:
                yield Server(process, url, data, http)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()

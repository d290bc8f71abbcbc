"""The encoder: prompts of waiting jobs become embeddings where replicas look, and are forgotten with their jobs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.cluster.encoder import Encoder
from wanduet.cluster.files import open_files
from wanduet.cluster.fit import Fit, FitOf
from wanduet.cluster.settings import ClusterSettings, ReplicaOrder
from wanduet.cluster.shapes import Shape
from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.errors import WanduetError
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import DECODE, NewJob
from wanduet.jobs.worker import WorkerSettings
from wanduet.media.embeddings import load_embeddings
from wanduet.planning.text import plan_text
from wanduet.runtime.models import Models
from wanduet.runtime.text_host import CachedPromptEncoder

PROMPT = "a red circle moving left on a black background"
REQUEST = {
    "prompt": PROMPT,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
}
ALL: FitOf = lambda demand: Fit(True)  # noqa: E731


class Bench:
    """An encoder on one node's disk, and the store as another node sees it."""

    def __init__(self, folder: Path, storage: str | None = None) -> None:
        self.folder, self.storage = folder, storage
        self.url = f"sqlite:///{folder / 'jobs.sqlite3'}"
        self.data = folder / "node" if storage else folder
        self.data.mkdir(exist_ok=True)
        config = EngineConfig(model="miniature", data_dir=self.data)
        settings = ClusterSettings(WorkerSettings(config), storage=storage)
        self.store = ClusterStore(open_files(folder / "api" if storage else folder, storage), self.url)
        self.encoder = Encoder(ReplicaOrder(settings, Shape(stage="encode", host_bytes=2**34), "n", self.url))

    def submit(self, **changes: Any) -> str:
        return self.store.submit(NewJob("ann", "m", {**REQUEST, **changes})).job.id

    def embeddings(self) -> list[Path]:
        return sorted((self.data / "embeddings").glob("*.safetensors"))

    def close(self) -> None:
        self.encoder.drain()
        wait(lambda: self.encoder.status().ended)
        self.store.close()


@pytest.fixture
def open_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    monkeypatch.setattr("wanduet.cluster.encoder.prepare_process", lambda threads: None)  # this process is not its own
    opened: list[Bench] = []

    def open_one(storage: str | None = None) -> Bench:
        opened.append(Bench(tmp_path, storage))
        return opened[-1]

    yield open_one
    for bench in opened:
        bench.close()


def wait(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_prompts_of_waiting_jobs_are_encoded_as_a_replica_would(open_bench) -> None:
    bench = open_bench()
    bench.submit()
    wait(lambda: len(bench.embeddings()) == 2)  # the negative prompt, too
    models = Models(EngineConfig(model="miniature", data_dir=bench.folder / "other"))
    text = plan_text(models.spec, models.config)
    mine = CachedPromptEncoder(models.folder, text.dtype, text.residency, bench.data / "embeddings")
    theirs = load_embeddings(mine.path_of(PROMPT))
    alone = CachedPromptEncoder(models.folder, text.dtype, text.residency, None).encode([PROMPT])[0]
    assert torch.equal(theirs.embeds, alone.embeds)
    assert mine.encode([PROMPT])[0].text == PROMPT
    assert mine._encoder is None  # found, not made


def test_what_will_be_refused_or_only_decoded_is_passed_over(open_bench, tmp_path: Path) -> None:
    with closing(ClusterStore(JobFiles(tmp_path), f"sqlite:///{tmp_path / 'jobs.sqlite3'}", fit_of=ALL)) as store:
        store.submit(NewJob("ann", "m", {**REQUEST, "prompt": "left"}))
        store.release(store.claim("w", 30.0), DECODE + "x")
        store.submit(NewJob("ann", "m", {**REQUEST, "prompt": "refused", "height": 33}))
    bench = open_bench()
    bench.submit(guidance_scale=1.0)
    wait(bench.embeddings)
    assert [load_embeddings(path).text for path in bench.embeddings()] == [PROMPT]


def test_with_an_object_store_the_first_attempt_on_another_disk_finds_them(open_bench, tmp_path: Path) -> None:
    bench = open_bench(f"file://{tmp_path / 'storage'}")
    job_id = bench.submit()
    offered = tmp_path / "storage" / "work" / job_id / "embeddings"
    wait(lambda: offered.is_dir() and len([path for path in offered.iterdir() if path.suffix != ".part"]) == 2)
    there = open_files(tmp_path / "replica", bench.storage)
    with there.attempt(job_id, resume=False):
        found = sorted((tmp_path / "replica" / "embeddings").iterdir())
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in bench.embeddings()]
    bench.store.delete(job_id)
    assert not offered.exists()  # the prompt goes with its job


def test_a_prompt_whose_job_is_deleted_meanwhile_is_forgotten(open_bench) -> None:
    bench = open_bench()
    encode, made = bench.encoder._encoder.encode, []
    submitted = threading.Event()

    def encode_late(texts: list[str], **options: Any) -> None:
        assert submitted.wait(120)
        bench.store.delete(job_id)
        encode(texts, **options)
        made.append(len(bench.embeddings()))

    bench.encoder._encoder.encode = encode_late
    job_id = bench.submit(guidance_scale=1.0)
    submitted.set()
    wait(lambda: made and not bench.embeddings())
    assert made == [1]


def test_an_error_of_the_model_leaves_prompts_to_replicas_and_the_encoder_alive(open_bench) -> None:
    bench = open_bench()
    tried: list[int] = []

    def fail(texts: list[str], **_: Any) -> None:
        tried.append(len(texts))
        raise WanduetError("damaged")

    bench.encoder._encoder.encode = fail
    job_id = bench.submit()
    wait(lambda: tried)
    assert bench.store.get(job_id).status == "queued"
    assert not bench.encoder.status().ended


def test_its_status_is_a_replicas(open_bench) -> None:
    status = open_bench().encoder.status()
    assert (status.shape.name, status.jobs, status.node, status.draining) == ("cpu encode", (), "n", False)
    assert status.worker

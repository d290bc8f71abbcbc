"""Every strategy on the CPU: the same video, whoever makes it."""

import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.distributed.launch import RankFailedError, RankGroup
from wanduet.distributed.mesh import Layout
from wanduet.distributed.rank import Mailbox, Rank
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.engine.ranks import work
from wanduet.errors import CancelledError, ConfigError, NonFiniteLatentsError
from wanduet.media.latents import load_latents
from wanduet.media.read import frame_hashes, read_frames, read_metadata
from wanduet.planning.hardware import parse_hardware
from wanduet.planning.host import process_peak_bytes
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models

REQUEST = {"prompt": "a red circle", "height": 48, "width": 32, "num_frames": 9, "num_inference_steps": 4, "seed": 5}
FEW_STEPS = {"guidance_scale": 1.0, "sampler": "renoise", "timesteps": (900, 500), "num_inference_steps": 2}
SPARSE = {"guidance_scale": 1.0, "sparse": 0.5, "height": 64, "width": 64, "num_frames": 17}  # 5 blocks of 16 tokens
GATED = {"guidance_gate": 0.5}
STRATEGIES = {
    "single": {"strategy": "single", "devices": "cpu"},
    "placed": {"devices": "vae=cpu,transformer=cpu"},
    "parallel": {"strategy": "parallel", "devices": "cpu,cpu"},
}


def run(config: EngineConfig, path: Path, **changes):
    with Engine(config) as engine:
        request = GenerationRequest(**(REQUEST | changes))
        job = engine.submit(request, OutputOptions(path, "ffv1", save_latents=True))
        job.result(120)
        return job


def latents(path: Path):
    return load_latents(Path(f"{path}.latents.safetensors"))[0]


def assert_looks_the_same(video: Path, other: Path) -> None:
    """A rounding in the latents may move a pixel that lies between two levels to the other one, no more than that."""
    frames, others = (np.stack(list(read_frames(path))).astype(int) for path in (video, other))
    apart = np.abs(frames - others)
    assert apart.max() <= 2  # of 255: a level of brightness and one of colour
    assert (apart > 0).mean() < 1e-3


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    return EngineConfig(model="miniature", data_dir=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(replace(config, **STRATEGIES["single"]), folder / "guided.mkv")
    run(replace(config, **STRATEGIES["single"]), folder / "plain.mkv", guidance_scale=1.0)
    run(replace(config, **STRATEGIES["single"]), folder / "from_video.mkv", **from_video(folder))
    run(replace(config, **STRATEGIES["single"]), folder / "few.mkv", **FEW_STEPS)
    run(replace(config, **STRATEGIES["single"]), folder / "sparse.mkv", **SPARSE)
    return folder


def from_video(folder: Path) -> dict[str, Any]:
    return {"input_video": str(folder / "guided.mkv"), "strength": 0.5, "seed": 6}


def test_placed_gives_the_same_bits(config, alone, tmp_path) -> None:
    job = run(replace(config, **STRATEGIES["placed"]), tmp_path / "a.mkv")
    assert job.plan.strategy == "placed"
    assert frame_hashes(tmp_path / "a.mkv").digest == frame_hashes(alone / "guided.mkv").digest


def test_two_ranks_give_the_same_latents_and_frames(config, alone, tmp_path) -> None:
    """Guidance on two ranks: bit for bit. Their decode by rows: but for a float on a rounding border."""
    with Engine(replace(config, **STRATEGIES["parallel"])) as engine:
        guided = engine.submit(
            GenerationRequest(**REQUEST), OutputOptions(tmp_path / "a.mkv", "ffv1", save_latents=True)
        )
        plain = engine.submit(
            GenerationRequest(**(REQUEST | {"guidance_scale": 1.0})),
            OutputOptions(tmp_path / "b.mkv", "ffv1", save_latents=True),
        )
        other = engine.submit(
            GenerationRequest(**(REQUEST | from_video(alone))),
            OutputOptions(tmp_path / "c.mkv", "ffv1", save_latents=True),
        )
        few = engine.submit(
            GenerationRequest(**(REQUEST | FEW_STEPS)), OutputOptions(tmp_path / "d.mkv", "ffv1", save_latents=True)
        )
        sparse = engine.submit(
            GenerationRequest(**(REQUEST | SPARSE)), OutputOptions(tmp_path / "e.mkv", "ffv1", save_latents=True)
        )
        guided.result(120)
        plain.result(120)
        assert other.result(120).timings["encode_video_s"] > 0
        few.result(120)
        sparse.result(120)
    assert (guided.plan.group.layout.cfg, plain.plan.group.layout.sequence) == (2, 2)
    of_ranks, of_one = (read_metadata(path)["engine"] for path in (tmp_path / "a.mkv", alone / "guided.mkv"))
    assert (of_ranks["kernels"], of_ranks["vae_kernels"]) == (of_one["kernels"], of_one["vae_kernels"])
    # The ranks' memory counts, once, beside that of this process, whose peak begins anew with each job: the second's may be
    # a little lower than the first's.
    own = process_peak_bytes() + 64 * 2**20
    for job in (guided, plain):
        assert job.rank_peaks["cpu"] > 2 * 64 * 2**20
        assert job.rank_peaks["cpu"] < job.result().peak_memory_bytes["cpu"] <= own + job.rank_peaks["cpu"]
        assert job.result().timings["prepare_s"] >= 0.0
    for here, there in (
        ("a", "guided"),
        ("b", "plain"),
        ("c", "from_video"),
        ("d", "few"),
        ("e", "sparse"),  # another block of keys would change it by a thousand times as much
    ):  # one may be denoised before the other is decoded
        made, expected = tmp_path / f"{here}.mkv", alone / f"{there}.mkv"
        assert (latents(made) - latents(expected)).abs().max() <= 1e-5 * latents(expected).abs().max()
        assert_looks_the_same(made, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_can_be_watched_wherever_they_are_made(config, alone, tmp_path, strategy) -> None:
    seen = []
    with Engine(replace(config, **STRATEGIES[strategy])) as engine:
        output = OutputOptions(tmp_path / "a.mkv", "ffv1", save_latents=True)
        job = engine.submit(GenerationRequest(**REQUEST), output, watch=seen.append)
        job.result(120)
    assert job.plan.strategy == strategy
    assert [info.step for info in seen] == [0, 1, 2, 3]
    assert (seen[-1].latents[0] - latents(tmp_path / "a.mkv")).abs().max() == 0


def work_with_a_long_step(rank: Rank, config: EngineConfig) -> None:
    """Ranks whose third step ends with a cancel only: after its second block, they wait for one."""
    steps, blocks = 0, 0
    next_step, next_block = Rank.cancelled, Rank.cancelled_in_step

    def cancelled(self: Rank) -> bool:
        nonlocal steps, blocks
        steps, blocks = steps + 1, 0
        return next_step(self)

    def cancelled_in_step(self: Rank) -> bool:
        nonlocal blocks
        blocks += 1
        while (steps, blocks) == (4, 3) and not self.cancelled_locally():  # the first "step" is the task's beginning
            time.sleep(0.01)
        return next_block(self)

    Rank.cancelled, Rank.cancelled_in_step = cancelled, cancelled_in_step
    work(rank, config)


@pytest.mark.parametrize(("video", "changes"), [("guided", {}), ("plain", {"guidance_scale": 1.0})])  # two prompts; one
def test_a_cancel_ends_a_step_of_ranks_and_the_group_makes_the_next_job(
    config, alone, tmp_path, monkeypatch, video, changes
) -> None:
    monkeypatch.setattr("wanduet.engine.group.work", work_with_a_long_step)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    with Engine(replace(config, **STRATEGIES["parallel"])) as engine:
        request = GenerationRequest(**(REQUEST | changes))
        job = engine.submit(request, OutputOptions(tmp_path / "a.mkv", "ffv1"))
        steps = []
        for event in job.events():
            if event.phase == "denoise":
                steps.append(event.done)
                if event.done == 2:
                    job.cancel()
                    job.cancel()
        with pytest.raises(CancelledError):
            job.result(60)
        group = engine.models._group
        following = engine.submit(request, OutputOptions(tmp_path / "b.mkv", "ffv1", save_latents=True))
        following.result(60)
        assert engine.models._group is group
    assert steps == [0, 1, 2]
    assert not (tmp_path / "a.mkv").exists()
    expected = latents(alone / f"{video}.mkv")
    assert (latents(tmp_path / "b.mkv") - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_cancel_while_ranks_start_is_not_lost(config, tmp_path, monkeypatch) -> None:
    """Not one step is made, nobody waits for the ranks, and the next job has them."""
    submitted, send = threading.Event(), RankGroup.send

    def cancelling(group: RankGroup, *arguments: Any, **keywords: Any) -> int:
        task = send(group, *arguments, **keywords)
        if task == 2:  # the denoise has been sent
            assert submitted.wait(60)
            job.cancel()
        return task

    monkeypatch.setattr(RankGroup, "send", cancelling)
    with Engine(replace(config, **STRATEGIES["parallel"])) as engine:
        many = GenerationRequest(**(REQUEST | {"num_inference_steps": 500}))
        job = engine.submit(many, OutputOptions(tmp_path / "a.mkv", "ffv1"))
        submitted.set()
        with pytest.raises(CancelledError):
            job.result(60)
        assert "denoise" not in [event.phase for event in job.events()]
        group = engine.models._group
        following = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "b.mkv", "ffv1"))
        steps = [event.done for event in following.events() if event.phase == "denoise"]
        following.result(60)
        assert engine.models._group is group
    assert steps == [0, 1, 2, 3, 4]


@pytest.fixture
def no_ranks(monkeypatch):
    """Groups without processes; what their denoise does is given."""
    from wanduet.engine.group import Group

    made: list[Group] = []

    def begin(self, config, plan, timeout_s) -> None:
        self.devices, self.timeout_s = plan.group.ranks, timeout_s
        self._ranks = SimpleNamespace(alive=True)
        made.append(self)

    def use(denoise):
        monkeypatch.setattr(Group, "denoise", denoise)
        return made

    monkeypatch.setattr(Group, "__init__", begin)
    monkeypatch.setattr(Group, "preload", lambda *_: None)
    monkeypatch.setattr(Group, "close", lambda self: None)
    return use


def test_a_rank_that_dies_as_its_job_is_cancelled_starts_no_other_group(config, tmp_path, no_ranks) -> None:
    def die(self, video, task):
        video.job.cancel()
        raise RankFailedError("Rank 1 (cpu) died.", 1)

    groups = no_ranks(die)
    with pytest.raises(CancelledError):
        run(replace(config, **STRATEGIES["parallel"]), tmp_path / "a.mkv")
    assert len(groups) == 1


def test_an_error_of_a_rank_does_not_reach_the_next_job(config, tmp_path, no_ranks) -> None:
    def fail(self, video, task):
        raise NonFiniteLatentsError(2)

    groups = no_ranks(fail)
    with Engine(replace(config, **STRATEGIES["parallel"])) as engine:
        for number in range(2):
            job = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / f"{number}.mkv", "ffv1"))
            with pytest.raises(NonFiniteLatentsError):
                job.result(60)
            assert engine.models._group is None
    assert len(groups) == 2  # not the one whose processes have ended


def test_a_killed_rank_costs_no_more_than_to_the_last_checkpoint(config, alone, tmp_path) -> None:
    settings = replace(config, checkpoint_seconds=0.0, **STRATEGIES["parallel"])
    with Engine(settings) as engine:
        job = engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "a.mkv", "ffv1", save_latents=True))
        steps, killed = [], False
        for event in job.events():
            if event.phase == "denoise":
                steps.append(event.done)
                if event.done == 2 and not killed:
                    killed = True
                    os.kill(engine.models._group._ranks._processes[1].pid, signal.SIGKILL)
        job.result(120)
    assert any("started again" in note for note in job.notes)
    again = steps[steps.index(2) + 1 :]
    assert again[-1] == 4
    expected = latents(alone / "guided.mkv")
    assert (latents(tmp_path / "a.mkv") - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_what_cannot_be_is_refused(config, tmp_path) -> None:
    with Engine(replace(config, strategy="parallel", devices="cpu")) as engine, pytest.raises(ConfigError, match="two"):
        engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "a.mkv", "ffv1"))


def test_a_group_that_never_holds_together_is_done_without(config, alone, tmp_path, monkeypatch) -> None:
    """Two equal devices share a job by the engine's own choice; then it is also the engine that must cope."""
    from wanduet.engine.group import Group

    def fall(self, job, task):
        raise RankFailedError("Rank 1 (cpu) died.", 1)

    monkeypatch.setattr(Group, "denoise", fall)
    monkeypatch.setattr(
        Group,
        "__init__",
        lambda self, _, plan, s: vars(self).update(
            devices=plan.group.ranks, timeout_s=s, _ranks=SimpleNamespace(alive=True)
        ),
    )
    monkeypatch.setattr(Group, "preload", lambda *_: None)
    monkeypatch.setattr(Group, "close", lambda self: None)
    job = run(replace(config, devices="cpu,cpu"), tmp_path / "a.mkv")
    assert job.notes[-1].startswith("denoise: without a group")
    assert job.plan.strategy == "parallel"  # what was planned; the video tells what was done
    assert read_metadata(tmp_path / "a.mkv")["engine"]["strategy"] == "placed"
    assert frame_hashes(tmp_path / "a.mkv").digest == frame_hashes(alone / "guided.mkv").digest


def test_unequal_devices_get_unequal_parts_and_give_the_same(config, alone, tmp_path) -> None:
    settings = replace(config, strategy="parallel", devices="cpu,cpu", device_speeds=(3.0, 1.0))
    job = run(settings, tmp_path / "a.mkv")
    assert (job.plan.group.layout.cfg, job.plan.group.layout.sequence) == (1, 2)  # pairs would wait for the slower one
    expected = latents(alone / "guided.mkv")
    assert (latents(tmp_path / "a.mkv") - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert_looks_the_same(tmp_path / "a.mkv", alone / "guided.mkv")


def test_speeds_that_are_alike_are_equal() -> None:
    from wanduet.engine.speeds import balanced

    assert balanced((100.0, 95.0)) == (1.0, 1.0)
    assert balanced((2.0, 1.0)) == (1.0, 0.5)
    with pytest.raises(ConfigError, match="speeds"):
        EngineConfig(devices="cpu,cpu", device_speeds=(1.0,))


@pytest.mark.parametrize(
    ("planned", "speeds", "suited"),
    [
        (Layout(cfg=2), (1.0, 1.0), Layout(cfg=2)),
        (Layout(cfg=2), (1.0, 0.5), Layout(ulysses=2)),
        (Layout(ulysses=2), (1.0, 0.5), Layout(ulysses=2)),
        (Layout(cfg=2, ulysses=2), (1.0, 0.5, 1.0, 0.5), Layout(cfg=2, ulysses=2)),
        (Layout(cfg=2, ulysses=2), (1.0, 1.0, 0.5, 0.5), Layout(ulysses=4)),
    ],
)
def test_ranks_that_turn_out_unequal_share_one_sequence_where_it_fits(planned, speeds, suited) -> None:
    from wanduet.engine.speeds import suited_layout
    from wanduet.planning.planner import make_plan

    config = EngineConfig(model="random:1.3b", strategy="parallel", devices="cuda:0,cuda:1")
    models = Models(config)
    request = GenerationRequest(prompt="a red circle").resolve(models.spec)
    plan = make_plan(request, models.memory, config, parse_hardware("2x24GiB"))
    plan = replace(plan, group=replace(plan.group, layout=planned))
    assert suited_layout(plan, request, models.spec, speeds, None) == suited
    tight = tuple(replace(device, limit_bytes=device.peak + 2**20) for device in plan.prediction.devices)
    assert (
        suited_layout(
            replace(plan, prediction=replace(plan.prediction, devices=tight)), request, models.spec, speeds, None
        )
        == planned
    )


@pytest.mark.parametrize(
    ("link", "slower", "shared"),
    [
        ("direct", 0.88, True),
        ("host", 0.88, False),  # 6 GB a step: 1.2 s, of 5.3
        ("host", 0.5, True),
        ("gloo", 0.5, False),
    ],
)
def test_what_joins_unequal_ranks_decides_whether_they_share_a_sequence(link, slower, shared) -> None:
    """In a layout that is planned, with speeds that are given, as in one that is chosen when they are measured."""
    from wanduet.engine.speeds import suited_layout
    from wanduet.planning.hardware import LINK_RATES
    from wanduet.planning.planner import make_plan

    config = EngineConfig(model="random:1.3b", strategy="parallel", devices="cuda:0,cuda:1")
    models, hardware = Models(config), replace(parse_hardware("2xRTX 3090"), link=link)
    request = GenerationRequest(prompt="a red circle").resolve(models.spec)
    expected = Layout(ulysses=2) if shared else Layout(cfg=2)
    plan = make_plan(request, models.memory, config, hardware)
    assert plan.group.layout == Layout(cfg=2)
    rate = LINK_RATES.get(link)
    assert suited_layout(plan, request, models.spec, (1.0, slower), rate) == expected
    assert suited_layout(plan, request, models.spec, (1.0, slower), 1e12) == Layout(ulysses=2)  # as fast as measured
    given = replace(config, device_speeds=(1.0, slower))
    assert make_plan(request, models.memory, given, hardware).group.layout == expected


@pytest.mark.parametrize(
    ("layout", "fields", "link", "after"),
    [
        (Layout(cfg=2), GATED, "direct", Layout(ulysses=2)),
        (Layout(cfg=2, ulysses=2), GATED, "direct", Layout(ulysses=4)),
        (Layout(cfg=2, ulysses=2), GATED | {"sparse": 0.5}, "direct", Layout(ulysses=4)),
        (Layout(cfg=2, ulysses=4), GATED, "direct", Layout(ring=2, ulysses=4)),
        (Layout(cfg=2, ulysses=4), GATED | {"sparse": 0.5}, "direct", None),  # in a ring, each has a part of the keys
        (Layout(cfg=2), {"guidance_interval": "0.2-1"}, "direct", Layout(ulysses=2)),
        (Layout(cfg=2), {}, "direct", None),
        (Layout(ulysses=2), GATED, "direct", None),
        (Layout(cfg=2), GATED, "gloo", None),  # to exchange takes longer than to compute all
    ],
)
def test_in_steps_without_guidance_ranks_share_one_sequence(layout, fields, link, after) -> None:
    from wanduet.engine.speeds import layout_unguided
    from wanduet.planning.hardware import LINK_RATES
    from wanduet.planning.planner import make_plan

    config = EngineConfig(model="random:1.3b", strategy="parallel", devices="cuda:0,cuda:1")
    models = Models(config)
    request = GenerationRequest(prompt="a red circle", **fields).resolve(models.spec)
    plan = make_plan(request, models.memory, config, parse_hardware("2xh100"))
    assert layout_unguided(plan, request, models.spec, layout, LINK_RATES.get(link)) == after


def test_what_ranks_send_a_second_is_measured_and_agreed_on(monkeypatch) -> None:
    from wanduet.engine import speeds as module

    moments = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.25, 30.0, 30.5])  # the first exchange sets up connections
    slower = torch.tensor([1e7], dtype=torch.float64)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(moments))
    monkeypatch.setattr(module, "all_gather", lambda own: [own, slower if own.dtype == torch.float64 else own])
    for link, expected in (("direct", None), ("host", 1e7)):
        rank = Rank(0, 2, torch.device("cpu"), 1.0, Mailbox(*Pipe()), link, None)
        assert module.link_rate(rank) == expected
    assert next(moments, None) is None
    moments = iter([0.0, 0.25] * 4)
    slower = torch.tensor([1e12], dtype=torch.float64)
    assert module.link_rate(Rank(1, 2, torch.device("cpu"), 1.0, Mailbox(*Pipe()), "gloo", None)) == 32 * 2**20 / 0.25


@pytest.mark.parametrize(
    ("seen", "speeds"),
    [
        ([(100.0, 98.0)], (1.0, 1.0)),
        ([(100.0, 60.0), (99.0, 97.0)], (1.0, 1.0)),  # something else ran on the second for a moment
        ([(80.0, 40.0), (100.0, 50.0), (90.0, 48.0)], (1.0, 0.5)),
    ],
)
def test_speeds_that_differ_are_measured_again(monkeypatch, seen, speeds) -> None:
    from wanduet.engine import speeds as module

    measured = iter(seen)
    monkeypatch.setattr(module, "all_gather", lambda own: [torch.tensor(speed) for speed in next(measured)])
    rank = Rank(0, 2, torch.device("cpu"), 1.0, Mailbox(*Pipe()), "gloo", None)  # the other rank has a GPU
    assert module.all_speeds(rank, None) == speeds
    assert next(measured, None) is None
    assert module.all_speeds(rank, (1.0, 4.0)) == (0.25, 1.0)


def test_cpus_are_alike_and_not_measured(monkeypatch) -> None:
    from wanduet.engine import speeds as module

    monkeypatch.setattr(module, "all_gather", None)
    rank = Rank(0, 2, torch.device("cpu"), 1.0, Mailbox(*Pipe()), "direct", None)
    assert module.all_speeds(rank, None) == (1.0, 1.0)

"""Going on from what an earlier run left: only with what the same settings made, and never with NaN."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wanduet.config import EngineConfig
from wanduet.engine import generate
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, NonFiniteLatentsError
from wanduet.kernels.attention.backends import plain_with_lse, sdpa
from wanduet.kernels.attention.call import AttentionCall, Step
from wanduet.kernels.attention.choose import Choice
from wanduet.media.latents import load_latents
from wanduet.media.read import frame_hashes, read_metadata
from wanduet.models.dit.block import Block
from wanduet.models.dit.model import WanTransformer
from wanduet.planning.plan import VAEPlan
from wanduet.request import GenerationRequest
from wanduet.runtime import dit_host
from wanduet.runtime.context import RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.sampling.checkpoint import Checkpoints, find_checkpoints
from wanduet.sampling.denoise import StepInfo
from wanduet.sampling.samplers import Schedule, make_sampler
from wanduet.stages.predict import TextPredictor, TransformerPredictor

SMALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "seed": 3}
Run = Callable[..., Job]


@pytest.fixture(scope="module")
def engines(config: EngineConfig) -> Iterator[Callable[[dict[str, Any]], Engine]]:
    """An engine for each set of settings, with one data folder."""
    made: dict[str, Engine] = {}

    def engine(settings: dict[str, Any]) -> Engine:
        if repr(settings) not in made:
            made[repr(settings)] = Engine(replace(config, **({"checkpoint_seconds": 0.0} | settings)))
        return made[repr(settings)]

    yield engine
    for one in made.values():
        one.close()


@pytest.fixture
def folder(config: EngineConfig) -> Path:
    """The checkpoints, none at first."""
    folder = config.data_folder / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture
def run(engines, folder: Path, tmp_path: Path) -> Run:
    """A whole job with checkpoints after each step; raises what it fails with."""

    def whole(name: str = "a", on_step=None, watch=None, settings: dict[str, Any] | None = None, **changes: Any) -> Job:
        output = {key: changes.pop(key) for key in ("resume", "save_latents") if key in changes}
        request = GenerationRequest(**(SMALL | changes))
        options = OutputOptions(tmp_path / f"{name}.mkv", "ffv1", **output)
        began.clear()
        job = engines(settings or {}).submit(request, options, on_step, watch)
        made.append(job)
        began.set()
        job.result(120)
        return job

    def cancel() -> None:
        """The job that runs; from any thread."""
        assert began.wait(60)
        made[-1].cancel()

    made: list[Job] = []
    began = threading.Event()
    whole.jobs, whole.cancel = made, cancel  # type: ignore[attr-defined]
    return whole


def interrupt(run: Run, after: int, **keywords: Any) -> None:
    """A run that is cancelled after so many steps."""

    def watch(info: StepInfo) -> None:
        if info.step + 1 == after:
            run.cancel()  # type: ignore[attr-defined]

    with pytest.raises(CancelledError):
        run(watch=watch, **keywords)


def frames(job: Job) -> list[str]:
    return [frame_hashes(video.path).digest for video in job.result().videos]


def steps_of(run: Run, **keywords: Any) -> tuple[Job, list[int]]:
    seen: list[int] = []
    return run(watch=lambda info: seen.append(info.step), **keywords), seen


# Settings.


def test_a_resume_at_another_precision_begins_again(run) -> None:
    fresh = frames(run("fresh", settings={"transformer_dtype": "bfloat16"}))
    interrupt(run, 4, settings={"transformer_dtype": "float32"})
    resumed, steps = steps_of(run, resume=True, settings={"transformer_dtype": "bfloat16"})
    assert steps == [0, 1, 2, 3, 4, 5]
    assert frames(resumed) == fresh


def test_a_finished_video_of_another_precision_is_made_again(run, engines, tmp_path) -> None:
    run(settings={"transformer_dtype": "bfloat16"})
    request, output = GenerationRequest(**SMALL), OutputOptions(tmp_path / "a.mkv", "ffv1")
    assert engines({"transformer_dtype": "bfloat16"}).is_finished(request, output)
    assert not engines({"transformer_dtype": "float32"}).is_finished(request, output)
    _, steps = steps_of(run, resume=True, settings={"transformer_dtype": "float32"})
    assert len(steps) == 6
    assert read_metadata(tmp_path / "a.mkv")["engine"]["transformer_dtype"] == "float32"
    _, steps = steps_of(run, resume=True, settings={"transformer_dtype": "float32"})
    assert steps == []
    run(resume=True, settings={"vae_dtype": "bfloat16", "transformer_dtype": "float32"})
    assert read_metadata(tmp_path / "a.mkv")["engine"]["vae_dtype"] == "bfloat16"


def test_kept_latents_of_another_precision_are_made_again(run, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_video", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(settings={"transformer_dtype": "bfloat16"})
    assert (tmp_path / "a.mkv.latents.safetensors").exists()
    _, steps = steps_of(run, resume=True, settings={"transformer_dtype": "float32"})
    assert len(steps) == 6


# Callbacks.


@pytest.mark.parametrize("in_place", [False, True])
def test_a_resume_after_a_callback_changed_latents_begins_again(run, in_place) -> None:
    def change(info: StepInfo) -> Tensor | None:
        if info.step == 3:
            run.cancel()
        if not in_place:
            return info.latents * 0.99
        info.latents.mul_(0.99)
        return None

    with pytest.raises(CancelledError):
        run(on_step=change)
    seen: list[int] = []
    run(on_step=lambda info: seen.append(info.step), resume=True)
    assert seen[0] == 0


def test_a_callback_that_only_looks_does_not_cost_the_steps(run) -> None:
    def look(info: StepInfo) -> None:
        if info.step == 3:
            run.cancel()

    with pytest.raises(CancelledError):
        run(on_step=look)
    seen: list[int] = []
    run(on_step=lambda info: seen.append(info.step), resume=True)
    assert seen == [4, 5]


def test_latents_changed_in_place_are_checked_too(run) -> None:
    def poison(info: StepInfo) -> None:
        if info.step == 2:
            info.latents.fill_(float("nan"))

    with pytest.raises(NonFiniteLatentsError) as found:
        run(on_step=poison)
    assert found.value.step == 2


def test_a_callback_that_raises_leaves_the_checkpoints_before_it(run) -> None:
    whole = frames(run("whole", on_step=lambda _: None))

    def breaks(info: StepInfo) -> None:
        if info.step == 3:
            raise KeyError("a fault of the caller's")

    with pytest.raises(KeyError):
        run(on_step=breaks)
    seen: list[int] = []
    assert frames(run(on_step=lambda info: seen.append(info.step), resume=True)) == whole
    assert seen == [3, 4, 5]  # the step whose callback failed is made again


# NaN.


@pytest.fixture
def poisoned(monkeypatch) -> Callable[[int], None]:
    """Lets the transformer give NaN from its so-manyth forward on; with a negative number never again."""
    whole, state = WanTransformer.forward_cfg, {"left": -1}

    def forward_cfg(self, *args, **keywords):
        velocities = whole(self, *args, **keywords)
        if state["left"] == 0:
            return [velocity * float("nan") for velocity in velocities]
        state["left"] -= 1
        return velocities

    monkeypatch.setattr(WanTransformer, "forward_cfg", forward_cfg)
    monkeypatch.setattr("wanduet.runtime.selftest.check_transformer", lambda *_: 1.0)
    return lambda count: state.update(left=count)


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_cancel_right_after_nan_keeps_the_checkpoint_before(run, poisoned, folder, seconds) -> None:
    whole = frames(run("whole"))
    poisoned(3)
    interrupt(run, 4, settings={"checkpoint_seconds": seconds})  # the fourth step is the first bad one
    assert [c.step for c in find_checkpoints(folder)] in ([3, 2], [])
    poisoned(-1)
    resumed, steps = steps_of(run, resume=True)
    assert steps[0] == (3 if seconds == 0.0 else 0)
    assert frames(resumed) == whole


def test_nan_ends_the_job_and_a_resume_goes_on_before_it(run, poisoned) -> None:
    whole = frames(run("whole"))
    poisoned(3)
    with pytest.raises(NonFiniteLatentsError):
        run()
    poisoned(-1)
    resumed, steps = steps_of(run, resume=True)
    assert steps == [3, 4, 5]
    assert frames(resumed) == whole


def test_nan_is_tried_again_on_plain_kernels_from_the_last_good_step(run, poisoned, monkeypatch) -> None:
    whole = frames(run("whole"))
    interrupt(run, 5)  # another run's steps are not taken for it
    monkeypatch.setattr(LoadedTransformer, "use_plain_kernels", lambda self: poisoned(-1) or True)
    poisoned(3)
    job, steps = steps_of(run)
    assert steps == [0, 1, 2, 3, 3, 4, 5]
    assert job.notes == ["denoise: plain kernels after NaN at step 4"]
    assert frames(job) == whole


def test_a_cancel_before_the_plain_kernels_run_keeps_the_last_good_step(run, poisoned, monkeypatch) -> None:
    whole = frames(run("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(LoadedTransformer, "use_plain_kernels", lambda self: run.cancel() or True)
        poisoned(3)
        with pytest.raises(CancelledError):
            run()
    poisoned(-1)
    resumed, steps = steps_of(run, resume=True)
    assert steps == [3, 4, 5]
    assert frames(resumed) == whole


# Cancel, and what else may go wrong then.


def test_a_full_disk_at_the_last_checkpoint_does_not_hide_the_cancel(run, monkeypatch, caplog) -> None:
    def full(self, checkpoint):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    interrupt(run, 2)
    assert "could not be written" in caplog.text


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize("where", ["WanTransformer.forward_cfg", "WanVAE.decode_rows"])
def test_a_cancel_while_memory_is_waited_for_ends_the_wait(run, monkeypatch, where) -> None:
    from wanduet.models.vae.model import WanVAE

    kind, name = where.split(".")
    monkeypatch.setattr("wanduet.runtime.selftest.check_transformer", lambda *_: 1.0)
    monkeypatch.setattr("wanduet.runtime.selftest.check_vae", lambda *_: 1.0)
    monkeypatch.setattr({"WanTransformer": WanTransformer, "WanVAE": WanVAE}[kind], name, out_of_memory)
    monkeypatch.setattr("wanduet.stages.fallback.WAIT_SECONDS", 600.0)
    waits, waiting = Job.wait, threading.Event()

    def noted(self: Job, seconds: float) -> None:
        waiting.set()
        waits(self, seconds)

    monkeypatch.setattr(Job, "wait", noted)
    monkeypatch.setattr("wanduet.stages.decode.decode_modes", waiting_modes)

    def cancel() -> None:
        assert waiting.wait(60)
        run.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(CancelledError):
        run()
    thread.join()


def waiting_modes(plan: VAEPlan, context: RunContext) -> Any:
    yield "cpu", plan.tiling
    context.wait(600.0)
    yield "cpu", plan.tiling


# A predictor with a state.


class EverySecondStep:
    """Predicts at every second step, and else gives the velocities of the step before."""

    def __init__(self, predictor: TextPredictor) -> None:
        self.predictor = predictor
        self.restore({})

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[Any]) -> Sequence[Tensor]:
        if self.step % 2 == 0:
            self.last = list(self.predictor(latents, step, conditions))
        self.step += 1
        return self.last

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "last": self.last}

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.last = state.get("step", 0), state.get("last", [])


def test_attention_is_given_the_step_also_by_a_denoise_that_goes_on(run, monkeypatch) -> None:
    calls: list[AttentionCall] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        calls.append(call)
        return sdpa(q, k, v)

    recorded = Choice("recorded", attention, plain_with_lse)
    monkeypatch.setattr(dit_host, "choose_attention", lambda *_: recorded)  # once for each size
    interrupt(run, 4, num_frames=1)
    before = len(calls)
    job, _ = steps_of(run, resume=True, num_frames=1)
    request = job.request
    sampler = make_sampler(Schedule.of(request), 0, torch.device("cpu"))
    steps = [Step(index, timestep) for index, timestep in enumerate(sampler.timesteps)]
    assert list(dict.fromkeys(call.step for call in calls)) == steps
    assert calls[before].step == steps[4]
    assert {call.grid for call in calls} == {(1, 2, 2)}


def test_a_predictor_that_remembers_goes_on_from_a_checkpoint_to_the_same_latents(run, monkeypatch) -> None:
    plain = frames(run("plain", save_latents=True))
    made = lambda *given: EverySecondStep(TransformerPredictor(*given[:3]))  # noqa: E731 - without the request
    monkeypatch.setattr("wanduet.stages.denoise.make_predictor", made)
    whole = frames(run("whole", save_latents=True))
    assert whole != plain

    def stop(info: StepInfo) -> None:
        if info.step == 2:  # the next step gives what this one has predicted
            run.cancel()

    with pytest.raises(CancelledError):
        run("cut", watch=stop)
    seen: list[int] = []
    assert frames(run("cut", watch=lambda info: seen.append(info.step), resume=True)) == whole
    assert seen == [3, 4, 5]


# Several videos of one job.


def test_one_video_that_fails_leaves_those_before_it_and_resume_makes_the_others(run, poisoned, tmp_path) -> None:
    whole = frames(run("whole", num_videos_per_prompt=3))
    poisoned(6 + 2)
    with pytest.raises(NonFiniteLatentsError):
        run(num_videos_per_prompt=3)
    first = tmp_path / "a-1.mkv"
    made_first = first.exists()  # unless the failure was quicker than its decode: then its latents are there
    assert made_first or Path(f"{first}.latents.safetensors").exists()
    poisoned(-1)
    resumed, steps = steps_of(run, resume=True, num_videos_per_prompt=3)
    assert frames(resumed) == whole
    assert steps == [2, 3, 4, 5, 0, 1, 2, 3, 4, 5]


def test_each_video_tells_what_happened_to_it_and_the_job_the_sum(run, monkeypatch) -> None:
    whole, forwards = WanTransformer.forward_cfg, []

    def sometimes(self, *args, **keywords):
        forwards.append(1)
        if len(forwards) == 9:  # in the second video
            out_of_memory()
        return whole(self, *args, **keywords)

    monkeypatch.setattr("wanduet.runtime.selftest.check_transformer", lambda *_: 1.0)
    monkeypatch.setattr(WanTransformer, "forward_cfg", sometimes)
    job = run(num_videos_per_prompt=2)
    first, second = (video.provenance for video in job.result().videos)
    assert first["rungs"] == []
    assert second["rungs"] == job.notes == ["denoise: emptied cache"]
    timings = job.result().timings
    for name in ("denoise_s", "decode_s"):
        parts = [video.record.timings[name] for video in job.videos]
        assert all(parts)
        assert timings[name] == pytest.approx(sum(parts))
    for video, about in zip(job.videos, (first, second), strict=True):
        assert about["timings"]["denoise_s"] == pytest.approx(video.timings["denoise_s"], abs=0.001)
        assert about["timings"]["denoise_s"] < timings["denoise_s"]
        assert about["attention"] == "sdpa"


def test_a_resumed_video_tells_of_the_run_before_too(run, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        whole, forwards = WanTransformer.forward_cfg, []

        def sometimes(self, *args, **keywords):
            forwards.append(1)
            if len(forwards) == 2:
                out_of_memory()
            return whole(self, *args, **keywords)

        patch.setattr("wanduet.runtime.selftest.check_transformer", lambda *_: 1.0)
        patch.setattr(WanTransformer, "forward_cfg", sometimes)
        interrupt(run, 4)
    before = run.jobs[-1].timings["denoise_s"]
    resumed = run(resume=True)
    assert resumed.notes == ["denoise: emptied cache"]
    assert resumed.timings["denoise_s"] > 0.5 * before


def test_a_finished_denoise_leaves_no_checkpoint_but_anothers(run, folder) -> None:
    interrupt(run, 3, seed=9)
    others = {path.name for path in folder.iterdir()}
    interrupt(run, 3)
    run(resume=True)
    assert {path.name for path in folder.iterdir()} == others


def test_without_resume_another_runs_steps_are_not_taken(run) -> None:
    interrupt(run, 3)
    _, steps = steps_of(run)
    assert steps == [0, 1, 2, 3, 4, 5]


def test_latents_are_the_same_bits_after_any_interruption(run, tmp_path) -> None:
    whole = run("whole", save_latents=True).result().videos[0].latents_path
    interrupt(run, 1)
    for after in (2, 4):
        interrupt(run, after, resume=True)
    resumed, steps = steps_of(run, resume=True, save_latents=True)
    assert steps == [4, 5]
    kept = resumed.result().videos[0].latents_path
    assert torch.equal(load_latents(kept)[0], load_latents(whole)[0])


# A cancel within a step.


@pytest.mark.parametrize(
    "changes", [{}, {"guidance_mode": "apg", "guidance_scale": 4.0}], ids=["stateless", "stateful"]
)
def test_a_cancel_within_a_step_stops_before_the_next_block_and_a_resume_makes_the_same_video(
    run: Run, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = run("whole", **changes)
    attended: list[tuple[int, int]] = []
    attend = Block.attend

    def cancelling(block: Block, residual: Any, rope: Any, runtime: Any, workspace: Any, call: AttentionCall) -> None:
        assert call.step is not None
        attended.append((call.step.index, call.block))
        if call.step.index == 3 and call.block == 1:
            run.cancel()  # type: ignore[attr-defined]
        attend(block, residual, rope, runtime, workspace, call)

    with monkeypatch.context() as patched:
        patched.setattr(Block, "attend", cancelling)
        with pytest.raises(CancelledError):
            run("again", **changes)
    assert attended[-1] == (3, 1)
    again, steps = steps_of(run, name="again", resume=True, **changes)
    assert steps == [3, 4, 5]
    assert frames(again) == frames(whole)

"""Jobs through the whole engine, with the miniature."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.engine.trace import overlap
from wanduet.errors import (
    CancelledError,
    InvalidRequestError,
    NonFiniteFramesError,
    NonFiniteLatentsError,
    OutOfMemoryError,
    OutputError,
)
from wanduet.media.latents import load_latents
from wanduet.media.read import frame_hashes, read_metadata
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Tiling
from wanduet.request import GenerationRequest
from wanduet.runtime.dit_host import TransformerHost
from wanduet.stages import decode


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def digest(job) -> str:
    (video,) = job.result().videos
    return frame_hashes(video.path).digest


def test_a_job_leaves_a_video_and_nothing_else(submit, tmp_path) -> None:
    job = submit()
    phases = [event.phase for event in job.events()]
    result = job.result()
    assert phases[-1] == "done"
    assert {"encode", "denoise", "decode"} <= set(phases)
    assert files(tmp_path) == {"out.mkv"}
    assert frame_hashes(result.videos[0].path).frames.__len__() == 9
    assert result.timings["total_s"] >= result.timings["denoise_s"] > 0
    assert result.timings["write_s"] >= 0


@pytest.mark.parametrize("name", ["one", "sub/../one", "link/one"])
def test_of_two_jobs_at_once_only_the_first_gets_a_path(submit, tmp_path, name) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    first = submit("one")
    with pytest.raises(OutputError, match="another job of this engine"):
        submit(name, changes={"seed": 4})
    first.cancel()
    with pytest.raises(CancelledError):
        first.result(60)
    assert digest(submit("one", changes={"seed": 4}))  # a finished one's name is free again, and so is its file
    assert digest(submit("one"))


def test_of_two_engines_at_once_only_the_first_gets_a_path(submit, config, tmp_path) -> None:
    gate = threading.Event()

    def stay(_: object) -> None:
        gate.wait(60)

    first = submit("one", on_step=stay)
    request = GenerationRequest(prompt="a", height=32, width=32, num_frames=5, num_inference_steps=1, seed=4)
    with Engine(config) as other:
        with pytest.raises(OutputError, match="another run of wanduet is writing it"):
            other.submit(request, OutputOptions(tmp_path / "one.mkv", "ffv1"))
        first.cancel()
        gate.set()
        with pytest.raises(CancelledError):
            first.result(60)
        assert other.submit(request, OutputOptions(tmp_path / "one.mkv", "ffv1")).result(60).videos[0].seed == 4
    assert files(tmp_path) == {"one.mkv"}


def test_a_path_that_another_process_writes_is_refused(submit, tmp_path) -> None:
    """As a process that holds its lock; without a name of its own, a file is replaced."""
    holds = "import sys; from pathlib import Path; from wanduet.media.names import take\n"
    holds += "taken = take([Path(sys.argv[1])]); print('taken', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holds, str(tmp_path / "one.mkv")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(OutputError, match="another run of wanduet is writing it"):
            submit("one")
        process.stdin.close()
    assert digest(submit("one"))  # its end gives the name back


def test_a_job_of_several_videos_claims_each_of_their_names(submit) -> None:
    both = submit("two", changes={"num_videos_per_prompt": 2})
    with pytest.raises(OutputError, match=r"two-2\.mkv: another job"):
        submit("two-2")
    both.cancel()


def test_same_seed_same_video_whatever_else_runs(submit) -> None:
    jobs = [submit("a"), submit("b", changes={"seed": 4}), submit("c")]
    one, other, again = (digest(job) for job in jobs)
    assert one == again != other


def test_several_videos_are_those_of_consecutive_seeds(submit, tmp_path) -> None:
    both = submit("two", changes={"num_videos_per_prompt": 2}).result()
    assert [v.seed for v in both.videos] == [3, 4]
    assert [v.path.name for v in both.videos] == ["two-1.mkv", "two-2.mkv"]
    alone = digest(submit("alone", changes={"seed": 4}))
    assert frame_hashes(both.videos[1].path).digest == alone


def test_metadata_is_enough_to_make_it_again(submit) -> None:
    first = submit("first", changes={"sampler": "dpm++2m", "guidance_scale": 2.0, "fps": 8, "seed": None})
    about = read_metadata(first.result().videos[0].path)
    fields = {k: v for k, v in about["request"].items() if k in GenerationRequest.model_fields}
    assert about["model"]["name"] == "miniature"
    assert about["model"]["hash"]
    assert about["versions"]["torch"] == torch.__version__
    assert digest(submit("again", changes=fields)) == digest(first)


def test_kept_latents_decode_to_the_same_frames(submit, config, tmp_path) -> None:
    from wanduet.engine.tools import decode_latents

    job = submit(save_latents=True)
    latents = job.result().videos[0].latents_path
    assert latents is not None
    again = decode_latents(config, latents, OutputOptions(tmp_path / "again.mkv", "ffv1", save_latents=True))
    assert frame_hashes(again.videos[0].path).digest == digest(job)
    assert latents.exists()


def test_cancel_stops_within_a_step_and_resume_loses_nothing(submit, tmp_path) -> None:
    whole = digest(submit("whole", changes={"num_inference_steps": 8}))
    seen: list[int] = []
    stop, cancelled = threading.Event(), threading.Event()

    def on_step(info):
        seen.append(info.step)
        if info.step == 4:
            stop.set()
            assert cancelled.wait(60)

    job = submit("part", on_step, changes={"num_inference_steps": 8})
    assert stop.wait(60)
    job.cancel()
    cancelled.set()
    with pytest.raises(CancelledError):
        job.result(60)
    assert seen[-1] <= 5
    assert files(tmp_path) == {"whole.mkv"}

    again: list[int] = []
    resumed = submit("part", lambda info: again.append(info.step), changes={"num_inference_steps": 8}, resume=True)
    assert digest(resumed) == whole
    assert again[0] == seen[-1] + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_program_makes_new_tensors_of_changes_nothing(submit, config, tmp_path, dtype) -> None:
    jobs = [submit(sampler, changes={"sampler": sampler}) for sampler in ("unipc", "euler")]
    wanted = [digest(job) for job in jobs]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with Engine(replace(config, data_dir=tmp_path / "data")) as engine:  # which loads, and encodes the text, too
            for job, same in zip(jobs, wanted, strict=True):
                fields = {k: v for k, v in job.request.model_dump().items() if k in GenerationRequest.model_fields}
                again = engine.submit(GenerationRequest(**fields), OutputOptions(tmp_path / "again.mkv", "ffv1"))
                assert digest(again) == same
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


def test_a_decode_that_gives_nan_is_no_video_and_costs_no_step(submit, tmp_path, monkeypatch) -> None:
    whole = digest(submit("whole"))  # the VAE is loaded, and has passed its own test
    with monkeypatch.context() as poisoned:
        decode_rows = WanVAE.decode_rows
        poisoned.setattr(WanVAE, "decode_rows", lambda *a: ((made := decode_rows(*a))[0] * float("nan"), made[1]))
        with pytest.raises(NonFiniteFramesError, match="latents are kept"):
            submit("nan").result()
    assert files(tmp_path) == {"whole.mkv", "nan.mkv.latents.safetensors"}
    again = submit("nan", resume=True)
    assert "denoise" not in {event.phase for event in again.events()}
    assert digest(again) == whole


@pytest.mark.parametrize("order", ["frame", "strip"])
def test_cancel_ends_a_decode_within_a_part_of_it(submit, tmp_path, monkeypatch, order) -> None:
    decode_rows, submitted, calls = WanVAE.decode_rows, threading.Event(), []

    def cancelling(*args):
        assert submitted.wait(60)
        calls.append(args)
        if len(calls) == 2:
            job.cancel()
        return decode_rows(*args)

    monkeypatch.setattr(WanVAE, "decode_rows", cancelling)
    monkeypatch.setattr(decode, "decode_modes", lambda *_: iter([("cpu", Tiling(order, 4))]))
    job = submit()
    submitted.set()
    with pytest.raises(CancelledError):
        job.result(60)
    assert len(calls) <= 5  # of 3 latent frames x 4 strips
    assert not [name for name in files(tmp_path) if name.endswith(".mkv")]


def test_a_cancel_ends_a_job_at_once_that_waits_for_another_ones_stage(submit) -> None:
    denoising, go_on = threading.Event(), threading.Event()

    def on_step(info):
        denoising.set()
        assert go_on.wait(60)

    first = submit("first", on_step)
    assert denoising.wait(60)
    waiting = submit("waiting")
    for event in waiting.events():
        if event.phase == "encode" and event.done == event.total:
            break
    waiting.cancel()
    with pytest.raises(CancelledError):
        waiting.result(60)
    assert not first.finished
    again = submit("waiting")  # its file's name is free again
    go_on.set()
    assert [len(job.result(60).videos) for job in (first, again)] == [1, 1]


def test_a_failed_decode_keeps_the_latents_and_resume_only_decodes(submit, tmp_path, monkeypatch) -> None:
    whole = digest(submit("whole"))

    def broken(self, z, past):
        raise RuntimeError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(WanVAE, "decode_mid", broken)
        with pytest.raises(RuntimeError, match="a fault"):
            submit("part").result(60)
    assert files(tmp_path) == {"whole.mkv", "part.mkv.latents.safetensors"}
    steps: list[int] = []
    assert digest(submit("part", watch=lambda info: steps.append(info.step), resume=True)) == whole
    assert steps == []
    assert files(tmp_path) == {"whole.mkv", "part.mkv"}


@pytest.mark.parametrize("step", [0, 2, 3])
def test_nan_is_found_and_named(submit, step, tmp_path) -> None:
    def poison(info):
        return info.latents * float("nan") if info.step == step else None

    with pytest.raises(NonFiniteLatentsError) as found:
        submit(on_step=poison).result(60)
    assert found.value.step == step
    assert files(tmp_path) == set()


@pytest.mark.parametrize("times", [1, 2])
def test_out_of_memory_while_denoising_repeats_the_forward(submit, monkeypatch, times) -> None:
    whole = digest(submit("whole"))
    forward_cfg = WanTransformer.forward_cfg
    failures = iter([True] * times)

    def sometimes(self, *args, **kwargs):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward_cfg(self, *args, **kwargs)

    monkeypatch.setattr(WanTransformer, "forward_cfg", sometimes)
    job = submit("tight")
    assert digest(job) == whole
    assert len(job.notes) == times
    assert read_metadata(job.result().videos[0].path)["rungs"] == job.notes


def test_out_of_memory_while_decoding_goes_down_the_ladder(submit, monkeypatch) -> None:
    whole = digest(submit("whole"))
    decode_rows = WanVAE.decode_rows
    heights: list[int] = []

    def small_only(self, mid, feature_cache, wanted, *halos):
        heights.append(wanted.count)
        if wanted.count > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return decode_rows(self, mid, feature_cache, wanted, *halos)

    monkeypatch.setattr(WanVAE, "decode_rows", small_only)
    job = submit("tight")
    job.result(60)
    assert job.notes[0].startswith("decode: frame-major, 4 strips")
    assert heights[0] == 32
    monkeypatch.undo()
    assert len(whole) == 64


def test_memory_that_never_suffices_ends_in_a_clear_error_and_the_next_job_works(submit, monkeypatch, tmp_path) -> None:
    def never(self, mid, feature_cache, wanted, *halos):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(WanVAE, "decode_rows", never)
        with pytest.raises(OutOfMemoryError, match="smallest form") as refused:
            submit("part").result(60)
    assert "part.mkv.latents.safetensors" in str(refused.value)
    assert load_latents(tmp_path / "part.mkv.latents.safetensors")[0].shape == (16, 3, 4, 6)
    submit("next").result(60)


def test_bad_requests_and_outputs_are_refused_before_any_work(engine, tmp_path) -> None:
    small = {"prompt": "a", "height": 32, "width": 32, "num_frames": 5}
    with pytest.raises(InvalidRequestError, match="num_frames"):
        engine.submit(GenerationRequest(**(small | {"num_frames": 6})), OutputOptions(tmp_path / "a.mp4"))
    with pytest.raises(OutputError):
        engine.submit(GenerationRequest(**small), OutputOptions(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        engine.submit(GenerationRequest(**small), OutputOptions(tmp_path / "file" / "a.mp4"))


def test_long_prompts_are_cut_with_a_warning(submit) -> None:
    result = submit(changes={"prompt": "a red circle " * 400 + "and a zebra"}).result()
    assert any("512 tokens" in warning and "zebra" in warning for warning in result.warnings)


def test_stages_work_on_different_jobs_at_once(config, tmp_path) -> None:
    """While one job decodes, the next one denoises; the trace that Perfetto reads shows it."""
    request = GenerationRequest(
        prompt="a red circle", height=32, width=48, num_frames=33, num_inference_steps=4, seed=1
    )
    with Engine(replace(config, devices="vae=cpu,transformer=cpu")) as engine:
        jobs = [engine.submit(request, OutputOptions(tmp_path / f"{i}.mkv", "ffv1")) for i in range(3)]
        for job in jobs:
            job.result(120)
        engine.trace.save(tmp_path / "trace.json")
    assert overlap(engine.trace.spans, "denoise", "decode") > 0.05
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["encode", "denoise", "decode"]
    assert sum(e["ph"] == "X" for e in events) == 9
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events if e["ph"] == "X")


@pytest.mark.parametrize(
    ("problem", "flag"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 MiB. And much more"), "--vram-limit"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "--ram-limit"),
        (MemoryError(), "--ram-limit"),
    ],
)
def test_memory_that_runs_out_where_nothing_is_smaller_is_a_clear_error(
    tmp_path, monkeypatch, caplog, problem, flag
) -> None:
    def run_out(*_: object) -> None:
        raise problem

    monkeypatch.setattr(TransformerHost, "use", run_out)
    with Engine(EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path / "data")) as engine:
        job = engine.submit(
            GenerationRequest.parse(prompt="x", height=32, width=32, num_frames=5), OutputOptions(tmp_path / "a.mp4")
        )
        with pytest.raises(OutOfMemoryError, match="out of memory") as caught:
            job.result(60)
    assert flag in (caught.value.hint or "")
    assert "Traceback" not in caplog.text  # it is no surprise


def test_events_end_for_whoever_reads_them_again(submit) -> None:
    job = submit()
    assert [event.phase for event in job.events()][-1] == "done"
    assert [event.phase for event in job.events()] == ["done"]


def test_the_example_of_the_docs_runs(config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDUET_DATA_DIR", str(config.data_dir))
    page = (Path(__file__).parents[3] / "docs" / "python.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Engine(" in block)
    exec(example, {"__name__": "__main__"})
    assert (tmp_path / "circle.mp4").stat().st_size > 0


def test_what_is_no_request_is_refused_in_a_sentence(engine, tmp_path) -> None:
    request = GenerationRequest.parse(prompt="x", height=32, width=32, num_frames=5)
    for arguments in (("x", OutputOptions(tmp_path / "a.mp4")), (request, None)):
        with pytest.raises(TypeError, match="submit takes a GenerationRequest and a path or OutputOptions"):
            engine.submit(*arguments)
    with pytest.raises(TypeError, match=r"EngineConfig\(model='miniature'\)"):
        Engine("miniature")
    assert OutputOptions("a.mp4").video_path(1, 2) == Path("a-2.mp4").absolute()

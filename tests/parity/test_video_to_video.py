"""`wanduet.WanVideoToVideoPipeline` against diffusers' own: the same call on the same folder, float32 on the CPU."""

import copy
import inspect
import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import WanVideoToVideoPipeline as Oracle
from PIL import Image

import wanduet

CALL = {"height": 32, "width": 48, "num_inference_steps": 4, "output_type": "latent"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
LEVEL = 1.01 / 255


@pytest.fixture(scope="module")
def loaded_oracle(random_model) -> Oracle:
    return Oracle.from_pretrained(random_model)


@pytest.fixture
def oracle(loaded_oracle) -> Oracle:
    """diffusers' pipeline, whose parts a test may replace."""
    pipe = Oracle(**loaded_oracle.components)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loaded(random_model, tmp_path_factory) -> "wanduet.WanVideoToVideoPipeline":
    folder = tmp_path_factory.mktemp("data")
    return wanduet.WanVideoToVideoPipeline.from_pretrained(random_model, data_dir=folder)


@pytest.fixture
def pipe(loaded) -> "wanduet.WanVideoToVideoPipeline":
    """Ours, which shares what is loaded."""
    pipe = wanduet.WanVideoToVideoPipeline.from_pipe(loaded, scheduler=copy.deepcopy(loaded.scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def floats(seed: int = 0, frames: int = 5, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.random.default_rng(seed).random((frames, *size, 3), dtype=np.float32)


def pictures(seed: int = 0, frames: int = 5, size: tuple[int, int] = (32, 48)) -> list[Image.Image]:
    return [Image.fromarray(np.uint8(frame * 255)) for frame in floats(seed, frames, size)]


def tensors(seed: int = 0, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.from_numpy(floats(seed, size=size)).permute(0, 3, 1, 2)


def run(pipe, video: Any = None, prompt: Any = "a red circle", **call: Any) -> Any:
    return pipe(video, prompt, generator=torch.Generator().manual_seed(7), **(CALL | call)).frames


def compare(oracle, pipe, *args: Any, **call: Any) -> torch.Tensor:
    expected, got = run(oracle, *args, **call), run(pipe, *args, **call)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    return got


SCHEDULERS = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=5.0),
}


@pytest.mark.parametrize(
    ("name", "strength"),
    [("unipc", 0.3), ("unipc", 0.8), ("unipc", 1.0), ("euler", 0.5), ("euler", 1.0), ("heun", 0.6), ("dpm++", 0.75)],
)
def test_latents_of_each_scheduler_and_strength(oracle, pipe, name, strength) -> None:
    counts = []
    for each in (oracle, pipe):
        each.scheduler = SCHEDULERS[name]()
    count = 1 if name == "heun" else 2  # diffusers' Heun cannot add noise for two prompts
    prompts, call = ["a heart", "a star"][:count], {"negative_prompt": ["blue", "red"][:count], "strength": strength}
    compare(oracle, pipe, pictures(), prompts, **call)
    compare(oracle, pipe, pictures(), prompts, **call)  # what the first call has left behind does no harm
    for each in (oracle, pipe):
        counts.append((each.num_timesteps, each.scheduler.timesteps.tolist(), each.scheduler.step_index))
    assert counts[0] == counts[1]


def test_each_strength_makes_another_video(pipe) -> None:
    """So that the comparison above could fail."""
    made = [run(pipe, pictures(), strength=strength) for strength in (0.3, 0.8, 1.0)]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.pairwise(made))


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_frames_of_resized_pictures(oracle, pipe, output_type) -> None:
    call = {"output_type": output_type, "guidance_scale": 1.0}
    expected, got = (run(each, pictures(size=(50, 40)), **call) for each in (oracle, pipe))
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= LEVEL


@pytest.mark.parametrize(
    "video",
    [
        floats(), list(floats()), floats(size=(20, 30)), tensors(), list(tensors(size=(20, 30))), tensors() * 2 - 1,
        pictures(frames=1), pictures(frames=7), tensors()[None], [floats(), floats(1)], [pictures(), pictures(1)],
        torch.stack([tensors(), tensors(1)]),
    ],
    ids=[
        "array", "arrays", "resized array", "tensor", "resized tensors", "of -1 to 1", "one frame", "7 frames",
        "batch of one", "two arrays", "two lists", "batch of two",
    ],
)  # fmt: skip
def test_kinds_of_videos(oracle, pipe, video) -> None:
    compare(oracle, pipe, video, guidance_scale=1.0, num_inference_steps=2)


def test_a_video_for_each_prompt_with_its_own_generator(oracle, pipe) -> None:
    made = []
    for each in (oracle, pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        made.append(each([pictures(), pictures(1)], ["a heart", "a star"], generator=generators, **CALL).frames)
    assert (made[0] - made[1]).abs().max() <= 1e-4 * made[0].abs().max()


def test_several_videos_of_a_prompt_are_what_several_prompts_make(pipe) -> None:
    """diffusers makes one, whatever is asked for."""
    several = run(pipe, [pictures(), pictures(1)], ["a", "b"], num_videos_per_prompt=2)
    videos = [pictures(seed) for seed in (0, 0, 1, 1)]
    assert torch.allclose(several, run(pipe, videos, ["a", "a", "b", "b"]), atol=1e-5)


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_own_timesteps(oracle, pipe, strength) -> None:
    for each in (oracle, pipe):
        each.scheduler = SCHEDULERS["euler"]()
    compare(oracle, pipe, pictures(), timesteps=[900.0, 600.0, 200.0], strength=strength)


def test_own_latents(oracle, pipe) -> None:
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    assert compare(oracle, pipe, latents=latents, strength=0.6).shape == latents.shape


def test_own_embeddings(oracle, pipe) -> None:
    embeds = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1))
    compare(oracle, pipe, pictures(), None, prompt_embeds=embeds, negative_prompt_embeds=torch.zeros(1, 40, 32))


def test_a_callback_sees_and_changes_the_same(oracle, pipe) -> None:
    def call(each, seen: list[Any]) -> torch.Tensor:
        def callback(pipe, step, timestep, tensors):
            seen.append((step, timestep.item(), pipe.num_timesteps, pipe.current_timestep.item()))
            pipe._interrupt = step == 2
            return {"latents": tensors["latents"] * 0.9}

        return run(each, pictures(), num_inference_steps=5, callback_on_step_end=callback)

    theirs: list[Any] = []
    ours: list[Any] = []
    expected, got = call(oracle, theirs), call(pipe, ours)
    assert theirs == ours
    assert len(ours) == 3
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_vae_that_is_set_encodes(oracle, random_model, tmp_path) -> None:
    vae = diffusers.AutoencoderKLWan.from_pretrained(random_model, subfolder="vae", torch_dtype=torch.float32)
    pipe = wanduet.WanVideoToVideoPipeline.from_pretrained(random_model, data_dir=tmp_path)
    pipe.set_progress_bar_config(disable=True)
    before = run(pipe, pictures())
    vae.encoder.conv_out.weight.data.mul_(20.0)
    oracle.vae = pipe.vae = vae
    after = compare(oracle, pipe, pictures())
    assert (before - after).abs().max() > 0.1


def test_pipelines_made_of_each_other_share_their_models(oracle, pipe, random_model, tmp_path) -> None:
    text = wanduet.WanPipeline.from_pretrained(random_model, data_dir=tmp_path)
    ours = wanduet.WanVideoToVideoPipeline.from_pipe(text)
    of_oracle = wanduet.WanVideoToVideoPipeline.from_pipe(oracle)
    of_components = wanduet.WanVideoToVideoPipeline(**pipe.components)
    for each in (text, ours, of_oracle, of_components):
        each.set_progress_bar_config(disable=True)
    expected = compare(oracle, ours, pictures())
    assert ours.transformer.parts is text.transformer.parts
    assert torch.equal(expected, run(of_components, pictures()))
    assert of_oracle.transformer is oracle.transformer
    compare(oracle, of_oracle, pictures())
    again = wanduet.WanPipeline.from_pipe(ours)
    again.set_progress_bar_config(disable=True)
    made = [
        each("a heart", num_frames=5, generator=torch.Generator().manual_seed(3), **CALL).frames
        for each in (text, again, diffusers.WanPipeline.from_pipe(oracle))
    ]
    assert torch.equal(made[0], made[1])
    assert (made[0] - made[2]).abs().max() <= 1e-4 * made[2].abs().max()


def test_what_a_program_reads(oracle, pipe) -> None:
    for name in ("vae_scale_factor_temporal", "vae_scale_factor_spatial", "device", "dtype"):
        assert getattr(pipe, name) == getattr(oracle, name), name
    assert set(pipe.components) == set(oracle.components)


def test_positional_parameters_are_those_of_diffusers() -> None:
    for method in ("__call__", "__init__"):
        theirs = inspect.signature(getattr(Oracle, method)).parameters.values()
        ours = inspect.signature(getattr(wanduet.WanVideoToVideoPipeline, method)).parameters.values()
        assert [p.name for p in ours if p.kind is not p.KEYWORD_ONLY] == [p.name for p in theirs]
    call = inspect.signature(Oracle.__call__).parameters
    for name, parameter in inspect.signature(wanduet.WanVideoToVideoPipeline.__call__).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY and name != "callback_on_step_end_tensor_inputs":
            assert parameter.default == call[name].default, name

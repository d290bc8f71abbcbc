"""`wanduet.WanPipeline` against diffusers' own: the same call on the same folder, float32 on the CPU."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import WanPipeline as Oracle

import wanduet

CALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 8}
LEVEL = 1 / 255


@pytest.fixture(scope="module")
def oracle(random_model) -> Oracle:
    pipe = Oracle.from_pretrained(random_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(random_model, tmp_path_factory) -> "wanduet.WanPipeline":
    return wanduet.WanPipeline.from_pretrained(random_model, data_dir=tmp_path_factory.mktemp("data"))


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compare(oracle, pipe, **call) -> None:
    expected = oracle(generator=seeded(), **CALL, **call).frames
    got = pipe(generator=seeded(), **CALL, **call).frames
    assert type(got) is type(expected)
    assert got.shape == expected.shape
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= LEVEL


def test_latents_of_eight_steps_with_guidance(oracle, pipe) -> None:
    call = {"prompt": "a red circle", "negative_prompt": "blue", "output_type": "latent", "guidance_scale": 5.0}
    expected = oracle(generator=seeded(), **CALL, **call).frames
    got = pipe(generator=seeded(), **CALL, **call).frames
    assert ((got - expected).abs().max() / expected.abs().max()) <= 1e-4


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_frames(oracle, pipe, output_type) -> None:
    compare(oracle, pipe, prompt="A  red &amp; green circle\n", output_type=output_type)


def test_without_guidance(oracle, pipe) -> None:
    compare(oracle, pipe, prompt="a square", guidance_scale=1.0)


def test_several_prompts_and_videos(oracle, pipe) -> None:
    compare(oracle, pipe, prompt=["a square", "a star"], negative_prompt=["x", "y"], num_videos_per_prompt=2)


def test_own_embeddings_and_shorter_text(oracle, pipe) -> None:
    embeds = torch.randn(1, 40, 32, generator=seeded(1))
    compare(oracle, pipe, prompt_embeds=embeds, negative_prompt_embeds=torch.zeros(1, 40, 32))
    compare(oracle, pipe, prompt="a heart", max_sequence_length=64)


def test_own_latents(oracle, pipe) -> None:
    latents = torch.randn(1, 16, 3, 4, 6, generator=seeded(2))
    compare(oracle, pipe, prompt="a heart", latents=latents)


def test_images(oracle, pipe) -> None:
    expected = oracle("a heart", generator=seeded(), output_type="pil", **CALL).frames[0]
    got = pipe("a heart", generator=seeded(), output_type="pil", **CALL).frames[0]
    assert [image.size for image in got] == [image.size for image in expected]
    differences = [np.abs(np.int16(a) - np.int16(b)).max() for a, b in zip(got, expected, strict=True)]
    assert max(differences) <= 1


def test_a_callback_sees_and_changes_the_same(oracle, pipe) -> None:
    def run(which, seen: list[tuple[float, torch.dtype]]) -> np.ndarray:
        def callback(_pipe, step, timestep, tensors):
            seen.append((timestep.item(), timestep.dtype))
            assert set(tensors) == {"latents", "prompt_embeds"}
            return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] * (1 + step)}

        return which(
            "a heart", generator=seeded(), callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **CALL,
        ).frames  # fmt: skip

    theirs: list[tuple[float, torch.dtype]] = []
    ours: list[tuple[float, torch.dtype]] = []
    assert np.abs(run(oracle, theirs) - run(pipe, ours)).max() <= LEVEL
    assert theirs == ours


def test_a_callback_may_turn_guidance_off(oracle, pipe) -> None:
    def run(which) -> torch.Tensor:
        def callback(pipe, step, _timestep, _tensors):
            if step == 2:
                pipe._guidance_scale = 0.0
            return {}

        call = {"guidance_scale": 5.0, "output_type": "latent", "callback_on_step_end": callback}
        return which("a heart", generator=seeded(), **CALL, **call).frames

    expected = run(oracle)
    assert (run(pipe) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_callback_object_says_what_it_sees(oracle, pipe) -> None:
    from diffusers.callbacks import PipelineCallback

    class Halve(PipelineCallback):
        tensor_inputs = ["latents", "negative_prompt_embeds"]  # noqa: RUF012 - as diffusers declares them

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {name: tensor * 0.5 for name, tensor in callback_kwargs.items()}

    results = [
        which("a heart", generator=seeded(), callback_on_step_end=Halve(), **CALL).frames for which in (oracle, pipe)
    ]
    assert np.abs(results[0] - results[1]).max() <= LEVEL


def test_a_generator_for_each_video(oracle, pipe) -> None:
    frames = [which(["a heart", "a star"], generator=[seeded(1), seeded(2)], **CALL).frames for which in (oracle, pipe)]
    assert np.abs(frames[0] - frames[1]).max() <= LEVEL


def test_without_a_generator_the_global_seed_counts(oracle, pipe) -> None:
    frames = []
    for which in (oracle, pipe):
        torch.manual_seed(5)
        frames.append(which("a heart", **CALL).frames)
    assert np.abs(frames[0] - frames[1]).max() <= LEVEL


def test_every_parameter_by_position(oracle, pipe) -> None:
    def call(which):
        return which(
            "a heart", "blue", 32, 48, 8, 3, 4.0, None, 2, seeded(), None, None, None, "np", False, None, None,
            ["latents"], 64,
        )  # fmt: skip

    (expected,), (got,) = call(oracle), call(pipe)
    assert got.shape == expected.shape == (2, 9, 32, 48, 3)
    assert np.abs(got - expected).max() <= LEVEL


def test_several_videos_need_no_more_activations_than_one(pipe, monkeypatch) -> None:
    """Each step is of one video: what the plan has counted. The transformer is given the step."""
    from wanduet.models.dit.model import WanTransformer

    forward_cfg, batches, steps = WanTransformer.forward_cfg, [], []

    def counted(self, latents, timestep, texts, rope, step):
        batches.append(len(latents))
        steps.append((step.index, step.timestep == timestep.item()))
        return forward_cfg(self, latents, timestep, texts, rope, step)

    monkeypatch.setattr(WanTransformer, "forward_cfg", counted)
    pipe(["a", "b", "c"], **(CALL | {"num_inference_steps": 2}), output_type="latent")
    assert set(batches) == {1}
    assert sorted(set(steps)) == [(0, True), (1, True)]


def test_interrupt_keeps_what_was_made(oracle, pipe) -> None:
    def run(which) -> torch.Tensor:
        def callback(pipe, step, _timestep, _tensors):
            pipe._interrupt = step == 2
            return {}

        return which("a", generator=seeded(), output_type="latent", callback_on_step_end=callback, **CALL).frames

    expected = run(oracle)
    assert (run(pipe) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_another_scheduler(oracle, pipe) -> None:
    from diffusers import UniPCMultistepScheduler

    before = (oracle.scheduler, pipe.scheduler)
    for each in (oracle, pipe):
        each.scheduler = UniPCMultistepScheduler.from_config(each.scheduler.config, flow_shift=7.0)
    compare(oracle, pipe, prompt="a heart")
    oracle.scheduler, pipe.scheduler = before


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 30}, {"guidance_scale_2": 3.0}, {"attention_kwargs": {"scales": 0.5}}, {"output_type": "jpg"},
        {"callback_on_step_end_tensor_inputs": ["noise"]}, {"prompt": None}, {"negative_prompt": ["a", "b"]},
        {"latents": torch.zeros(1, 16, 1, 1, 1)},
        {"negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1, 8, 32)}, {"negative_prompt": 5},
        {"prompt": []}, {"prompt": ["a", 5]}, {"prompt": ("a",)}, {"prompt_embeds": torch.zeros(1, 8, 32)},
        {"prompt": None, "prompt_embeds": torch.zeros(8, 32)}, {"prompt": None, "prompt_embeds": torch.zeros(1, 8, 33)},
        {"negative_prompt_embeds": torch.zeros(2, 8, 32)}, {"generator": [torch.Generator()] * 2},
        {"num_videos_per_prompt": 0}, {"max_sequence_length": 0}, {"max_sequence_length": -1},
    ],
)  # fmt: skip
def test_what_is_not_supported_raises(pipe, wrong) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        pipe(**({"prompt": "a"} | CALL | wrong))


def test_positional_parameters_are_those_of_diffusers() -> None:
    import inspect

    theirs = list(inspect.signature(Oracle.__call__).parameters)
    ours = inspect.signature(wanduet.WanPipeline.__call__).parameters
    assert [n for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY] == theirs


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_scheduler_is_the_one_that_the_folder_names(random_model, tmp_path, name) -> None:
    import diffusers

    flow = {} if name.startswith("FlowMatch") else {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    shift = {"shift": 5.0} if name.startswith("FlowMatch") else {"flow_shift": 5.0}
    oracle = Oracle.from_pretrained(random_model, scheduler=getattr(diffusers, name)(**flow, **shift))
    oracle.set_progress_bar_config(disable=True)
    oracle.save_pretrained(tmp_path / "model")
    compare(oracle, wanduet.WanPipeline.from_pretrained(tmp_path / "model", data_dir=tmp_path), prompt="a heart")


def test_a_scheduler_of_another_kind_is_refused(random_model, tmp_path) -> None:
    from diffusers import DDIMScheduler

    from wanduet.errors import ModelNotFoundError

    model = shutil.copytree(random_model, tmp_path / "model")
    DDIMScheduler().save_pretrained(model / "scheduler")
    with pytest.raises(ModelNotFoundError, match="DDIMScheduler"):
        wanduet.WanPipeline.from_pretrained(model)

"""`WanPipeline` as a program for diffusers meets it: keywords, calls that are no computation, refusals, two things at once."""

import copy
import gc
import pickle
import threading
import weakref
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import Tensor

import wanduet
from wanduet.config import EngineConfig
from wanduet.doors.python.approximations import Approximations
from wanduet.doors.python.arguments import CallArguments
from wanduet.doors.python.parts import PipelineBusyError
from wanduet.engine.pipeline import Engine
from wanduet.errors import ConfigError, ModelNotFoundError
from wanduet.kernels.attention import sparse_steps
from wanduet.kernels.attention.sparse import plain_listed
from wanduet.models.dit.model import WanTransformer
from wanduet.planning.hardware import parse_hardware
from wanduet.request import GenerationRequest
from wanduet.weights.hub import open_model

CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "output_type": "latent"}
WAIT = 60.0


def load(tmp_path, model: str = "miniature", **keywords: Any) -> "wanduet.WanPipeline":
    pipe = wanduet.WanPipeline.from_pretrained(model, data_dir=tmp_path, **keywords)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> "wanduet.WanPipeline":
    return load(tmp_path_factory.mktemp("data"), devices="cpu")


@pytest.fixture
def pipe(loaded) -> "wanduet.WanPipeline":
    """Of its own state, with what is loaded shared."""
    pipe = wanduet.WanPipeline.from_pipe(loaded)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, **call: Any) -> Tensor:
    return pipe("a red circle", generator=torch.Generator().manual_seed(1), **(CALL | call)).frames


# The model card's program, and what else diffusers' programs call.


def test_the_model_cards_program(tmp_path) -> None:
    vae = wanduet.WanPipeline.from_pretrained("miniature").vae  # the card loads diffusers' own (see tests/parity)
    pipe = wanduet.WanPipeline.from_pretrained("miniature", torch_dtype=torch.bfloat16, data_dir=tmp_path)
    assert vae.dtype == pipe.vae.dtype == torch.float32
    pipe.to("cpu")
    output = pipe(
        prompt="a red circle", negative_prompt="blue", height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=5.0,
    ).frames[0]  # fmt: skip
    path = wanduet.export_to_video(output, str(tmp_path / "output.mp4"), fps=16)
    import av

    with av.open(path) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (48, 32, 5, 16)


@pytest.mark.parametrize(
    "keywords",
    [
        {"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"},
        {"torch_dtype": {"transformer": torch.bfloat16}}, {"dtype": {"default": torch.bfloat16, "vae": torch.float32}},
        {"torch_dtype": torch.bfloat16, "use_safetensors": True, "low_cpu_mem_usage": True, "device_map": "balanced"},
        {"torch_dtype": torch.bfloat16, "cache_dir": "x", "token": True, "local_files_only": True, "variant": None},
        {"torch_dtype": torch.bfloat16, "revision": "main", "vae": None, "scheduler": None, "device_map": "cpu"},
    ],
)  # fmt: skip
def test_keywords_that_are_taken(tmp_path, keywords) -> None:
    pipe = load(tmp_path, **keywords)
    assert (pipe.dtype, pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_dict_names_the_vaes_dtype_too(tmp_path) -> None:
    dtypes = {"vae": torch.bfloat16, "text_encoder": torch.bfloat16}
    pipe = load(tmp_path, torch_dtype=dtypes)
    assert (pipe.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"variant": "fp16"}, "torch_dtype="), ({"use_safetensors": False}, "safetensors"),
        ({"device_map": {"": 0}}, "devices="), ({"quantization_config": {"a": 1}}, "vram_limit="),
        ({"max_memory": {0: "8GB"}}, "vram_limit="), ({"torch_dtype": torch.float64}, "float32"),
        ({"torch_dtype": {"unet": torch.float16}}, "transformer"), ({"transformer_2": 5}, "Wan2"),
        ({"dtype": torch.float32, "torch_dtype": torch.float16}, "not both"), ({"proxies": {"http": "x"}}, "HTTPS_PROXY"),
        ({"sheduler": 5}, "scheduler"), ({"custom_pipeline": "x"}, "diffusers"),
    ],
)  # fmt: skip
def test_keywords_that_are_refused_say_what_takes_their_place(tmp_path, keywords, says) -> None:
    with pytest.raises((ValueError, TypeError), match=says) as caught:
        load(tmp_path, **keywords)
    assert next(iter(keywords)).removeprefix("torch_") in str(caught.value)
    assert str(caught.value).count(". ") == 0


def test_the_hubs_keywords_reach_its_client(tmp_path, monkeypatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **keywords: Any) -> str:
        asked.append({"name": name} | keywords)
        raise OSError("no such token")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match="no such token"):
        wanduet.WanPipeline.from_pretrained(
            "somebody/model", cache_dir=tmp_path, token="secret", local_files_only=True, revision="v2"
        )
    (call,) = asked
    assert (call["name"], call["cache_dir"], call["token"]) == ("somebody/model", tmp_path, "secret")
    assert (call["revision"], call["local_files_only"]) == ("v2", True)
    assert all(
        pattern.endswith((".json", ".safetensors")) or "tokenizer" in pattern for pattern in call["allow_patterns"]
    )


def test_calls_about_memory_and_speed_change_no_result(pipe) -> None:
    before = latents(pipe)
    pipe.enable_model_cpu_offload()
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True)
    for name in ("vae_tiling", "vae_slicing", "attention_slicing", "xformers_memory_efficient_attention"):
        getattr(pipe, f"enable_{name}")()
        getattr(pipe, f"disable_{name}")()
    pipe.maybe_free_model_hooks()
    pipe.remove_all_hooks()
    pipe.vae.enable_slicing()
    pipe.transformer.set_attention_backend("flash")
    pipe.transformer.eval().requires_grad_(False)
    assert torch.equal(latents(pipe), before)


def test_a_gpu_that_is_not_there_is_refused_at_once(pipe, monkeypatch) -> None:
    monkeypatch.setattr("wanduet.doors.python.parts.detect", lambda: parse_hardware("cpu"))
    before = pipe.device
    for call in (
        lambda: pipe.to("cuda"), lambda: pipe.to(0), pipe.cuda, lambda: pipe.enable_model_cpu_offload(gpu_id=1),
        lambda: pipe.enable_sequential_cpu_offload(device="cuda"), lambda: pipe.to("cuda", torch.float16),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="no device 'cuda"):
            call()
    assert pipe.device == before


def test_ways_to_say_where_and_how(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("wanduet.doors.python.parts.detect", lambda: parse_hardware("2x24GiB"))
    pipe = load(tmp_path)
    assert pipe.to("cuda").device == torch.device("cuda:0")
    assert pipe.to(1).device == torch.device("cuda:1")
    assert pipe.to(torch.device("cuda", 0)).device == torch.device("cuda:0")
    assert pipe.to("cpu", torch.bfloat16).device == torch.device("cpu")
    assert pipe.dtype == torch.bfloat16
    assert pipe.to(torch.float32).dtype == torch.float32
    assert pipe.to(dtype=torch.float16, device="cuda:1").dtype == torch.float16
    assert pipe.device == torch.device("cuda:1")
    assert pipe.cpu().cuda(0).device == pipe._execution_device == torch.device("cuda:0")
    pipe.enable_model_cpu_offload(gpu_id=1)
    assert pipe.transformer.device == pipe.vae.device == torch.device("cuda:1")
    pipe.reset_device_map()
    assert pipe.transformer.device != pipe.vae.device
    for wrong in ((torch.float32, "cpu"), ("cpu", torch.float32, 1)):
        with pytest.raises(ValueError, match="device and a dtype"):
            pipe.to(*wrong)
    with pytest.raises(ValueError, match="float64"):
        pipe.to(torch.float64)


def test_another_dtype_is_computed_in(tmp_path) -> None:
    pipe = load(tmp_path, devices="cpu")
    exact = latents(pipe)
    rounded = latents(pipe.to(torch.bfloat16))
    assert 1e-5 < (rounded - exact).abs().max() / exact.abs().max() < 0.2
    pipe.transformer.to(torch.float32)
    assert torch.equal(latents(pipe), exact)


def test_the_result_by_name_by_number_and_as_a_tuple(pipe) -> None:
    output = pipe("a", **CALL)
    assert output[0] is output["frames"] is output.frames is output.to_tuple()[0]
    assert isinstance(pipe("a", return_dict=False, **CALL), tuple)


def test_progress_as_diffusers_shows_it(pipe, capsys) -> None:
    pipe.set_progress_bar_config(desc="denoising", ncols=60)
    latents(pipe)
    assert "denoising: 100%" in capsys.readouterr().err
    assert "3/3" not in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    latents(pipe)
    assert capsys.readouterr().err == ""
    assert list(pipe.progress_bar([1, 2])) == [1, 2]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("save_lora_weights", "trains no"), ("lora_scale", "attention_kwargs"), ("save_pretrained", "folder"),
        ("load_ip_adapter", "images"), ("unet", "pipe.transformer"), ("enable_vae_tilling", "enable_vae_tiling"),
        ("sheduler", "scheduler"), ("check_inputs", "itself"), ("boundary_ratio", "Wan2.1"),
        ("prepare_latents", "latents="), ("register_modules", "pipe.scheduler"),
    ],
)  # fmt: skip
def test_names_that_are_not_here_say_what_takes_their_place(pipe, name, says) -> None:
    assert not hasattr(pipe, name)
    with pytest.raises(AttributeError, match=says) as caught:
        getattr(pipe, name)
    assert name in str(caught.value)
    assert str(caught.value).count(". ") == 0


def test_class_methods_that_are_not_here_are_refused_so_too() -> None:
    with pytest.raises(AttributeError, match="from_pretrained with a folder"):
        wanduet.WanPipeline.from_single_file("model.safetensors")
    assert not hasattr(wanduet.WanPipeline, "lora_state_dict")


@pytest.mark.parametrize("keywords", [{"local_files_only": True}, {"local_files_only": True, "scheduler": "given"}])
def test_a_model_that_is_not_there_is_refused_before_the_first_call(keywords) -> None:
    from diffusers import UniPCMultistepScheduler

    if "scheduler" in keywords:
        keywords = keywords | {"scheduler": UniPCMultistepScheduler()}
    with pytest.raises(ModelNotFoundError, match="somebody/nothing"):
        wanduet.WanPipeline.from_pretrained("somebody/nothing", **keywords)


def test_parts_say_what_they_cannot_do(pipe) -> None:
    for part, name in (("transformer", "add_adapter"), ("vae", "encode"), ("text_encoder", "resize_token_embeddings")):
        with pytest.raises(AttributeError, match=rf"pipe\.{part} .* {name}.* set pipe\.{part}"):
            getattr(getattr(pipe, part), name)
    with pytest.raises(NotImplementedError, match="encode_prompt"):
        pipe.text_encoder(torch.zeros(1, 1))
    with pytest.raises(NotImplementedError, match=r"set pipe\.transformer"):
        pipe.transformer.load_state_dict({})
    for name in ("vae", "transformer", "text_encoder", "tokenizer", "scheduler", "transformer_2"):
        with pytest.raises((TypeError, ValueError), match=rf"pipe\.{name}"):
            setattr(pipe, name, 5)
    with pytest.raises(ValueError, match=r"vae\.decode"):
        pipe.vae.decode(torch.zeros(1, 3, 1, 4, 4))


def test_parts_of_two_pipelines_are_not_mixed(pipe, tmp_path) -> None:
    other = load(tmp_path, devices="cpu")
    with pytest.raises(TypeError, match="from_pipe"):
        pipe.transformer = other.transformer
    with pytest.raises(TypeError, match="from_pipe"):
        wanduet.WanPipeline(**(pipe.components | {"vae": other.vae}))
    with pytest.raises(ValueError, match="random"):
        wanduet.WanPipeline.from_pretrained("random:1.3b", data_dir=tmp_path, tokenizer=print)


# What is planned is what runs.


def test_two_equal_gpus_are_planned_as_they_are_used(tmp_path, monkeypatch) -> None:
    """A group of processes cannot see a callback, so that its memory and its decode's order must not be planned."""
    hardware = parse_hardware("2x24GiB,ram=64GiB")
    monkeypatch.setattr("wanduet.doors.python.parts.detect", lambda: hardware)
    config = {"model": "random:1.3b", "transformer_dtype": "float32", "vae_dtype": "float32", "data_dir": tmp_path}
    request = GenerationRequest.parse(
        prompt=512 * "-", negative_prompt=512 * "-", height=480, width=832, num_frames=81, guidance_scale=5.0, seed=0
    )
    with Engine(EngineConfig(**config), hardware) as engine:
        assert engine.plan(request).strategy == "parallel"
    with Engine(EngineConfig(**config, strategy="placed"), hardware) as engine:
        placed = engine.plan(request)
    plan = wanduet.WanPipeline.from_pretrained("random:1.3b", data_dir=tmp_path).plan()
    assert plan.strategy == "placed"
    assert (plan.transformer.device, plan.vae.device) == (placed.transformer.device, placed.vae.device)
    assert plan.vae.tiling == placed.vae.tiling
    assert plan.prediction.peak_bytes == placed.prediction.peak_bytes


def test_two_gpus_of_which_one_is_too_small_for_a_part(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("wanduet.doors.python.parts.detect", lambda: parse_hardware("24GiB+1GiB,ram=64GiB"))
    plan = wanduet.WanPipeline.from_pretrained("random:1.3b", data_dir=tmp_path).plan()
    assert plan.strategy in ("placed", "single")
    assert plan.prediction.fits


def test_what_is_loaded_is_not_taken_off_the_free_memory_twice(pipe, monkeypatch) -> None:
    latents(pipe)
    monkeypatch.setattr("wanduet.doors.python.parts.detect", lambda: parse_hardware("cpu,ram=64MiB"))
    latents(pipe)


# Two things at once.


def test_two_threads_on_one_pipeline_run_one_after_the_other(pipe) -> None:
    expected = latents(pipe, guidance_scale=1.0), latents(pipe, guidance_scale=5.0)
    running, most, started, results = [0], [0], threading.Event(), {}

    def callback(pipe, step, _timestep, _tensors) -> dict[str, Any]:
        running[0] += step == 0
        most[0] = max(most[0], running[0])
        started.set()
        running[0] -= step == 2
        return {}

    def run(scale: float) -> None:
        results[scale] = latents(pipe, guidance_scale=scale, callback_on_step_end=callback)

    threads = [threading.Thread(target=run, args=(scale,)) for scale in (1.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert most[0] == 1
    assert torch.equal(results[1.0], expected[0])
    assert torch.equal(results[5.0], expected[1])


@pytest.mark.parametrize(
    "what",
    [
        lambda pipe: latents(pipe), lambda pipe: pipe.to(torch.bfloat16), lambda pipe: setattr(pipe, "vae", pipe.vae),
        lambda pipe: latents(wanduet.WanPipeline.from_pipe(pipe)),
    ],
)  # fmt: skip
def test_a_callback_cannot_call_its_pipeline_or_replace_its_parts(pipe, what) -> None:
    expected = latents(pipe)

    def callback(pipe, step, _timestep, _tensors) -> dict[str, Any]:
        with pytest.raises(PipelineBusyError, match="callback"):
            what(pipe)
        return {}

    assert torch.equal(latents(pipe, callback_on_step_end=callback), expected)


def test_a_callback_may_decode_what_it_sees(pipe) -> None:
    seen = []

    def callback(pipe, _step, _timestep, tensors) -> dict[str, Any]:
        seen.append(pipe.vae.decode(tensors["latents"], return_dict=False)[0].shape)
        return {}

    expected = latents(pipe)
    assert torch.equal(latents(pipe, callback_on_step_end=callback), expected)
    assert seen == 3 * [(1, 3, 5, 32, 32)]


def test_parts_are_replaced_only_between_calls_of_other_threads(pipe) -> None:
    """Whoever replaces a part while another thread's call runs waits for its end, and that call is not disturbed."""
    expected, inside, replaced = latents(pipe), threading.Event(), threading.Event()

    def replace() -> None:
        inside.wait(WAIT)
        pipe.vae = pipe.vae
        replaced.set()

    def callback(_pipe, step, _timestep, _tensors) -> dict[str, Any]:
        inside.set()
        assert not replaced.is_set()
        return {}

    thread = threading.Thread(target=replace)
    thread.start()
    assert torch.equal(latents(pipe, callback_on_step_end=callback), expected)
    assert replaced.wait(WAIT)
    thread.join(WAIT)


@pytest.mark.parametrize("where", ["callback", "scheduler"])
def test_the_call_after_one_that_failed(pipe, where) -> None:
    expected = latents(pipe)

    def fail(*_args: Any, **_named: Any) -> Any:
        raise RuntimeError("mine")

    good = pipe.scheduler.step
    call = {"callback_on_step_end": fail} if where == "callback" else {}
    if where == "scheduler":
        pipe.scheduler.step = fail
    with pytest.raises(RuntimeError, match="mine"):
        latents(pipe, **call)
    pipe.scheduler.step = good
    assert pipe.current_timestep is None
    assert torch.equal(latents(pipe), expected)


def test_interrupted_from_a_callback_and_from_another_thread(pipe) -> None:
    seen: list[int] = []

    def callback(pipe, step, _timestep, tensors) -> dict[str, Any]:
        seen.append(step)
        thread = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
        thread.start()
        thread.join(WAIT)
        return {"latents": tensors["latents"] * 0}

    assert not latents(pipe, callback_on_step_end=callback).any()
    assert seen == [0]
    assert pipe.interrupt
    assert latents(pipe).any()  # the next call runs to its end
    assert not pipe.interrupt


def test_what_is_skipped_in_a_call(pipe, monkeypatch) -> None:
    """As many forwards as the speed or the switches say, for each video as if it were alone."""
    made: list[int] = []
    forward = WanTransformer.forward

    def spy(self, latents: Tensor, *given: Any) -> Any:
        made.append(latents.is_meta)
        return forward(self, latents, *given)

    def run(**call: Any) -> tuple[Tensor, int]:
        made.clear()
        return latents(pipe, **({"num_inference_steps": 12} | call)), made.count(False)

    latents(pipe)  # loads the transformer, whose self-test runs a forward too
    monkeypatch.setattr(WanTransformer, "forward", spy)
    exact, count = run()
    assert count == 24
    for same in ({"speed": "exact"}, {"loss_budget": 99}):
        assert torch.equal(run(**same)[0], exact)
    skips = {"step_cache": "easycache:1.0", "guidance_gate": 0.25}
    for call, expected in (
        ({"guidance_gate": 0.25}, 3 * 2 + 9),
        ({"guidance_interval": "0.25-0.5"}, 3 + 3 * 2 + 6),
        ({"guidance_mode": "apg"}, 24),
        ({"step_cache": "easycache:1.0"}, 2 * 11),  # 10 steps and the last
        (skips, 3 * 2 + 8),
    ):
        made_so, count = run(**call)
        assert count == expected
        assert not torch.equal(made_so, exact)
    assert run(guidance_mode="cfg-zero", num_inference_steps=13)[1] == 2 * 12, "the first step is left out"
    noise = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    pair, count = run(**skips, num_videos_per_prompt=2, latents=noise)
    assert count == 2 * (3 * 2 + 8)
    for video, one in zip(pair, noise, strict=True):
        assert torch.equal(run(**skips, latents=one[None])[0][0], video)


@pytest.mark.parametrize("begins_with_a_video", [False, True])
def test_a_sparse_call_is_dense_in_the_first_quarter_of_its_own_steps(pipe, monkeypatch, begins_with_a_video) -> None:
    sparse_calls: list[int] = []

    def spy(*given: Any) -> Any:
        sparse_calls.append(1)
        return plain_listed(*given)

    monkeypatch.setattr(sparse_steps, "PLAIN", sparse_steps.ListedBackend("plain", spy))
    sparse_steps.choose_listed.cache_clear()
    size = {"height": 64, "width": 64, "output_type": "latent", "guidance_scale": 1.0}  # with 5 frames, two blocks
    if begins_with_a_video:
        from_video = wanduet.WanVideoToVideoPipeline.from_pipe(pipe)
        from_video.set_progress_bar_config(disable=True)
        video = np.zeros((5, 64, 64, 3), dtype=np.float32)
        from_video(video, "a red circle", num_inference_steps=8, strength=0.5, sparse=0.5, **size)
    else:
        latents(pipe, num_inference_steps=4, sparse=0.5, **size)
    sparse_steps.choose_listed.cache_clear()
    blocks = open_model("miniature").spec.transformer.num_layers
    assert len(sparse_calls) == 3 * (blocks - 1)  # of 4 steps; the first block is dense


def test_a_quantized_call_is_almost_the_exact_one(pipe) -> None:
    exact = latents(pipe)
    error = (latents(pipe, quantize="int8") - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.3
    assert torch.equal(latents(pipe), exact)


def test_distilled_weights_have_no_guidance_unless_a_call_asks_for_it_which_is_refused(tmp_path) -> None:
    fast = load(tmp_path, "miniature-fast", devices="cpu")
    with pytest.raises(ValueError, match=r"guidance_scale=5 is not supported with miniature-fast.+leave it out"):
        latents(fast, guidance_scale=5.0)
    assert torch.equal(latents(fast), latents(fast, guidance_scale=1.0))
    assert fast.guidance_scale == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"speed": "near"}, "speed='near' is not allowed.+ has 3"),
        ({"speed": "warp"}, "one of 'exact'"),
        ({"speed": "near", "loss_budget": 30.0}, "leave one of the two out"),
        ({"step_cache": "magcache", "num_inference_steps": 20}, "easycache for this model"),
        ({"guidance_gate": 0.5, "guidance_scale": 1.0}, "without guidance"),
        ({"speed": "near", "num_inference_steps": 20, "callback_on_step_end": print}, "may change the latents"),
        ({"sparse": 0.5, "num_inference_steps": 1}, "first quarter of the steps is dense"),
        ({"quantize": "int4"}, "'off', 'fp8' or 'int8'"),
        ({"quantize_attention": "int8"}, "off on cpu"),
        ({"low_res_first": True}, r"wanduet\.Engine"),
    ],
)
def test_approximations_that_a_call_cannot_have(pipe, call, says) -> None:
    with pytest.raises(ValueError, match=says):
        latents(pipe, **call)


def test_a_step_cache_needs_a_scheduler_with_one_timestep_a_step(pipe) -> None:
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="computes each step twice"):
        latents(pipe, step_cache="easycache", num_inference_steps=20)


def test_the_scheduler_replaced_between_calls(pipe) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    before, usual = pipe.scheduler, latents(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert not torch.equal(latents(pipe), usual)
    pipe.scheduler = before
    assert torch.equal(latents(pipe), usual)


def test_parts_set_to_nothing_are_loaded_when_they_are_needed(tmp_path) -> None:
    """As programs do that free memory between encoding a prompt and denoising."""
    pipe = load(tmp_path, devices="cpu", text_encoder=None)
    expected = latents(pipe)
    embeds, negative = pipe.encode_prompt("a red circle", max_sequence_length=512)
    pipe.text_encoder = pipe.tokenizer = pipe.vae = None
    again = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=negative, generator=torch.Generator().manual_seed(1), **CALL
    ).frames
    assert torch.allclose(again, expected, atol=1e-6)
    del pipe.transformer
    assert torch.equal(latents(pipe), expected)


def test_blocks_that_a_callback_has_parked_come_back(pipe) -> None:
    """As a decode does on a GPU that is too small for both models."""
    expected = latents(pipe)

    def callback(pipe, _step, _timestep, _tensors) -> dict[str, Any]:
        pipe._parts.models.transformer.loaded.swap_out()
        return {}

    assert torch.equal(latents(pipe, callback_on_step_end=callback), expected)


def test_given_latents_leave_the_generator_alone(pipe) -> None:
    generator, given = torch.Generator().manual_seed(1), torch.zeros(1, 16, 2, 4, 4)
    state = generator.get_state()
    pipe("a", generator=generator, latents=given, **CALL)
    assert torch.equal(generator.get_state(), state)
    assert not given.any()


def test_a_pipeline_that_is_deleted_while_it_works_ends_its_call_and_frees_its_models(tmp_path) -> None:
    pipes = [load(tmp_path, devices="cpu")]
    models, results = weakref.ref(pipes[0]._parts.models), []

    def callback(_pipe, step, _timestep, _tensors) -> dict[str, Any]:
        pipes.clear()
        return {}

    thread = threading.Thread(target=lambda: results.append(latents(pipes[0], callback_on_step_end=callback)))
    gc.disable()  # so that a reference in a circle would be seen
    try:
        thread.start()
        thread.join(WAIT)
        assert len(results) == 1
        assert models() is None
    finally:
        gc.enable()


def test_a_pipeline_is_not_copied_or_pickled(pipe) -> None:
    for thing in (pipe, pipe.transformer):
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"from_pipe\(pipe\)"):
                way(thing)
    assert copy.copy(pipe).transformer is pipe.transformer


def test_weights_that_are_not_shown_are_not_counted_as_none(pipe) -> None:
    with pytest.raises(NotImplementedError, match=r"set pipe\.vae"):
        sum(parameter.numel() for parameter in pipe.vae.parameters())
    assert pipe.vae.requires_grad_(False).eval() is pipe.vae


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": None}, {"width": "48"}, {"num_frames": 5.5}, {"num_inference_steps": None}, {"guidance_scale": None},
        {"guidance_scale": "5"}, {"generator": 5}, {"generator": [5]}, {"latents": np.zeros((1, 16, 2, 4, 6))},
        {"num_videos_per_prompt": 0}, {"max_sequence_length": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_a_wrong_kind_are_named(pipe, wrong) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
        pipe("x", **({"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1} | wrong))


def test_a_size_that_a_program_computed_as_a_float(pipe) -> None:
    assert torch.equal(latents(pipe, height=32.0), latents(pipe, height=32))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("WanPipeline", {"guidance_scale_2", "num_frames"}),
        ("WanVideoToVideoPipeline", {"video", "strength", "timesteps"}),
    ],
)
def test_every_argument_of_a_call_is_taken_by_its_name(name: str, own: set[str]) -> None:
    named = signature(getattr(wanduet, name).__call__).parameters.keys() - {"self"}
    taken = signature(CallArguments).parameters.keys() | signature(Approximations).parameters.keys()
    assert named - taken == own
    assert taken - named == {"approximations"}

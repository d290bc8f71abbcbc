"""A program for diffusers' Wan pipeline, run by both: schedulers as objects, modules given and replaced, callbacks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanPipeline as Oracle
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

import wanduet

CALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture
def oracle(loaded_oracle) -> Oracle:
    """diffusers' pipeline, whose parts a test may replace."""
    pipe = Oracle(**loaded_oracle.components)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def loaded_oracle(random_model) -> Oracle:
    return Oracle.from_pretrained(random_model)


@pytest.fixture
def own(random_model, tmp_path) -> "wanduet.WanPipeline":
    pipe = wanduet.WanPipeline.from_pretrained(random_model, data_dir=tmp_path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, prompt: Any = "a red circle", **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipe(prompt, generator=generator, **(CALL | call)).frames


def same(expected: torch.Tensor, got: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-4 * expected.abs().max())


def compare(oracle, pipe, *args: Any, **call: Any) -> torch.Tensor:
    expected, got = latents(oracle, *args, **call), latents(pipe, *args, **call)
    assert got.shape == expected.shape
    assert same(expected, got)
    return got


# A whole program, as the model's card and diffusers' page on Wan have it, but for sizes and devices.

PROGRAM = """
import torch
from diffusers import AutoModel
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from transformers import UMT5EncoderModel

text_encoder = UMT5EncoderModel.from_pretrained(model_id, subfolder="text_encoder", torch_dtype=torch.float32)
vae = AutoModel.from_pretrained(model_id, subfolder="vae", torch_dtype=torch.float32)
transformer = AutoModel.from_pretrained(model_id, subfolder="transformer", torch_dtype=torch.float32)
device = torch.device("cpu")
apply_group_offloading(text_encoder, onload_device=device, offload_type="block_level", num_blocks_per_group=1)
transformer.enable_group_offload(onload_device=device, offload_type="leaf_level")
pipe = WanPipeline.from_pretrained(
    model_id, vae=vae, transformer=transformer, text_encoder=text_encoder, torch_dtype=torch.float32
)
pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=5.0)
pipe.to("cpu")
pipe.set_progress_bar_config(disable=True)
pipe.vae.enable_tiling()
output = pipe(
    prompt="a red circle", negative_prompt="blue, static", height=32, width=48, num_frames=9, guidance_scale=5.0,
    num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(0),
).frames[0]
"""


def test_a_whole_program_unchanged_but_for_its_import(random_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path))
    made = []
    for pipeline in (Oracle, wanduet.WanPipeline):
        names: dict[str, Any] = {"WanPipeline": pipeline, "model_id": str(random_model)}
        exec(PROGRAM, names)
        made.append(names["output"])
    assert made[0].shape == made[1].shape == (9, 32, 48, 3)
    assert abs(made[0] - made[1]).max() <= 1.01 / 255


def test_the_bundled_miniature(tmp_path) -> None:
    folder = Path(wanduet.__file__).parent / "miniature" / "model"
    # In so many words: else transformers takes the text encoder's dtype from its files, which are bfloat16.
    theirs = Oracle.from_pretrained(folder, torch_dtype=torch.float32)
    ours = wanduet.WanPipeline.from_pretrained("miniature", torch_dtype=torch.float32, data_dir=tmp_path, devices="cpu")
    for each in (theirs, ours):
        each.set_progress_bar_config(disable=True)
    compare(theirs, ours, "a small red circle moves left", negative_prompt="blue", height=48, width=64)


# Schedulers.


class Damped(diffusers.UniPCMultistepScheduler):
    """With a state of its own, that no config knows."""

    damping = 1.0

    def step(self, model_output, timestep, sample, return_dict=True):
        return super().step(model_output * self.damping, timestep, sample, return_dict)


def shifted() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(7.0)
    return scheduler


def damped() -> Any:
    scheduler = Damped(**FLOW, flow_shift=3.0)
    scheduler.damping = 0.7
    return scheduler


def configured() -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    scheduler.register_to_config(flow_shift=9.0)
    return scheduler


def few_sigmas() -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    usual = scheduler.set_timesteps
    scheduler.set_timesteps = lambda count, device=None: usual(count + 2, device=device)
    return scheduler


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=5.0),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=5.0),
    "set_shift": shifted,
    "a config changed": configured,
    "a subclass with a state": damped,
    "set_timesteps replaced": few_sigmas,
}


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_object_itself_is_stepped(oracle, pipe, name, guidance_scale) -> None:
    counts = []
    for each in (oracle, pipe):
        each.scheduler = SCHEDULERS[name]()
    compare(oracle, pipe, guidance_scale=guidance_scale)
    compare(oracle, pipe, guidance_scale=guidance_scale)  # what the first call has left behind does no harm
    for each in (oracle, pipe):
        counts.append((each.num_timesteps, each.scheduler.timesteps.tolist(), each.scheduler.step_index))
    assert counts[0] == counts[1]


def test_shifts_and_states_that_no_config_knows_make_another_video(pipe) -> None:
    """So that the comparison above could fail."""
    made = {}
    for name in SCHEDULERS:
        pipe.scheduler = SCHEDULERS[name]()
        made[name] = latents(pipe)
    assert not same(made["euler"], made["set_shift"])
    assert not any(same(made["unipc"], made[n]) for n in ("a config changed", "a subclass with a state"))
    assert not same(made["unipc"], made["set_timesteps replaced"])


def test_a_callback_sees_the_scheduler_and_the_state_of_the_call(oracle, pipe) -> None:
    def run(which) -> list[Any]:
        seen: list[Any] = []

        def callback(pipe, step, timestep, tensors):
            state = (pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt)
            scheduler = (pipe.scheduler.step_index, pipe.scheduler.timesteps.tolist(), pipe.scheduler.order)
            seen.append((step, timestep.item(), pipe.current_timestep.item(), pipe.attention_kwargs, state, scheduler))
            return {}

        which.scheduler = SCHEDULERS["heun"]()
        latents(which, callback_on_step_end=callback)
        return [*seen, which.current_timestep]

    assert run(oracle) == run(pipe)


def test_a_scheduler_that_a_callback_replaces_makes_the_next_step(oracle, pipe) -> None:
    def run(which) -> torch.Tensor:
        def callback(pipe, step, _timestep, _tensors):
            if step == 1:
                other = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
                other.set_timesteps(4)
                other.set_begin_index(2)
                pipe.scheduler = other
            return {}

        which.scheduler = SCHEDULERS["euler"]()
        return latents(which, callback_on_step_end=callback)

    assert same(run(oracle), run(pipe))


def test_the_documented_ways_to_set_a_scheduler(oracle, own, random_model, tmp_path) -> None:
    for each in (oracle, own):
        each.scheduler = diffusers.UniPCMultistepScheduler.from_config(each.scheduler.config, flow_shift=8.0)
    at_once = wanduet.WanPipeline.from_pretrained(random_model, data_dir=tmp_path, scheduler=oracle.scheduler)
    assert at_once.scheduler is oracle.scheduler
    assert torch.equal(compare(oracle, own), latents(at_once))


# Embeddings.


@pytest.mark.parametrize("prompt", ["a heart", ["a heart", "a star"]])
@pytest.mark.parametrize("way", ["in place", "returned"])
def test_embeddings_changed_by_a_callback(oracle, pipe, prompt, way) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def callback(_pipe, step, _timestep, tensors):
        assert list(tensors) == names
        if way == "in place":
            tensors["prompt_embeds"][:, 0] *= 1.5 + step
            tensors["negative_prompt_embeds"].add_(0.1)
            tensors["latents"].mul_(0.95)
            return {}
        return {name: tensor * 0.9 for name, tensor in tensors.items()}

    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    changed = compare(oracle, pipe, prompt, **call)
    assert not same(latents(pipe, prompt), changed)


def test_a_programs_own_embeddings_are_the_callbacks(oracle, pipe) -> None:
    """diffusers works on the very tensor that it was given, and so may whoever keeps it."""

    def run(which) -> torch.Tensor:
        mine = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))

        def callback(_pipe, step, _timestep, _tensors):
            mine.mul_(0.5)
            return {}

        return latents(which, None, prompt_embeds=mine, guidance_scale=1.0, callback_on_step_end=callback)

    assert same(run(oracle), run(pipe))


def test_a_callback_may_encode_another_prompt(oracle, pipe) -> None:
    def callback(pipe, step, _timestep, _tensors):
        if step:
            return {}
        return {"prompt_embeds": pipe.encode_prompt("a blue star", max_sequence_length=512)[0].detach()}

    assert not same(latents(pipe), compare(oracle, pipe, callback_on_step_end=callback))


@pytest.mark.parametrize(
    "call",
    [
        {"prompt": "a circle", "negative_prompt": "x"},
        {"prompt": ["a", "b"], "num_videos_per_prompt": 2},
        {"prompt": "a", "do_classifier_free_guidance": False, "max_sequence_length": 64},
        {"prompt": None, "prompt_embeds": torch.ones(1, 4, 32), "negative_prompt": "y"},
    ],
)
def test_encode_prompt(oracle, pipe, call) -> None:
    for expected, got in zip(oracle.encode_prompt(**call), pipe.encode_prompt(**call), strict=True):
        assert (expected is None) == (got is None)
        if expected is not None:
            assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
            assert (got - expected).abs().max() <= 1e-5


def test_latents_say_the_size(oracle, pipe) -> None:
    given = torch.randn(1, 16, 3, 6, 4, generator=torch.Generator().manual_seed(2))
    assert compare(oracle, pipe, latents=given).shape == given.shape


def test_every_video_of_every_prompt_with_its_own_generator(oracle, pipe) -> None:
    made = [
        which(
            ["a heart", "a star"],
            num_videos_per_prompt=2,
            **CALL,
            generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        ).frames
        for which in (oracle, pipe)
    ]
    assert same(*made)
    with pytest.raises(ValueError, match="2 generators were given for 4 videos"):
        pipe(["a", "b"], num_videos_per_prompt=2, generator=[torch.Generator()] * 2, **CALL)


# Modules.


def transformer(**changes: Any) -> Any:
    torch.manual_seed(9)
    shape = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64}
    made = diffusers.WanTransformer3DModel(**(shape | {"num_layers": 3} | changes))
    made.proj_out.weight.data.normal_(0.0, 0.2)
    return made.eval()


def test_a_transformer_that_is_set_is_used_and_so_is_what_is_done_to_it(oracle, own) -> None:
    before, shown = latents(own), own.transformer
    given = transformer()
    oracle.transformer = own.transformer = given
    assert own.transformer is given
    assert not same(before, compare(oracle, own))
    with torch.no_grad():
        given.blocks[0].ffn.net[2].weight.add_(0.1)
    compare(oracle, own)
    given.proj_out.weight.data.mul_(0.5)  # which PyTorch does not count as a change
    compare(oracle, own)
    given.load_state_dict(transformer().state_dict())
    compare(oracle, own)
    own.transformer = shown
    assert torch.equal(latents(own), before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own imports
def test_compiled_offloaded_and_reformatted_modules(oracle, own) -> None:
    from diffusers.hooks import apply_group_offloading

    expected = latents(oracle)
    own.transformer.to(memory_format=torch.channels_last)
    own.transformer = torch.compile(own.transformer, mode="max-autotune", fullgraph=True)
    cpu = torch.device("cpu")
    apply_group_offloading(own.transformer, onload_device=cpu, offload_type="block_level", num_blocks_per_group=1)
    own.transformer.enable_group_offload(onload_device=cpu, offload_type="leaf_level")
    own.enable_group_offload(onload_device="cpu", offload_type="leaf_level", use_stream=True)
    own.enable_model_cpu_offload()
    own.vae.enable_tiling()
    assert same(expected, latents(own))
    oracle.transformer = given = transformer()
    expected = latents(oracle)
    own.transformer = torch.compile(given)
    apply_group_offloading(given, onload_device=cpu, offload_type="leaf_level")
    assert same(expected, latents(own))


class Wrapper(torch.nn.Module):
    """A module around another, which answers what the other one would."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own imports
def test_a_wrapper_is_not_taken_for_what_it_wraps(own) -> None:
    for inner in (own.transformer, torch.compile(own.transformer), torch.compile(transformer())):
        with pytest.raises(TypeError, match="not Wrapper"):
            own.transformer = Wrapper(inner)


def test_a_vae_that_is_set_decodes(oracle, own, random_model) -> None:
    vae = diffusers.AutoencoderKLWan.from_pretrained(random_model, subfolder="vae", torch_dtype=torch.float32)
    usual = latents(own, output_type="pt")
    vae.decoder.conv_out.weight.data.mul_(2.0)
    oracle.vae = own.vae = vae
    expected, got = latents(oracle, output_type="pt"), latents(own, output_type="pt")
    assert (expected - got).abs().max() <= 1 / 255
    assert (usual - got).abs().max() > 2 / 255
    assert own.vae is vae


def test_a_text_encoder_and_a_tokenizer_that_are_set(oracle, own, random_model) -> None:
    before = latents(own)
    encoder = UMT5EncoderModel.from_pretrained(random_model, subfolder="text_encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(random_model / "tokenizer")
    tokenizer.add_tokens(["red"])
    for each in (oracle, own):
        each.tokenizer = tokenizer
    only_tokenizer = compare(oracle, own, "a red circle &amp; a star", negative_prompt="x")
    encoder.encoder.block[0].layer[0].SelfAttention.q.weight.data.mul_(3.0)
    for each in (oracle, own):
        each.text_encoder = encoder
    both = compare(oracle, own, "a red circle &amp; a star", negative_prompt="x")
    assert not same(before, only_tokenizer)
    assert not same(only_tokenizer, both)
    compare(oracle, own, ["a", "b"], num_videos_per_prompt=2, max_sequence_length=64)
    own.tokenizer = own.text_encoder = None
    assert torch.equal(latents(own), before)


def test_from_pretrained_with_every_part_given(oracle, random_model, tmp_path) -> None:
    parts = {name: part for name, part in oracle.components.items() if part is not None}
    parts["transformer"] = oracle.transformer = transformer()
    pipe = wanduet.WanPipeline.from_pretrained(random_model, data_dir=tmp_path, torch_dtype=torch.bfloat16, **parts)
    assert pipe.dtype == torch.float32  # a module keeps the dtype that it has
    compare(oracle, pipe)


def test_pipelines_of_modules_and_of_pipelines(oracle, pipe) -> None:
    expected = latents(oracle)
    for made in (
        wanduet.WanPipeline(**oracle.components),
        wanduet.WanPipeline.from_pipe(oracle),
        wanduet.WanPipeline(**pipe.components),
    ):
        made.set_progress_bar_config(disable=True)
        assert same(expected, latents(made))
    oracle.transformer = transformer()
    other = wanduet.WanPipeline.from_pipe(pipe, transformer=oracle.transformer)
    compare(oracle, other)
    assert same(expected, latents(pipe))  # which has kept its own


def test_a_merged_lora(oracle, own) -> None:
    """The way that the refusal of LoRAs names: diffusers merges it, the plain weights are given."""
    given = transformer()
    with torch.no_grad():
        for block in given.blocks:
            delta = torch.randn(48, 2) @ torch.randn(2, 48) * 0.05
            block.attn1.to_q.weight += delta
    oracle.transformer = own.transformer = given
    compare(oracle, own)


def test_half_of_a_pair_in_bfloat16(own) -> None:
    """A given transformer in bfloat16 is computed in bfloat16, whatever the pipeline was."""
    given = transformer().to(torch.bfloat16)
    exact = latents(own := wanduet.WanPipeline.from_pipe(own, transformer=transformer()))
    own.transformer = given
    assert own.dtype == torch.bfloat16
    rounded = latents(own)
    assert 1e-5 < ((rounded - exact).abs().max() / exact.abs().max()) < 0.1


class Silent(diffusers.WanTransformer3DModel):
    def forward(self, *args, **kwargs):
        return (torch.zeros(1),)


def hooked() -> Any:
    made = transformer()
    made.blocks[0].register_forward_hook(lambda *_: None)
    return made


def with_adapter() -> Any:
    made = transformer()
    made.blocks[0].attn1.lora_A = torch.nn.Linear(2, 2)
    return made


def processed() -> Any:
    made = transformer()
    made.blocks[0].attn1.processor = type("Mine", (), {})()
    return made


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Silent(num_attention_heads=1, num_layers=1, ffn_dim=8, text_dim=8), "Silent"),
        (lambda: torch.nn.Linear(1, 1), "Linear"),
        (hooked, "forward hooks"),
        (with_adapter, "lora_A"),
        (processed, "Mine"),
        (lambda: transformer(image_dim=8, added_kv_proj_dim=48), "text-to-video"),
        (lambda: transformer().to("meta"), "meta device"),
    ],
)
def test_modules_that_cannot_be_used_are_refused_when_they_are_set(pipe, make, sentence) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        pipe.transformer = make()
    assert str(caught.value).startswith("pipe.transformer")
    assert str(caught.value).count(". ") == 0  # one sentence


def test_a_module_that_no_longer_can_be_used_is_refused_at_the_next_call(own) -> None:
    own.transformer = given = transformer()
    before = latents(own)
    hook = given.blocks[0].register_forward_hook(lambda *_: None)
    given.blocks[0].attn1.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"pipe\.transformer"):
        latents(own)
    hook.remove()
    del given.blocks[0].attn1.lora_A
    assert torch.equal(latents(own), before)


def test_parts_that_do_not_fit_each_other_are_refused(own) -> None:
    from wanduet.errors import ModelNotFoundError

    own.transformer = transformer(text_dim=40)
    with pytest.raises(ModelNotFoundError, match="text_dim"):
        latents(own)


def test_latents_are_decoded_later(oracle, pipe) -> None:
    """As diffusers' programs do it, with what `pipe.vae` and `pipe.video_processor` are."""

    def run(which) -> torch.Tensor:
        made = latents(which)
        config = which.vae.config
        mean, std = (torch.tensor(v).view(1, config.z_dim, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        with torch.no_grad():
            video = which.vae.decode((made * std + mean).to(which.vae.dtype), return_dict=False)[0]
        return which.video_processor.postprocess_video(video, output_type="pt")

    assert (run(oracle) - run(pipe)).abs().max() <= 1.01 / 255
    assert (run(pipe) - latents(pipe, output_type="pt")).abs().max() <= 1.01 / 255


def test_what_a_program_reads(oracle, pipe) -> None:
    for name in ("vae_scale_factor_temporal", "vae_scale_factor_spatial", "device", "_execution_device", "dtype"):
        assert getattr(pipe, name) == getattr(oracle, name), name
    assert set(pipe.components) == set(oracle.components)
    for kind in ("transformer", "vae"):
        theirs, ours = getattr(oracle, kind), getattr(pipe, kind)
        for key, value in theirs.config.items():
            if not key.startswith("_"):
                expected = tuple(value) if isinstance(value, list) else value
                found = getattr(ours.config, key)
                assert (tuple(found) if isinstance(found, list) else found) == expected, key
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    assert pipe.text_encoder.config.d_model == oracle.text_encoder.config.d_model
    assert pipe.tokenizer("a circle")["input_ids"] == oracle.tokenizer("a circle")["input_ids"]
    assert isinstance(pipe.scheduler, type(oracle.scheduler))

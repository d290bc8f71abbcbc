"""Where the text encoder runs: on a GPU with room if the CPU would delay the job, and where the user says."""

from dataclasses import replace

import pytest

from wanduet.config import GIB, EngineConfig
from wanduet.errors import ConfigError
from wanduet.footprint.phases import ModelMemory, text_device_bytes, text_encoder_bytes
from wanduet.planning.hardware import parse_hardware
from wanduet.planning.plan import Plan
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models

PUBLISHED = "a/model"  # random models have no text encoder


@pytest.fixture(scope="module")
def memory() -> ModelMemory:
    return Models(EngineConfig(model="random:1.3b")).memory


def plan(memory: ModelMemory, machine: str, request=None, **changes) -> Plan:
    config = EngineConfig(**{"model": PUBLISHED} | changes)
    fields = {"prompt": "x", "height": 480, "width": 832, "num_frames": 81, "speed": "near"} | (request or {})
    made = GenerationRequest(**fields).resolve(memory.spec)
    return make_plan(made, memory, config, parse_hardware(machine), nearest=False)


def test_a_gpu_with_room_encodes_prompts_and_the_plan_counts_it(memory) -> None:
    found, without = plan(memory, "h100,ram=64GiB"), plan(memory, "h100,ram=64GiB", text_encoder_device="cpu")
    assert (found.text.device, found.text.residency, without.text.device) == ("cuda:0", "resident", "cpu")
    kept, encoding = text_device_bytes(memory.spec, "bfloat16", "resident")
    assert kept > 8 * GIB
    (device,), (before,) = found.prediction.devices, without.prediction.devices
    for phase in ("denoise", "decode"):
        assert device.phases[phase] == before.phases[phase] + kept
    assert device.phases["encode"] >= kept + encoding + memory.transformer_weights("bfloat16")
    assert device.role == "vae+transformer+text_encoder"
    assert found.prediction.host_bytes <= without.prediction.host_bytes


def test_nothing_else_of_a_plan_changes_for_the_text(memory) -> None:
    for machine in ("h100", "2xh100", "24GiB", "12GiB", "24GiB+12GiB", "8GiB", "4GiB"):
        with_cpu = plan(memory, machine, text_encoder_device="cpu")
        found = plan(memory, machine)
        same = replace(found, text=with_cpu.text, prediction=with_cpu.prediction, choices=with_cpu.choices)
        assert same == with_cpu, machine
        assert found.prediction.fits


def test_a_gpu_without_room_or_without_bfloat16_leaves_it_to_the_cpu(memory) -> None:
    assert plan(memory, "12GiB").text.device == "cpu"
    assert plan(memory, "h100", vram_limit=12 * GIB).text.device == "cpu"
    assert plan(memory, "Tesla V100").text.device == "cpu"
    assert plan(memory, "cpu").text.device == "cpu"


def test_an_exact_video_has_the_cpu_s_embeddings_unless_a_gpu_is_named(memory) -> None:
    exact = {"speed": "exact"}
    assert plan(memory, "h100", exact).text.device == "cpu"
    assert plan(memory, "h100", exact, text_encoder_device="cuda:0").text.device == "cuda:0"
    few = exact | {"timesteps": (1000, 757, 522), "sampler": "renoise", "guidance_scale": 1.0}
    assert plan(memory, "h100", few).text.device == "cuda:0"


def test_a_long_job_leaves_the_memory_free(memory) -> None:
    long = {"height": 1088, "width": 1920, "num_inference_steps": 100}
    assert plan(memory, "24GiB", long).text.device == "cpu"
    assert plan(memory, "h100", {"num_inference_steps": 20}).text.device == "cuda:0"


def test_several_gpus_that_make_one_video_have_it_on_the_first(memory) -> None:
    found = plan(memory, "2xh100")
    assert (found.strategy, found.text.device) == ("parallel", "cuda:0")
    first, second = found.prediction.devices
    assert (
        first.phases["denoise"] - second.phases["denoise"] == text_device_bytes(memory.spec, "bfloat16", "resident")[0]
    )


def test_the_host_keeps_it_if_much_memory_is_free(memory) -> None:
    small, large = (plan(memory, f"12GiB,ram={ram}") for ram in ("32GiB", "128GiB"))
    assert (small.text.residency, large.text.residency) == ("streamed", "resident")
    whole = text_encoder_bytes(memory.spec, "bfloat16", "resident")
    assert large.prediction.host_bytes >= small.prediction.host_bytes + whole // 2


@pytest.mark.parametrize("changes", [{"text_encoder_device": "cuda:0"}, {"devices": "text_encoder=cuda:0,vae=cuda:0"}])
def test_a_named_gpu_without_room_for_all_layers_takes_one_after_the_other(memory, changes) -> None:
    found = plan(memory, "8GiB", **changes)
    assert found.prediction.fits
    assert (found.text.device, found.text.residency) == ("cuda:0", "streamed")
    assert plan(memory, "h100", **changes).text.residency == "resident"


def test_a_gpu_that_runs_nothing_else_is_planned_too(memory) -> None:
    found = plan(memory, "24GiB+12GiB", devices="cuda:0", text_encoder_device="cuda:1")
    assert [(d.name, d.role) for d in found.prediction.devices] == [
        ("cuda:0", "vae+transformer"),
        ("cuda:1", "text_encoder"),
    ]
    alone = found.prediction.devices[1]
    assert alone.peak == sum(text_device_bytes(memory.spec, "bfloat16", "resident"))


def test_what_cannot_be_is_refused(memory) -> None:
    with pytest.raises(ConfigError, match="no device 'cuda:1'"):
        plan(memory, "24GiB", text_encoder_device="cuda:1")
    with pytest.raises(ConfigError, match="text_encoder_device='tpu'"):
        EngineConfig(text_encoder_device="tpu")
    tight = plan(memory, "8GiB", text_encoder_device="cuda:0", text_encoder_hold="resident")
    assert not tight.prediction.fits


def test_a_random_model_s_plan_has_no_text_encoder_on_a_gpu(memory) -> None:
    assert plan(memory, "h100,ram=256GiB", model="random:1.3b").text == plan(memory, "12GiB", model="random:1.3b").text


def test_8_bits_take_half_the_memory_and_the_embedding_stays_16_bit(memory) -> None:
    spec = memory.spec.text_encoder
    embedding = 2 * spec.vocab_size * spec.d_model
    wide, narrow = (text_encoder_bytes(memory.spec, dtype, "resident") - embedding for dtype in ("bfloat16", "q8"))
    assert 0.5 < narrow / wide < 0.57  # a layer in 16 bits is there beside them
    assert text_encoder_bytes(memory.spec, "fp8", "resident") - embedding == narrow
    kept, _ = text_device_bytes(memory.spec, "q8", "resident")
    assert kept < 0.51 * text_device_bytes(memory.spec, "bfloat16", "resident")[0]
    found, before = (
        plan(memory, "12GiB,ram=64GiB", text_encoder_dtype=dtype, text_encoder_hold="resident")
        for dtype in ("q8", "bfloat16")
    )
    assert (found.text.dtype, found.text.residency) == ("q8", "resident")
    assert before.prediction.host_bytes - found.prediction.host_bytes > 3 * GIB

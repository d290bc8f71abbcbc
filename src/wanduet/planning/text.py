"""Chooses where the text encoder runs, and whether it stays in memory."""

import os
from collections.abc import Iterator
from dataclasses import replace

from wanduet.config import GIB, EngineConfig, parse_devices
from wanduet.family.spec import ModelSpec
from wanduet.footprint.phases import text_encoder_bytes
from wanduet.planning.cost import MOST_CORES, encode_seconds
from wanduet.planning.hardware import Hardware
from wanduet.planning.plan import Plan, TextPlan
from wanduet.request import ResolvedRequest

# A GPU encodes prompts if the CPU would make a job longer by this share, and by these seconds: else the encoder's memory is
# better left free.
DELAY_SHARE, DELAY_SECONDS = 0.02, 0.3
# Share of the host's memory, of what a plan leaves, that the whole encoder may take for later prompts.
HOST_SHARE = 0.25


def text_device(config: EngineConfig) -> str:
    """Return the device that `config` names for the text encoder, by default the CPU."""
    if config.text_encoder_device != "auto":
        return config.text_encoder_device
    return parse_devices(config.devices).role("text_encoder") or "cpu"


def plan_text(spec: ModelSpec, config: EngineConfig, hardware: Hardware | None = None) -> TextPlan:
    """Choose the dtype and the residency of the text encoder, on the device that `config` names; by default, the CPU.

    Raises ConfigError if `hardware` does not have that device.
    """
    # A prompt has a few dozen tokens: reading weights takes most of the time, so half the bytes take half the time.
    small = text_encoder_bytes(spec, "float32", "resident") < GIB
    dtype = config.text_encoder_dtype
    if dtype == "auto":
        dtype = "float32" if small else "bfloat16"
    device = text_device(config)
    if hardware is not None:
        device = hardware.device(device).name
    if config.text_encoder_hold != "auto":
        return TextPlan(dtype, config.text_encoder_hold, device)
    return TextPlan(dtype, "resident" if small else "streamed", device)


def better_texts(
    plan: Plan, spec: ModelSpec, config: EngineConfig, hardware: Hardware, request: ResolvedRequest
) -> Iterator[TextPlan]:
    """Yield faster ways than a plan's to encode prompts, fastest first: resident on a GPU, resident on the host.

    They need more memory, which the caller checks. A GPU must compute in the encoder's dtype. Unless `config` names it, it
    must be one of the plan's, and the request must save time, by an approximation or few-step weights: an exact video stays
    what it is on any machine, and a GPU's embeddings differ from the CPU's in the last bits.
    """
    text = plan.text
    if config.text_encoder_hold != "auto":
        return
    resident = replace(text, residency="resident")
    if text.on_gpu:
        yield resident
        return
    is_named = config.text_encoder_device != "auto" or parse_devices(config.devices).role("text_encoder") is not None
    saves_time = request.approximates or request.timesteps is not None
    if not is_named and saves_time and delays(plan, spec):
        used = plan.group.ranks[:1] or (plan.transformer.device, plan.vae.device)
        for device in map(hardware.device, dict.fromkeys(used)):
            if not device.is_cpu and (device.has_bfloat16 or text.dtype == "float32"):
                yield replace(resident, device=device.name)
    left = plan.prediction.host_limit_bytes - plan.prediction.host_bytes
    if text.residency == "streamed" and text_encoder_bytes(spec, text.dtype, "resident") < HOST_SHARE * left:
        yield resident


def delays(plan: Plan, spec: ModelSpec) -> bool:
    """Return whether encoding a new prompt on the CPU makes the plan's job noticeably longer."""
    read, work = encode_seconds(spec, plan.text.dtype, plan.text.residency)
    seconds = read + work / min(MOST_CORES, os.cpu_count() or 1)
    return seconds > max(DELAY_SECONDS, DELAY_SHARE * plan.prediction.seconds.total)

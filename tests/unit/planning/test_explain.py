"""Every sentence of a plan is true where it is given: each is held against the plan and the machine, over many of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from wanduet.config import GIB, EngineConfig, format_bytes
from wanduet.footprint.phases import ModelMemory, text_device_bytes, text_encoder_bytes
from wanduet.kernels.attention.backends import SDPA, Backend
from wanduet.kernels.measurements import Timing
from wanduet.planning import explain
from wanduet.planning.cost import cut_seconds, decode_seconds, swap_seconds
from wanduet.planning.hardware import Hardware, parse_hardware
from wanduet.planning.placement import Placement, find_placements
from wanduet.planning.plan import Choice, Plan
from wanduet.planning.planner import Planner, make_plan
from wanduet.planning.search import DECODE_MODES, ENCODE_TILES, Candidate, candidates
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime.models import Models


@pytest.fixture(scope="module")
def memories() -> dict[str, ModelMemory]:
    return {name: Models(EngineConfig(model=name)).memory for name in ("random:1.3b", "miniature")}


@dataclass(frozen=True)
class Case:
    """A plan and what it came of."""

    plan: Plan
    request: ResolvedRequest
    memory: ModelMemory
    config: EngineConfig
    hardware: Hardware

    @property
    def layers(self) -> int:
        return self.memory.spec.transformer.num_layers

    @property
    def transformer(self):
        return self.hardware.device(self.plan.transformer.device)

    @property
    def vae(self):
        return self.hardware.device(self.plan.vae.device)

    @property
    def planner(self) -> Planner:
        return Planner(self.request, self.memory, self.config, self.hardware, self.plan.text)

    def fits_as(self, resident: int, share: bool, keep: bool, mode) -> bool:
        place = Placement(self.plan.strategy, self.transformer, self.vae)
        return self.planner.plan_of(place, Candidate(resident, share, keep, mode)).prediction.fits

    def seconds(self, keep: bool, mode) -> float:
        decode = decode_seconds(self.request, self.memory.spec, self.vae, self.plan.vae.dtype)
        turn = swap_seconds(self.memory.transformer_weights(self.plan.transformer.dtype))
        return cut_seconds(self.request, decode, mode) + (0.0 if keep else turn)

    def faster_decodes(self, keep: tuple[bool, ...]):
        """Ways to decode that would be faster, all else being as planned."""
        mine = self.seconds(self.plan.both_resident, self.plan.vae.tiling)
        return [(k, mode) for k in keep for mode in DECODE_MODES if self.seconds(k, mode) < mine - 1e-9]

    def placements(self, strategy: str) -> list[Placement]:
        return [p for p in find_placements(self.config, self.hardware) if p.strategy == strategy]

    def any_fits(self, place: Placement) -> bool:
        weights = self.memory.transformer_weights(self.planner.transformer_dtype(place.transformer))
        ways = candidates(self.request, self.memory.spec, place, weights, self.plan.vae.dtype)
        return any(self.planner.plan_of(place, way).prediction.fits for way in ways)


def on_cuda(device) -> bool:
    return device.name.startswith("cuda")


Claim = Callable[[Case, Choice, re.Match], bool]
ASKED = {"attention": "attention", "strategy": "strategy", "transformer_dtype": "transformer_dtype"}


def was_asked(c: Case, choice: Choice, _: re.Match) -> bool:
    return getattr(c.config, choice.setting) not in ("auto", None)


CLAIMS: dict[str, Claim] = {
    r"asked for": lambda c, x, m: was_asked(c, x, m) and getattr(c.config, x.setting) == x.value,
    r"asked for: the transformer takes (.+) instead of (.+); its products are computed in (\w+)": lambda c, x, m: (
        x.value == c.config.weights == c.plan.transformer.weights
        and m.groups()
        == (
            format_bytes(c.memory.transformer_weights(m[3])),
            format_bytes(replace(c.memory, weights="auto").transformer_weights(m[3])),
            c.plan.transformer.dtype,
        )
    ),
    r"without effect: the transformer computes in bfloat16, which is as small": lambda c, x, m: (
        x.value == c.config.weights == "bf16" and c.plan.transformer.dtype == "bfloat16"
    ),
    r"asked for; (\w+) stands for both devices": lambda c, x, m: (
        c.config.strategy == "placed" and c.plan.vae.device == c.plan.transformer.device == m[1]
    ),
    r"--devices names (.+)": lambda c, x, m: c.config.devices.replace(" ", "") == m[1].replace(" ", ""),
    r"(\d) devices of one kind make one video together: (.+)": lambda c, x, m: (
        int(m[1]) == len(c.plan.group.ranks)
        and len({(d.model, d.total_bytes) for d in map(c.hardware.device, c.plan.group.ranks)}) == 1
        and sharing(c, m[2])
    ),
    r"nothing fits; of all placements this one lacks least device memory": lambda c, x, m: not c.plan.prediction.fits,
    r"(\S+) denoises while (\S+) decodes": lambda c, x, m: (
        m.groups() == (c.plan.transformer.device, c.plan.vae.device) and m[1] != m[2] and c.config.strategy == "auto"
    ),
    r"(\S+) denoises while (\S+) decodes; one video on several devices together does not fit": lambda c, x, m: (
        (m.groups() == (c.plan.transformer.device, c.plan.vae.device) and not parallel_fits(c))
        or c.plan.vae.device != c.placements("placed")[0].vae.name
    ),
    r"the work in parts on several devices does not fit, and on this one it does": lambda c, x, m: (
        c.plan.prediction.fits and not any(c.any_fits(p) for p in c.placements("placed"))
    ),
    r"(\S+) is the only device that --devices names": lambda c, x, m: c.config.devices == m[1],
    r"there is no GPU": lambda c, x, m: not c.hardware.gpus and c.config.devices is None,
    r"(\S+) is the only GPU": lambda c, x, m: [d.name for d in c.hardware.gpus] == [m[1]],
    r"the most precise, and the default on a CPU": lambda c, x, m: (
        c.transformer.is_cpu and x.value == "float32" and c.config.transformer_dtype == "auto"
    ),
    r"the most precise, and the default(; bfloat16 decodes faster at a small loss)?": lambda c, x, m: (
        x.value == "float32" and c.config.vae_dtype == "auto" and bool(m[1]) == (c.vae.capability >= (8, 0))
    ),
    r"this GPU has bfloat16 matrix units; norms, modulation and residuals stay float32": lambda c, x, m: (
        x.value == "bfloat16" and c.transformer.capability >= (8, 0)
    ),
    r"this GPU has no bfloat16 matrix units": lambda c, x, m: (
        x.value == "float16" and (0, 0) < c.transformer.capability < (8, 0)
    ),
    r"this GPU is not known to have bfloat16 matrix units": lambda c, x, m: c.transformer.capability == (0, 0),
    r"without effect: the VAE is on (\w+)": lambda c, x, m: c.vae.name == m[1] and not on_cuda(c.vae),
    r"without effect: the VAE computes in (\w+)": lambda c, x, m: c.plan.vae.dtype == m[1] != "float32",
    r"without effect: this GPU has no TF32": lambda c, x, m: on_cuda(c.vae) and c.vae.capability < (8, 0),
    r"without effect: the model is not on the hub": lambda c, x, m: (
        x.value == c.config.revision and c.config.model in ("random:1.3b", "miniature")
    ),
    r"without effect: no GPU is used": lambda c, x, m: (
        x.value == c.config.vram_limit and all(c.hardware.device(d.name).is_cpu for d in c.plan.prediction.devices)
    ),
    r"without effect: strategy (\w+) does not share a video": lambda c, x, m: (
        bool(c.config.device_speeds) and not c.plan.group.ranks and m[1] == c.plan.strategy
    ),
    r"the VAE's float32 convolutions round their factors to TF32": lambda c, x, m: tf32(c) and x.value is True,
    r"asked for: the VAE's float32 convolutions are exact": lambda c, x, m: tf32(c) and not c.config.tf32,
    r"its memory is counted as with published weights; random ones have no text encoder": lambda c, x, m: c.config.model.startswith("random"),
    r"small: (.+) of host memory hold all of it": lambda c, x, m: (
        x.value == "resident" and m[1] == format_bytes(text_bytes(c, "resident")) and text_bytes(c, "resident") < GIB
    ),
    r"read layer by layer from its files, which takes (.+) of host memory instead of (.+)": lambda c, x, m: (
        x.value == "streamed"
        and m.groups() == (format_bytes(text_bytes(c, "streamed")), format_bytes(text_bytes(c, "resident")))
    ),
    r"all of it stays in host memory, (.+), which is free": lambda c, x, m: (
        x.value == "resident" and m[1] == format_bytes(text_bytes(c, "resident")) and not c.plan.text.on_gpu
    ),
    r"its (.+) of layers (stay on the device|are copied for each new prompt)": lambda c, x, m: (
        c.plan.text.on_gpu and m[1] == format_bytes(text_device_bytes(c.memory.spec, c.plan.text.dtype, "resident")[0])
        and x.value == {"stay on the device": "resident", "are copied for each new prompt": "streamed"}[m[2]]
    ),
    r"there is room beside the video, and the CPU would delay it": lambda c, x, m: (
        x.value == c.plan.text.device != "cpu" and c.plan.prediction.fits and c.config.text_encoder_device == "auto"
    ),
    r"all blocks are in host memory, where they run": lambda c, x, m: c.transformer.is_cpu and x.value == c.layers,
    r"strategy parallel keeps all blocks on every device": lambda c, x, m: bool(c.plan.group.ranks) and x.value == c.layers,
    r"the fewest there can be": lambda c, x, m: x.value == 0 and not c.plan.prediction.fits,
    r"all blocks fit on (every|the) device": lambda c, x, m: (
        c.plan.prediction.fits and x.value == c.layers and (m[1] == "every") == bool(c.plan.group.ranks)
    ),
    r"(\d+) come from host memory as they are needed: no larger number that is tried fits": lambda c, x, m: (
        int(m[1]) == c.layers - x.value > 0
        and not any(
            c.fits_as(resident, share, keep, mode)
            for resident in (c.layers, c.layers * 2 // 3, c.layers // 3)
            if resident > x.value
            for share in (True, False)
            for keep in ((True, False) if c.plan.transformer.device == c.plan.vae.device else (True,))
            for mode in (DECODE_MODES[0], DECODE_MODES[-1])
        )
    ),
    r"without effect: the transformer runs in host memory": lambda c, x, m: c.transformer.is_cpu,
    r"without effect: no block waits on the host": lambda c, x, m: (
        not c.transformer.is_cpu and c.plan.transformer.resident_blocks == c.layers and c.plan.both_resident
    ),
    r"in ordinary host memory: page-locked memory is for CUDA devices": lambda c, x, m: not on_cuda(c.transformer),
    r"page-locked host memory: copies run beside the computation": lambda c, x, m: (
        x.value == "pinned" and on_cuda(c.transformer) and blocks_wait(c)
    ),
    r"in a scratch file: too little host memory is free to hold them page-locked": lambda c, x, m: (
        x.value == "mapped" and blocks_wait(c) and c.plan.prediction.host_bytes + waiting_bytes(c) > c.plan.prediction.host_limit_bytes
    ),
    r"every device decodes its rows of each frame; should the others be lost, one goes on (\w+)-major, (\d+) strips":
        lambda c, x, m: (c.plan.vae.tiling.order, c.plan.vae.tiling.num_tiles) == (m[1], int(m[2])) and bool(c.plan.group.ranks),
    r"what needs least memory": lambda c, x, m: not c.plan.prediction.fits and (
        {"decode": c.plan.vae.tiling == DECODE_MODES[-1], "encode": c.plan.vae.encode_tiles == ENCODE_TILES[-1]}
        .get(x.setting, not c.plan.transformer.share_first)
    ),
    r"whole frames, the fastest way": lambda c, x, m: c.plan.prediction.fits and (
        c.plan.vae.encode_tiles == 1 if x.setting == "encode" else c.plan.vae.tiling == DECODE_MODES[0]
    ),
    r"fewer strips do not fit": lambda c, x, m: c.plan.prediction.fits and not fewer_strips_fit(c),
    r"no faster way to decode fits": lambda c, x, m: c.plan.prediction.fits and not any(
        c.fits_as(c.plan.transformer.resident_blocks, c.plan.transformer.share_first, keep, mode)
        for keep, mode in c.faster_decodes((c.plan.both_resident,))
    ),
    r"every device holds both": lambda c, x, m: bool(c.plan.group.ranks) and x.value,
    r"each model has a device of its own": lambda c, x, m: c.plan.transformer.device != c.plan.vae.device and x.value,
    r"both are in host memory": lambda c, x, m: c.transformer.is_cpu and c.vae.is_cpu and x.value,
    r"both fit on the device together": lambda c, x, m: c.plan.prediction.fits and x.value and not c.plan.group.ranks,
    r"they take turns on the device, which needs least memory": lambda c, x, m: not c.plan.prediction.fits and not x.value,
    r"they take turns on the device: with both on it, no decode that fits is as fast": lambda c, x, m: (
        c.plan.prediction.fits and not x.value and not any(
            c.fits_as(c.plan.transformer.resident_blocks, c.plan.transformer.share_first, True, mode) for _, mode in c.faster_decodes((True,))
        )
    ),
    r"the same for both prompts: computed once, and kept meanwhile": lambda c, x, m: (
        x.value == "shared" and c.request.uses_guidance and c.plan.transformer.share_first
    ),
    r"to keep it from one prompt to the next would not fit": lambda c, x, m: x.value == "apart" and not any(
        c.fits_as(c.plan.transformer.resident_blocks, True, keep, mode)
        for keep in ((True, False) if c.plan.transformer.device == c.plan.vae.device else (True,))
        for mode in DECODE_MODES
    ),
    r"(.+): this exchanges least": lambda c, x, m: sharing(c, m[1]) and c.plan.group.layout.cfg == 2,
    r"there is one prompt: each device has a part of its tokens": lambda c, x, m: not c.request.uses_guidance,
    r"an odd number of devices: each has a part of the tokens": lambda c, x, m: len(c.plan.group.ranks) % 2 == 1,
    r"devices of unlike speeds: each has a part of the tokens, the faster one more": lambda c, x, m: (
        len(set(c.config.device_speeds or ())) > 1 and c.plan.group.layout.cfg == 1
    ),
    r"PyTorch's own, the only one on (\w+)": lambda c, x, m: x.value == "sdpa" and m[1] == c.transformer.name == "cpu",
    r"asked for, but not there on (\w+): the job will be refused": lambda c, x, m: m[1] == "cpu" and x.value != "sdpa",
    r"(asked for: )?(checked|the fastest that is right: checked and measured) when a job first runs there": (
        lambda c, x, m: on_cuda(c.transformer) and c.hardware.assumed and bool(m[1]) == (x.value != "auto")
    ),
    r"PyTorch's own operations: Triton's kernels are not for (\w+)": lambda c, x, m: (
        x.value == "torch" and m[1] == (c.vae if x.setting == "vae_kernels" else c.transformer).name == "cpu"
    ),
    r"taken to work there; PyTorch's own operations run where they do not": lambda c, x, m: (
        on_cuda(c.vae if x.setting == "vae_kernels" else c.transformer) and c.hardware.assumed
    ),
}  # fmt: skip


def fewer_strips_fit(c: Case) -> bool:
    fewer = ENCODE_TILES[ENCODE_TILES.index(c.plan.vae.encode_tiles) - 1]
    (device,) = c.plan.prediction.devices
    now, then = (c.memory.encode((480, 832, 81), count, "float32") for count in (c.plan.vae.encode_tiles, fewer))
    return device.phases["encode"] + then - now <= device.limit_bytes


def sharing(c: Case, text: str) -> bool:
    if text == "each has a part of the tokens":
        return c.plan.group.layout.cfg == 1
    match = re.fullmatch(
        r"each of the two prompts is on (one device|(\d) devices, each with a part of the tokens)", text
    )
    return match is not None and c.request.uses_guidance and c.plan.group.layout.sequence == int(match[2] or 1)


def tf32(c: Case) -> bool:
    return on_cuda(c.vae) and c.vae.capability >= (8, 0) and c.plan.vae.dtype == "float32"


def text_bytes(c: Case, hold) -> int:
    return text_encoder_bytes(c.memory.spec, c.plan.text.dtype, hold)


def blocks_wait(c: Case) -> bool:
    return c.plan.transformer.resident_blocks < c.layers or not c.plan.both_resident


def waiting_bytes(c: Case) -> int:
    on_host = c.layers - c.plan.transformer.resident_blocks if c.plan.both_resident else c.layers
    return c.memory.transformer_weights(c.plan.transformer.dtype) * on_host // c.layers


def parallel_fits(c: Case) -> bool:
    shared = replace(c.config, strategy="parallel")
    return make_plan(c.request, c.memory, shared, c.hardware, nearest=False).prediction.fits


def check(case: Case) -> set[str]:
    """The patterns that were met; fails where a sentence is unknown or untrue."""
    met = set()
    for choice in case.plan.choices:
        fitting = [(pattern, m) for pattern in CLAIMS if (m := re.fullmatch(pattern, choice.why))]
        assert fitting, f"nobody has checked whether this is true: {choice}"
        for pattern, match in fitting:
            if choice.setting == "vae_dtype" and "CPU" in pattern:
                continue
            assert CLAIMS[pattern](case, choice, match), f"untrue: {choice}"
            met.add(pattern)
    return met


OLD = {"capability": (7, 5)}
GRID = [
    # machine, settings, guidance scale, changes of its GPUs
    ("2x24GiB", {}, 5.0, {}),
    ("4x24GiB", {}, 5.0, {}),
    ("3x24GiB", {}, 5.0, {}),
    ("2x24GiB", {}, 1.0, {}),
    ("2x24GiB", {"strategy": "parallel"}, 1.0, {}),
    ("2x24GiB", {"devices": "cuda:0,cuda:1", "device_speeds": (3.0, 1.0), "strategy": "parallel"}, 5.0, {}),
    ("2x24GiB", {"devices": "cuda:1", "attention": "flash-attn-4", "tf32": False}, 5.0, {}),
    ("2x24GiB", {"devices": "vae=cuda:0,transformer=cuda:1", "vae_dtype": "bfloat16"}, 5.0, {}),
    ("2x24GiB", {"vram_limit": int(3.5 * GIB)}, 5.0, {}),
    ("2x2GiB", {}, 5.0, {}),
    ("2x1.5GiB", {"strategy": "parallel"}, 5.0, {}),
    ("24GiB+12GiB", {}, 5.0, {}),
    ("24GiB+1GiB", {}, 5.0, {}),
    ("1GiB+1.2GiB", {}, 5.0, {}),
    ("24GiB", {}, 1.0, {}),
    ("24GiB", {"vae_dtype": "float32", "transformer_dtype": "float32", "text_encoder_hold": "streamed"}, 5.0, OLD),
    ("24GiB", {}, 5.0, OLD),
    ("4GiB", {}, 5.0, {}),
    ("3GiB", {}, 5.0, {}),
    ("2.5GiB", {}, 5.0, {}),
    ("2GiB", {}, 5.0, {}),
    ("24GiB", {"vram_limit": int(2.5 * GIB), "ram_limit": int(4.25 * GIB)}, 5.0, {}),
    ("24GiB", {"ram_limit": GIB}, 5.0, {}),
    ("cpu", {}, 5.0, {}),
    ("cpu", {"attention": "sdpa"}, 1.0, {}),
    ("cpu", {"attention": "flash-attn-4", "strategy": "placed", "devices": "cpu"}, 5.0, {}),
    ("cpu", {"devices": "cpu,cpu"}, 1.0, {}),
    ("cpu", {"model": "miniature", "revision": "main", "vram_limit": 8 * GIB}, 5.0, {}),
    ("2x24GiB", {"devices": "cuda:0,cuda:1", "device_speeds": (3.0, 1.0), "strategy": "placed"}, 5.0, {}),
    ("cpu", {"model": "miniature", "text_encoder_hold": "streamed"}, 5.0, {}),
    ("24GiB", {"devices": "vae=cpu,transformer=cuda:0"}, 5.0, {}),
    ("24GiB", {"weights": "q8", "vram_limit": int(2.5 * GIB)}, 5.0, {}),
    ("24GiB", {"weights": "bf16"}, 5.0, {}),
    ("24GiB", {"devices": "vae=cuda:0,transformer=cpu"}, 5.0, {}),
    ("h100", {"model": "a/model"}, 5.0, {}),
    ("12GiB,ram=128GiB", {"model": "a/model"}, 5.0, {}),
    ("8GiB", {"model": "a/model", "text_encoder_device": "cuda:0"}, 5.0, {}),
]


INPUT = {"input_video": "sha256:0", "strength": 0.5}


def case_of(memories, machine: str, changes: dict, scale: float, gpus: dict, **given) -> Case:
    config = EngineConfig(**{"model": "random:1.3b"} | changes)
    memory = replace(memories.get(config.model, memories["random:1.3b"]), weights=config.weights)
    hardware = parse_hardware(machine if "ram" in machine else f"{machine},ram=32GiB")
    hardware = replace(hardware, devices=tuple(replace(d, **gpus) for d in hardware.devices))
    request = GenerationRequest(prompt="x", height=480, width=832, num_frames=81, guidance_scale=scale, **given)
    request = request.resolve(memory.spec)
    return Case(make_plan(request, memory, config, hardware, nearest=False), request, memory, config, hardware)


def test_every_sentence_of_a_plan_is_true(memories) -> None:
    met: set[str] = set()
    for machine, changes, scale, gpus in GRID:
        met |= check(case_of(memories, machine, changes, scale, gpus))
    for machine in ("24GiB", "6GiB", "1GiB"):
        met |= check(case_of(memories, machine, {}, 5.0, {}, **INPUT))
    rare = {p for p in CLAIMS if p not in met}
    assert len(rare) <= 4, rare  # else the grid no longer comes to most of the sentences


def test_a_setting_that_a_plan_does_not_use_is_named(memories) -> None:
    given = {"revision": "main", "vram_limit": 8 * GIB, "devices": "cpu,cpu", "device_speeds": (2.0, 1.0)}

    def unused(machine: str, model: str, **changes) -> set[str]:
        choices = case_of(memories, machine, {"model": model} | given | changes, 5.0, {}).plan.choices
        return {c.setting for c in choices if c.why.startswith("without effect")} & given.keys()

    assert unused("cpu", "random:1.3b", strategy="placed") == {"revision", "vram_limit", "device_speeds"}
    assert unused("cpu", "miniature", strategy="parallel") == {"revision", "vram_limit"}
    assert unused("2x24GiB", "miniature", devices="cuda:0,cuda:1", strategy="parallel") == {"revision"}
    assert unused("cpu", "miniature", **dict.fromkeys(given)) == set()


@pytest.fixture
def gpu_here(monkeypatch) -> Hardware:
    """A GPU that this machine would have: only what is asked of it before a run."""
    hardware = parse_hardware("24GiB,ram=32GiB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    found = {
        "sdpa": SDPA,
        "quick": Backend("quick", SDPA.attend, None),
        "rough": Backend("rough", SDPA.attend, None, False),
    }
    monkeypatch.setattr(explain, "available_backends", lambda device: found)
    monkeypatch.setattr(explain, "has_quack", lambda device, dtype: False)
    device = replace(hardware.devices[0], model="A card")
    return replace(hardware, devices=(device,), host="this machine")


def explained(memories, hardware: Hardware, **changes) -> dict[str, Choice]:
    memory = memories["random:1.3b"]
    config = EngineConfig(model="random:1.3b", **changes)
    request = GenerationRequest(prompt="x", height=480, width=832).resolve(memory.spec)
    plan = make_plan(request, memory, config, hardware, nearest=False)
    return {choice.setting: choice for choice in plan.choices}


def test_attention_and_kernels_of_a_gpu_that_is_here(memories, gpu_here, monkeypatch) -> None:
    monkeypatch.setattr(explain, "remembered", lambda *_: None)
    before = explained(memories, gpu_here)
    assert before["attention"].value == "auto"
    assert before["attention"].why == "the fastest that is right of sdpa, quick: measured when a job first runs here"
    table = (Timing("quick", 1.0, 0.0), Timing("sdpa", 2.0, 0.0), Timing("other", None, None, "wrong result"))
    monkeypatch.setattr(explain, "remembered", lambda *_: ("quick", table))
    after = explained(memories, gpu_here)["attention"]
    assert (after.value, after.why) == ("quick", "the fastest of 2 that were measured on this GPU")
    assert explained(memories, gpu_here, attention="rough")["attention"].why == "asked for, checked before it is used"
    assert "not available here" in explained(memories, gpu_here, attention="none")["attention"].why


@pytest.mark.parametrize("triton", [True, False])
def test_kernels_are_told_as_far_as_they_are_known(memories, gpu_here, monkeypatch, triton) -> None:
    monkeypatch.setattr(explain, "plans_triton", lambda what, device: triton)
    monkeypatch.setattr(explain, "triton_problem", lambda: None if triton else "Triton is not installed")
    found = explained(memories, gpu_here)
    for setting in ("kernels", "vae_kernels"):
        assert found[setting].value == ("triton" if triton else "torch")
        assert ("checked before they are used" in found[setting].why) == triton
        assert ("Triton is not installed" in found[setting].why) != triton
    monkeypatch.setattr(explain, "has_quack", lambda device, dtype: True)
    assert explained(memories, gpu_here)["kernels"].value == ("triton+quack" if triton else "torch")


def test_a_card_of_another_node_is_not_looked_for_here(memories, gpu_here, monkeypatch) -> None:
    other = replace(gpu_here, devices=(replace(gpu_here.devices[0], model="Another card"),))
    monkeypatch.setattr(explain, "available_backends", lambda device: SimpleNamespace()[device])
    assert explained(memories, other)["attention"].why.endswith("when a job first runs there")

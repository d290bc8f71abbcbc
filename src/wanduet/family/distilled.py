"""Wan2.1 text-to-video weights that are distilled for few steps: how to recognise them, and how they are run.

Such weights run without guidance, and only at the timesteps that they were distilled for. Sources: the model cards and
the inference code of each project.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import atan, tan
from pathlib import Path
from typing import Any

from wanduet.family.spec import SelfAttention

_DMD = (1000.0, 757.0, 522.0)
_SHIFT_5 = (1000.0, 937.5, 2500 / 3, 625.0)  # 4 even steps with a shift of 5
# rCM's angles a mean the noise level sin(a) / (sin(a) + cos(a)).
_RCM = tuple(1000 * tan(angle) / (1 + tan(angle)) for angle in (atan(80), 1.5, 1.4, 1.0))
_ORIGINAL = "in the original layout"
SINGLE_FILE = "a file of a transformer alone"
_PICKLE = "a .pt file with the original names"
_CHUNKS = "causal attention over chunks of 3 latent frames, with the keys and values of earlier chunks"
# Parts of the names of the tensors of VSA's gate and SLA's projection.
VSA_KEY, SLA_KEY = ".to_gate_compress.", ".proj_l."
MODULES = {"vsa": VSA_KEY, "sla": SLA_KEY}


@dataclass(frozen=True, slots=True, kw_only=True)
class FewStep:
    """Few-step weights of one project, all run in the same way.

    `repositories`: hub ids, of which the last part is also recognised as a folder's name. `files`: names of single
    files, or of the folder of a file that is named `model`. `pipelines`: `_class_name` in model_index.json. `keys`: parts of the names of transformer tensors that other
    weights do not have. `attention` and `key_share`: as in `TransformerSpec`. `needs`: what the weights do not run without
    and wanduet does not have. `published`: what the repositories have, if it is no model that wanduet fetches. `size`: height,
    width and number of frames of the training videos.
    """

    name: str
    sampler: str
    timesteps: tuple[float, ...]
    flow_shift: float | None = None  # for another number of steps; None: that of the weights they were made from
    size: tuple[int, int, int] | None = None
    repositories: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    attention: SelfAttention = "dense"
    key_share: float = 1.0
    needs: str = ""
    published: str = ""

    def defaults(self) -> dict[str, Any]:
        """Return the fields of `GenerationDefaults` that differ from the model's that the weights were made from."""
        found: dict[str, Any] = {
            "sampler": self.sampler,
            "timesteps": self.timesteps,
            "num_inference_steps": len(self.timesteps),
            "guidance_scale": 1.0,
        }
        if self.flow_shift is not None:
            found["flow_shift"] = self.flow_shift
        if self.size is not None:
            found |= dict(zip(("height", "width", "num_frames"), self.size, strict=True))
        return found


FAST_MINIATURE = FewStep(
    name="miniature-fast",
    sampler="euler",
    timesteps=(1000.0, 900.0, 750.0, 500.0),  # 4 even steps with the miniature's shift of 3
    files=("miniature-fast",),
)
FEW_STEP = (
    FAST_MINIATURE,
    FewStep(
        name="FastWan",
        sampler="renoise",
        timesteps=_DMD,
        flow_shift=8.0,
        size=(448, 832, 61),
        repositories=("FastVideo/FastWan2.1-T2V-1.3B-Diffusers",),
        keys=(VSA_KEY,),
        attention="vsa",
        key_share=0.2,
    ),
    FewStep(
        name="FastWan 14B",
        sampler="renoise",
        timesteps=_DMD,
        flow_shift=8.0,
        size=(448, 832, 61),
        repositories=("FastVideo/FastWan2.1-T2V-14B-Diffusers", "FastVideo/FastWan2.1-T2V-14B-480P-Diffusers"),
        attention="vsa",
        key_share=0.1,
    ),
    FewStep(
        name="FastWan with ordinary attention",
        sampler="renoise",
        timesteps=_DMD,
        flow_shift=8.0,
        repositories=(
            "FastVideo/FastWan-QAD-1.3B",
            "FastVideo/FastWan-QAD-FP8-1.3B",
            "FastVideo/FastWan-QAD-1.3B-SA2",
        ),
        pipelines=("WanDMDPipeline",),
    ),
    FewStep(
        name="CausVid",
        sampler="renoise",
        timesteps=_DMD,
        flow_shift=8.0,
        repositories=("tianweiy/CausVid",),
        files=("bidirectional_checkpoint1", "bidirectional_checkpoint2"),
        published=_PICKLE,
    ),
    FewStep(
        name="CausVid, frame by frame",
        sampler="renoise",
        timesteps=_DMD,
        flow_shift=8.0,
        files=("autoregressive_checkpoint",),
        needs=_CHUNKS,
        published=_PICKLE,
    ),
    FewStep(
        name="Self-Forcing",
        sampler="renoise",
        timesteps=_SHIFT_5,
        flow_shift=5.0,
        repositories=("gdhe17/Self-Forcing",),
        files=("self_forcing_dmd.pt",),
        needs=_CHUNKS,
        published=_PICKLE,
    ),
    FewStep(
        name="LightX2V NVFP4",
        sampler="euler",
        timesteps=_SHIFT_5,
        flow_shift=5.0,
        repositories=("lightx2v/Wan-NVFP4",),
        files=("wan2.1_t2v_1_3b_nvfp4_lightx2v_4step.safetensors",),
        keys=(".weight_global_scale", ".input_absmax"),
        needs="weights in NVFP4",
        published=_ORIGINAL,
    ),
    FewStep(
        name="LightX2V 14B",
        sampler="euler",
        timesteps=_SHIFT_5,
        flow_shift=5.0,
        repositories=("lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v",),
        published=SINGLE_FILE,
    ),
    FewStep(
        name="rCM",
        sampler="renoise",
        timesteps=_RCM,
        size=(480, 832, 77),
        files=("rCM_Wan2.1_T2V_1.3B_480p.pt",),
        published=SINGLE_FILE,
    ),
    FewStep(
        name="TurboWan",
        sampler="renoise",
        timesteps=_RCM,
        size=(480, 832, 77),
        repositories=("IPostYellow/TurboWan2.1-T2V-1.3B-Diffusers",),
        keys=(SLA_KEY,),
        attention="sla",
        key_share=0.1,
    ),
    FewStep(
        name="TurboWan by its authors",
        sampler="renoise",
        timesteps=_RCM,
        size=(480, 832, 77),
        repositories=(
            "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P",
            "TurboDiffusion/TurboWan2.1-T2V-14B-480P",
            "TurboDiffusion/TurboWan2.1-T2V-14B-720P",
        ),
        attention="sla",
        key_share=0.1,
        published=SINGLE_FILE,
    ),
)
# LoRA files that make ordinary weights few-step ones, by a part of the file's name or title.
FEW_STEP_LORAS = {
    "causvid": FewStep(  # Wan2GP runs it by Euler's method at the first 8 of the timesteps that it was distilled for
        name="CausVid LoRA",
        sampler="euler",
        timesteps=(1000.0, 934.0, 862.0, 756.0, 603.0, 410.0, 250.0, 140.0),
        flow_shift=2.0,
    ),
    "lightx2v": FewStep(name="LightX2V LoRA", sampler="euler", timesteps=_SHIFT_5, flow_shift=5.0),
}
PIPELINES = tuple(pipeline for one in FEW_STEP for pipeline in one.pipelines)
ORDINARY = "FastVideo/FastWan-QAD-1.3B"  # few-step weights that run here


def by_name(name: str) -> FewStep | None:
    """Return the few-step weights of a hub id, or of a folder's or file's name; None for other names."""
    last = name.rpartition("/")[2].lower()
    for one in FEW_STEP:
        if last in (known.rpartition("/")[2].lower() for known in (*one.repositories, *one.files)):
            return one
    return None


def by_file(path: Path) -> FewStep | None:
    """Return the few-step weights of a file, by its name, or its folder's if it is called `model`; None for others."""
    return by_name(path.name) or (by_name(path.parent.name) if path.stem == "model" else None)


def by_tensors(names: Iterable[str]) -> FewStep | None:
    """Return the few-step weights that have transformer tensors of these names; None for other weights."""
    listed = list(names)
    return next((one for one in FEW_STEP if any(key in name for key in one.keys for name in listed)), None)


def by_pipeline(name: object) -> FewStep | None:
    """Return the few-step weights of a `_class_name` in model_index.json; None for other pipelines."""
    return next((one for one in FEW_STEP if name in one.pipelines), None)


def by_lora(names: Iterable[str]) -> FewStep | None:
    """Return how a few-step LoRA is sampled, by its file's name and the titles in its header; None for other LoRAs."""
    listed = [name.lower() for name in names]
    return next((one for mark, one in FEW_STEP_LORAS.items() if any(mark in name for name in listed)), None)

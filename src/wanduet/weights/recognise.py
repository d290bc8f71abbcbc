"""Recognises what a file of weights is, by the names and shapes of its tensors; its own name says nothing reliable."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wanduet.weights.source import TensorInfo

# Prefixes that programs write before a transformer's names, and ComfyUI's before each model's in one file for all. Of the
# models that a training saves, the first one here is taken: that of averaged weights.
_TRAINED = tuple(
    f"{name}.{inner}" for name in ("generator_ema", "generator", "model") for inner in ("", "model.", "net.")
)
_PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "model.", "net.", *_TRAINED),
    "vae": ("", "vae.", "first_stage_model."),
    "text_encoder": ("", "text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl."),
    "clip": ("", "clip_vision.", "conditioner."),
}
# Modules that only a component in one layout has; all of them must be there.
_MARKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("transformer", "official", ("head.modulation", "blocks.0.self_attn.q")),
    ("transformer", "diffusers", ("scale_shift_table", "blocks.0.attn1.to_q")),
    ("vae", "official", ("decoder.middle.0.residual.0.gamma",)),
    ("vae", "diffusers", ("decoder.mid_block.resnets.0.norm1.gamma",)),
    ("text_encoder", "official", ("token_embedding", "blocks.0.attn.q")),
    ("text_encoder", "transformers", ("encoder.block.0.layer.0.SelfAttention.q",)),
    ("clip", "official", ("visual.cls_embedding",)),
    ("clip", "transformers", ("vision_model.embeddings.class_embedding",)),
)
_ADAPTER = re.compile(r"lora_|[._]lora\.|lokr_|hada_|\.diff$|\.diff_[bm]$|dora_scale|[._]oft_")
_ALPHA = re.compile(r"[._]alpha$")
# Modules that make a transformer another member, in both layouts, and that member's name.
_MEMBERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("vace_patch_embedding",), "VACE"),
    (("face_adapter", "motion_encoder", "pose_patch_embedding", "blocks.0.block"), "Wan2.2 Animate"),
    (("casual_audio_encoder",), "Wan2.2 S2V"),
    (("audio_proj.audio_proj_glob_1",), "HuMo"),
    (("fps_embedding", "condition_embedder.fps_embedding"), "SkyReels-V2 DF"),
    (("blocks.0.cam_encoder",), "ReCamMaster"),
    (("ref_conv",), "Fun-Control"),
    (("control_adapter.conv",), "Fun-Control camera"),
    (("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"), "FLF2V"),
    (
        ("img_emb", "condition_embedder.image_embedder", "blocks.0.cross_attn.k_img", "blocks.0.attn2.add_k_proj"),
        "I2V",
    ),
)
_LONGEST = 500  # characters of a name that is looked at: a stranger's may have a million parts
_SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}
_UMT5_VOCABULARY, _T5_VOCABULARY = 256384, 32128
NAMES = {
    "transformer": "transformer", "vae": "VAE", "text_encoder": "text encoder", "clip": "image encoder",
    "adapter": "LoRA", "unknown": "file of tensors",
}  # fmt: skip
_NEEDS = {
    "transformer": ("a Wan2.1 VAE", "a UMT5 text encoder", "its tokenizer"),
    "vae": ("a transformer", "a UMT5 text encoder", "its tokenizer"),
    "text_encoder": ("a transformer", "a Wan2.1 VAE", "its tokenizer"),
}
TAKE_T2V = "Take the weights of Wan2.1 T2V, 1.3B or 14B."
# What each member that does not run is for.
_PURPOSE = {
    "I2V": "image to video", "FLF2V": "video between two images", "VACE": "video editing",
    "SkyReels-V2 DF": "video of any length", "Fun-Control": "video by a control video",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recognised:
    """One model in a file of weights.

    `component`: transformer, vae, text_encoder, clip, adapter or unknown. `layout`: whose names the tensors have, after
    `prefix`. `dtypes`: safetensors' names, that of most values first. `needs`: what it does not run without. `problem`
    and `hint`: why wanduet does not run it, and what to take instead; None if it does. `device_bytes`: size in memory,
    computed in 16 bits (the VAE: in 32).
    """

    component: str
    layout: str
    member: str
    prefix: str
    dtypes: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    needs: tuple[str, ...] = ()
    problem: str | None = None
    hint: str | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of the weights in memory, in the precision that they are computed in by default on a GPU."""
        return self.num_parameters * (4 if self.component == "vae" else 2)

    @property
    def described(self) -> str:
        """What the file is, for a sentence: `the transformer of Wan2.1 I2V-14B`."""
        if self.component in ("adapter", "unknown"):
            return self.member
        return f"the {NAMES[self.component]} of {self.member}" if self.component != "text_encoder" else self.member


def recognise(tensors: Mapping[str, TensorInfo]) -> tuple[Recognised, ...]:
    """Return each model whose tensors a file has, by their stored names; one `adapter` or `unknown` if it has none."""
    modules = _modules(tensors)
    found = []
    for component, layout, marks in _MARKS:
        for prefix in _PREFIXES[component]:
            if all(f"{prefix}{mark}" in modules for mark in marks):
                inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                found.append(_describe(component, layout, prefix, inside))
                break
    if found:
        return tuple(found)
    # Of a LoRA, some programs leave only the alphas.
    if any(_ADAPTER.search(name) for name in tensors) or (tensors and all(_ALPHA.search(name) for name in tensors)):
        problem = "it is a LoRA or another adapter: changes to a model, not a model"
        return (
            _of(
                "adapter",
                "",
                "an adapter (LoRA)",
                "",
                tensors,
                problem,
                "Give the model that it was made for, and this file as --lora.",
            ),
        )
    problem = "its tensors are those of no model that wanduet knows"
    return (_of("unknown", "", "no model that is known", "", tensors, problem, TAKE_T2V),)


def _modules(names: Iterable[str]) -> set[str]:
    """Return names and all of their beginnings that end before a dot: modules, also where a format adds last parts."""
    found: set[str] = set()
    for name in names:
        if len(name) > _LONGEST:
            continue
        parts = name.split(".")
        found.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return found


def _of(
    component: str,
    layout: str,
    member: str,
    prefix: str,
    tensors: Mapping[str, TensorInfo],
    *why: str | None,
) -> Recognised:
    counts: Counter[str] = Counter()
    for info in tensors.values():
        counts[info.dtype] += math.prod(info.shape)
    dtypes = tuple(dtype for dtype, _ in counts.most_common())
    total = counts.total()
    problem, hint = why or (None, None)
    needs = _NEEDS.get(component, ()) if problem is None else ()
    return Recognised(component, layout, member, prefix, dtypes, len(tensors), total, needs, problem, hint)


def _describe(component: str, layout: str, prefix: str, tensors: Mapping[str, TensorInfo]) -> Recognised:
    if component == "clip":
        unused = "it is an image encoder, which only image to video needs"
        return _of(component, layout, "CLIP ViT-H", prefix, tensors, unused, "Leave it out.")
    describe = {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder}[component]
    member, problem, hint = describe(tensors)
    if component == "text_encoder" and "spiece_model" in tensors:
        tensors = {name: info for name, info in tensors.items() if name != "spiece_model"}
    return _of(component, layout, member, prefix, tensors, problem, hint)


def _shape(tensors: Mapping[str, TensorInfo], *names: str) -> tuple[int, ...]:
    """Return the shape of the first of these tensors that is there; () without one."""
    return next((tensors[name].shape for name in names if name in tensors), ())


def _transformer(tensors: Mapping[str, TensorInfo]) -> tuple[str, str | None, str | None]:
    """Return a transformer's member, and why it does not run and what to take instead."""
    patch = _shape(tensors, "patch_embedding.weight")
    if len(patch) != 5 or 0 in patch:
        return "Wan", "it has no patch_embedding.weight of five axes", "Take another file of the same weights."
    width, channels = patch[0], patch[1]
    size = _SIZES.get(width) or f"{width} wide"
    modules = _modules(tensors)
    for marks, member in _MEMBERS:
        if modules.intersection(marks):
            full = f"{'Wan2.2' if member == 'I2V' and channels != 36 else 'Wan2.1'} {member}-{size}"
            shown = full if member in _PURPOSE else f"{member} ({size})"
            purpose = f"is for {_PURPOSE[member]}" if member in _PURPOSE else "needs modules of its own"
            return shown, f"{shown} {purpose}, which wanduet does not have", TAKE_T2V
    if channels == 36:
        return f"Wan2.2 I2V-A{size}", "Wan2.2 I2V is for image to video, which wanduet does not have", TAKE_T2V
    if width == 3072 or channels == 48:
        return "Wan2.2 TI2V-5B", "Wan2.2 TI2V-5B needs Wan2.2's VAE, which wanduet does not have", TAKE_T2V
    out = _shape(tensors, "head.head.weight", "proj_out.weight")
    if out and out[0] != channels * math.prod(patch[2:]):
        text = f"it takes {channels} channels and gives {out[0] // math.prod(patch[2:])}, so it needs a control video"
        return f"Wan of {size}", text, TAKE_T2V
    return f"Wan2.1 T2V-{size}", None, None


def _vae(tensors: Mapping[str, TensorInfo]) -> tuple[str, str | None, str | None]:
    channels = _shape(tensors, "decoder.conv1.weight", "decoder.conv_in.weight")[1:2]
    modules = _modules(tensors)
    if channels == (48,) or modules.intersection(("decoder.upsamples.0.upsamples", "decoder.up_blocks.0.upsampler")):
        return (
            "Wan2.2",
            "it is Wan2.2's VAE, of 48 latent channels; Wan2.1's transformers have 16",
            "Take Wan2.1's: Wan2.1_VAE.pth, wan_2.1_vae.safetensors, or the folder vae of a Diffusers checkpoint.",
        )
    return "Wan2.1", None, None


def _text_encoder(tensors: Mapping[str, TensorInfo]) -> tuple[str, str | None, str | None]:
    vocabulary = _shape(
        tensors, "token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"
    )[:1]  # fmt: skip
    if vocabulary == (_T5_VOCABULARY,):
        return (
            "T5 v1.1",
            "it is T5 v1.1, with a vocabulary of 32128; Wan was trained with UMT5, which has 256384",
            "Take umt5-xxl: umt5_xxl_fp16.safetensors, or models_t5_umt5-xxl-enc-bf16.pth.",
        )
    if vocabulary == (_UMT5_VOCABULARY,):
        return "UMT5-XXL", None, None
    return f"UMT5 with a vocabulary of {vocabulary[0] if vocabulary else '?'}", None, None

"""Nodes that run the engine in ComfyUI's own process. The package `wanduet` must be installed in its Python."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .engine import ModelChoice, conditioning_of, embeds_of, latent_of, run, samples_of, stages_of
from .host import file_in, files_in
from .inputs import CATEGORY, OWN, SAMPLERS, ModelType, loras_input, sampling_inputs, seed_input, settings, size_inputs
from .pictures import frames_of, images_of
from .plan_text import plan_text

FOLDERS = {"transformer": "diffusion_models", "vae": "vae", "text_encoder": "text_encoders"}
PRECISIONS = ("auto", "bf16", "q8", "fp8")


class WanduetModel(io.ComfyNode):
    """Chooses a model and how it is held in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetModel",
            display_name="wanduet: model",
            category=CATEGORY,
            description="A model for the engine in this process. What the files lack comes from `model`.",
            inputs=[
                io.String.Input(
                    "model", default="",
                    tooltip="A folder, a file, an id of Hugging Face, or `miniature`. Empty: Wan2.1-T2V-1.3B.",
                ),
                *(
                    io.Combo.Input(name, options=[OWN, *files_in(folder)], default=OWN, tooltip="In place of the model's own.")
                    for name, folder in FOLDERS.items()
                ),
                io.Combo.Input(
                    "weights", options=list(PRECISIONS), default="auto",
                    tooltip="The transformer's matrices in memory: q8 and fp8 take half of the bytes of bf16.",
                ),
                io.Float.Input(
                    "vram_limit", default=0.0, min=0.0, max=1024.0, step=0.5, tooltip="GiB of each GPU. 0: what is free."
                ),
            ],
            outputs=[ModelType.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: str, weights: str, vram_limit: float, **names: str) -> io.NodeOutput:
        """See ComfyUI. Raises ModelNotFoundError and what else is wrong with the files."""
        files = tuple((part, file_in(FOLDERS[part], name)) for part, name in names.items() if name != OWN)
        choice = ModelChoice(model.strip(), files, weights, int(vram_limit * 2**30) or None)
        stages_of(choice)
        return io.NodeOutput(choice)


class WanduetTextEncode(io.ComfyNode):
    """Encodes a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetTextEncode",
            display_name="wanduet: text encode",
            category=CATEGORY,
            description="Encodes a prompt. ComfyUI's own nodes for Wan take the result, and theirs fits the sampler here.",
            inputs=[ModelType.Input("model"), io.String.Input("text", multiline=True, dynamic_prompts=True)],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, model: ModelChoice, text: str) -> io.NodeOutput:
        """See ComfyUI."""
        return io.NodeOutput(
            run(model, "encode", lambda stages, hooks: conditioning_of(stages, stages.encode_prompt(text, hooks)))
        )


class WanduetSampler(io.ComfyNode):
    """Denoises a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetSampler",
            display_name="wanduet: sampler",
            category=CATEGORY,
            description="Denoises a video. Interrupted, it goes on where it was when the same workflow is queued again.",
            inputs=[
                ModelType.Input("model"),
                io.Conditioning.Input("positive"),
                *size_inputs(),
                *sampling_inputs(),
                io.Combo.Input("sampler", options=[OWN, *SAMPLERS], default=OWN),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.5, tooltip="0: the model's own."),
                seed_input(),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1.0, step=0.05,
                    tooltip="With a latent: how much of it is made anew; 1 ignores it.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Default: the model's own."),
                io.Latent.Input("latent", optional=True, tooltip="A video to start from; it sets size and length."),
                loras_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: ModelChoice, positive: Any, strength: float, negative: Any = None, latent: Any = None, **values: Any
    ) -> io.NodeOutput:
        """See ComfyUI."""

        def work(stages: Any, hooks: Any) -> Any:
            source = None if latent is None else samples_of(stages, latent)
            given = dict(values)
            if source is not None:
                vae = stages.spec.vae
                frames, rows, columns = source.shape[1:]
                given |= {"width": columns * vae.spatial_stride, "height": rows * vae.spatial_stride}
                given |= {"length": (frames - 1) * vae.temporal_stride + 1, "strength": strength}
            embeds = [None if one is None else embeds_of(stages, one) for one in (positive, negative)]
            return latent_of(stages, stages.denoise(request_of(given), *embeds, source, hooks))

        return io.NodeOutput(run(model, "denoise", work))


class WanduetDecode(io.ComfyNode):
    """Decodes latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetDecode",
            display_name="wanduet: decode",
            category=CATEGORY,
            description="Decodes latents of Wan's VAE, also those of ComfyUI's own nodes.",
            inputs=[
                ModelType.Input("model"),
                io.Latent.Input("latent"),
                io.Boolean.Input(
                    "keep_loaded", default=True, tooltip="Off: the engine gives all its memory back afterwards."
                ),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelChoice, latent: Any, keep_loaded: bool) -> io.NodeOutput:
        """See ComfyUI."""

        def work(stages: Any, hooks: Any) -> Any:
            return images_of(stages.decode(samples_of(stages, latent), hooks))

        return io.NodeOutput(run(model, "decode", work, keep_loaded))


class WanduetEncode(io.ComfyNode):
    """Encodes images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetEncode",
            display_name="wanduet: encode",
            category=CATEGORY,
            description="Encodes images to latents, for a video that is made from another. Frames beyond 4n + 1 are left out.",
            inputs=[ModelType.Input("model"), io.Image.Input("images")],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, model: ModelChoice, images: Any) -> io.NodeOutput:
        """See ComfyUI."""

        def work(stages: Any, hooks: Any) -> Any:
            frames = frames_of(images)
            stride = stages.spec.vae.temporal_stride
            return latent_of(stages, stages.encode_frames(frames[: (len(frames) - 1) // stride * stride + 1], hooks))

        return io.NodeOutput(run(model, "encode_video", work))


class WanduetPlan(io.ComfyNode):
    """Says what a video needs, before anything is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetPlan",
            display_name="wanduet: plan",
            category=CATEGORY,
            description="Says whether a video fits, and what memory and time it needs. Loads nothing.",
            inputs=[ModelType.Input("model"), *size_inputs(), *sampling_inputs(), loras_input()],
            outputs=[io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelChoice, **values: Any) -> io.NodeOutput:
        """See ComfyUI."""
        text = plan_text(stages_of(model).plan(request_of(values)).as_dict())
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def request_of(values: dict[str, Any]) -> Any:
    """Return the request of a node's inputs. Raises InvalidRequestError, and ValueError for LoRA on a server."""
    from wanduet import GenerationRequest

    fields = settings(**{name: value for name, value in values.items() if name != "loras"})
    loras = values.get("loras") or ()
    for lora in loras:
        if lora["path"] is None:
            raise ValueError(
                f"{lora['name']} is a LoRA on a server. Take the node `wanduet: LoRA`, which names a file here."
            )
    if loras:
        fields["loras"] = [{"name": one["path"]} | {k: one[k] for k in ("strength", "start", "end")} for one in loras]
    return GenerationRequest.parse(prompt="-", **fields)


ENGINE_NODES: list[type[io.ComfyNode]] = [
    WanduetModel, WanduetTextEncode, WanduetSampler, WanduetDecode, WanduetEncode, WanduetPlan,
]  # fmt: skip

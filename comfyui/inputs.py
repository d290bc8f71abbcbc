"""Inputs that several nodes have, and the types between them."""

from typing import Any

from comfy_api.latest import io

CATEGORY = "wanduet"
ServerType = io.Custom("WANDUET_SERVER")
ModelType = io.Custom("WANDUET_MODEL")
LorasType = io.Custom("WANDUET_LORAS")  # a tuple of dicts: name, path (None on a server), strength, start, end

SPEEDS = ("exact", "near", "fine", "fast", "draft")
SAMPLERS = ("unipc", "unipc-official", "dpm++2m", "euler", "renoise")
OWN = "default"  # the model's own
MOST_SEED = 2**53 - 1  # the largest whole number that a browser keeps exactly


def size_inputs() -> list[Any]:
    """Return the inputs for the size and length of a video."""
    return [
        io.Int.Input("width", default=832, min=0, max=8192, step=16, tooltip="Pixels. 0: the model's own."),
        io.Int.Input("height", default=480, min=0, max=8192, step=16, tooltip="Pixels. 0: the model's own."),
        io.Int.Input("length", default=81, min=0, max=4097, step=1, tooltip="Frames, 4n + 1. 0: the model's own."),
    ]


def sampling_inputs() -> list[Any]:
    """Return the inputs for how a video is made, without its seed."""
    return [
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip="0: the model's own, 50 for Wan2.1."),
        io.Float.Input(
            "guidance", default=0.0, min=0.0, max=100.0, step=0.5,
            tooltip="How closely the prompt is followed; 1 turns guidance off, and halves the time. 0: the model's own.",
        ),
        io.Combo.Input(
            "speed", options=list(SPEEDS), default="exact",
            tooltip="How much work may be skipped: exact, none; each of the others is faster and less like the exact video.",
        ),
    ]  # fmt: skip


def seed_input() -> Any:
    """Return the input for the seed."""
    return io.Int.Input(
        "seed", default=0, min=0, max=MOST_SEED, control_after_generate=True,
        tooltip="The same seed and settings give the same video.",
    )  # fmt: skip


def loras_input() -> Any:
    """Return the optional input for LoRA files."""
    return LorasType.Input("loras", optional=True, tooltip="LoRA files, from a LoRA node.")


def settings(**values: Any) -> dict[str, Any]:
    """Return a request's fields, by wanduet's names; those that are left to the model are left out."""
    names = {
        "length": "num_frames",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "shift": "flow_shift",
    }
    fields = {names.get(name, name): value for name, value in values.items() if value not in (None, "", OWN)}
    counts = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "flow_shift", "fps")
    return {name: value for name, value in fields.items() if value or name not in counts}

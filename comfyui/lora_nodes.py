"""Nodes that stack LoRA files, for both kinds of nodes."""

from typing import Any

from comfy_api.latest import io

from .host import file_in, files_in
from .inputs import CATEGORY, LorasType


def _common() -> list[Any]:
    return [
        io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05),
        io.Float.Input(
            "start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="The first step, as a share of the steps."
        ),
        io.Float.Input(
            "end", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="The last step, as a share of the steps."
        ),
        LorasType.Input("loras", optional=True, tooltip="Further files."),
    ]


class WanduetLora(io.ComfyNode):
    """Adds a file from ComfyUI's folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetLora",
            display_name="wanduet: LoRA",
            category=CATEGORY,
            description="Adds a LoRA file to a stack. A server needs a file of the same name in its own folder.",
            inputs=[io.Combo.Input("lora", options=files_in("loras")), *_common()],
            outputs=[LorasType.Output(display_name="loras")],
        )

    @classmethod
    def execute(cls, lora: str, strength: float, start: float, end: float, loras: Any = ()) -> io.NodeOutput:
        """See ComfyUI."""
        added = {"name": lora, "path": file_in("loras", lora), "strength": strength, "start": start, "end": end}
        return io.NodeOutput((*(loras or ()), added))


class WanduetServerLora(io.ComfyNode):
    """Adds a file that only a server has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetServerLora",
            display_name="wanduet: LoRA on a server",
            category=CATEGORY,
            description="Adds a LoRA file of a server's folder, by its name, to a stack.",
            inputs=[io.String.Input("name", default="", placeholder="style.safetensors"), *_common()],
            outputs=[LorasType.Output(display_name="loras")],
        )

    @classmethod
    def execute(cls, name: str, strength: float, start: float, end: float, loras: Any = ()) -> io.NodeOutput:
        """See ComfyUI."""
        added = {"name": name.strip(), "path": None, "strength": strength, "start": start, "end": end}
        return io.NodeOutput((*(loras or ()), added))


LORA_NODES: list[type[io.ComfyNode]] = [WanduetLora, WanduetServerLora]

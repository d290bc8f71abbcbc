"""wanduet's nodes for ComfyUI: videos from a wanduet server, or by the engine in ComfyUI's own process."""

from comfy_api.latest import ComfyExtension, io

from .engine_nodes import ENGINE_NODES
from .lora_nodes import LORA_NODES
from .server_nodes import SERVER_NODES


class WanduetExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes, in the order of the menu."""
        return [*SERVER_NODES, *ENGINE_NODES, *LORA_NODES]


async def comfy_entrypoint() -> WanduetExtension:
    """Called by ComfyUI when it loads the pack."""
    return WanduetExtension()

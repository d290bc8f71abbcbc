import asyncio
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.comfyui.stand_ins import Host, NodeOutput, call, load_pack, modules

NAME = "custom_nodes_x_wanduet"


@pytest.fixture(scope="package")
def _host() -> Iterator[Host]:
    host = Host()
    added = modules(host)
    sys.modules.update(added)
    yield host
    for name in [name for name in sys.modules if name in added or name.partition(".")[0] == NAME]:
        del sys.modules[name]


@pytest.fixture(scope="package")
def pack(_host: Host) -> ModuleType:
    """The pack, loaded in a process that looks like ComfyUI's."""
    return load_pack(NAME)


@pytest.fixture
def host(_host: Host, pack: ModuleType) -> Host:
    """ComfyUI as the test sees it, as after its start."""
    _host.reset()
    return _host


@pytest.fixture(scope="package")
def nodes(pack: ModuleType) -> dict[str, Any]:
    """The pack's nodes by their ids."""
    found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in found}


@pytest.fixture
def run(nodes: dict[str, Any], host: Host) -> Callable[..., NodeOutput]:
    """Runs a node by its id."""
    return lambda node_id, **inputs: call(nodes[node_id], **inputs)

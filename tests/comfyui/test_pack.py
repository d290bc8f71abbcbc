"""The pack as a whole: it loads as ComfyUI loads it, its workflows fit its nodes, and the registry can read it."""

import asyncio
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui.stand_ins import PACK, Host, call, load_pack

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
# ComfyUI's own nodes in the workflows: their inputs with links, widgets and outputs.
CORE: dict[str, tuple[dict[str, str], int, list[str]]] = {
    "CreateVideo": ({"images": "IMAGE", "audio": "AUDIO"}, 1, ["VIDEO"]),
    "SaveVideo": ({"video": "VIDEO"}, 3, []),
}
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


def shape(kind: str, nodes: dict[str, Any]) -> tuple[dict[str, str], int, list[str]]:
    """The inputs with links, the number of values in the file, and the outputs of a node."""
    if kind in CORE:
        return CORE[kind]
    schema = nodes[kind].define_schema()
    linked = {one.id: one.io_type for one in schema.inputs if one.io_type not in WIDGETS}
    widgets = [one for one in schema.inputs if one.io_type in WIDGETS]
    # ComfyUI's page keeps what becomes of a seed after a run beside the seed.
    count = len(widgets) + sum(bool(one.given.get("control_after_generate")) for one in widgets)
    return linked, count, [one.io_type for one in schema.outputs]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_fits_its_nodes(path: Path, nodes: dict[str, Any]) -> None:
    workflow = json.loads(path.read_text("utf-8"))
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for node in by_id.values():
        inputs, count, outputs = shape(node["type"], nodes)
        assert {one["name"]: one["type"] for one in node["inputs"]} == inputs
        assert [one["type"] for one in node["outputs"]] == outputs
        assert len(node["widgets_values"]) == count
    for link, source, out_slot, target, in_slot, kind in workflow["links"]:
        output, given = by_id[source]["outputs"][out_slot], by_id[target]["inputs"][in_slot]
        assert output["type"] == given["type"] == kind
        assert link in output["links"]
        assert given["link"] == link
    for node in by_id.values():
        if node["type"] in nodes:
            required = {one.id for one in nodes[node["type"]].define_schema().inputs if not one.optional}
            assert not {one["name"] for one in node["inputs"] if one["link"] is None} & required


def test_there_is_a_workflow_of_each_kind() -> None:
    kinds = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text("utf-8"))["nodes"]}
    assert {"WanduetServerVideo", "WanduetSampler", "WanduetDecode"} <= kinds


def test_every_node_is_named_for_a_person_and_by_the_packs_prefix(nodes: dict[str, Any]) -> None:
    readme = (PACK / "README.md").read_text("utf-8")
    for name, node in nodes.items():
        schema = node.define_schema()
        schema.validate()
        assert name.startswith("Wanduet")
        assert schema.category == "wanduet"
        assert schema.description
        assert schema.display_name.removeprefix("wanduet: ") in readme


def test_the_registry_can_read_the_pack() -> None:
    about = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))
    project = about["project"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,99}", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert "Repository" in project["urls"]
    assert {"PublisherId", "DisplayName", "Icon"} <= set(about["tool"]["comfy"])
    required = [line for line in (PACK / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert required == project["dependencies"] == []  # nothing that could replace ComfyUI's PyTorch


def test_the_nodes_load_without_the_package(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Python that has ComfyUI but not wanduet, the nodes of a server work, and those of the engine say what is missing."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wanduet"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wanduet", None)
    name = "custom_nodes_x_other"
    try:
        nodes = asyncio.run(asyncio.run(load_pack(name).comfy_entrypoint()).get_node_list())
        by_id = {node.define_schema().node_id: node for node in nodes}
        with pytest.raises(Exception, match="No wanduet server answers"):
            call(by_id["WanduetServer"], address="http://127.0.0.1:1")
        with pytest.raises(RuntimeError, match="not installed in the Python that runs ComfyUI"):
            call(by_id["WanduetModel"], model="miniature")
    finally:
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
            del sys.modules[loaded]

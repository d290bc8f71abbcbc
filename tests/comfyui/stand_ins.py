"""Stand-ins for what the nodes use of ComfyUI, written after its public source: same names, signatures and checks.

`load_pack` loads the pack as ComfyUI does; `call` runs a node as its executor does: inputs are checked against the schema,
defaults filled in, all in inference mode, and outputs are checked against their types.
"""

import importlib.util
import io as files
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image

PACK = Path(__file__).parents[2] / "comfyui"

_PLAIN = {"display_name", "optional", "tooltip", "lazy", "extra_dict", "raw_link"}
_WIDGET = _PLAIN | {"default", "socketless", "force_input"}
_NUMBER = _WIDGET | {"min", "max", "step", "display_mode"}
# Keywords of each type's Input in comfy_api/latest/_io.py.
KEYWORDS = {
    "BOOLEAN": _WIDGET | {"label_on", "label_off"},
    "INT": _NUMBER | {"control_after_generate"},
    "FLOAT": _NUMBER | {"round"},
    "STRING": _WIDGET | {"multiline", "placeholder", "dynamic_prompts"},
    "COMBO": (_WIDGET - {"force_input"}) | {"options", "control_after_generate", "upload", "image_folder", "remote"},
}  # fmt: skip


class _Input:
    io_type = ""

    def __init__(self, id: str, **given: Any) -> None:
        if unknown := set(given) - KEYWORDS.get(self.io_type, _PLAIN):
            raise TypeError(f"{self.io_type}.Input has no {unknown}")
        self.id, self.given, self.optional = id, given, given.get("optional", False)

    def check(self, value: Any) -> None:
        """As ComfyUI's validation of a prompt."""
        kinds = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
        assert isinstance(value, kinds.get(self.io_type, object)), f"{self.id}: {value!r}"
        if self.io_type in ("INT", "FLOAT"):
            assert self.given["min"] <= value <= self.given["max"], f"{self.id}: {value}"
        if self.io_type == "COMBO":
            assert value in self.given["options"], f"{self.id}: {value} not in list"


class _Output:
    io_type = ""

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        self.id, self.display_name = id, display_name


def custom(io_type: str) -> Any:
    """As io.Custom."""
    own = {"io_type": io_type}
    return type(io_type, (), own | {"Input": type("Input", (_Input,), own), "Output": type("Output", (_Output,), own)})


@dataclass
class Schema:
    """As io.Schema, with the fields that all versions of it have."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False

    def validate(self) -> None:
        ids = [one.id for one in self.inputs]
        assert len(ids) == len(set(ids)), f"Input ids must be unique: {ids}"
        assert not set(ids) & {one.id for one in self.outputs}


class NodeOutput:
    """As io.NodeOutput."""

    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: str | None = None) -> None:
        self.args, self.ui = args, ui


class _Locked(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"Cannot set attribute {name!r}: ComfyUI locks the class of a node.")


class ComfyNode(metaclass=_Locked):
    """As io.ComfyNode."""

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **inputs: Any) -> NodeOutput:
        raise NotImplementedError


def call(node: type[ComfyNode], **given: Any) -> NodeOutput:
    """Run a node, as ComfyUI's executor does."""
    schema = node.define_schema()
    schema.validate()
    inputs = {one.id: one for one in schema.inputs}
    assert set(given) <= set(inputs), f"{schema.node_id} has no {set(given) - set(inputs)}"
    values = {}
    for name, one in inputs.items():
        if name in given:
            values[name] = given[name]
        elif "default" in one.given:
            values[name] = one.given["default"]
        else:
            assert one.optional, f"Required input is missing: {name}"
            continue
        one.check(values[name])
    with torch.inference_mode():
        output = node.execute(**values)
    assert isinstance(output, NodeOutput)
    assert len(output.args) == len(schema.outputs)
    for one, value in zip(schema.outputs, output.args, strict=True):
        _check_output(one.io_type, value)
    return output


def _check_output(io_type: str, value: Any) -> None:
    if io_type == "IMAGE":
        assert value.ndim == 4 and value.shape[-1] == 3 and value.dtype == torch.float32  # noqa: PT018
        assert float(value.min()) >= 0 and float(value.max()) <= 1  # noqa: PT018
    elif io_type == "LATENT":
        assert value["samples"].ndim == 5
    elif io_type == "CONDITIONING":
        assert all(embeds.ndim == 3 and isinstance(about, dict) for embeds, about in value)
    elif io_type == "VIDEO":
        assert isinstance(value, VideoFromFile)
    elif io_type == "STRING":
        assert isinstance(value, str)


class VideoFromFile:
    """As InputImpl.VideoFromFile."""

    def __init__(self, file: str | files.BytesIO, *, start_time: float = 0, duration: float = 0) -> None:
        self._file = file

    def get_stream_source(self) -> str | files.BytesIO:
        if isinstance(self._file, files.BytesIO):
            self._file.seek(0)
        return self._file


class InterruptProcessingException(Exception):  # noqa: N818
    """As comfy.model_management's."""


class Host:
    """What a test sees of ComfyUI: progress, and how often its models were unloaded; and what it sets."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.shown: list[tuple[int, int]] = []
        self.previews: list[Image.Image] = []
        self.unloaded = 0
        self.folders: dict[str, Path] = {}
        self.interrupt_at: float | None = None  # a share of the progress
        self.interrupted = threading.Event()

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.interrupted.is_set():
            self.interrupted.clear()
            raise InterruptProcessingException

    def unload_all_models(self) -> None:
        self.unloaded += 1

    def get_filename_list(self, folder_name: str) -> list[str]:
        if folder_name not in self.folders:
            return []
        return sorted(path.name for path in self.folders[folder_name].iterdir())

    def get_full_path_or_raise(self, folder_name: str, filename: str) -> str:
        path = self.folders.get(folder_name, Path()) / filename
        if not path.is_file():
            raise FileNotFoundError(f"Model in folder '{folder_name}' with filename '{filename}' not found.")
        return str(path)

    def progress(self, value: int, total: int, preview: Any) -> None:
        """As the hook that ComfyUI's main.py sets."""
        if self.interrupt_at is not None and value >= self.interrupt_at * total > 0:
            self.interrupt_at = None
            self.interrupted.set()
        self.throw_exception_if_processing_interrupted()
        self.shown.append((value, total))
        if preview is not None:
            kind, picture, side = preview
            assert kind in ("JPEG", "PNG")
            assert picture.mode == "RGB"
            assert side is None or side > 0
            self.previews.append(picture)


def _progress_bar(host: Host) -> type:
    class ProgressBar:
        """As comfy.utils.ProgressBar."""

        def __init__(self, total: int, node_id: Any = None) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            if total is not None:
                self.total = total
            host.progress(min(value, self.total), self.total, preview)

    return ProgressBar


def modules(host: Host) -> dict[str, ModuleType]:
    """The modules of ComfyUI that the pack imports."""
    io = ModuleType("comfy_api.latest.io")
    names = ("Boolean", "Int", "Float", "String", "Combo", "Image", "Latent", "Conditioning", "Video")
    vars(io).update({name: custom(name.upper()) for name in names})
    vars(io).update(Custom=custom, Schema=Schema, NodeOutput=NodeOutput, ComfyNode=ComfyNode)
    preview_text = type("PreviewText", (), {"__init__": lambda self, value, **_: setattr(self, "value", value)})
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": _progress_bar(host)},
        "comfy.model_management": {
            "InterruptProcessingException": InterruptProcessingException,
            "throw_exception_if_processing_interrupted": host.throw_exception_if_processing_interrupted,
            "processing_interrupted": lambda: host.interrupted.is_set(),
            "unload_all_models": host.unload_all_models,
            "soft_empty_cache": lambda force=False: None,
        },
        "comfy_api": {},
        "comfy_api.latest": {
            "io": io,
            "ui": SimpleNamespace(PreviewText=preview_text),
            "InputImpl": SimpleNamespace(VideoFromFile=VideoFromFile),
            "ComfyExtension": type("ComfyExtension", (), {}),
        },
        "folder_paths": {
            "get_filename_list": host.get_filename_list, "get_full_path_or_raise": host.get_full_path_or_raise,
        },
    }  # fmt: skip
    found = {}
    for name, content in contents.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(content)
    found["comfy"].__dict__.update(utils=found["comfy.utils"], model_management=found["comfy.model_management"])
    found["comfy_api"].__dict__.update(latest=found["comfy_api.latest"])
    return found


def load_pack(name: str, folder: Path = PACK) -> ModuleType:
    """Import the pack from its folder under any name, as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

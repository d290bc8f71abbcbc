"""Nodes that have a wanduet server make the video. They need no engine, and no GPU, in ComfyUI's process."""

import base64
import hashlib
import io as files
import json
import os
import uuid
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from comfy_api.latest import InputImpl, io

from .client import Client, Server, ServerError, Video, follow
from .host import InterruptProcessingException, Progress, check_interrupt
from .inputs import CATEGORY, ServerType, loras_input, sampling_inputs, seed_input, settings, size_inputs
from .pictures import decode_file

LOCAL = "http://127.0.0.1:8000"


def own_server() -> Server:
    """Return the server that the environment of ComfyUI names."""
    return Server(os.environ.get("WANDUET_SERVER") or LOCAL, os.environ.get("WANDUET_API_KEY", ""))


class WanduetServer(io.ComfyNode):
    """Names a server and asks for its model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetServer",
            display_name="wanduet: server",
            category=CATEGORY,
            description="A running `wanduet serve`.",
            inputs=[
                io.String.Input("address", default=LOCAL, tooltip="Empty: that of the environment, WANDUET_SERVER."),
                io.String.Input(
                    "key", default="",
                    tooltip="It is saved in the workflow and in the files that ComfyUI saves. Leave it empty, and set "
                    "WANDUET_API_KEY where ComfyUI runs: that key is sent to the address of WANDUET_SERVER alone.",
                ),
            ],
            outputs=[ServerType.Output(display_name="server"), io.String.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(cls, address: str, key: str) -> io.NodeOutput:
        """See ComfyUI. Raises ServerError."""
        own = own_server()
        given = address.strip() or own.address
        # A workflow from elsewhere may name any address: it does not get the key of the environment.
        is_own = Client(Server(given)).address == Client(own).address
        server = Server(given, key.strip() or (own.key if is_own else ""))
        return io.NodeOutput(server, Client(server).model())


class WanduetServerVideo(io.ComfyNode):
    """Has a server make a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        return io.Schema(
            node_id="WanduetServerVideo",
            display_name="wanduet: video from a server",
            category=CATEGORY,
            description="Has a wanduet server make a video, and fetches it.",
            inputs=[
                ServerType.Input("server"),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True),
                io.String.Input("negative", multiline=True, default="", tooltip="Empty: the model's own."),
                *size_inputs(),
                *sampling_inputs(),
                seed_input(),
                io.Int.Input("fps", default=0, min=0, max=120, tooltip="Frames per second. 0: the model's own."),
                io.Boolean.Input(
                    "take_up", default=True,
                    tooltip="Take up a video that the server has, or makes, with the same settings; off: a new one each time.",
                ),
                loras_input(),
            ],
            outputs=[io.Video.Output(display_name="video"), io.Image.Output(display_name="images")],
        )  # fmt: skip

    @classmethod
    def execute(cls, server: Server, take_up: bool, loras: Any = None, **values: Any) -> io.NodeOutput:
        """See ComfyUI. Raises ServerError, InterruptProcessingException."""
        client = Client(server)
        body = body_of(values, loras)
        key = job_key(client.model(), body) if take_up else f"comfyui-{uuid.uuid4().hex}"
        content = make_video(client, body, key)
        return io.NodeOutput(InputImpl.VideoFromFile(files.BytesIO(content)), decode_file(content))


def body_of(values: dict[str, Any], loras: Any) -> dict[str, Any]:
    """Return the body of a submission."""
    negative = {"negative_prompt": values["negative"]}
    body = settings(**{name: value for name, value in values.items() if name != "negative"}, **negative)
    if loras:
        # The server takes names of its own folder, whatever the folder is here.
        body["loras"] = [
            {name: lora[name] for name in ("strength", "start", "end")} | {"name": _file_name(lora["name"])}
            for lora in loras
        ]
    return body


def job_key(model: str, body: dict[str, Any]) -> str:
    """Return the Idempotency-Key of a model and a body."""
    return "comfyui-" + hashlib.sha256(json.dumps([model, body], sort_keys=True).encode()).hexdigest()


def make_video(client: Client, body: dict[str, Any], key: str) -> bytes:
    """Return the file of a video; take up the one that has the same key.

    One that failed or was cancelled is deleted first, as it keeps its key. An interrupt cancels the video on the server;
    a lost connection does not.

    Raises ServerError, InterruptProcessingException.
    """
    bar = Progress()

    def show(video: Video, image: str | None) -> None:
        if image is None:
            bar.show(video["progress"], 100)
        else:
            bar.preview(base64.b64decode(image.partition(",")[2]))

    video = client.create(body, key)
    if video["status"] == "failed":
        client.delete(video["id"])
        video = client.create(body, key)
    try:
        video = follow(client, video, show, check_interrupt)
    except InterruptProcessingException:
        with suppress(ServerError):  # it is interrupted here in any case
            client.cancel(video["id"])
        raise
    if video["status"] == "failed":
        raise ServerError(video["error"]["message"])
    return client.content(video["id"])


def _file_name(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


SERVER_NODES: list[type[io.ComfyNode]] = [WanduetServer, WanduetServerVideo]

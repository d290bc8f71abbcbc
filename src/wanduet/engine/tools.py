"""Tools besides a whole job: decode saved latents, encode a prompt, inspect files, check the machine."""

import importlib.util
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from wanduet.config import EngineConfig, format_bytes
from wanduet.engine import generate
from wanduet.engine.group import EngineModels
from wanduet.engine.job import Job, JobResult, OutputOptions
from wanduet.engine.record import is_same_model
from wanduet.errors import InvalidRequestError, OutputError, WanduetError
from wanduet.family.registry import RANDOM_SPECS
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import with_speed
from wanduet.kernels.attention.backends import BACKENDS, available_backends
from wanduet.kernels.attention.choose import measured
from wanduet.kernels.select import TRITON, VAE_TRITON, has_triton
from wanduet.kernels.triton_probe import Probe, probe_triton
from wanduet.kernels.verdicts import IN_A_JOB, plain_operations, read_verdicts
from wanduet.media.codecs import CONTAINERS
from wanduet.media.embeddings import PromptEmbeds, contains_embeddings, load_embeddings, save_embeddings
from wanduet.media.files import UnreadableFileError, check_writable
from wanduet.media.latents import load_latents
from wanduet.media.provenance import versions
from wanduet.media.read import probe, read_metadata
from wanduet.meta.prices import all_prices, in_words
from wanduet.planning.hardware import Hardware, detect
from wanduet.planning.planner import make_plan
from wanduet.planning.text import plan_text
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime.text_host import CachedPromptEncoder, check_shapes
from wanduet.untrusted import cut, printable
from wanduet.weights.describe import describe_weights
from wanduet.weights.hub import local_model, open_model, unverified_files, verify_manifest
from wanduet.weights.manifest import Progress

# Triton's release by PyTorch's, for PyTorch's wheels for Windows, whose metadata do not require it.
TRITON_OF_TORCH = {"2.8": "3.4", "2.9": "3.5", "2.11": "3.6", "2.13": "3.7"}
FLASH4_MAJORS = (9, 10)  # major compute capabilities of data centre GPUs: Hopper and Blackwell
_INSPECTED = (
    "What can be looked into: videos, and latents and prompt embeddings that wanduet wrote (.safetensors); files of "
    "weights (.safetensors, .gguf, .pth)."
)
FILE_SUFFIXES = (".safetensors", *CONTAINERS)


class Advice(str):
    """What to do, for the item of the command line's checklist that `about` names."""

    __slots__ = ("about",)
    about: str

    def __new__(cls, about: str, text: str) -> Self:
        """Return the text with what it is about."""
        made = super().__new__(cls, text)
        made.about = about
        return made


def decode_latents(config: EngineConfig, path: Path, output: OutputOptions) -> JobResult:
    """Decode a latents file and write the video. Raises UnreadableFileError, OutputError, and errors of the decode."""
    latents, about = load_latents(path)
    models = EngineModels(config)
    try:
        request = _request_of(about, models.spec) if about else _request_for(latents, models.spec)
    except InvalidRequestError as error:
        raise UnreadableFileError(f"{path} cannot have been made as it says: {error.message}") from error
    expected = models.spec.latent_shape(request.generated_height, request.generated_width, request.num_frames)
    if tuple(latents.shape) != expected:
        raise UnreadableFileError(f"{path}: latents {list(latents.shape)} do not fit their request {list(expected)}.")
    check_writable(output.path, generate.bytes_on_disk(request, models.spec))
    plan = make_plan(request, models.memory, config, detect())
    job = Job(request.model_copy(update={"num_videos_per_prompt": 1}), plan, output)
    job.videos[0].reuse_latents(about)
    if (made_by := about.get("model")) is not None and not is_same_model(made_by, models.about):
        job.warnings.append(
            f"The latents were made by the model {printable(cut(made_by.get('name')))}. {models.about['name']}, which decodes "
            "them, has other weights: where the VAEs differ, the picture is wrong."
        )
    models.peaks.begin(job.id)
    try:
        video = generate.decode_video(models, job.videos[0], latents)
        job.add_time("total_s", time.perf_counter() - job.created)
        peaks = models.peaks.end(job.id, job.rank_peaks)
        return JobResult((video,), job.timings, peaks, tuple(job.warnings))
    finally:
        models.unload()  # also ends a group of ranks


def _request_of(about: dict[str, Any], spec: ModelSpec) -> ResolvedRequest:
    fields = about.get("request")
    if not isinstance(fields, dict):
        raise UnreadableFileError("The latents do not say which request they belong to.")
    known = {k: v for k, v in fields.items() if k in GenerationRequest.model_fields}
    known["seed"] = about.get("seed", known.get("seed"))
    return GenerationRequest.parse(**with_speed(known, about.get("speed"))).resolve(spec)


def _request_for(latents: Tensor, spec: ModelSpec) -> ResolvedRequest:
    """Return a request of the latents' size and length, for a file without metadata."""
    _, frames, rows, columns = latents.shape
    stride = spec.vae.spatial_stride
    return GenerationRequest.parse(
        prompt="-", height=rows * stride, width=columns * stride,
        num_frames=(frames - 1) * spec.vae.temporal_stride + 1, seed=0,
    ).resolve(spec)  # fmt: skip


def encode_to_file(config: EngineConfig, prompt: str, path: Path) -> PromptEmbeds:
    """Encode a prompt, write its embeddings to a file and return them."""
    check_writable(path)
    models = EngineModels(config)
    request = GenerationRequest.parse(prompt=prompt)
    embeds = models.text(plan_text(models.spec, config, detect())).encode([request.prompt])[0]
    save_embeddings(path, embeds)
    return embeds


def inspect(config: EngineConfig, target: str) -> dict[str, Any]:
    """Describe a file that wanduet wrote (latents, embeddings, video), a file of weights, or a prompt's cached
    embeddings.

    `target`: a path or a prompt. Raises UnreadableFileError.
    """
    path = Path(target)
    try:
        is_file = bool(target) and path.exists()
    except (OSError, ValueError):  # a prompt longer than any file name
        is_file = False
    if not is_file:
        if path.suffix.lower() in FILE_SUFFIXES and not any(c.isspace() for c in path.name):
            raise UnreadableFileError(f"There is no file {target!r}.")  # rather than treat it as a prompt
        return _inspect_prompt(config, target)
    try:
        return _inspect_file(path)
    except UnreadableFileError as error:
        error.hint = error.hint or _INSPECTED
        raise


def _inspect_file(path: Path) -> dict[str, Any]:
    if (weights := describe_weights(path)) is not None:
        return weights
    if path.suffix.lower() != ".safetensors":
        return {"kind": "video", "path": str(path), **probe(path), "made_by": _made_by(path)}
    if contains_embeddings(path):
        return _inspect_embeddings(load_embeddings(path), path)
    latents, about = load_latents(path)
    channels = latents.float().flatten(1)
    return {
        "kind": "latents",
        "path": str(path),
        "shape": list(latents.shape),
        "dtype": str(latents.dtype).removeprefix("torch."),
        "mean": float(channels.mean()),
        "std": float(channels.std()),
        "min": float(channels.min()),
        "max": float(channels.max()),
        "channel_means": [round(v, 4) for v in channels.mean(1).tolist()],
        "channel_stds": [round(v, 4) for v in channels.std(1).tolist()],
        "made_by": about,
    }


def _made_by(path: Path) -> dict[str, Any] | None:
    try:
        return read_metadata(path)
    except UnreadableFileError:
        return None


def _inspect_prompt(config: EngineConfig, prompt: str) -> dict[str, Any]:
    if config.model not in RANDOM_SPECS:
        open_model(
            config.model, config.revision, fetch=False, files=config.files
        )  # do not download gigabytes to inspect a prompt
    models = EngineModels(config)
    GenerationRequest.parse(prompt=prompt)
    encoder = models.text(plan_text(models.spec, config))
    path = encoder.path_of(prompt) if isinstance(encoder, CachedPromptEncoder) else None
    if path is None or not path.exists():
        raise UnreadableFileError(
            f"There is no file {prompt!r}, and no embeddings of such a prompt in the cache.",
            hint="Files: latents, embeddings (.safetensors), videos. Prompts: as they were generated with --model.",
        )
    return _inspect_embeddings(load_embeddings(path), path)


def _inspect_embeddings(prompt: PromptEmbeds, path: Path) -> dict[str, Any]:
    norms = prompt.embeds.norm(dim=1)
    return {
        "kind": "embeddings",
        "path": str(path),
        "text": prompt.text,
        "cut": prompt.cut,
        "shape": list(prompt.embeds.shape),
        "token_norm_min": float(norms.min()),
        "token_norm_max": float(norms.max()),
        "mean": float(prompt.embeds.mean()),
        "std": float(prompt.embeds.std()),
        "encoder": prompt.encoder,
        "dtype": prompt.dtype,
    }


def doctor(config: EngineConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Report this machine's hardware and software, problems, and advice. `progress` is called while weights are
    hashed."""
    hardware = detect()
    folder = config.data_folder
    read_verdicts(folder / "measurements")
    problems: list[str] = []
    data_folder = {"path": str(folder), "free_bytes": _free_bytes(folder)}
    try:
        check_writable(folder / "doctor")
    except OutputError as error:
        advice = f"{error.message} Set WANDUET_DATA_DIR to a folder that can be written."
        problems.append(Advice("data folder", advice))
    probe = probe_triton() if hardware.gpus else Probe(tried=False)
    measured_by = {d.name: _attention(torch.device(d.name), folder / "measurements") for d in hardware.gpus}
    return {
        "versions": versions(),
        "cpu": {"model": hardware.host, "count": hardware.cpu_count},
        "memory": {"total_bytes": hardware.host_total_bytes, "free_bytes": hardware.host_free_bytes},
        "gpus": [
            {
                "name": d.name,
                "model": d.model,
                "total_bytes": d.total_bytes,
                "free_bytes": d.free_bytes,
                "bfloat16": d.has_bfloat16,
                "attention": list(available_backends(torch.device(d.name))),
                "attention_measured": measured_by[d.name],
            }
            for d in hardware.gpus
        ],
        "links": _links(hardware),
        "triton": has_triton(),
        "triton_problem": probe.problem,
        "triton_probe": _triton_result(probe),
        "plain_kernels": _plain_kernels(hardware),
        "data_folder": data_folder,
        "prices": _prices(folder / "measurements"),
        "model": _model(config, progress),
        "advice": problems + _advice(hardware, probe) + _not_used(measured_by),
    }


def _prices(folder: Path) -> list[dict[str, Any]]:
    """Return what `wanduet price` has measured on this machine with the installed versions, in words."""
    return [
        {
            "model": f"{prices.about.get('name')} on {prices.about.get('card')}",
            "settings": prices.about.get("request"),
            "measured_with": prices.job,
            "costs": {_in_words(settings): in_words(price) for settings, price in prices.costs()},
        }
        for prices in all_prices(folder)
    ]


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "exact"


def _triton_result(probe: Probe) -> str:
    """Describe the result of the test whether Triton can build its driver module."""
    if not probe.tried:
        return f"Not tried: {probe.problem or 'no GPU is seen'}."
    return f"{probe.problem}." if probe.problem else "Triton works: its driver module was built, now or before."


def _attention(device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Return the measurements of each back end, fastest first, by dtype and shape. Errors are relative, against
    float32."""
    return [
        {
            "dtype": dtype,
            "queries x keys x heads x channels": shape,
            "milliseconds": {row.name: row.milliseconds for row in table if row.usable},
            "error": {row.name: row.error for row in table if row.usable},
            "dropped": {row.name: row.problem for row in table if not row.usable},
        }
        for (dtype, shape), table in measured(device, folder).items()
    ]


def _not_used(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a sentence for each installed attention back end that failed, by device."""
    ours = {backend.name for backend in BACKENDS if backend.package is None}  # PyTorch's: not for all devices
    failed = {
        (device, name): problem
        for device, rows in tables.items()
        for row in rows
        for name, problem in row["dropped"].items()
        if name not in ours
    }
    return [
        Advice(
            "attention",
            f"Attention back end {name} is not used on {device}: {problem}. It is tried again a day after it failed, or "
            "when the driver or what is installed has changed.",
        )
        for (device, name), problem in failed.items()
    ]


def _plain_kernels(hardware: Hardware) -> dict[str, list[str]]:
    """Return, by device, the operations whose fused kernels failed there."""
    found = {}
    for gpu in hardware.gpus:
        device = torch.device(gpu.name)
        names = [name for what in (TRITON, VAE_TRITON, IN_A_JOB) for name in plain_operations(what, device) or ()]
        if names:
            found[gpu.name] = names
    return found


def _advice(hardware: Hardware, probe: Probe) -> list[str]:
    found: list[str] = []
    gpus = hardware.gpus
    if not gpus and torch.version.cuda is None:
        advice = "PyTorch was installed without CUDA: reinstall it from pytorch.org if this machine has an NVIDIA GPU."
        found.append(Advice("GPU", advice))
    elif not gpus:
        found.append(Advice("GPU", "No GPU is seen: check the driver with nvidia-smi."))
    if probe.problem is not None:
        hint = probe.hint if probe.tried else _triton_hint()
        advice = f"{probe.problem}: plain kernels run instead, about a fifth slower. {hint}".rstrip()
        found.append(Advice("kernels", advice))
    if any(d.capability[0] in FLASH4_MAJORS for d in gpus) and importlib.util.find_spec("flash_attn") is None:
        found.append(
            Advice(
                "attention", "This GPU is served best by flash-attn-4: pip install -e '.[hopper]' in wanduet's folder"
            )
        )
    if hardware.host_free_bytes < 6 * 2**30:
        free = format_bytes(hardware.host_free_bytes)
        found.append(Advice("memory", f"Only {free} of host memory are free; the text encoder needs 3 GiB."))
    return found


def _triton_hint() -> str:
    """Return the command that installs the Triton release required by this PyTorch's metadata."""
    package = "triton-windows" if sys.platform == "win32" else "triton"
    pinned = re.search(r"^triton\W*==\W*(\d+\.\d+)", "\n".join(requires("torch") or ()), re.MULTILINE)
    release = pinned[1] if pinned else TRITON_OF_TORCH.get(".".join(torch.__version__.split(".")[:2]))
    return f'pip install "{package}=={release}.*"' if release else f"pip install {package}"


def _links(hardware: Hardware) -> list[str]:
    """Return the GPU rows of `nvidia-smi topo -m`: how the GPUs are connected."""
    if len(hardware.gpus) < 2 or shutil.which("nvidia-smi") is None:
        return []
    try:
        text = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.replace("\t", " ") for line in text.splitlines() if line.startswith("GPU")]


def _model(config: EngineConfig, progress: Progress | None) -> dict[str, Any]:
    """Check whether the model is downloaded and complete: configs, headers, hashes."""
    if config.model in RANDOM_SPECS:
        return {"name": config.model, "found": True}
    found: dict[str, Any] = {"name": config.model, "found": False}
    try:
        folder = local_model(config.model, files=config.files) or open_model(config.model, config.revision, fetch=False)
        found |= {"found": True, "path": str(folder.path), "revision": folder.revision, "whole": False}
        folder.check_complete()
        folder.spec  # noqa: B018 - reads the configs
        check_shapes(folder)
        verify_manifest(folder, config.data_folder / "verified.json", (), progress)
    except WanduetError as error:
        return found | {"problem": error.message, "hint": error.hint}
    files = {name: describe_weights(path) for name, path in folder.parts.items() if path.is_file()}
    return found | {"whole": True, "verified": not unverified_files(folder)} | ({"files": files} if files else {})


def _free_bytes(folder: Path) -> int | None:
    try:
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free
    except OSError:
        return None

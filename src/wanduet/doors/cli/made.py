"""The commands on files that the engine made: `decode` latents, `verify` a video."""

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from wanduet.config import DType, EngineConfig, TextDType, Weights, format_seconds
from wanduet.doors.cli.commands import announce, rounded
from wanduet.doors.cli.options import EngineFlags
from wanduet.doors.cli.outputs import free_output, take_output
from wanduet.doors.cli.places import Place
from wanduet.doors.cli.progress import follow, stoppable_engine
from wanduet.engine import tools
from wanduet.engine.job import OutputOptions
from wanduet.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    WanduetError,
)
from wanduet.family.registry import RANDOM_NAMES, RANDOM_SPECS
from wanduet.kernels.attention.backends import BACKENDS
from wanduet.loras import BUNDLED_LORAS
from wanduet.media.files import UnreadableFileError
from wanduet.media.input_video import read_source
from wanduet.media.latents import load_latents
from wanduet.media.provenance import versions
from wanduet.media.read import frame_hashes, probe, read_metadata
from wanduet.request import INPUT_HASH, GenerationRequest
from wanduet.untrusted import cut, printable
from wanduet.weights.adapters.files import open_adapter
from wanduet.weights.hub import open_model
from wanduet.weights.names import BUNDLED


@dataclass(frozen=True, slots=True)
class Inputs:
    """Files that a video was made from, of which its metadata have only hashes: a video, and LoRAs or folders of them."""

    video: Path | None = None
    loras: Sequence[Path] = ()


def run_decode(latents: Path, flags: EngineFlags, output: Place, codec: str, quality: int | None) -> dict[str, Any]:
    """Decode saved latents to a video."""
    about = load_latents(latents)[1]
    config = _config_of(latents, flags, about)
    options = OutputOptions(output.path, codec, quality, save_latents=True)
    if output.is_folder:
        prompt = str(_part(about, "request").get("prompt") or latents.stem)
        options, names = free_output(options, prompt, over_latents=True)
    else:
        names = take_output(options, 1)
    with names:
        result = tools.decode_latents(config, latents, options)
    video = result.videos[0]
    return {
        "output": output.shown(video.path),
        "seed": video.seed,
        "num_frames": video.num_frames,
        "timings": rounded(result.timings),
        "peak_memory_bytes": result.peak_memory_bytes,
        "warnings": list(result.warnings),
    }


def run_verify(video: Path, flags: EngineFlags, max_steps: int, inputs: Inputs | None = None) -> dict[str, Any]:
    """Make a video again and compare frame hashes. `inputs`: the files that it was made from.

    Raises UnreadableFileError, also if the video's metadata claims more than `max_steps` steps: size and length can be
    checked against the file, steps cannot.
    """
    about = read_metadata(video)
    if "denoised_by" in _part(about, "engine"):
        raise UnreadableFileError(
            f"{video} was decoded from latents that another model or program made, so it cannot be made again."
        )
    (request, quality), facts = _request_of(video, about), probe(video)
    inputs = inputs or Inputs()
    request = _with_loras(video, _with_input(video, request, inputs.video), inputs.loras)
    for side in ("width", "height"):  # before spending hours on an untrusted file's claims
        if getattr(request, side) not in (None, facts[side]):
            raise UnreadableFileError(
                f"{video} was not made as it says, or was edited: its {side} is {facts[side]}, not {getattr(request, side)}."
            )
    if (steps := request.num_inference_steps or 0) > max_steps:
        raise UnreadableFileError(
            f"{video} says that it was made in {steps} steps, more than the {max_steps} that are made again.",
            hint=f"If that is true and worth the time: --max-steps {steps}.",
        )
    expected = frame_hashes(video)
    if len(expected.frames) < (request.num_frames or 0):
        raise UnreadableFileError(
            f"{video} is cut off, or was edited: it has {len(expected.frames)} of {request.num_frames} frames."
        )
    with tempfile.TemporaryDirectory() as folder, stoppable_engine(_config_of(video, flags, about)) as engine:
        path = Path(folder) / f"again{video.suffix}"
        try:
            job = engine.submit(request, OutputOptions(path, str(facts["codec"]), quality))
        except InvalidRequestError as error:
            raise UnreadableFileError(f"{video} cannot have been made as it says: {error.message}") from error
        announce(job, engine.config)
        seconds = format_seconds(job.plan.prediction.seconds.total)
        print(f"Making it again takes about {seconds} here; Ctrl-C stops it.", file=sys.stderr)
        follow(job)
        job.result()
        again = frame_hashes(path)
        now = engine.models.about
    pairs = zip(expected.frames, again.frames, strict=False)
    different = [i for i, (a, b) in enumerate(pairs) if a != b]
    return {
        "video": str(video),
        "equal": expected.digest == again.digest,
        "num_frames": len(expected.frames),
        "different_frames": different,
        "model_equal": _part(about, "model").get("hash") == now["hash"],
        "versions_then": about.get("versions"),
        "versions_now": versions(),
    }


def _with_input(video: Path, request: GenerationRequest, given: Path | None) -> GenerationRequest:
    """Return the request with the file of its input video in place of its hash. Raises UnreadableFileError if it is not
    given or another one, InvalidRequestError if it is no video."""
    if request.input_video is None:
        if given is not None:
            raise UnreadableFileError(f"{video} was not made from a video, so --input-video has no use.")
        return request
    if given is None:
        raise UnreadableFileError(
            f"{video} was made from another video, of which it has only the hash.", hint="Name it with --input-video."
        )
    if f"{INPUT_HASH}{read_source(given).sha256}" != request.input_video:
        raise UnreadableFileError(f"{video} was made from another video than {given}: their hashes differ.")
    return request.model_copy(update={"input_video": str(given)})


def _with_loras(video: Path, request: GenerationRequest, given: Sequence[Path]) -> GenerationRequest:
    """Return the request with the paths of its LoRAs, which are found by their hashes. Raises UnreadableFileError if one is
    not among those given."""
    if not request.loras:
        if given:
            raise UnreadableFileError(f"{video} was made without LoRA, so --lora has no use.")
        return request
    found = _by_hash((*given, *BUNDLED_LORAS.values()), request)
    missing = [lora for lora in request.loras if lora.sha256 not in found]
    if missing:
        names = ", ".join(printable(cut(lora.file_name)) for lora in missing)
        raise UnreadableFileError(
            f"{video} was made with LoRA, and of {names} it has only the hash.",
            hint="Name the files, or a folder with them, with --lora.",
        )
    paths_of = {sha256: str(path.absolute()) for sha256, path in found.items()}
    loras = tuple(lora.model_copy(update={"name": paths_of[lora.sha256 or ""]}) for lora in request.loras)
    return request.model_copy(update={"loras": loras})


def _by_hash(given: Sequence[Path], request: GenerationRequest) -> dict[str, Path]:
    """Return the LoRAs among files and folders by their hashes, until all of a request are found."""
    paths = [file for path in given for file in (path, *(path.iterdir() if path.is_dir() else ()))]
    loras = request.loras or ()
    names, found = {lora.file_name for lora in loras}, dict[str, Path]()
    for path in sorted(paths, key=lambda path: path.name not in names):
        if all(lora.sha256 in found for lora in loras):
            break
        with suppress(WanduetError, OSError):  # another file of the folder
            found[open_adapter(path).sha256()] = path
    return found


def _request_of(video: Path, about: dict[str, Any]) -> tuple[GenerationRequest, int | None]:
    """Return the request and the quality in a video's metadata, which is untrusted. Raises UnreadableFileError."""
    fields = {k: v for k, v in _part(about, "request").items() if k in GenerationRequest.model_fields}
    seed, quality = about.get("seed"), _part(about, "output").get("quality")
    if type(seed) is not int or type(quality) not in (int, type(None)):
        raise UnreadableFileError(f"{video} does not say which seed and quality made it.")
    try:
        return GenerationRequest.parse(**(fields | {"seed": seed, "num_videos_per_prompt": 1})), quality
    except InvalidRequestError as error:
        raise UnreadableFileError(f"{video} does not say which request made it: {error.message}") from error


def _config_of(file: Path, flags: EngineFlags, about: Mapping[str, Any]) -> EngineConfig:
    """Return the flags' settings, with the model and the precision that made a file unless flags set them.

    The file is untrusted: it may only select a model that wanduet knows by name and that is downloaded already. Its
    metadata never causes a download or the reading of a folder. Raises UnreadableFileError, ModelNotFoundError.
    """
    config, unset = flags.config(), EngineFlags()
    engine, made_by = dict(_part(about, "engine")), _part(about, "model")
    engine["attention"] = engine.get("approximate_attention")  # the exact ones give the same up to rounding
    if not flags.names_model:
        config = replace(config, **_model_here(file, made_by, config))
    for name, allowed in (
        ("transformer_dtype", get_args(DType)),
        ("weights", get_args(Weights)),
        ("vae_dtype", get_args(DType)),
        ("tf32", (True, False)),
        ("text_encoder_dtype", get_args(TextDType)),
        ("attention", [backend.name for backend in BACKENDS if not backend.exact]),
    ):
        value = engine.get(name)
        if value is None or getattr(flags, name) != getattr(unset, name):
            continue
        if type(value) is not type(getattr(unset, name)) or value not in allowed:
            raise UnreadableFileError(
                f"{file} says that it was made with {name}={cut(repr(value))}, which does not exist.",
                hint=f"Say another with --{name.replace('_', '-')}.",
            )
        config = replace(config, **{name: value})
    return config


def _model_here(file: Path, made_by: Mapping[str, Any], config: EngineConfig) -> dict[str, Any]:
    """Return name and revision of the model that a file names, else of the default model, if known and downloaded.

    Raises ModelNotFoundError.
    """
    name, revision = made_by.get("name"), config.revision
    if name is None:
        try:
            open_model(config.model, revision, fetch=False, files=config.files)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"{file} does not say which model made it, and {config.model} is not here.",
                hint="Name the model with --model.",
            ) from error
        return {}
    if isinstance(name, str) and (name in BUNDLED or name in RANDOM_SPECS):
        return {"model": name}
    if not isinstance(name, str) or name not in RANDOM_NAMES:
        raise ModelNotFoundError(
            f"{file} says that it was made by the model {printable(cut(repr(name)))}, which only you can know.",
            hint="If you trust that model, name it with --model.",
        )
    recorded = made_by.get("revision")
    if revision is None and isinstance(recorded, str) and re.fullmatch(r"[0-9a-f]{40}", recorded):
        revision = recorded
    try:
        open_model(name, revision, fetch=False)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{file} says that it was made by {name}, which is not here.",
            hint=f"Let it be fetched: --model {name}{'' if revision is None else f' --revision {revision}'}",
        ) from error
    return {"model": name, "revision": revision}


def _part(about: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return one object of a file's untrusted metadata; an empty mapping if it has none."""
    value = about.get(name)
    return value if isinstance(value, Mapping) else {}

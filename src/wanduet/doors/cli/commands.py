"""The implementations of the commands: each returns what is printed. Imported only when a command runs."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanduet.config import EngineConfig, format_seconds
from wanduet.doors.cli.embeddings import use_embeddings
from wanduet.doors.cli.outputs import free_file, free_output, likely_output, take_output
from wanduet.doors.cli.places import Place
from wanduet.doors.cli.progress import follow, stoppable_engine
from wanduet.doors.cli.resume import seed_of_interrupted, take_begun, with_seed
from wanduet.engine import tools
from wanduet.engine.job import Job, JobResult, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.engine.record import measured_price
from wanduet.engine.roofline import where_it_went
from wanduet.errors import (
    CancelledError,
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    OutputError,
    WanduetError,
)
from wanduet.family.guidance import CFG
from wanduet.family.registry import RANDOM_NAMES, RANDOM_SPECS
from wanduet.family.sparsity import ALL
from wanduet.family.speeds import forecast
from wanduet.family.step_caches import OFF
from wanduet.kernels.attention.backends import BACKENDS, SDPA
from wanduet.media.names import Taken, take_given
from wanduet.media.provenance import versions
from wanduet.meta.prices import in_words
from wanduet.miniature.vocabulary import is_in_world
from wanduet.planning.explain import unused_settings
from wanduet.planning.hardware import detect, parse_hardware
from wanduet.planning.plan import Plan
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime.models import Models
from wanduet.schedule import joined
from wanduet.untrusted import printable
from wanduet.weights.hub import open_model
from wanduet.weights.names import BUNDLED

SHOWN = 500  # characters of a prompt
# Of a video's metadata, see `engine.record.approximations_made`.
APPROXIMATED = ("speed", "price", "forwards", "skipped_steps", "quantized_layers", "low_res")


@dataclass(frozen=True, slots=True)
class Ways:
    """How `generate` runs: whether it only plans, whether it shows where the time went, and files of embeddings."""

    dry_run: bool = False
    profile: bool = False
    embeddings: tuple[Path, ...] = ()


AS_USUAL = Ways()


def run_generate(
    request: GenerationRequest,
    config: EngineConfig,
    options: OutputOptions,
    output: Place,
    ways: Ways = AS_USUAL,
) -> dict[str, Any]:
    """Make a request's videos. `options.path` is a file, or a folder for a name derived from the prompt."""
    check_attention(config)
    is_named = not output.is_folder
    count = request.num_videos_per_prompt
    if ways.dry_run:
        if not is_named:
            options = likely_output(options, request.prompt, count)
        models = Models(without_fetching(config))
        resolved = models.resolve(request)
        plan = models.plan(resolved, config, detect())
        return {"output": output.shown(options.path), "settings": settings(resolved), "plan": plan.as_dict()}
    with Taken() as names, stoppable_engine(config) as engine:  # names stay locked until the engine has stopped
        use_embeddings(ways.embeddings, engine, [request])
        begun = take_begun(request, options, engine) if options.resume and not is_named else None
        if begun is not None and begun.complete:
            begun.names.release()
            begun = None
        if begun is not None:
            names.add(begun.names)
            options, request = begun.options, with_seed(request, begun.seed)
        elif is_named:
            names.add(take_output(options, count))
        else:
            options, found = free_output(options, request.prompt, count)
            names.add(found)
        if options.resume and begun is None and request.seed is None:
            request = with_seed(request, _interrupted_seed(request, options, engine))
        job = engine.submit(request, replace(options, taken=True))
        announce(job, config)
        _say_price(measured_price(engine.models, job.plan, job.request), job.request)
        follow(job)
        try:
            result = job.result()
        except WanduetError as error:
            say_how_to_go_on(job, error)
            raise
        done = report(job, result, output)
        if ways.profile:
            done |= _profile(job, engine, Path(f"{job.video_path(0)}.trace.json"))
    return done


def _interrupted_seed(request: GenerationRequest, options: OutputOptions, engine: Engine) -> int | None:
    seed = seed_of_interrupted(request, options, engine)
    if seed is None:
        print("No interrupted run of this request was found; a new one begins.", file=sys.stderr)
    return seed


def say_how_to_go_on(job: Job, error: WanduetError) -> None:
    """Add to a job's error which of its work is kept, and how to continue with it."""
    if isinstance(error, CancelledError) and job.timings["denoise_s"]:
        error.hint = "Go on where it stopped: the same command with --resume."
    elif isinstance(error, OutputError):
        kept = [
            path for index in range(job.request.num_videos_per_prompt) if (path := job.latents_path(index)).exists()
        ]
        if kept:
            again = "the same command with --resume only decodes"
            error.hint = f"{error.hint or ''} The latents are kept in {kept[0]}: {again}.".strip()


def _profile(job: Job, engine: Engine, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"profile": where_it_went(job, engine.models.memory)}
    try:
        engine.trace.save(path)
    except OutputError as error:  # the video is complete all the same
        print(error, file=sys.stderr)
        return found
    return found | {"trace": str(path)}


def run_plan(request: GenerationRequest, config: EngineConfig, hardware: str | None) -> dict[str, Any]:
    """Return the plan for a request, on this machine or on `hardware`, and the request's settings."""
    check_attention(config)
    models = Models(without_fetching(config))
    machine = detect()
    if hardware is not None:
        machine = parse_hardware(hardware, machine)
    resolved = models.resolve(request)
    plan = models.plan(resolved, config, machine)
    found = plan.as_dict() | {"hardware": {device.name: device.model for device in machine.gpus}}
    found["settings"] = settings(resolved)
    if resolved.approximates:
        price = None if hardware is not None else measured_price(models, plan, resolved)
        found |= {"price": found.get("price") if price is None else price}
    return found


def check_attention(config: EngineConfig) -> None:
    """Raise ConfigError for an attention back end that does not exist."""
    names = ["auto", SDPA.name, *(backend.name for backend in BACKENDS)]
    if config.attention not in names:
        known = ", ".join(dict.fromkeys(names))
        raise ConfigError(f"attention={config.attention!r} is no back end.", hint=f"Known: {known}.")


def without_fetching(config: EngineConfig) -> EngineConfig:
    """Return the config; a model that is not downloaded is replaced by one with the same published shapes.

    Raises ModelNotFoundError.
    """
    if config.model in RANDOM_SPECS:
        return config
    try:
        open_model(config.model, config.revision, fetch=False, files=config.files)
    except ModelNotFoundError:
        if config.model not in RANDOM_NAMES or config.files:
            raise
        print(f"{config.model} is not fetched yet; its published shapes are used.", file=sys.stderr)
        return replace(config, model=RANDOM_NAMES[config.model], revision=None)
    return config


def run_encode(prompt: str, config: EngineConfig, output: Place) -> dict[str, Any]:
    """Write a prompt's embeddings to a file."""
    path = output.path
    if output.is_folder:
        path, names = free_file(path, prompt, ".safetensors")
    elif path.suffix.lower() != ".safetensors":  # the suffix by which `inspect` recognises them
        raise InvalidRequestError("output", path.name, "a name that ends in .safetensors", f"{path.name}.safetensors")
    else:
        names = take_given([path])
    with names:
        embeds = tools.encode_to_file(config, prompt, path)
    return {"output": output.shown(path), "text": embeds.text, "tokens": embeds.embeds.shape[0], "cut": embeds.cut}


def report(job: Job, result: JobResult, output: Place) -> dict[str, Any]:
    """Return a finished job as `generate --json` prints it."""
    request = job.request
    made = [{name: v.provenance[name] for name in APPROXIMATED if name in v.provenance} for v in result.videos]
    videos = [
        {"output": output.shown(v.path), "seed": v.seed} | one for v, one in zip(result.videos, made, strict=True)
    ]
    return {
        "output": videos[0]["output"],
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames,
        "fps": request.fps,
        "videos": videos,
        "latents": [output.shown(v.latents_path) for v in result.videos if v.latents_path is not None],
        "settings": settings(request),
        "plan": job.plan.as_dict(),
        "timings": rounded(result.timings),
        "peak_memory_bytes": result.peak_memory_bytes,
        "predicted_peak_bytes": predicted(job.plan),
        "attention": job.attention,
        "rungs": job.notes,
        "warnings": list(result.warnings),
        "versions": versions(),
        **made[0],
    }


def predicted(plan: Plan) -> dict[str, int]:
    """Return predicted peak bytes by device; for a CPU, of the whole process."""
    peaks = {name: size for name, size in plan.prediction.peak_bytes.items() if name != "cpu"}
    return peaks | {"cpu": plan.prediction.host_bytes}


def settings(request: ResolvedRequest) -> dict[str, Any]:
    """Return all resolved fields."""
    return request.recorded()


def announce(job: Job, config: EngineConfig) -> None:
    """Print what is about to be made, on stderr."""
    r = job.request
    if config.model in BUNDLED and not r.loras and not is_in_world(r.prompt):
        job.warnings.append(
            "The miniature knows coloured shapes that move on a background of another colour, and a few scenes; this prompt "
            "goes beyond its world. Try: a red circle moving left on a black background."
        )
    job.warnings += [
        f"--{unused.setting.replace('_', '-')} is {unused.why}." for unused in unused_settings(job.plan, config)
    ]
    print(f"Prompt: {shown(r.prompt)}", file=sys.stderr)
    size = f"{r.width}x{r.height}, {r.num_frames} frame{'s' * (r.num_frames > 1)} ({r.seconds:.1f} s)"
    where = f"transformer on {job.plan.transformer.device}, VAE on {job.plan.vae.device}"
    steps = f"{r.num_inference_steps} step{'s' * (r.num_inference_steps > 1)} of {r.sampler}"
    if r.timesteps is not None:
        steps = f"{steps} at {joined(r.timesteps)}"
    if r.input_video is not None:
        steps = f"the last {r.num_denoising_steps} of {steps} (strength {r.strength:g}) from {shown(Path(r.input_video).name)}"
    if r.step_cache != OFF:
        steps += f" with step cache {r.step_cache}"
    if r.ends_guidance:
        steps += f", of which {len(r.guided_steps)} guided"
    if r.guidance_mode != CFG:
        steps += f", guidance {r.guidance_mode}"
    if r.sparse < ALL:
        steps += f", with {r.sparse:g} of the keys"  # from which step on, the plan says: it depends on the model
    if r.quantize != OFF:
        steps += f", products in {r.quantize}"
    if r.quantize_attention != OFF:
        steps += f", attention in {r.quantize_attention}"
    if r.low_res_first:
        steps += ", the first of them at a lower resolution"
    print(f"{size}, {steps}, seed {r.seed}; {where}", file=sys.stderr)
    for choice in job.plan.choices:
        if choice.setting == "loras":
            print(f"LoRA: {choice.why}", file=sys.stderr)
    if work := forecast(planned := job.plan.as_dict()):
        about = format_seconds(planned["predicted_seconds"]["total"])
        print(f"{work[0].upper()}{work[1:]}, about {about}", file=sys.stderr)


def _say_price(price: dict[str, Any] | None, request: ResolvedRequest) -> None:
    """Print what a request's approximations cost, on stderr; nothing for an exact one."""
    if price is not None:
        print(f"Measured here: {in_words(price)}", file=sys.stderr)
    elif request.approximates:
        print("What this costs is not measured here; `wanduet price` measures it.", file=sys.stderr)


def shown(prompt: str) -> str:
    """Return a prompt for the terminal: without control characters, cut to SHOWN characters."""
    text = printable(prompt)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text)} characters)"


def rounded(timings: dict[str, float]) -> dict[str, float]:
    """Return seconds by phase, to the millisecond."""
    return {name: round(seconds, 3) for name, seconds in timings.items()}

"""A video's metadata, and the checks whether files of an earlier run belong to a video (made with the same
settings)."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from wanduet.accelerate.low_res import LowRes
from wanduet.accelerate.skipped_steps import forwards_made
from wanduet.engine.job import Video
from wanduet.family.sparsity import ALL
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import price_dict
from wanduet.family.step_caches import OFF
from wanduet.kernels.attention.backends import BACKENDS
from wanduet.media.provenance import Making, make_provenance, versions
from wanduet.meta.prices import Subject, card_of, price_of
from wanduet.planning.hardware import device_model
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest
from wanduet.runtime.models import Models

# The metadata that determine a video's pixels. Devices, strategies and kernels are not among them: they differ in the
# last bits only, and an interrupted run may resume with others.
_DECISIVE = ("request", "seed", "model", "output")
_DECISIVE_SETTINGS = (
    "transformer_dtype",
    "text_encoder_dtype",
    "approximate_attention",
    "callback",
    "vae_dtype",
    "tf32",
    "weights",
)
# Settings that are recorded only if they are not the default, so that digests of earlier versions stay valid.
_IF_SET = ("weights",)
# The fields of a request that do not change its latents.
_NOT_IN_LATENTS = ("fps", "num_videos_per_prompt")


def video_digest(models: Models, video: Video) -> str:
    """Return the digest of everything that determines a video's latents; the key of its checkpoints and latents."""
    about = {
        "request": {k: v for k, v in _recorded(video.request).items() if k not in _NOT_IN_LATENTS},
        "index": video.index,
        "model": models.about,
        "text_encoder": None if models.folder is None else models.folder.text_fingerprint,
        "text_len": models.spec.text_len,
        **_settings_of_latents(models, video),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _recorded(request: ResolvedRequest) -> dict[str, Any]:
    """Return a request's fields without the names of its LoRAs: their hashes decide."""
    loras = {"loras": [lora.recorded() | {"name": None} for lora in request.loras]} if request.loras else {}
    return request.recorded() | loras


def _settings_of_latents(models: Models, video: Video) -> dict[str, Any]:
    """Return the engine's settings that change the latents by more than the last bits."""
    weights = video.plan.transformer.weights
    return {
        "transformer_dtype": video.plan.transformer.dtype,
        "text_encoder_dtype": video.plan.text.dtype,
        "approximate_attention": _approximate_attention(models, video.request),
        "callback": video.job.on_step is not None,
    } | ({} if weights == "auto" else {"weights": weights})


def _approximate_attention(models: Models, request: ResolvedRequest) -> str | None:
    """Return the approximate back end that the engine's settings name, unless the request names another one."""
    named = models.config.attention if request.quantize_attention == OFF else None
    return named if any(one.name == named and not one.exact for one in BACKENDS) else None


def provenance_of(models: Models, video: Video) -> dict[str, Any]:
    """Return the metadata of how a video is made; see `make_provenance`."""
    plan, output = video.plan, video.job.output
    of_latents = {"strategy": plan.strategy} | _settings_of_latents(models, video)
    engine = of_latents | {
        "vae_dtype": plan.vae.dtype,
        "tf32": plan.vae.tf32,
        "choices": [{"setting": c.setting, "value": c.value} for c in plan.choices],
    }
    engine |= {name: used for name in ("kernels", "vae_kernels") if (used := getattr(video.record, name)) is not None}
    if video.denoised is not None:  # the latents may come from another machine
        made = video.denoised.get("engine", {})
        engine = {name: value for name, value in engine.items() if name not in _IF_SET}
        engine |= {name: made[name] for name in (*of_latents, *_IF_SET) if name in made}
        engine["denoised_on"] = video.denoised.get("hardware", [])
        if not is_same_model(made_by := video.denoised.get("model", {}), models.about):
            engine["denoised_by"] = made_by
    making = Making(
        video.seed,
        models.about,
        engine,
        hardware=[d.name for d in plan.prediction.devices],
        attention=video.record.attention,
        timings={k: round(v, 3) for k, v in video.timings.items() if v},
        notes=video.record.notes,
        warnings=video.job.warnings,
    )
    made = make_provenance(video.request, making, versions(), datetime.now(UTC))
    made |= approximations_made(video, models.spec)
    if video.request.approximates:
        price = measured_price(models, plan, video.request)
        made |= {"price": made.get("price") if price is None else price}
        if not _is_sparse_as_asked(video):
            made["price"] = None
    return {"output": {"codec": output.codec, "quality": output.quality}} | made


def _is_sparse_as_asked(video: Video) -> bool:
    """Return False if a video was made with all keys in place of some, in some steps or in all, after a failure."""
    return (
        video.request.sparse == ALL
        or video.record.attention is None
        or "+" in video.record.attention.split(", then ")[-1]
    )


def subject_of(models: Models, plan: Plan, request: ResolvedRequest) -> Subject:
    """Return what the prices of a request belong to, on this machine with this plan."""
    card = card_of(device_model(name) for name in plan.group.ranks or (plan.transformer.device,))
    engine: dict[str, Any] = {"dtype": plan.transformer.dtype, "weights": plan.transformer.weights}
    if request.loras:
        engine["loras"] = tuple((lora.sha256, lora.strength, lora.start, lora.end) for lora in request.loras)
    return Subject.of(
        request, models.about, card, engine | {"approximate_attention": _approximate_attention(models, request)}
    )


def measured_price(models: Models, plan: Plan, request: ResolvedRequest) -> dict[str, Any] | None:
    """Return what the approximations of a request cost here, as `wanduet price` measured it; None if it did not, and for
    what it does not measure: an exact request, and a video that starts from another one."""
    if request.uses_input:
        return None
    subject, settings = subject_of(models, plan, request), request.approximations
    return price_of(models.checkpoint.measurements, subject, settings)


def approximations_made(video: Video, spec: ModelSpec) -> dict[str, Any]:
    """Return how many forwards made a video's latents, and which steps were skipped (indices in the schedule), if its
    request asks for an approximation; its speed and what that loses, if it asks for a speed; the number of layers whose
    products were in 8 bits, if it asks for such products; and the steps at a lower resolution, if there are any."""
    request, skipped = video.request, video.record.skipped_steps
    found: dict[str, Any] = {}
    if request.speed is not None:
        found |= {"speed": request.speed, "price": price_dict(request.price)}
    if request.approximates:
        found |= {"forwards": forwards_made(request, skipped), "skipped_steps": list(skipped)}
    if request.quantize != OFF:
        found["quantized_layers"] = video.record.quantized_layers
    if (low := LowRes.of(request, spec)) is not None:
        found["low_res"] = low.as_dict()
    return found


def is_same_model(made_by: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Return whether the metadata `made_by` name the same weights as `about`: by hash, or by name for random weights,
    which have no hash."""
    name = "name" if None in (made_by.get("hash"), about["hash"]) else "hash"
    return bool(made_by.get(name) == about[name])


def made_alike(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether the metadata of two videos mean the same pixels, up to rounding."""
    if any(about.get(name) != wanted[name] for name in _DECISIVE):
        return False
    settings = about.get("engine")
    if not isinstance(settings, Mapping):
        return False
    return all(settings.get(name) == wanted["engine"].get(name) for name in _DECISIVE_SETTINGS)

"""What the page says of models: of the one that the server runs, and of those that could be started in its place."""

from collections.abc import Iterator
from typing import Any

from wanduet.doors.page.words import length
from wanduet.family.distilled import FEW_STEP
from wanduet.family.registry import MEMBERS, with_few_steps
from wanduet.family.spec import ModelSpec
from wanduet.request import GenerationRequest
from wanduet.weights.forms import forms_of, size_of
from wanduet.weights.hub import open_model
from wanduet.weights.names import BUNDLED

_ALIKE = 0.8  # a share of the work that is not worth a word


def model_words(served: ModelSpec, model: str) -> dict[str, Any]:
    """Return what the `served` model makes by default, and the `others`: each with its hub id or name, what it costs, and
    the command that starts a server of it. `model`: the served model as its operator named it."""
    others = [
        {
            "name": name,
            "about": " · ".join(filter(None, (_makes(spec), _work(name, spec, model, served), _bytes(name)))),
            "command": f"wanduet ui --model {name}",
        }
        for name, spec in _known(model)
        if (spec.transformer, spec.defaults) != (served.transformer, served.defaults)
    ]
    return {"served": _makes(served), "others": others}


def _known(model: str) -> Iterator[tuple[str, ModelSpec]]:
    """Yield the models that run here, by hub id or name; few-step weights, of which a project may have several, once."""
    if model in BUNDLED:
        yield from ((name, open_model(name).spec) for name in BUNDLED)
    for member in MEMBERS:
        yield member.hub_id, member.spec
        size = member.spec.name.rpartition("-")[2]
        for row in FEW_STEP:
            name = next((name for name in row.repositories if size in name), None)
            if name is not None and model not in BUNDLED and not (row.needs or row.published):
                yield name, with_few_steps(member.spec, row)


def _makes(spec: ModelSpec) -> str:
    """Return the size, length and steps of a model's videos by default."""
    default = spec.defaults
    steps = f"{default.num_inference_steps} steps{' without guidance' * (default.guidance_scale <= 1)}"
    return f"{default.width} × {default.height} · {length(default.num_frames, default.fps)} · {steps}"


def _work(name: str, spec: ModelSpec, model: str, served: ModelSpec) -> str:
    """Return how much denoising costs beside the served model's, each by its defaults; "" if they are of no one kind."""
    from wanduet.planning.cost import denoise_flop

    if (name in BUNDLED) != (model in BUNDLED):
        return ""
    here, there = (denoise_flop(GenerationRequest.parse(prompt="x").resolve(one), one) for one in (served, spec))
    if _ALIKE < there / here < 1 / _ALIKE:
        return "as much work"
    return f"{there / here:.0f} times the work" if there > here else f"1/{here / there:.0f} of the work"


def _bytes(name: str) -> str:
    sizes = [size for form in forms_of(name) if (size := size_of(name, form))]
    return f"weights of {min(sizes) / 1e9:.1f} GB or more" if sizes else ""

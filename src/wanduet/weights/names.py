"""Error messages for names that are not models, with the name that the user probably meant."""

import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

from wanduet.config import format_bytes
from wanduet.errors import ModelNotFoundError
from wanduet.family.distilled import FAST_MINIATURE, MODULES, ORDINARY, SINGLE_FILE, FewStep, by_name
from wanduet.family.registry import RANDOM_NAMES, RANDOM_SPECS
from wanduet.weights.published import published_models

MINIATURE = "miniature"
MINIATURE_FAST = FAST_MINIATURE.name
BUNDLED = (MINIATURE, MINIATURE_FAST)  # they come with wanduet
HINT = "Give a folder, a hub id, or `miniature`."
SUFFIX = "-Diffusers"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".safetensors", ".safetensors.index.json", ".gguf", ".pth", ".pt", ".ckpt")
SHOWN = 200  # characters of a name that a message quotes
_URL = re.compile(
    r"(?:https?://[^/]+|huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:/(?:tree|blob|resolve)/.*|\.git|/|\?.*)?"
)
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
# The repository in the official layout: the hub id of the same weights in the Diffusers layout.
_OFFICIAL = {name.removesuffix(SUFFIX): name for name in RANDOM_NAMES}


def no_model(name: str, reason: str = "") -> ModelNotFoundError:
    """Return the error for a name that is neither a folder nor a hub id; its hint suggests the nearest valid name."""
    shown = f"{name[:SHOWN]}{'…' if len(name) > SHOWN else ''}"
    return ModelNotFoundError(f"There is no model {shown!r}{reason}.", hint=_hint(name))


def official_layout(model: str, num_bytes: int | None = None) -> ModelNotFoundError:
    """Return the error for a model in the layout of Wan's own repository.

    `num_bytes`: size of its Diffusers version.
    """
    other = diffusers_name(model)
    known = published_models().get(other)
    size = num_bytes or (known.num_bytes if known else None)
    return ModelNotFoundError(
        f"{model} is in the official layout, of which wanduet reads {' and '.join(_OFFICIAL)} only.",
        hint=f"The same weights in the layout it reads: --model {other}"
        + (f" ({format_bytes(size)} to fetch)." if size else "."),
    )


def check_few_step(model: str) -> None:
    """Raise ModelNotFoundError if a hub id or a file's name means few-step weights that wanduet does not run."""
    known = by_name(model)
    if known is None:
        return
    check_needs(model, known)
    if known.published == SINGLE_FILE:
        raise ModelNotFoundError(
            f"{model} ({known.name}, few steps) is {known.published}, not a whole model.",
            hint="Fetch that file, and give it beside a model: --transformer FILE.",
        )
    if known.published:
        raise ModelNotFoundError(
            f"{model} ({known.name}, few steps) is {known.published}, which wanduet does not fetch.",
            hint=f"Fetch the file, and give it as --transformer beside a model; or take a folder, such as {ORDINARY}.",
        )


def check_needs(shown: str, known: FewStep) -> None:
    """Raise ModelNotFoundError if few-step weights need what wanduet does not have. `shown`: their name in messages."""
    if known.needs:
        raise ModelNotFoundError(
            f"{shown} has few-step weights ({known.name}) that need {known.needs}, which wanduet does not have.",
            hint=f"Few-step weights that it runs: {ORDINARY}.",
        )


def check_module(shown: str, known: FewStep, names: Collection[str]) -> None:
    """Raise ModelNotFoundError if few-step weights lack the tensors of their self-attention's own module.

    `shown`: their name in messages; `names`: of the transformer's tensors, empty if they could not be read.
    """
    key = MODULES.get(known.attention)
    if names and key is not None and not any(key in name for name in names):
        raise ModelNotFoundError(
            f"{shown} is named as few-step weights ({known.name}) that are trained for sparse attention "
            f"({known.attention.upper()}), but its transformer has no {key.strip('.')}.",
            hint="Fetch these weights again, or rename them if they are others.",
        )


def diffusers_name(model: str) -> str:
    """Return the hub id under which the publisher has the same weights in the Diffusers layout."""
    return _OFFICIAL.get(model, f"{model}{SUFFIX}")


def is_official(model: str) -> bool:
    """Return True if a hub id is a known repository in the official layout."""
    return model in _OFFICIAL


def official_id(model: str) -> str | None:
    """Return the hub id of the same weights in the official layout, for an id in the Diffusers layout; None if it is not
    known."""
    return next((official for official, other in _OFFICIAL.items() if other == model), None)


def cache_folder_id(path: Path) -> str | None:
    """Return the hub id of a `models--owner--name` folder of the hub's cache, or of a folder inside one; else None."""
    for part in (path, *path.parents):
        if match := _CACHE_FOLDER.fullmatch(part.name):
            return "/".join(match.groups())
    return None


def _hint(name: str) -> str:
    if name.lower().endswith(_FILES):
        return "There is no such file: give its path from the current folder, or its whole path."
    if (match := _URL.fullmatch(name)) and not HUB_ID.fullmatch(name):
        return f"Give the hub id alone: --model {match.group(1)}"
    by_last_part = {known.split("/")[1].lower(): known for known in (*RANDOM_NAMES, *_OFFICIAL)}
    by_last_part |= {known: known for known in (*BUNDLED, *RANDOM_SPECS)}
    if near := get_close_matches(name.rpartition("/")[2].lower()[:SHOWN], by_last_part, 1, 0.75):
        meant = by_last_part[near[0]]
        return f"Did you mean --model {_OFFICIAL.get(meant, meant)}?"
    return HINT

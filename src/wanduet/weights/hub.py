"""Models from the hub: found in the cache, or fetched with resume, pinned to a revision and verified.

huggingface_hub's own settings hold: HF_HUB_OFFLINE, HF_ENDPOINT (a mirror), HF_HOME, HF_TOKEN.
"""

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.config import format_bytes
from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.weights.diffusers import COMPONENTS, ModelFolder, check_pipeline
from wanduet.weights.manifest import (
    SHA256_LENGTH,
    Notes,
    Progress,
    file_sha256,
    find_damaged,
    verify,
    write_manifest,
)
from wanduet.weights.names import HINT, HUB_ID, MINIATURE, diffusers_name, is_official, no_model, official_layout
from wanduet.weights.published import published_hashes, unverified_weights

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

log = logging.getLogger(__name__)

# Nothing that is not needed (a repository may hold single-file weights too), no pickles.
_NEEDED = (
    "*.json", "tokenizer/*.model", "tokenizer/*.txt", *(f"{component}/*.safetensors" for component in COMPONENTS),
)  # fmt: skip


def open_model(
    model: str, revision: str | None = None, *, fetch: bool = True, remember: Path | None = None
) -> ModelFolder:
    """A model by folder, hub id or `miniature`; fetched from the hub if it is not in the cache.

    `remember` is a file where verified files are noted, so that they are not hashed again when they are loaded.
    Raises ModelNotFoundError, or WeightsError for a file that is damaged.
    """
    local = local_model(model)
    if local is not None:
        local.check_complete()
        return local
    try:
        cached = _cached(model, revision)
    except (WeightsError, IncompleteModelError) as error:  # half a download is never used
        if not fetch or is_offline():
            raise
        log.warning("%s It is fetched again.", error.message)
        cached = None
    if cached is not None:
        if names := unverified_weights(cached.path):  # fetched by another program into a cache without links
            shown = f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]
            log.warning(
                "The cache of %s has no hashes of %s: damage would not be noticed. "
                "`wanduet download --model %s` checks it, and notes them.", model, shown, model,
            )  # fmt: skip
        return cached
    if not fetch:
        raise ModelNotFoundError(f"{model} is not in the cache.", hint=f"Fetch it: wanduet download --model {model}")
    return download(model, revision, remember).folder


def local_model(model: str) -> ModelFolder | None:
    """The model that a folder's path or `miniature` names; None for a hub id.

    Raises ModelNotFoundError for a folder that is no model. Its files are looked at by `ModelFolder.check_complete`.
    """
    if model == MINIATURE:
        return ModelFolder(Path(__file__).parent.parent / "miniature" / "model", MINIATURE)
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user's home, a NUL
        raise no_model(model, f" ({str(error)[:200]})") from error
    if is_folder:
        name = os.path.basename(os.path.abspath(path))  # a link keeps its own
        return ModelFolder(path.resolve(), name or "model")  # everybody sees this name, so it is no path
    if is_file:
        raise ModelNotFoundError(f"{model} is a file; a model is a folder in the Diffusers layout.", hint=HINT)
    if not HUB_ID.fullmatch(model) or path.is_absolute() or model.startswith("."):
        raise no_model(model)
    if is_official(model):
        raise official_layout(model)
    return None


class IncompleteModelError(ModelNotFoundError):
    """Some of a model's files are in the hub's cache, and some are missing."""


@dataclass(frozen=True, slots=True)
class Download:
    """A fetched model, and what was verified: files with a published hash, and their bytes."""

    folder: ModelFolder
    num_verified: int
    num_bytes: int


def download(
    model: str, revision: str | None = None, remember: Path | None = None, progress: Progress | None = None
) -> Download:
    """Fetch a model with huggingface_hub (resumed where it stopped) and check every file.

    A file that is not what was published is thrown away and fetched once more. With HF_HUB_OFFLINE the cached
    model is checked instead. `remember` is a file where good ones are noted; `progress` is called while files
    are hashed. Raises ModelNotFoundError if it cannot be fetched, WeightsError if a file is still not what was
    published.
    """
    notes = Notes(remember)
    info, path = _fetch(model, revision)
    if info is None:
        folder = _cached(model, revision)
        if folder is None:
            if is_official(model):
                raise official_layout(model)
            raise ModelNotFoundError(f"{model} is not in the cache, and HF_HUB_OFFLINE forbids fetching it.")
        hashes = published_hashes(folder.path)
        verify(folder.path, hashes, notes, progress)
        return Download(folder, len(hashes), _size(folder.path, hashes))
    hashes = _published(info)
    damaged, _ = find_damaged(path, hashes, notes, progress)
    if damaged:
        log.warning("Not what was published, fetched again: %s", ", ".join(damaged))
        _throw_away(path, damaged)
        _, path = _fetch(model, revision)
        damaged, _ = find_damaged(path, hashes, notes, progress)
        _throw_away(path, damaged)
    if damaged:
        raise WeightsError(
            f"{', '.join(damaged)} of {model} came damaged twice: the hash is not the one that was published.",
            hint="Is a proxy or a mirror (HF_ENDPOINT) in between? What was good is kept.",
        )
    if set(hashes) - set(
        published_hashes(path)
    ):  # a cache of copies, as on Windows without links: note the hashes there
        write_manifest(
            path, {name: h if len(h) == SHA256_LENGTH else file_sha256(path / name) for name, h in hashes.items()}
        )
    return Download(ModelFolder(path, model, info.sha), len(hashes), _size(path, hashes))


def verify_manifest(
    folder: ModelFolder, remember: Path | None, parts: tuple[str, ...] = (), progress: Progress | None = None
) -> int:
    """Check a folder against the hashes that it was published with; returns how many files were hashed.

    `parts` are the subfolders to look at, none for the whole model; `progress` is called while files are hashed.
    Raises WeightsError.
    """
    hashes = published_hashes(folder.path)
    wanted = {name: value for name, value in hashes.items() if not parts or name.split("/")[0] in parts}
    with folder.checking:
        return verify(folder.path, wanted, Notes(remember, folder.checked), progress)


def _fetch(model: str, revision: str | None) -> "tuple[ModelInfo | None, Path]":
    """What the hub says of a model, and its folder; no info in offline mode. Raises ModelNotFoundError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
        _check_listed(model, info)
        _check_listed_kind(model, info)
        _announce(model, info)
        # By the name that was asked for, not by the commit: the cache then knows the name without a network.
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(_NEEDED)))
        if path.name != info.sha:  # somebody published in between
            info = HfApi().model_info(model, revision=path.name, files_metadata=True)
        return info, path
    except ModelNotFoundError:
        raise
    except OfflineModeIsEnabled:
        return None, Path()
    except GatedRepoError as error:
        raise ModelNotFoundError(f"{model} is gated: accept its terms on the hub, then set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{model} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"The hub has no model {model!r} (or it is private).") from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"The hub refused {model}: {_first_line(error)}") from error
    except Exception as error:  # the HTTP client's own errors (no common base over its versions), a full disk
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ModelNotFoundError(
            f"There is no folder {model}, and it cannot be fetched from the hub: {_first_line(error)}",
            hint=("Free some space, or set HF_HOME to another disk. " if full else "Is there a network? ") + _AGAIN,
        ) from error


_AGAIN = (
    "Files that came whole are kept; run the same command again. `--model miniature` comes with wanduet and "
    "needs nothing fetched."
)


def _check_listed(model: str, info: "ModelInfo") -> None:
    """Refuse, from the hub's list of files alone, what is no model in the Diffusers layout. Raises ModelNotFoundError."""
    names = [sibling.rfilename for sibling in info.siblings or ()]
    lacking = [
        part
        for part in COMPONENTS
        if f"{part}/config.json" not in names or not any(fnmatch(name, f"{part}/*.safetensors") for name in names)
    ]
    if not lacking:
        return
    if any("/" not in name and name.endswith(".pth") for name in names):
        raise official_layout(model, _listed_bytes(diffusers_name(model)))
    raise ModelNotFoundError(
        f"{model} is no model in the Diffusers layout: it lacks {', '.join(f'{part}/' for part in lacking)}.",
        hint="Nothing was fetched. A repository that diffusers' WanPipeline can load is what is needed.",
    )


def _check_listed_kind(model: str, info: "ModelInfo") -> None:
    """Read the few bytes that say which pipeline it is before the gigabytes. Raises ModelNotFoundError."""
    from huggingface_hub import hf_hub_download

    if any(sibling.rfilename == "model_index.json" for sibling in info.siblings or ()):
        check_pipeline(Path(hf_hub_download(model, "model_index.json", revision=info.sha)), model)


def _listed_bytes(model: str) -> int | None:
    """What fetching a model would take, by the hub's list of its files; None where there is no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        siblings = HfApi().model_info(model, files_metadata=True).siblings or ()
    except (HfHubHTTPError, OSError):
        return None
    return sum(s.size or 0 for s in siblings if any(fnmatch(s.rfilename, pattern) for pattern in _NEEDED))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _announce(model: str, info: "ModelInfo") -> None:
    """Say how much will be fetched. Raises ModelNotFoundError where the disk has no room for it."""
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    sizes = {
        sibling.rfilename: sibling.size or 0
        for sibling in info.siblings or ()
        if any(fnmatch(sibling.rfilename, pattern) for pattern in _NEEDED)
    }
    missing = [name for name in sizes if not isinstance(try_to_load_from_cache(model, name, revision=info.sha), str)]
    begun = sum(
        p.stat().st_size for p in (cache / f"models--{model.replace('/', '--')}" / "blobs").glob("*.incomplete")
    )
    needed = sum(sizes[name] for name in missing) - begun
    if needed <= 0:
        return
    free = shutil.disk_usage(next(p for p in (cache, *cache.absolute().parents) if p.exists())).free
    if needed > free:
        raise ModelNotFoundError(
            f"{model} needs {format_bytes(needed)} more in {cache}, which has {format_bytes(free)} free.",
            hint="Free some space, or set HF_HOME to a folder on another disk.",
        )
    log.warning("%s is not here yet: fetching %s into %s, once.", model, format_bytes(needed), cache)


def _published(info: "ModelInfo") -> dict[str, str]:
    """Hash of every file that wanduet needs, as the hub tells them."""
    return {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs is not None else str(sibling.blob_id)
        for sibling in info.siblings or ()
        if any(fnmatch(sibling.rfilename, pattern) for pattern in _NEEDED)
        and (sibling.lfs is not None or sibling.blob_id is not None)
    }


def _throw_away(folder: Path, names: list[str]) -> None:
    """Remove files and the blobs that they are links to, so that the hub's client fetches them anew."""
    for name in names:
        path = folder / name
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.parent.name == "blobs":
            blob.unlink(missing_ok=True)


def _size(folder: Path, names: Mapping[str, str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def _cached(model: str, revision: str | None) -> ModelFolder | None:
    """The hub's cached copy, if it is whole; None if nothing of it is there.

    Raises IncompleteModelError that names what is missing, WeightsError for a file that is cut off.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=list(_NEEDED)))
    except LocalEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # an id that the hub's client refuses, a cache that cannot be read
        raise ModelNotFoundError(f"{model} cannot be looked up: {_first_line(error)}", hint=HINT) from error
    try:
        folder = ModelFolder(found, model, found.name)
        folder.check_complete()
        folder.spec  # noqa: B018 - reads the configs
    except ModelNotFoundError as error:
        raise IncompleteModelError(
            f"Not all of {model} is in the cache. {error.message}",
            hint=f"Fetch the rest: wanduet download --model {model}",
        ) from error
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

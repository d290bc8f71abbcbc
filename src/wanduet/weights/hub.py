"""Opens models from the hub: from its cache, or by a resumable download of one revision, with verification.

huggingface_hub's own settings apply: HF_HUB_OFFLINE, HF_ENDPOINT (a mirror), HF_HOME, HF_TOKEN.
"""

import errno
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.config import format_bytes
from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.weights.compose import compose
from wanduet.weights.diffusers import COMPONENTS, ModelFolder, check_pipeline, open_folder
from wanduet.weights.manifest import (
    SHA256_LENGTH,
    Notes,
    Progress,
    file_sha256,
    find_damaged,
    verify,
    write_manifest,
)
from wanduet.weights.names import (
    BUNDLED,
    HINT,
    HUB_ID,
    MINIATURE,
    check_few_step,
    diffusers_name,
    is_official,
    no_model,
    official_layout,
)
from wanduet.weights.published import published_hashes, unverified_weights

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

log = logging.getLogger(__name__)

# Only the needed files (a repository may also have single-file weights), and no pickles.
_NEEDED = (
    "*.json", "tokenizer/*.model", "tokenizer/*.txt", *(f"{component}/*.safetensors" for component in COMPONENTS),
)  # fmt: skip
# Of a repository in the official layout; its pickles are opened only as tensors.
_NEEDED_OFFICIAL = (
    "config.json", "diffusion_pytorch_model*.safetensors*", "*VAE*.pth", "models_t5_*.pth", "google/umt5-xxl/*",
)  # fmt: skip


def _needed(model: str) -> tuple[str, ...]:
    """Return patterns of the files to fetch of a repository."""
    return _NEEDED_OFFICIAL if is_official(model) else _NEEDED


def open_model(
    model: str,
    revision: str | None = None,
    *,
    fetch: bool = True,
    remember: Path | None = None,
    files: Mapping[str, Path] | None = None,
) -> ModelFolder:
    """Open a model by folder, file, hub id or a bundled one's name; with `fetch`, download it if it is not in the hub's
    cache.

    `remember`: a file that records verified files, so that they are not hashed again when they are loaded. `files`: see
    `local_model`. Raises ModelNotFoundError, or WeightsError for a damaged file.
    """
    local = local_model(model, revision, files)
    if local is not None:
        local.check_complete()
        return local
    try:
        cached = _cached(model, revision)
    except (WeightsError, IncompleteModelError) as error:  # an incomplete download is never used
        if not fetch or is_offline():
            raise
        log.warning("%s It is fetched again.", error.message)
        cached = None
    if cached is not None:
        if names := unverified_files(cached):  # another program filled a cache without links
            shown = f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]
            log.warning(
                "The cache of %s has no hashes of %s: damage would not be noticed. "
                "`wanduet download --model %s` checks it, and notes them.", model, shown, model,
            )  # fmt: skip
        return cached
    if not fetch:
        raise ModelNotFoundError(f"{model} is not in the cache.", hint=f"Fetch it: wanduet download --model {model}")
    return download(model, revision, remember).folder


def local_model(model: str, revision: str | None = None, files: Mapping[str, Path] | None = None) -> ModelFolder | None:
    """Return the model of a folder's or a file's path or of a bundled one's name; None for a hub id.

    `files`: paths by component, which take the place of the model's own. With them, or with a file as the model, what
    they lack comes from a model on this machine; nothing is fetched.

    Raises ModelNotFoundError for a folder that is not a model, WeightsError for a damaged file.
    `ModelFolder.check_complete` checks the files.
    """
    if files:
        return compose(model, files, lambda base: _local_copy(base, revision))
    if model in BUNDLED:
        return _bundled(model)
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # the name is too long, has an unknown `~user` or a NUL
        raise no_model(model, f" ({str(error)[:200]})") from error
    if is_folder:
        name = os.path.basename(os.path.abspath(path))  # the name of a link, not of its target
        return open_folder(path.resolve(), name or "model")  # users see this name, so it is not a path
    if is_file:
        return compose(model, {}, lambda base: _local_copy(base, revision))
    if not HUB_ID.fullmatch(model) or path.is_absolute() or model.startswith("."):
        raise no_model(model)
    check_few_step(model)
    return None


def _local_copy(model: str, revision: str | None) -> ModelFolder | None:
    """Return a model that is on this machine: a folder, a bundled one, or one in the hub's cache; else None."""
    return local_model(model) or _cached(model, revision)


def _bundled(model: str) -> ModelFolder:
    folder = Path(__file__).parent.parent / "miniature"
    whole = folder / "model"
    if model == MINIATURE:
        return ModelFolder(whole, model)
    shared = ("vae", "text_encoder", "tokenizer")
    return ModelFolder(folder / "fast", model, parts={name: whole / name for name in shared})


class IncompleteModelError(ModelNotFoundError):
    """Some of a model's files are missing from the hub's cache."""


@dataclass(frozen=True, slots=True)
class Download:
    """A downloaded model; the number of files verified by a published hash, and their bytes."""

    folder: ModelFolder
    num_verified: int
    num_bytes: int


def download(
    model: str, revision: str | None = None, remember: Path | None = None, progress: Progress | None = None
) -> Download:
    """Download a model with huggingface_hub (which resumes a partial download) and verify every file.

    A file whose hash differs from the published one is deleted and downloaded once more. With HF_HUB_OFFLINE, the
    cached model is verified instead. `remember`: a file that records verified files. `progress` is called during
    hashing. Raises ModelNotFoundError if the download fails, WeightsError if a file is still damaged.
    """
    check_few_step(model)
    notes = Notes(remember)
    info, path = _fetch(model, revision)
    if info is None:
        folder = _cached(model, revision)
        if folder is None:
            raise ModelNotFoundError(f"{model} is not in the cache, and HF_HUB_OFFLINE forbids fetching it.")
        hashes = published_hashes(folder.path)
        verify(folder.path, hashes, notes, progress)
        return Download(folder, len(hashes), _size(folder.path, hashes))
    hashes = _published(model, info)
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
    if set(hashes) - set(published_hashes(path)):  # a cache without links, as on Windows: write the hashes into it
        write_manifest(
            path, {name: h if len(h) == SHA256_LENGTH else file_sha256(path / name) for name, h in hashes.items()}
        )
    return Download(open_folder(path, model, info.sha), len(hashes), _size(path, hashes))


def verify_manifest(
    folder: ModelFolder, remember: Path | None, parts: tuple[str, ...] = (), progress: Progress | None = None
) -> int:
    """Verify a folder against its published hashes; return the number of files hashed in this call.

    `parts`: the subfolders to verify; empty for the whole model, with the parts that it shares with another. `progress`
    is called during hashing. Raises WeightsError.
    """
    wanted = {
        folder.path: _hashes_of(folder.path, [part for part in parts if part not in folder.parts] if parts else None)
    }
    for part, path in folder.parts.items():
        if not parts or part in parts:
            wanted.setdefault(path.parent, {}).update(_hashes_of(path.parent, [path.name]))
    with folder.checking:
        return sum(verify(path, hashes, Notes(remember, folder.checked), progress) for path, hashes in wanted.items())


def unverified_files(folder: ModelFolder) -> list[str]:
    """Return the names of a model's weight files without a known hash: damage to these cannot be detected."""
    found = unverified_weights(folder.path) if folder.path.is_dir() else []
    files = [path for path in folder.parts.values() if path.is_file()]
    return found + [path.name for path in files if path.name not in published_hashes(path.parent)]


def _hashes_of(folder: Path, parts: Collection[str] | None) -> dict[str, str]:
    """Return the published hashes of the files in some subfolders; None for all files."""
    hashes = published_hashes(folder)
    return {name: value for name, value in hashes.items() if parts is None or name.split("/")[0] in parts}


def _fetch(model: str, revision: str | None) -> "tuple[ModelInfo | None, Path]":
    """Download a model; return the hub's info (None in offline mode) and the folder. Raises ModelNotFoundError."""
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
        # By `revision`, not by commit, so that the cache can resolve that name without a network.
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(_needed(model))))
        if path.name != info.sha:  # a new commit was published in between
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
    except Exception as error:  # errors of the HTTP client (no base class common to all versions), a full disk
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
    """Raise ModelNotFoundError if the hub's list of files does not show a model in the Diffusers layout."""
    names = [sibling.rfilename for sibling in info.siblings or ()]
    if is_official(model):
        return
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
    """Check model_index.json before the download of the weights. Raises ModelNotFoundError for another pipeline."""
    from huggingface_hub import hf_hub_download

    if any(sibling.rfilename == "model_index.json" for sibling in info.siblings or ()):
        check_pipeline(Path(hf_hub_download(model, "model_index.json", revision=info.sha)), model)


def _listed_bytes(model: str) -> int | None:
    """Return the bytes to download for a model, from the hub's list of its files; None if the hub does not list it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        siblings = HfApi().model_info(model, files_metadata=True).siblings or ()
    except (HfHubHTTPError, OSError):
        return None
    return sum(s.size or 0 for s in siblings if any(fnmatch(s.rfilename, pattern) for pattern in _needed(model)))


def is_offline() -> bool:
    """Return True if HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _announce(model: str, info: "ModelInfo") -> None:
    """Log the size of the download. Raises ModelNotFoundError if the disk has too little space."""
    from huggingface_hub import constants, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    sizes = {
        sibling.rfilename: sibling.size or 0
        for sibling in info.siblings or ()
        if any(fnmatch(sibling.rfilename, pattern) for pattern in _needed(model))
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


def _published(model: str, info: "ModelInfo") -> dict[str, str]:
    """Return the hub's hash of every file that wanduet needs."""
    return {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs is not None else str(sibling.blob_id)
        for sibling in info.siblings or ()
        if any(fnmatch(sibling.rfilename, pattern) for pattern in _needed(model))
        and (sibling.lfs is not None or sibling.blob_id is not None)
    }


def _throw_away(folder: Path, names: list[str]) -> None:
    """Delete files and the blobs that they link to, so that the hub's client downloads them again."""
    for name in names:
        path = folder / name
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.parent.name == "blobs":
            blob.unlink(missing_ok=True)


def _size(folder: Path, names: Mapping[str, str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def _cached(model: str, revision: str | None) -> ModelFolder | None:
    """Return the copy in the hub's cache; None if the cache has none of its files.

    Raises IncompleteModelError, which names the missing files, or WeightsError for a truncated file.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(
            snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=list(_needed(model)))
        )
    except LocalEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # an id that the hub's client rejects, an unreadable cache
        raise ModelNotFoundError(f"{model} cannot be looked up: {_first_line(error)}", hint=HINT) from error
    try:
        folder = open_folder(found, model, found.name)
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

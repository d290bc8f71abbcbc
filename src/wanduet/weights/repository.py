"""Fetches a form of a model from the hub with huggingface_hub, which resumes a partial download."""

import errno
import logging
import shutil
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.config import format_bytes
from wanduet.errors import ModelNotFoundError
from wanduet.untrusted import first_line
from wanduet.weights.diffusers import COMPONENTS, PARTS, check_pipeline
from wanduet.weights.forms import Form
from wanduet.weights.names import diffusers_name, official_layout

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

log = logging.getLogger(__name__)

_AGAIN = (
    "Files that came whole are kept; run the same command again. `--model miniature` comes with wanduet and "
    "needs nothing fetched."
)


def fetch(form: Form, revision: str | None, parts: Collection[str] = PARTS) -> "tuple[ModelInfo | None, Path]":
    """Download components of a model; return the hub's info (None in offline mode) and the folder. Raises
    ModelNotFoundError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model = form.repository
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
        _check_listed(form, info, parts)
        _check_listed_kind(form, info)
        _announce(form, info, parts)
        # By `revision`, not by commit, so that the cache can resolve that name without a network.
        path = Path(snapshot_download(model, revision=revision, allow_patterns=form.patterns(parts)))
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
        raise ModelNotFoundError(f"The hub refused {model}: {first_line(error)}") from error
    except Exception as error:  # errors of the HTTP client (no base class common to all versions), a full disk
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ModelNotFoundError(
            f"There is no folder {model}, and it cannot be fetched from the hub: {first_line(error)}",
            hint=("Free some space, or set HF_HOME to another disk. " if full else "Is there a network? ") + _AGAIN,
        ) from error


def _check_listed(form: Form, info: "ModelInfo", parts: Collection[str]) -> None:
    """Raise ModelNotFoundError if the hub's list of files does not show a model in the form's layout."""
    model, names = form.repository, [sibling.rfilename for sibling in info.siblings or ()]
    if form.name == "bf16":
        return
    if form.single:
        if missing := sorted(set(form.patterns(parts)) - set(names)):
            raise ModelNotFoundError(
                f"{model} has no {', '.join(missing)} any more.", hint="Nothing was fetched. Take another --form."
            )
        return
    lacking = [
        part
        for part in COMPONENTS
        if part in parts
        and not (f"{part}/config.json" in names and any(fnmatch(n, p) for n in names for p in form.files[part]))
    ]
    if not lacking:
        return
    if any("/" not in name and name.endswith(".pth") for name in names):
        raise official_layout(model, listed_bytes(Form("full", diffusers_name(model), form.files)))
    raise ModelNotFoundError(
        f"{model} is no model in the Diffusers layout: it lacks {', '.join(f'{part}/' for part in lacking)}.",
        hint="Nothing was fetched. A repository that diffusers' WanPipeline can load is what is needed.",
    )


def _check_listed_kind(form: Form, info: "ModelInfo") -> None:
    """Check model_index.json before the download of the weights. Raises ModelNotFoundError for another pipeline."""
    from huggingface_hub import hf_hub_download

    if not form.single and any(sibling.rfilename == "model_index.json" for sibling in info.siblings or ()):
        check_pipeline(Path(hf_hub_download(form.repository, "model_index.json", revision=info.sha)), form.repository)


def listed_bytes(form: Form, parts: Collection[str] = PARTS) -> int | None:
    """Return the bytes of a form, from the hub's list of its files; None if the hub does not list it."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(form.repository, files_metadata=True).siblings or ()
    except Exception:  # errors of the HTTP client have no base class common to all versions
        return None
    return sum(s.size or 0 for s in siblings if form.has(s.rfilename, parts)) or None


def is_offline() -> bool:
    """Return True if HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _announce(form: Form, info: "ModelInfo", parts: Collection[str]) -> None:
    """Log the size of the download. Raises ModelNotFoundError if the disk has too little space."""
    from huggingface_hub import constants, try_to_load_from_cache

    cache, model = Path(constants.HF_HUB_CACHE), form.repository
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or () if form.has(s.rfilename, parts)}
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


def published(form: Form, info: "ModelInfo", parts: Collection[str] = PARTS) -> dict[str, str]:
    """Return the hub's hash of every file that wanduet needs."""
    return {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs is not None else str(sibling.blob_id)
        for sibling in info.siblings or ()
        if form.has(sibling.rfilename, parts) and (sibling.lfs is not None or sibling.blob_id is not None)
    }


def throw_away(folder: Path, names: list[str]) -> None:
    """Delete files and the blobs that they link to, so that the hub's client downloads them again."""
    for name in names:
        path = folder / name
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.parent.name == "blobs":
            blob.unlink(missing_ok=True)

"""Opens models from the hub: from its cache, or by a resumable download of one revision, with verification.

huggingface_hub's own settings apply: HF_HUB_OFFLINE, HF_ENDPOINT (a mirror), HF_HOME, HF_TOKEN.
"""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from wanduet.errors import ModelNotFoundError, WanduetError, WeightsError
from wanduet.untrusted import first_line
from wanduet.weights.compose import compose
from wanduet.weights.diffusers import PARTS, ModelFolder, open_folder
from wanduet.weights.forms import Form, FormName, form_of, forms_of
from wanduet.weights.manifest import (
    SHA256_LENGTH,
    Notes,
    Progress,
    file_sha256,
    find_damaged,
    verify,
    write_manifest,
)
from wanduet.weights.names import BUNDLED, HINT, HUB_ID, MINIATURE, check_few_step, no_model
from wanduet.weights.published import published_hashes, unverified_weights
from wanduet.weights.repository import fetch, is_offline, published, throw_away

log = logging.getLogger(__name__)


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
        return compose(model, files, lambda base, given: _local_copy(base, revision, given))
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
        return compose(model, {}, lambda base, given: _local_copy(base, revision, given))
    if not HUB_ID.fullmatch(model) or path.is_absolute() or model.startswith("."):
        raise no_model(model)
    check_few_step(model)
    return None


def _local_copy(model: str, revision: str | None, given: Mapping[str, Path]) -> ModelFolder | None:
    """Return a model that is on this machine: a folder, a bundled one, or one in the hub's cache, of which only what
    `given` lacks must be there; else None."""
    return local_model(model) or _cached(model, revision, given)


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
    """A downloaded model and its form; the number of files verified by a published hash, and their bytes."""

    folder: ModelFolder
    form: Form
    num_verified: int
    num_bytes: int


def download(
    model: str,
    revision: str | None = None,
    remember: Path | None = None,
    progress: Progress | None = None,
    *,
    form: FormName | None = None,
    given: Mapping[str, Path] | None = None,
) -> Download:
    """Download a model with huggingface_hub (which resumes a partial download) and verify every file.

    A file whose hash differs from the published one is deleted and downloaded once more. With HF_HUB_OFFLINE, the
    cached model is verified instead. `remember`: a file that records verified files. `progress` is called during
    hashing. `form`: which of the model's forms to fetch; None: its own. `given`: paths in place of some components, which
    are not fetched. Raises ModelNotFoundError if the download fails, WeightsError if a file is still damaged,
    ConfigError for a form that the model does not have.
    """
    check_few_step(model)
    chosen, notes, parts = form_of(model, form), Notes(remember), _lacking(given or {})
    info, path = fetch(chosen, revision, parts)
    if info is None:
        folder = _cached_form(chosen, model, revision, given or {})
        if folder is None:
            raise ModelNotFoundError(f"{model} is not in the cache, and HF_HUB_OFFLINE forbids fetching it.")
        hashes = published_hashes(folder.path)
        if chosen.single:  # other models share the repository
            listed = {name: published_hashes((folder.path / name).parent) for name in chosen.patterns(parts)}
            hashes = {name: known[Path(name).name] for name, known in listed.items() if Path(name).name in known}
        verify(folder.path, hashes, notes, progress)
        return Download(folder, chosen, len(hashes), _size(folder.path, hashes))
    hashes = published(chosen, info, parts)
    damaged, _ = find_damaged(path, hashes, notes, progress)
    if damaged:
        log.warning("Not what was published, fetched again: %s", ", ".join(damaged))
        throw_away(path, damaged)
        _, path = fetch(chosen, revision, parts)
        damaged, _ = find_damaged(path, hashes, notes, progress)
        throw_away(path, damaged)
    if damaged:
        raise WeightsError(
            f"{', '.join(damaged)} of {chosen.repository} came damaged twice: the hash is not the one that was published.",
            hint="Is a proxy or a mirror (HF_ENDPOINT) in between? What was good is kept.",
        )
    _keep_hashes(path, hashes, chosen)
    return Download(chosen.open(path, model, given or {}), chosen, len(hashes), _size(path, hashes))


def _size(folder: Path, names: Mapping[str, str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def _keep_hashes(path: Path, hashes: Mapping[str, str], form: Form) -> None:
    """Write hashes into a cache without links, as on Windows, whose files do not show them."""
    by_folder: dict[Path, dict[str, str]] = {path: dict(hashes)}
    if form.single:  # other models share the repository, and each file is verified by its own folder's hashes
        by_folder = {}
        for name, value in hashes.items():
            by_folder.setdefault((path / name).parent, {})[Path(name).name] = value
    for folder, listed in by_folder.items():
        known = published_hashes(folder)
        if set(listed) - set(known):
            full = {n: h if len(h) == SHA256_LENGTH else file_sha256(folder / n) for n, h in listed.items()}
            write_manifest(folder, (known if form.single else {}) | full)


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


def _cached(model: str, revision: str | None, given: Mapping[str, Path] | None = None) -> ModelFolder | None:
    """Return the copy in the hub's cache, in the model's own form or in another one; None if the cache has nothing of its
    own form, and no other one whole.

    `given`: paths in place of some components, which the copy then need not have. Raises IncompleteModelError, which
    names the missing files of its own form, or WeightsError for a truncated file of it.
    """
    problem: WanduetError | None = None
    for form in forms_of(model).values():
        try:
            found = _cached_form(form, model, revision, given or {})
        except (WeightsError, ModelNotFoundError) as error:
            problem = problem or (error if form.repository == model else None)
            continue
        if found is not None:
            return found
    if problem is not None:
        raise problem
    return None


def _cached_form(form: Form, model: str, revision: str | None, given: Mapping[str, Path]) -> ModelFolder | None:
    """Return the copy of one form in the hub's cache; see `_cached`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = form.patterns(_lacking(given))
    try:
        found = Path(
            snapshot_download(form.repository, revision=revision, local_files_only=True, allow_patterns=wanted)
        )
    except LocalEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # an id that the hub's client rejects, an unreadable cache
        raise ModelNotFoundError(f"{model} cannot be looked up: {first_line(error)}", hint=HINT) from error
    try:
        folder = form.open(found, model, given)
        if not given:
            folder.spec  # noqa: B018 - reads the configs
    except ModelNotFoundError as error:
        raise IncompleteModelError(
            f"Not all of {model} is in the cache. {error.message}",
            hint=f"Fetch the rest: wanduet download --model {model}"
            + ("" if form.repository == model else f" --form {form.name}"),
        ) from error
    return folder


def _lacking(given: Mapping[str, Path]) -> list[str]:
    return [part for part in PARTS if part not in given]

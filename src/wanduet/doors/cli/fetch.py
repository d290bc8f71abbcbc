"""`wanduet download`: downloads a model, or checks one on disk; `wanduet convert`: writes one in another layout. A module
of its own because downloads do not need torch."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from wanduet.config import EngineConfig, format_bytes
from wanduet.errors import ConfigError
from wanduet.family.registry import DEFAULT_MODEL, RANDOM_SPECS
from wanduet.weights.compose import MissingPartsError
from wanduet.weights.diffusers import PARTS, ModelFolder
from wanduet.weights.forms import FormName, form_of, forms_of
from wanduet.weights.hub import download, local_model, open_model, verify_manifest
from wanduet.weights.manifest import Progress, write_manifest
from wanduet.weights.names import BUNDLED
from wanduet.weights.repository import is_offline, listed_bytes


def run_download(config: EngineConfig, trust: bool = False, form: FormName | None = None) -> dict[str, Any]:
    """Download and check a model, or what the config's files lack; a folder is only checked.

    `trust` accepts a folder's files as they are and records their hashes. `form`: which of the model's forms to fetch;
    None: the one of its hub id. Raises ModelNotFoundError, WeightsError, ConfigError for `trust` without a folder and for
    `form` without a hub id.
    """
    if config.model in RANDOM_SPECS:
        return {"model": config.model, "note": "Random weights are made in memory; there is nothing to fetch."}
    remember = config.data_folder / "verified.json"
    model, given = config.model, dict(config.files)
    try:
        local = local_model(model, config.revision, given)
    except MissingPartsError as error:
        local, model, given = None, error.model, dict(error.parts)
    if trust and (local is None or config.model in BUNDLED):
        raise ConfigError("--trust is for a folder of weights of your own.", hint="Name it: --model FOLDER.")
    if form is not None and local is not None and not given:
        raise ConfigError("--form is for a model of the hub.", hint=f"Name it: --model {DEFAULT_MODEL}.")
    if local is not None:
        return _check_folder(local, config.model, remember, trust)
    _say_sizes(model, form, [part for part in PARTS if part not in given])
    with checking_bar() as progress:
        found = download(model, config.revision, remember, progress, form=form, given=given)
    return {
        "model": config.model,
        "form": found.form.name,
        "path": str(found.folder.path),
        "revision": found.folder.revision,
        "bytes": found.num_bytes,
        "files_verified": found.num_verified,
    }


def _say_sizes(model: str, form: FormName | None, parts: Collection[str]) -> None:
    """Print what is fetched, and the sizes of the other forms of it. Raises ConfigError."""
    chosen, forms = form_of(model, form), forms_of(model)
    if is_offline():
        print(f"Looking for {model} ...", file=sys.stderr)
        return
    sizes = {name: listed_bytes(one, parts) for name, one in forms.items()} if len(forms) > 1 else {}
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size)
    print(f"Fetching {model}, {chosen.name} ({chosen.repository}) ...", file=sys.stderr)
    if listed:
        print(f"  --form: {listed}", file=sys.stderr)


def _check_folder(folder: ModelFolder, model: str, remember: Path, trust: bool) -> dict[str, Any]:
    note = "A folder on this machine; there is nothing to fetch."
    if model in BUNDLED:
        note = "The miniature comes with wanduet; there is nothing to fetch."
    if trust:
        write_manifest(folder.path)
        note = "The files are taken as they are: their hashes are in the folder's manifest.json from now on."
    with checking_bar() as progress:  # first: a damaged folder's metadata cannot be relied on
        checked = verify_manifest(folder, None if model in BUNDLED else remember, (), progress)
    folder.check_complete()
    return {"model": model, "path": str(folder.path), "note": note, "files_verified": checked}


def run_convert(config: EngineConfig, target: Path) -> dict[str, Any]:
    """Write a model that is on this machine as a folder in the Diffusers layout.

    Raises ModelNotFoundError, WeightsError, OutputError, ConfigError for random weights.
    """
    from wanduet.runtime.convert import convert

    if config.model in RANDOM_SPECS:
        raise ConfigError(f"{config.model} has random weights, which are in no file.")
    model = open_model(config.model, config.revision, fetch=False, files=config.files)
    with checking_bar() as progress:
        verify_manifest(model, config.data_folder / "verified.json", (), progress)
    with checking_bar("Writing and checking") as progress:
        done = convert(model, target, progress)
    return {
        "model": model.name,
        "path": str(done.folder.path),
        "component_bytes": done.num_bytes,
        "bytes": sum(done.num_bytes.values()),
    }


@contextmanager
def checking_bar(title: str = "Checking the weights") -> Iterator[Progress]:
    """Show a progress bar of bytes on stderr, if it is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show

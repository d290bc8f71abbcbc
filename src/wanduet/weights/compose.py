"""Puts a model together from single files, as ComfyUI's users have them, and a model on this machine."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from wanduet.config import format_bytes
from wanduet.errors import ModelNotFoundError
from wanduet.family.distilled import by_file
from wanduet.family.registry import DEFAULT_MODEL
from wanduet.weights.components import read_sentencepiece, recognise_file, why_not
from wanduet.weights.diffusers import COMPONENTS, GIVE_TOKENIZER, PARTS, ModelFolder
from wanduet.weights.names import BUNDLED, check_needs
from wanduet.weights.published import published_models
from wanduet.weights.recognise import TAKE_T2V

Opener = Callable[[str, Mapping[str, Path]], ModelFolder | None]


class MissingPartsError(ModelNotFoundError):
    """Files make no whole model. `model`: the hub id that has what they lack; `parts`: what there is, by component."""

    def __init__(self, model: str, parts: Mapping[str, Path], command: str) -> None:
        lacking = [part for part in PARTS if part not in parts]
        known = published_models().get(model)
        names = ", no ".join(part.replace("_", " ") for part in lacking)
        size = f" ({format_bytes(known.bytes_of(lacking))}, or less with --form comfy)" if known else ""
        super().__init__(
            f"The files have no {names}, and {model}, which would give them, is not on this machine.",
            hint="Name files with --transformer, --vae, --text-encoder and --tokenizer, or fetch what is missing: "
            f"{command}{size}.",
        )
        self.model, self.parts = model, parts


def compose(model: str, files: Mapping[str, Path], open_local: Opener) -> ModelFolder:
    """Return a model of files (paths by component), and of the components that they lack from a model on this machine.

    That is `model`, or the default one if `model` is a file, which gives every component that it has. `open_local`
    returns a model by name, with paths in place of some components, or None if the others are not on this machine. Raises
    MissingPartsError then, ModelNotFoundError, WeightsError.
    """
    named = model
    parts = {name: _absolute(path) for name, path in files.items()}
    for name, path in parts.items():
        if not path.exists():
            raise ModelNotFoundError(f"There is no {path}, which --{name.replace('_', '-')} names.")
    whole = _absolute(Path(model)) if model not in BUNDLED else None
    if whole is not None and whole.exists() and not whole.is_dir():
        parts = _parts_of(whole, parts)
        model = DEFAULT_MODEL
    tokenizer = parts.get("tokenizer")
    if tokenizer is not None and tokenizer.is_file() and read_sentencepiece(tokenizer) is None:
        raise ModelNotFoundError(f"{tokenizer} has no tokenizer in it.", hint=GIVE_TOKENIZER)
    text = parts.get("text_encoder")
    if "tokenizer" not in parts and text is not None and text.is_file() and read_sentencepiece(text) is not None:
        parts["tokenizer"] = text
    base = open_local(model, parts) if set(PARTS) - set(parts) else None
    if set(PARTS) - set(parts) and base is None:
        flags = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
        raise MissingPartsError(model, parts, shlex.join(["wanduet", "download", "--model", named, *flags]))
    transformer = parts.get("transformer")
    name = base.name if transformer is None and base is not None else _stem(transformer)
    own = base is not None and transformer is None
    return ModelFolder(
        base.path if base is not None else parts["transformer"],
        name,
        base.revision if own and base is not None else None,
        ({} if base is None else dict(base.parts)) | parts,
    )


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # an unknown `~user`
        raise ModelNotFoundError(f"There is no {path}: {error}") from error


def _parts_of(path: Path, named: Mapping[str, Path]) -> dict[str, Path]:
    """Return the components that one file gives, and those named beside it. Raises ModelNotFoundError, WeightsError."""
    known = by_file(path)
    if known is not None:
        check_needs(path.name, known)
    kinds = recognise_file(path)
    by_component = {kind.component: kind for kind in kinds}
    transformer = by_component.get("transformer")
    if transformer is None:
        what = kinds[0]
        flag = f"Give it as --{what.component.replace('_', '-')}, beside a model."
        raise ModelNotFoundError(
            f"{path} is no model, but {what.described}.", hint=flag if what.problem is None else what.hint
        )
    if (problem := why_not(path, transformer)) is not None:
        raise ModelNotFoundError(f"{path} cannot be used: {problem}.", hint=transformer.hint or TAKE_T2V)
    if "transformer" in named:
        raise ModelNotFoundError(
            f"{path} and {named['transformer']} are two transformers; wanduet runs one.", hint="Leave one out."
        )
    return {name: path for name in COMPONENTS if name in by_component} | dict(named)


def _stem(path: Path | None) -> str:
    """Return the name that users see of a transformer's file: without its ending, and of a folder's model."""
    if path is None:
        return "model"
    return path.stem if path.is_file() else path.parent.name

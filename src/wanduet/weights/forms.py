"""The forms in which the hub has a model: whole in the Diffusers layout, in the official one, and ComfyUI's files.

Their weights are the same, rounded: the Diffusers repository has float32 throughout, the official one a text encoder in
bfloat16, ComfyUI's files 16 bits, and a text encoder (14B: also a transformer) in scaled fp8.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, get_args

from wanduet.errors import ConfigError, ModelNotFoundError
from wanduet.weights.diffusers import COMPONENTS, PARTS, ModelFolder, open_folder, open_official
from wanduet.weights.names import diffusers_name, is_official, official_id

FormName = Literal["full", "bf16", "comfy"]
COMFY = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
_SPLIT = "split_files"
# The smallest transformer of each member whose 8 bits, if any, have scales.
_COMFY_TRANSFORMERS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1_t2v_1.3B_fp16.safetensors",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1_t2v_14B_fp8_scaled.safetensors",
}
# In GB, rounded.
_SIZES: Mapping[str, Mapping[FormName, float]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"full": 28.9, "bf16": 17.6, "comfy": 9.8},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"full": 80.4, "bf16": 69.0, "comfy": 21.3},
}
_COMFY_TEXT = f"{_SPLIT}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
_COMFY_VAE = f"{_SPLIT}/vae/wan_2.1_vae.safetensors"
# Only the needed files (a repository may also have single-file weights), and no pickles.
_DIFFUSERS = {
    "": ("*.json",),
    **{component: (f"{component}/*.safetensors",) for component in COMPONENTS},
    "tokenizer": ("tokenizer/*.model", "tokenizer/*.txt"),
}
# Of a repository in the official layout; its pickles are opened only as tensors.
_OFFICIAL = {
    "": ("config.json",),
    "transformer": ("diffusion_pytorch_model*.safetensors*",),
    "vae": ("*VAE*.pth",),
    "text_encoder": ("models_t5_*.pth",),
    "tokenizer": ("google/umt5-xxl/*",),
}


@dataclass(frozen=True, slots=True)
class Form:
    """One form of a model: the repository, and patterns of its files by component ("": of all).

    `single`: whether each component is one file, found by its pattern, instead of the repository being a model.
    """

    name: FormName
    repository: str
    files: Mapping[str, tuple[str, ...]] = field(hash=False)
    single: bool = False

    def patterns(self, parts: Collection[str] = PARTS) -> list[str]:
        """Return patterns of the files of some components."""
        return [one for part, listed in self.files.items() if not part or part in parts for one in listed]

    def has(self, file: str, parts: Collection[str] = PARTS) -> bool:
        """Return whether a file of the repository, by its path there, belongs to some components."""
        return any(fnmatch(file, pattern) for pattern in self.patterns(parts))

    def open(self, path: Path, model: str, given: Mapping[str, Path]) -> ModelFolder:
        """Open a snapshot of the repository as the model that users name `model`, with `given` files in place of its
        components.

        Raises ModelNotFoundError if a component is missing, WeightsError for a damaged file.
        """
        revision = path.name if model == self.repository else None  # a commit of another repository is not the model's
        if self.single:
            own = {part: path / self.files[part][0] for part in PARTS if part not in given}
            if missing := [file.name for file in own.values() if not file.is_file()]:
                raise ModelNotFoundError(f"{self.repository} lacks {', '.join(dict.fromkeys(missing))}.")
            folder = ModelFolder(path, model, revision, own | dict(given))
        elif self.files is _OFFICIAL:
            folder = open_official(path, model, revision, given)
        else:
            folder = ModelFolder(path, model, revision, dict(given)) if given else open_folder(path, model, revision)
        folder.check_complete([part for part in PARTS if part not in given])
        return folder


def forms_of(model: str) -> dict[FormName, Form]:
    """Return the forms of a hub id: its own first, then those of the same weights."""
    whole = diffusers_name(model) if is_official(model) else model
    own: FormName = "bf16" if is_official(model) else "full"
    found: dict[FormName, Form] = {"full": Form("full", whole, _DIFFUSERS)}
    if (official := official_id(whole)) is not None:
        found["bf16"] = Form("bf16", official, _OFFICIAL)
    if (transformer := _COMFY_TRANSFORMERS.get(whole)) is not None:
        files = {
            "transformer": (f"{_SPLIT}/diffusion_models/{transformer}",),
            "vae": (_COMFY_VAE,),
            "text_encoder": (_COMFY_TEXT,),
            "tokenizer": (_COMFY_TEXT,),  # it has a SentencePiece model in it
        }
        found["comfy"] = Form("comfy", COMFY, files, single=True)
    return {own: found.pop(own)} | found


def size_of(model: str, form: FormName) -> int | None:
    """Return about how many bytes a form of a hub id has, without asking the hub; None if that is not known."""
    gigabytes = _SIZES.get(diffusers_name(model) if is_official(model) else model, {}).get(form)
    return None if gigabytes is None else round(gigabytes * 1e9)


def form_of(model: str, name: FormName | None) -> Form:
    """Return a form of a hub id; None: its own. Raises ConfigError if there is none of this name."""
    forms = forms_of(model)
    if name is None:
        return next(iter(forms.values()))
    if name not in get_args(FormName) or name not in forms:
        raise ConfigError(f"{model} is not known in the form {name!r}.", hint=f"Its forms: {', '.join(forms)}.")
    return forms[name]

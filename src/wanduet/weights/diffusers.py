"""A model on disk: its configs, and the files of its weights. Folders in the Diffusers layout, in the official one, and
files that take the place of some components."""

import hashlib
import json
import os
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from wanduet.errors import InvalidRequestError, ModelNotFoundError, WeightsError
from wanduet.family.distilled import PIPELINES as FEW_STEP_PIPELINES
from wanduet.family.distilled import FewStep, by_file, by_name, by_pipeline, by_tensors
from wanduet.family.registry import defaults_for
from wanduet.family.spec import (
    SUPPORTED,
    GenerationDefaults,
    ModelSpec,
    TextEncoderSpec,
    TransformerSpec,
    VAESpec,
    check_consistent,
    value_problems,
)
from wanduet.family.wan21 import WAN_1_3B
from wanduet.request import GenerationRequest
from wanduet.untrusted import cut, read_file
from wanduet.weights.components import derived_config, open_component, read_sentencepiece, shards
from wanduet.weights.json_files import read_json
from wanduet.weights.names import cache_folder_id, check_module, check_needs, diffusers_name, is_official
from wanduet.weights.quantised import dequantised
from wanduet.weights.safetensors import TensorFiles, check_pointer
from wanduet.weights.source import FETCH_MODEL, WeightSource
from wanduet.weights.trained_names import by_model_names

COMPONENTS = ("transformer", "vae", "text_encoder")
GIVE_TOKENIZER = "Give a folder with tokenizer.json, or a SentencePiece model."
PARTS = (*COMPONENTS, "tokenizer")
# Supported classes, as named in `_class_name` (diffusers) or `architectures` (transformers).
PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline")
CLASSES = {
    "transformer": {"WanTransformer3DModel"},
    "vae": {"AutoencoderKLWan"},
    "text_encoder": {"UMT5EncoderModel", "UMT5ForConditionalGeneration", "UMT5Model"},
}
DEFAULTS_FILE = "generation_defaults.json"
# Where Wan's own repositories have each component; the first pattern that matches counts.
OFFICIAL = {
    "transformer": ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    "vae": ("*VAE*.pth", "*VAE*.safetensors"),
    "text_encoder": ("models_t5_*.pth", "models_t5_*.safetensors"),
    "tokenizer": ("google/umt5-xxl",),
}

Spec = TypeVar("Spec", TransformerSpec, VAESpec, TextEncoderSpec, GenerationDefaults)


@dataclass(frozen=True)
class ModelFolder:
    """One model on disk.

    `name`: hub id, or the folder's name; it is written into videos and responses. `revision`: the hub's commit, if
    known. `parts`: paths that take the place of the folder's own components, by name: a folder with a config, a file of
    weights in any layout (`components.py`), or, for the tokenizer, a file with a SentencePiece model.
    """

    path: Path
    name: str
    revision: str | None = None
    parts: Mapping[str, Path] = field(default_factory=dict, hash=False)
    checked: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # verified files
    checking: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the folder exists and has every component. Raises ModelNotFoundError."""
        if not self.path.exists():
            raise ModelNotFoundError(
                f"There is no folder {self.path}.", hint="Give a folder, a hub id, or `miniature`."
            )
        missing = [n for n in (*COMPONENTS, "tokenizer") if not (self.part(n).is_dir() or self.is_file(n))]
        if missing:
            raise ModelNotFoundError(
                f"{self.path} is no model in the Diffusers layout: it lacks {', '.join(n + '/' for n in missing)}.",
                hint=_layout_hint(self.path),
            )

    @cached_property
    def few_step(self) -> FewStep | None:
        """What is known of the weights if they are distilled for few steps: by their tensors, the folder's name or its
        pipeline. None for other weights.

        Raises ModelNotFoundError if they need what wanduet does not have, or lack the module of their attention.
        """
        tensors: Collection[str] = ()
        with suppress(ModelNotFoundError, WeightsError):  # `check_complete` raises it
            tensors = self._files("transformer").tensors  # also of a quantisation that is not read
        index = self.path / "model_index.json"
        own = "transformer" not in self.parts
        pipeline = read_json(index).get("_class_name") if own and index.exists() else None
        marked, named = by_tensors(tensors), None if own else by_file(self.part("transformer"))
        named = named or by_name(self.name)
        if marked is not None and named is not None and named.attention == marked.attention:
            marked = named  # it says more: VSA's gates do not show how sparse the weights are trained to be
        found = marked or named or by_pipeline(pipeline)
        if found is not None:
            shown = str(self.path if own else self.part("transformer"))
            check_needs(shown, found)
            check_module(shown, found, tensors)
        return found

    def check_complete(self, parts: Collection[str] = PARTS) -> None:
        """Check every config and the header of every weights file, so that a problem shows before gigabytes are read;
        with `parts`, only of these components.

        Raises ModelNotFoundError for a component that is missing or not supported, WeightsError for a damaged file.
        """
        self._check_kind()
        if "tokenizer" in parts and not self.is_file("tokenizer"):
            for path in sorted(self.tokenizer.iterdir()):
                check_pointer(path)
            if not os.path.lexists(self.tokenizer / "tokenizer.json"):
                raise ModelNotFoundError(
                    f"{self.tokenizer} lacks tokenizer.json.",
                    hint=GIVE_TOKENIZER if self.is_given("tokenizer") else FETCH_MODEL,
                )
        missing: list[ModelNotFoundError] = []
        if "transformer" in parts:
            _ = self.few_step  # raises for weights that need a module of their own, clearer than a list of its tensors
        for component in (name for name in COMPONENTS if name in parts):
            self._check_class(component)
            try:
                dequantised(self._files(component))
            except ModelNotFoundError as error:
                missing.append(error)
        if missing:
            raise ModelNotFoundError(" ".join(error.message for error in missing), hint=missing[0].hint)

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's specification, from its configs.

        Raises ModelNotFoundError for a missing or unsupported config.
        """
        self._check_kind()
        shapes, few_step = self._component("transformer", WAN_1_3B.transformer), self.few_step
        transformer = shapes
        if few_step is not None:
            transformer = replace(shapes, attention=few_step.attention, key_share=few_step.key_share)
        spec = ModelSpec(
            self.name,
            transformer=transformer,
            vae=self._component("vae", WAN_1_3B.vae),
            text_encoder=self._component("text_encoder", WAN_1_3B.text_encoder),
            defaults=self._defaults(shapes),
            text_len=WAN_1_3B.text_len,
        )
        check_consistent(self.path, spec)
        return spec

    @cached_property
    def transformer(self) -> WeightSource:
        """The transformer's tensors."""
        return by_model_names(dequantised(self._files("transformer")))

    @cached_property
    def vae(self) -> WeightSource:
        """The VAE's tensors."""
        return dequantised(self._files("vae"))

    @cached_property
    def text_encoder(self) -> WeightSource:
        """The text encoder's tensors."""
        return dequantised(self._files("text_encoder"))

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder, or the file with its SentencePiece model."""
        return self.part("tokenizer")

    @cached_property
    def sentencepiece(self) -> bytes | None:
        """The tokenizer's SentencePiece model, if it is a file; None if it is a folder."""
        return read_sentencepiece(self.tokenizer) if self.is_file("tokenizer") else None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the transformer's and the VAE's weights and configs, which determine the pixels."""
        both = self.transformer.fingerprint() + self.vae.fingerprint()
        configs = [self.config(component) for component in ("transformer", "vae")]
        return hashlib.sha256((both + json.dumps(configs, sort_keys=True)).encode()).hexdigest()

    @cached_property
    def text_fingerprint(self) -> str:
        """Digest of the text encoder's weights and config, and of the tokenizer."""
        config = json.dumps(self.config("text_encoder"), sort_keys=True)
        digest = hashlib.sha256((self.text_encoder.fingerprint() + config).encode())
        if self.is_file("tokenizer"):
            return hashlib.sha256(digest.digest() + (self.sentencepiece or b"")).hexdigest()
        try:
            for path in sorted(self.tokenizer.iterdir()):
                if path.is_file():
                    digest.update(os.fsencode(path.name) + read_file(path))
        except OSError as error:
            raise ModelNotFoundError(f"{self.tokenizer} cannot be read: {error.strerror}.") from error
        return digest.hexdigest()

    def part(self, name: str) -> Path:
        """Return the path of a component's folder or file, which need not exist."""
        return self.parts.get(name, self.path / name)

    def is_given(self, name: str) -> bool:
        """Return True if a component is given by a path of its own, outside the model's folder."""
        return name in self.parts and self.path not in (self.parts[name], *self.parts[name].parents)

    def is_file(self, name: str) -> bool:
        """Return True if a component's weights are in a file of any layout, not in a folder with a config."""
        return name in self.parts and self.parts[name].is_file()

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config.json; for a file, what its tensors' shapes say. Raises ModelNotFoundError."""
        if not self.is_file(component):
            folder = self.part(component)
            if self.is_given(component) and not (folder / "config.json").exists():
                raise ModelNotFoundError(
                    f"{folder} has no config.json, so it is no model's {component.replace('_', ' ')}.",
                    hint=f"Give a file with weights as --{component.replace('_', '-')}, or the index of several.",
                )
            return read_json(folder / "config.json")
        places = (self.path / component / "config.json", self.part(component).parent / "config.json")
        known = next((read_json(place) for place in places if place.is_file()), {})
        return derived_config(component, getattr(self, component), known)

    def _component(self, name: str, known: Spec) -> Spec:
        return _with_config(known, self.part(name) / "config.json", self.config(name))

    def _check_kind(self) -> None:
        check_pipeline(self.path / "model_index.json", str(self.path))

    def _check_class(self, component: str) -> None:
        """Raise ModelNotFoundError for an unsupported class: a clearer message than a list of mismatched tensors."""
        if self.is_file(component):
            return  # it is recognised when it is opened
        config = self.config(component)
        given = config.get("_class_name", config.get("architectures"))
        names = given if isinstance(given, list) else [given]
        if given and not set(map(str, names)) & CLASSES[component]:
            raise ModelNotFoundError(
                f"{self.part(component) / 'config.json'}: this is a {cut(names[0])}, which wanduet does not run.",
                hint=SUPPORTED,
            )

    def _defaults(self, transformer: TransformerSpec) -> GenerationDefaults:
        path = self.path / DEFAULTS_FILE
        few_step = {} if self.few_step is None else self.few_step.defaults()
        if path.exists():
            own = read_json(path)  # they are of the folder's own transformer
            both = own | few_step if "transformer" in self.parts else few_step | own
            defaults = _with_config(WAN_1_3B.defaults, path, both)
            try:
                GenerationRequest.parse(prompt="-", sampler=defaults.sampler, timesteps=defaults.timesteps or None)
            except InvalidRequestError as error:
                raise ModelNotFoundError(f"{path} is not understood: {error.message}") from None
            return defaults
        return replace(defaults_for(transformer), **few_step)

    def _files(self, name: str) -> WeightSource:
        folder = self.part(name)
        if self.is_file(name):
            return open_component(folder, name)
        usual = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        # Prefer the usual name: the folder may also have a variant (`.fp16.`) or an adapter.
        indices = _first(folder / f"{usual}.index.json") or sorted(folder.glob("*.safetensors.index.json"))
        if indices and (indices[0].name.startswith(usual) or not (folder / usual).is_file()):
            paths = [folder / file for file in shards(indices[0])]
        else:
            paths = _first(folder / usual) or sorted(folder.glob("*.safetensors"))
        missing = [path.name for path in paths if not path.is_file()]
        if missing or not paths:
            pickles = sorted(path.name for end in ("bin", "pth", "pt") for path in folder.glob(f"*.{end}"))
            raise ModelNotFoundError(
                f"{folder} lacks {', '.join(missing) or 'its .safetensors file'}"
                + (f"; {pickles[0]} is a pickle, which wanduet does not open." if pickles else "."),
                hint=f"Give one file with weights as --{name.replace('_', '-')}."
                if self.is_given(name)
                else FETCH_MODEL,
            )
        return TensorFiles(name.replace("_", " "), paths)


def check_pipeline(path: Path, shown: str) -> None:
    """Raise ModelNotFoundError for another pipeline or unsupported components, with which the results would be wrong.

    `path`: its model_index.json, which may be missing. `shown`: the model's name in messages.
    """
    index = read_json(path) if path.exists() else {}
    name = index.get("_class_name", PIPELINES[0])
    if name not in (*PIPELINES, *FEW_STEP_PIPELINES):
        raise ModelNotFoundError(
            f"{shown} is a {cut(name)}; wanduet runs a WanPipeline (text to video) only.", hint=SUPPORTED
        )
    for part in ("transformer_2", "image_encoder"):
        value = index.get(part)
        if isinstance(value, list) and any(item is not None for item in value):
            raise ModelNotFoundError(f"{path}: {part} is not supported ({cut(name)}).", hint=SUPPORTED)


def open_folder(path: Path, name: str, revision: str | None = None) -> ModelFolder:
    """Open a folder in the Diffusers layout or in the official one. Raises ModelNotFoundError for another folder."""
    if (path / "high_noise_model").is_dir() or (path / "low_noise_model").is_dir():
        raise ModelNotFoundError(
            f"{path} is Wan2.2 A14B, with two transformers that take turns, which wanduet does not run.", hint=SUPPORTED
        )
    found = _official_parts(path)
    if "transformer" not in found or len(found) == 1:
        return ModelFolder(path, name, revision)
    return open_official(path, name, revision)


def open_official(
    path: Path, name: str, revision: str | None = None, given: Mapping[str, Path] | None = None
) -> ModelFolder:
    """Open a folder in the official layout, with `given` paths in place of some components. Raises ModelNotFoundError
    for one that lacks others."""
    found = _official_parts(path) | dict(given or {})
    if missing := [f"{part} ({OFFICIAL[part][0]})" for part in OFFICIAL if part not in found]:
        raise ModelNotFoundError(
            f"{path} is a model in the official layout, but it lacks its {', '.join(missing)}.", hint=_layout_hint(path)
        )
    return ModelFolder(path, name, revision, found)


def _official_parts(path: Path) -> dict[str, Path]:
    found = {
        part: [p for pattern in patterns for p in sorted(path.glob(pattern))] for part, patterns in OFFICIAL.items()
    }
    return {part: paths[0] for part, paths in found.items() if paths}


def _layout_hint(path: Path) -> str:
    """Return a hint for a folder without a model's subfolders: its probable kind, and what to pass instead."""
    if (path / "snapshots").is_dir() and (model := cache_folder_id(path)):
        return f"It is a folder of the hub's cache; give the hub id: --model {model}"
    if path.name in (*COMPONENTS, "tokenizer", "scheduler") and (path.parent / "model_index.json").is_file():
        return f"It is a part of a model; give the whole: --model {path.parent}"
    if inside := next((p.parent for p in sorted(path.glob("*/model_index.json"))), None):
        return f"There is one in it: --model {inside}"
    if any((folder / name).is_dir() for folder in (path, path / "models") for name in ("diffusion_models", "unet")):
        return (
            "It looks like ComfyUI's folders: give files of diffusion_models, vae and text_encoders as --transformer, --vae "
            "and --text-encoder."
        )
    if any(path.glob("*.pth")) or any(path.glob("diffusion_pytorch_model*.safetensors")):
        model = cache_folder_id(path) or f"Wan-AI/{path.name}"
        instead = (
            f"The same weights in diffusers' layout: {diffusers_name(model)}"
            if is_official(model)
            else "Give its files as --transformer, --vae, --text-encoder and --tokenizer."
        )
        return f"It looks like the official layout, not whole. {instead}"
    return "A folder that diffusers' WanPipeline can load is what is needed."


def _first(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


def _with_config(known: Spec, path: Path, config: dict[str, Any]) -> Spec:
    """Return a member's spec with the entries of a config from `path`. Raises ModelNotFoundError."""
    try:
        spec = known.with_config(config)
        problems = value_problems(spec, known)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelNotFoundError(f"{path} is not understood: {cut(error)}.") from error
    if problems:
        raise ModelNotFoundError(f"{path} is not understood: {'; '.join(problems)}.")
    return spec

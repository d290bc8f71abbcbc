"""A model folder in the Diffusers layout: its configs, and the files of its weights."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from wanduet.errors import InvalidRequestError, ModelNotFoundError, WeightsError
from wanduet.family.distilled import PIPELINES as FEW_STEP_PIPELINES
from wanduet.family.distilled import FewStep, by_name, by_pipeline, by_tensors
from wanduet.family.specs import (
    WAN_1_3B,
    WAN_14B,
    GenerationDefaults,
    ModelSpec,
    TextEncoderSpec,
    TransformerSpec,
    VAESpec,
)
from wanduet.request import GenerationRequest
from wanduet.untrusted import cut, read_file
from wanduet.weights.json_files import read_json
from wanduet.weights.names import cache_folder_id, check_needs, diffusers_name
from wanduet.weights.safetensors import TensorFiles, check_pointer
from wanduet.weights.source import WeightSource

COMPONENTS = ("transformer", "vae", "text_encoder")
# Supported classes, as named in `_class_name` (diffusers) or `architectures` (transformers).
PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline")
CLASSES = {
    "transformer": {"WanTransformer3DModel"},
    "vae": {"AutoencoderKLWan"},
    "text_encoder": {"UMT5EncoderModel", "UMT5ForConditionalGeneration", "UMT5Model"},
}
_KINDS = "wanduet runs Wan2.1 text-to-video checkpoints in the Diffusers layout."
DEFAULTS_FILE = "generation_defaults.json"

# Upper limits of a config's values. Published models have at most 40 layers and a vocabulary of 256,384. With 10**9
# layers, planning and building on the meta device would take days.
LARGEST = 2**20
MOST = {"num_layers": 256, "num_res_blocks": 64, "dim_mult": 64, "patch_size": 16, "z_dim": 1024}
MOST_ENTRIES, MOST_FLOATS, MOST_CHARACTERS = 8, 1024, 2**16

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class ModelFolder:
    """One model on disk.

    `name`: hub id, or the folder's name; it is written into videos and responses. `revision`: the hub's commit, if
    known.
    """

    path: Path
    name: str
    revision: str | None = None
    checked: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # verified files
    checking: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the folder exists and is in the Diffusers layout. Raises ModelNotFoundError."""
        if not self.path.is_dir():
            raise ModelNotFoundError(
                f"There is no folder {self.path}.", hint="Give a folder, a hub id, or `miniature`."
            )
        missing = [n for n in (*COMPONENTS, "tokenizer") if not (self.path / n).is_dir()]
        if missing:
            raise ModelNotFoundError(
                f"{self.path} is no model in the Diffusers layout: it lacks {', '.join(n + '/' for n in missing)}.",
                hint=_layout_hint(self.path),
            )

    @cached_property
    def few_step(self) -> FewStep | None:
        """What is known of the weights if they are distilled for few steps: by their tensors, the folder's name or its
        pipeline. None for other weights.

        Raises ModelNotFoundError if they need what wanduet does not have.
        """
        tensors: Iterable[str] = ()
        with suppress(ModelNotFoundError, WeightsError):  # `check_complete` raises it
            tensors = self.transformer.tensors
        index = self.path / "model_index.json"
        pipeline = read_json(index).get("_class_name") if index.exists() else None
        found = by_tensors(tensors) or by_name(self.name) or by_pipeline(pipeline)
        if found is not None:
            check_needs(str(self.path), found)
        return found

    def check_complete(self) -> None:
        """Check every config and the header of every weights file, so that a problem shows before gigabytes are read.

        Raises ModelNotFoundError for a component that is missing or not supported, WeightsError for a damaged file.
        """
        self._check_kind()
        for path in sorted(self.tokenizer.iterdir()):
            check_pointer(path)
        if not os.path.lexists(self.tokenizer / "tokenizer.json"):
            raise ModelNotFoundError(
                f"{self.tokenizer} lacks tokenizer.json.", hint="Fetch the model again with `wanduet download`."
            )
        missing: list[ModelNotFoundError] = []
        _ = self.few_step  # raises for weights that need a module of their own, clearer than a list of its tensors
        for component in COMPONENTS:
            self._check_class(component)
            try:
                self._files(component)
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
        transformer = self._component("transformer", TransformerSpec.from_config)
        spec = ModelSpec(
            self.name,
            transformer=transformer,
            vae=self._component("vae", VAESpec.from_config),
            text_encoder=self._component("text_encoder", TextEncoderSpec.from_config),
            defaults=self._defaults(transformer),
        )
        check_consistent(self.path, spec)
        return spec

    @cached_property
    def transformer(self) -> WeightSource:
        """The transformer's tensors."""
        return self._files("transformer")

    @cached_property
    def vae(self) -> WeightSource:
        """The VAE's tensors."""
        return self._files("vae")

    @cached_property
    def text_encoder(self) -> TensorFiles:
        """The text encoder's tensors."""
        return self._files("text_encoder")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.path / "tokenizer"

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
        try:
            for path in sorted(self.tokenizer.iterdir()):
                if path.is_file():
                    digest.update(os.fsencode(path.name) + read_file(path))
        except OSError as error:
            raise ModelNotFoundError(f"{self.tokenizer} cannot be read: {error.strerror}.") from error
        return digest.hexdigest()

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config.json. Raises ModelNotFoundError."""
        return read_json(self.path / component / "config.json")

    def _component(self, name: str, read: Callable[[dict[str, Any]], Spec]) -> Spec:
        return _understood(self.path / name / "config.json", self.config(name), read)

    def _check_kind(self) -> None:
        check_pipeline(self.path / "model_index.json", str(self.path))

    def _check_class(self, component: str) -> None:
        """Raise ModelNotFoundError for an unsupported class: a clearer message than a list of mismatched tensors."""
        config = self.config(component)
        given = config.get("_class_name", config.get("architectures"))
        names = given if isinstance(given, list) else [given]
        if given and not set(map(str, names)) & CLASSES[component]:
            raise ModelNotFoundError(
                f"{self.path / component / 'config.json'}: this is a {cut(names[0])}, which wanduet does not run.",
                hint=_KINDS,
            )

    def _defaults(self, transformer: TransformerSpec) -> GenerationDefaults:
        path = self.path / DEFAULTS_FILE
        few_step = {} if self.few_step is None else self.few_step.defaults()
        if path.exists():
            defaults = _understood(path, few_step | read_json(path), GenerationDefaults.from_config)
            try:
                GenerationRequest.parse(prompt="-", sampler=defaults.sampler, timesteps=defaults.timesteps or None)
            except InvalidRequestError as error:
                raise ModelNotFoundError(f"{path} is not understood: {error.message}") from None
            return defaults
        return replace(WAN_14B.defaults if transformer == WAN_14B.transformer else WAN_1_3B.defaults, **few_step)

    def _files(self, name: str) -> TensorFiles:
        folder = self.path / name
        usual = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        # Prefer the usual name: the folder may also have a variant (`.fp16.`) or an adapter.
        indices = _first(folder / f"{usual}.index.json") or sorted(folder.glob("*.safetensors.index.json"))
        if indices and (indices[0].name.startswith(usual) or not (folder / usual).is_file()):
            paths = [folder / file for file in _shards(indices[0])]
        else:
            paths = _first(folder / usual) or sorted(folder.glob("*.safetensors"))
        missing = [path.name for path in paths if not path.is_file()]
        if missing or not paths:
            pickles = sorted(path.name for end in ("bin", "pth", "pt") for path in folder.glob(f"*.{end}"))
            raise ModelNotFoundError(
                f"{folder} lacks {', '.join(missing) or 'its .safetensors file'}"
                + (f"; {pickles[0]} is a pickle, which wanduet does not open." if pickles else "."),
                hint="Fetch the model again with `wanduet download`.",
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
            f"{shown} is a {cut(name)}; wanduet runs a WanPipeline (text to video) only.", hint=_KINDS
        )
    for part in ("transformer_2", "image_encoder"):
        value = index.get(part)
        if isinstance(value, list) and any(item is not None for item in value):
            raise ModelNotFoundError(f"{path}: {part} is not supported ({cut(name)}).", hint=_KINDS)


def _layout_hint(path: Path) -> str:
    """Return a hint for a folder without a model's subfolders: its probable kind, and what to pass instead."""
    if (path / "snapshots").is_dir() and (model := cache_folder_id(path)):
        return f"It is a folder of the hub's cache; give the hub id: --model {model}"
    if path.name in (*COMPONENTS, "tokenizer", "scheduler") and (path.parent / "model_index.json").is_file():
        return f"It is a part of a model; give the whole: --model {path.parent}"
    if inside := next((p.parent for p in sorted(path.glob("*/model_index.json"))), None):
        return f"There is one in it: --model {inside}"
    if any(path.glob("*.pth")) or any(path.glob("diffusion_pytorch_model*.safetensors")):
        model = cache_folder_id(path) or f"Wan-AI/{path.name}"
        return f"It is in the official layout. The same weights in the layout wanduet reads: {diffusers_name(model)}"
    return "A folder that diffusers' WanPipeline can load is what is needed."


def _first(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


def _shards(index: Path) -> list[str]:
    """Return the files that an index names. Raises ModelNotFoundError."""
    weights = read_json(index).get("weight_map", {})
    names = {str(name) for name in weights.values()} if isinstance(weights, dict) else {""}
    if any(not name.endswith(".safetensors") or Path(name).name != name for name in names):
        raise ModelNotFoundError(f"{index} is not understood: its weight_map must give each tensor's file.")
    return sorted(names)


def _understood(path: Path, config: dict[str, Any], read: Callable[[dict[str, Any]], Spec]) -> Spec:
    """Convert a config to a spec, whose fields must have the types of their defaults. Raises ModelNotFoundError."""
    try:
        spec = read(config)
        problems = [_problem(f.name, getattr(spec, f.name), f.default) for f in fields(spec)]  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelNotFoundError(f"{path} is not understood: {cut(error)}.") from error
    if found := [problem for problem in problems if problem]:
        raise ModelNotFoundError(f"{path} is not understood: {'; '.join(found)}.")
    return spec


def check_consistent(path: Path, spec: ModelSpec) -> None:
    """Check that the configs of a model's components agree. Raises ModelNotFoundError."""
    transformer, vae, text = spec.transformer, spec.vae, spec.text_encoder
    rules = {
        "transformer: patch_size must be [1, n, n]": transformer.patch_size
        == (1, transformer.patch_size[-1], transformer.patch_size[-1]),
        "transformer: attention_head_dim must be even, at least 6": transformer.attention_head_dim % 2 == 0
        and transformer.attention_head_dim >= 6,
        "transformer: in_channels and out_channels must be the vae's z_dim": transformer.in_channels
        == transformer.out_channels
        == vae.z_dim,
        "transformer: text_dim must be the text encoder's d_model": transformer.text_dim == text.d_model,
        "vae: temperal_downsample needs one entry less than dim_mult": len(vae.temperal_downsample)
        == len(vae.dim_mult) - 1,
        "vae: latents_mean and latents_std need one entry for each of z_dim": len(vae.latents_mean)
        == len(vae.latents_std)
        == vae.z_dim,
        "vae: latents_std must be above 0": all(std > 0 for std in vae.latents_std),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ModelNotFoundError(
            f"The configs of {path} do not fit together: {'; '.join(broken)}.",
            hint=_KINDS,
        )


def _problem(name: str, value: object, default: object) -> str | None:
    """Return the problem of a config's value, by its default's type and the limits above; None if there is none."""
    if isinstance(default, tuple):
        kind = type(default[0]) if default else float
        if not isinstance(value, tuple) or (default and not value) or {type(v) for v in value} - _allowed(kind):
            return f"{name} must be a list of {kind.__name__}"
        if len(value) > (MOST_FLOATS if kind is float else MOST_ENTRIES):
            return f"{name} has too many entries: {len(value)}"
        numbers = [] if kind is bool else list(value)
        lowest = None if kind is float else 1
    elif isinstance(default, bool) or not isinstance(default, int | float):
        if type(value) is not type(default):
            return f"{name} must be of type {type(default).__name__}"
        return f"{name} is too long" if isinstance(value, str) and len(value) > MOST_CHARACTERS else None
    else:
        if type(value) not in _allowed(type(default)):
            return f"{name} must be a number, not {cut(repr(value))}"
        numbers, lowest = [value], 0 if isinstance(default, float) else 1
    most = MOST.get(name, LARGEST)
    if any(not -most <= n <= most or (lowest is not None and n < lowest) for n in numbers):
        return f"{name}={cut(repr(value))} is out of range"
    return None


def _allowed(kind: type) -> set[type]:
    return {int, float} if kind is float else {kind}

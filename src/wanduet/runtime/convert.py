"""Writes a model of any layout as a folder in the Diffusers layout, in bfloat16 (the VAE in float32).

Weights that wanduet, like the official code, computes in float32 beside bfloat16 products (time embedding, modulation,
norms, head) stay float32, unless they are stored in bfloat16. So a video computed in bfloat16 is the same bit for bit as
from the source.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from wanduet.config import format_bytes
from wanduet.errors import OutputError, WeightsError
from wanduet.family.registry import defaults_for
from wanduet.folders import make_folder, sync_folder
from wanduet.meta.init import meta_init
from wanduet.models.dit.model import WanTransformer
from wanduet.models.text.tokenizer import Tokenizer
from wanduet.models.text.umt5 import EMBEDDING, EMBEDDING_COPY
from wanduet.models.vae.model import WanVAE
from wanduet.runtime.text_host import check_shapes, check_tied_embedding
from wanduet.weights.diffusers import CLASSES, COMPONENTS, DEFAULTS_FILE, PIPELINES, ModelFolder, open_folder
from wanduet.weights.json_files import read_json
from wanduet.weights.manifest import Progress, file_sha256, find_damaged, write_manifest
from wanduet.weights.writer import Entry, write_weights

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
# Entries that no shape shows, as the published configs have them.
_CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "WanTransformer3DModel", "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
    },
    "vae": {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0},
    "text_encoder": {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False,
        "is_encoder_decoder": False, "dtype": "bfloat16",
    },
}  # fmt: skip
# Entries that describe how the source stored its weights.
_STORAGE = ("quantization_config", "torch_dtype", "dtype", "_name_or_path")
_TOKENIZER_ENDINGS = (".json", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class Converted:
    """A written folder, and the bytes of each component's weights by name."""

    folder: ModelFolder
    num_bytes: dict[str, int]


def convert(model: ModelFolder, target: Path, progress: Progress | None = None) -> Converted:
    """Write a model as a new folder `target`, with a manifest, and check it by reading it again.

    `progress` is called with bytes and total bytes, of writing and then of checking; it may raise to stop. The folder
    appears under its name when it is whole; before, it is a hidden one beside it, which is removed after an error and by
    the next call. Raises OutputError if `target` exists or cannot be written, WeightsError, ModelNotFoundError.
    """
    target = target.expanduser().absolute()
    if target.exists() or target.is_symlink():
        raise OutputError(f"{target} exists; nothing is overwritten.", hint="Name a new folder.")
    entries = _entries(model)
    total = sum(entry.num_bytes for listed in entries.values() for entry in listed)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, 2 * total)

    try:
        make_folder(target.parent)
        free = shutil.disk_usage(target.parent).free
        if total > free:
            raise OutputError(f"{target} needs {format_bytes(total)}; {target.parent} has {format_bytes(free)} free.")
        with _partial(target) as folder:
            hashes: dict[str, str] = {}
            for component, listed in entries.items():
                (folder / component).mkdir(parents=True)
                path, source = folder / component / FILES[component], getattr(model, component)
                hashes |= {f"{component}/{k}": v for k, v in write_weights(path, source, listed, wrote).items()}
            _write_configs(model, folder)
            _write_tokenizer(model, folder / "tokenizer")
            _check(model, folder, target.name, hashes, None if progress is None else _second_half(progress))
            sync_folder(folder)
            folder.rename(target)
            sync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    num_bytes = {component: sum(entry.num_bytes for entry in listed) for component, listed in entries.items()}
    return Converted(open_folder(target, target.name), num_bytes)


def _second_half(progress: Progress) -> Progress:
    return lambda done, total: progress(total + done, 2 * total)


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `target`, and remove it at the end if it is still there. Raises OutputError if
    another process writes the same target."""
    folder = target.with_name(f".{target.name}.partial")
    lock = FileLock(folder.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"Another process is writing {target}.") from None
    try:
        if folder.exists():  # of a process that was killed
            shutil.rmtree(folder)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _entries(model: ModelFolder) -> dict[str, list[Entry]]:
    """Return the tensors to write of each component. Raises WeightsError if they are not those of the specification."""
    with meta_init():
        modules = {"transformer": WanTransformer(model.spec.transformer), "vae": WanVAE(model.spec.vae)}
    for component, module in modules.items():
        getattr(model, component).check({name: tuple(p.shape) for name, p in module.named_parameters()})
    check_shapes(model)
    check_tied_embedding(model)
    found: dict[str, list[Entry]] = {}
    for component in COMPONENTS:
        tensors = getattr(model, component).tensors
        found[component] = [
            Entry(
                name,
                EMBEDDING if name == EMBEDDING_COPY else name,
                info.shape,
                _dtype(component, name, info.dtype),
            )
            for name, info in tensors.items()
            if not (name == EMBEDDING_COPY and EMBEDDING in tensors)
        ]
    return found


def _dtype(component: str, name: str, stored: str) -> str:
    """Return the dtype to write a tensor in. `stored`: its dtype in the source."""
    if component == "vae":
        return "F32"
    if component == "text_encoder" or stored == "BF16":
        return "BF16"
    large = WanTransformer.parameter_dtype(name, torch.bfloat16) == torch.bfloat16
    return "BF16" if large else "F32"


def _write_configs(model: ModelFolder, folder: Path) -> None:
    spec = model.spec
    for component in COMPONENTS:
        known = getattr(spec, component)
        shapes = {f.name: getattr(known, f.name) for f in fields(known) if f.name not in ("attention", "key_share")}
        own = {k: v for k, v in model.config(component).items() if k not in _STORAGE}
        _write_json(folder / component / "config.json", _CONFIGS[component] | own | shapes)
    index = model.path / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.is_file() and "transformer" not in model.parts else None
    tokenizer = model.tokenizer / "tokenizer_config.json"
    kind = read_json(tokenizer).get("tokenizer_class") if tokenizer.is_file() else None
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": pipeline or PIPELINES[0],
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", kind or "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", *CLASSES["transformer"]],
            "vae": ["diffusers", *CLASSES["vae"]],
        },
    )
    scheduler = {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": spec.defaults.flow_shift, "num_train_timesteps": 1000, "solver_order": 2, "solver_type": "bh2",
        "predict_x0": True, "final_sigmas_type": "zero",
    }  # fmt: skip
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if spec.defaults != defaults_for(replace(spec.transformer, attention="dense", key_share=1.0)):
        _write_json(folder / DEFAULTS_FILE, {f.name: getattr(spec.defaults, f.name) for f in fields(spec.defaults)})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(model: ModelFolder, folder: Path) -> None:
    folder.mkdir()
    if model.sentencepiece is not None:
        Tokenizer(model.tokenizer, model.sentencepiece).save(folder)
        (folder / "spiece.model").write_bytes(model.sentencepiece)
        return
    for path in sorted(model.tokenizer.iterdir()):
        if path.is_file() and path.name.endswith(_TOKENIZER_ENDINGS):
            shutil.copyfile(path, folder / path.name)


def _check(
    model: ModelFolder, folder: Path, name: str, hashes: dict[str, str], progress: Progress | None
) -> None:  # fmt: skip
    """Read a written folder again, and give it its manifest. Raises WeightsError if it is not the source's model."""
    damaged, _ = find_damaged(folder, hashes, None, progress)
    if damaged:
        raise WeightsError(f"{', '.join(damaged)} cannot be read as written: the disk or the memory is damaged.")
    found = open_folder(folder, name)
    found.check_complete()
    if found.spec != replace(model.spec, name=name):
        raise WeightsError(
            f"{name} would not be run as {model.name} is: its own name says what its tensors and configs do not.",
            hint=f"End the folder's name with {model.name.rpartition('/')[2]}.",
        )
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    write_manifest(folder, {path: hashes.get(path) or file_sha256(folder / path) for path in written})

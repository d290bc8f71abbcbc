"""Encodes prompts to embeddings, and caches the embeddings on disk."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

import torch

from wanduet.errors import (
    CancelledError,
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    OutputError,
    WeightsError,
)
from wanduet.family.spec import ModelSpec
from wanduet.footprint.phases import text_compute_dtype
from wanduet.kernels.dit.weight import FORMATS
from wanduet.media.embeddings import PromptEmbeds, load_embeddings, save_embeddings
from wanduet.media.files import UnreadableFileError
from wanduet.models.text.tokenizer import TokenizedPrompt, Tokenizer, clean_text
from wanduet.models.text.umt5 import EMBEDDING, EMBEDDING_COPY, FINAL_NORM, Residency, TextEncoder
from wanduet.runtime.gil import finish_unless
from wanduet.runtime.release import release_models
from wanduet.weights.diffusers import GIVE_TOKENIZER, ModelFolder
from wanduet.weights.hub import verify_manifest
from wanduet.weights.source import FETCH_MODEL, fetch_again

log = logging.getLogger(__name__)

FEED_FORWARD = "gated-gelu"  # of UMT5; encoders with another feed-forward have other tensors

ShouldCancel = Callable[[], bool]
OnLayer = Callable[[int, int], None]  # layers done, layers in all
Use = Callable[[], AbstractContextManager[None]]


class PromptEncoder(Protocol):
    """Encodes prompts for the engine."""

    def encode(
        self,
        texts: Sequence[str],
        should_cancel: ShouldCancel | None = None,
        on_layer: OnLayer | None = None,
        max_tokens: int | None = None,
    ) -> list[PromptEmbeds]:
        """Return the embeddings of each text, truncated to `max_tokens` (None: the model's limit).

        `should_cancel` returning True stops the work. `on_layer(done, total)` is called after each layer.
        Raises CancelledError, WeightsError.
        """


class CachedPromptEncoder:
    """A checkpoint's tokenizer and UMT5 encoder with a cache. They are loaded for the first prompt not in the cache."""

    def __init__(
        self,
        folder: ModelFolder,
        dtype: str,
        residency: Residency,
        cache: Path | None,
        device: str = "cpu",
        use_device: Use = nullcontext,
    ) -> None:
        """`cache`: the folder for cached embeddings; None disables the cache. Its parent gets `verified.json`, the
        record of verified weights files. `use_device`: makes a context in which `device` may be used."""
        self._folder, self._dtype, self._residency, self._cache = folder, dtype, residency, cache
        self._device, self._use_device = device, use_device
        self._tokenizer: Tokenizer | None = None
        self._encoder: TextEncoder | None = None

    def encode(
        self,
        texts: Sequence[str],
        should_cancel: ShouldCancel | None = None,
        on_layer: OnLayer | None = None,
        max_tokens: int | None = None,
    ) -> list[PromptEmbeds]:
        """See PromptEncoder. All texts that are not in the cache share one pass through the layers."""
        limit = max_tokens or self._folder.spec.text_len
        found = [self._from_cache(text, limit) for text in texts]
        if should_cancel is not None and not all(found) and not finish_unless(should_cancel, _import_libraries):
            raise CancelledError("Cancelled before the text was encoded.")
        prompts = {i: self._tokenize(text, limit) for i, text in enumerate(texts) if found[i] is None}
        if prompts:
            hidden = self._encode([prompt.ids for prompt in prompts.values()], should_cancel, on_layer)
            for (index, prompt), embeds in zip(prompts.items(), hidden, strict=True):
                if not bool(torch.isfinite(embeds).all()):
                    raise WeightsError("The text encoder gave NaN or infinity: its weights are damaged.")
                made = PromptEmbeds(embeds.float(), prompt.text, prompt.cut, self._folder.text_fingerprint, self._dtype)
                found[index] = made
                self._keep(made, limit)
        return [one for one in found if one is not None]

    def _encode(
        self, ids: Sequence[Sequence[int]], should_cancel: ShouldCancel | None, on_layer: OnLayer | None
    ) -> list[torch.Tensor]:
        if self._device != "cpu":
            try:
                with self._use_device():
                    return self._load().encode(ids, should_cancel=should_cancel, on_layer=on_layer)
            except torch.OutOfMemoryError as error:
                problem = str(error).split(". ")[0]
            # Outside the except block, whose traceback keeps the tensors alive.
            log.warning("The text encoder found too little memory on %s (%s). The CPU goes on.", self._device, problem)
            self.release()
            self._device, self._residency = "cpu", "streamed"
        return self._load().encode(ids, should_cancel=should_cancel, on_layer=on_layer)

    def release(self) -> None:
        """Free the weights; the next new prompt loads them again. No thread may encode meanwhile."""
        self._encoder = None
        release_models()

    def _tokenize(self, text: str, limit: int) -> TokenizedPrompt:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer(text, limit)

    def _load_tokenizer(self) -> Tokenizer:
        try:
            return Tokenizer(self._folder.tokenizer, self._folder.sentencepiece)
        except Exception as error:  # the tokenizers library raises plain exceptions, some of them of many lines
            lines = str(error.__cause__ or error).strip().splitlines()
            reason = lines[0].strip(" :.") if lines else type(error).__name__
            raise ModelNotFoundError(
                f"{self._folder.tokenizer} holds no tokenizer that can be read: {reason}.",
                hint=GIVE_TOKENIZER
                if self._folder.is_given("tokenizer")
                else f"It needs a tokenizer.json. {FETCH_MODEL}",
            ) from error

    def _load(self) -> TextEncoder:
        if self._encoder is None:
            # Verify before the first use: embeddings from damaged weights would stay in the cache.
            remember = None if self._cache is None else self._cache.parent / "verified.json"
            verify_manifest(self._folder, remember, ("text_encoder", "tokenizer"))
            check_shapes(self._folder)
            check_tied_embedding(self._folder)
            config = self._folder.config("text_encoder")
            try:
                dtype = getattr(torch, text_compute_dtype(self._dtype))
                encoder = TextEncoder(
                    config,
                    self._folder.text_encoder,
                    dtype,
                    self._residency,
                    device=torch.device(self._device),
                    format=FORMATS.get(self._dtype),
                )
            except Exception as error:  # transformers checks its configs with errors of its own
                path = self._folder.part("text_encoder") / "config.json"
                raise ModelNotFoundError(f"{path} is not understood: {error}.") from error
            self._encoder = encoder
        return self._encoder

    def path_of(self, text: str, max_tokens: int | None = None) -> Path | None:
        """Return the path of a text's embeddings in the cache; None without a cache."""
        if self._cache is None:
            return None
        limit = max_tokens or self._folder.spec.text_len
        key = f"{clean_text(text)}\0{self._folder.text_fingerprint}\0{self._dtype}\0{limit}"
        return self._cache / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def adopt(self, prompt: PromptEmbeds, name: str) -> None:
        """Put embeddings that were made before into the cache, under their prompt; `name` is that of their file, for errors.

        Raises InvalidRequestError for those of another text encoder, or computed in another dtype; ConfigError without a
        cache; OutputError.
        """
        path = self.path_of(prompt.text)
        if path is None:
            raise ConfigError("--embeddings needs the cache of embeddings.", hint="Leave out --no-cache-embeddings.")
        shape = (self._folder.spec.text_len, self._folder.spec.text_encoder.d_model)
        fits = prompt.embeds.shape[0] <= shape[0] and prompt.embeds.shape[1] == shape[1]
        if prompt.encoder != self._folder.text_fingerprint or not fits:
            raise InvalidRequestError(
                "embeddings", name, "embeddings of this model's text encoder; these are of another"
            )
        if prompt.dtype != self._dtype:
            allowed = f"embeddings computed in {self._dtype}, or --text-encoder-dtype {prompt.dtype}"
            raise InvalidRequestError("embeddings", name, allowed)
        save_embeddings(path, prompt)

    def _from_cache(self, text: str, limit: int) -> PromptEmbeds | None:
        path = self.path_of(text, limit)
        try:
            if path is None or not path.exists():
                return None
            found = load_embeddings(path)
        except (UnreadableFileError, OSError) as error:  # a damaged entry is encoded again
            log.warning("%s It is made again.", error)
            return None
        fits = found.embeds.shape[1] == self._folder.spec.text_encoder.d_model and found.embeds.shape[0] <= limit
        belongs = (found.text, found.encoder) == (clean_text(text), self._folder.text_fingerprint)
        return found if fits and belongs else None

    def _keep(self, prompt: PromptEmbeds, limit: int) -> None:
        path = self.path_of(prompt.text, limit)
        if path is not None:
            with suppress(OutputError):  # a full disk costs the cache, not the job
                save_embeddings(path, prompt)


class RandomPromptEncoder:
    """The prompt encoder of a model without one (`random:1.3b`): noise with one token per word, plus one."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def encode(
        self,
        texts: Sequence[str],
        should_cancel: ShouldCancel | None = None,
        on_layer: OnLayer | None = None,
        max_tokens: int | None = None,
    ) -> list[PromptEmbeds]:
        """See PromptEncoder. The same text gives the same noise."""
        if should_cancel is not None and should_cancel():
            raise CancelledError("Cancelled before the text was encoded.")
        return [self._embed(clean_text(text), max_tokens or self._spec.text_len) for text in texts]

    def _embed(self, text: str, limit: int) -> PromptEmbeds:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        count = min(len(text.split()) + 1, limit)
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(count, self._spec.text_encoder.d_model, generator=generator, dtype=torch.float32) * 0.1
        return PromptEmbeds(embeds, text, "", "random", "float32")


def _import_libraries() -> None:
    """Import the libraries of tokenizer and encoder; the first import takes seconds."""
    from transformers import AutoTokenizer, UMT5Config  # noqa: F401
    from transformers.models.umt5.modeling_umt5 import UMT5Block  # noqa: F401


def check_shapes(folder: ModelFolder) -> None:
    """Check that the text encoder's files have exactly the tensors of its config, in their shapes.

    Raises WeightsError, or ModelNotFoundError for another type of encoder.
    """
    kind = folder.config("text_encoder").get("feed_forward_proj", FEED_FORWARD)
    if kind != FEED_FORWARD:
        raise ModelNotFoundError(
            f"{folder.part('text_encoder') / 'config.json'}: feed_forward_proj={kind!r} is not supported "
            f"(only {FEED_FORWARD!r})."
        )
    spec, shapes = folder.spec.text_encoder, folder.text_encoder.shapes
    inner, width = spec.num_heads * spec.d_kv, spec.d_model
    attention, feed_forward = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    layer = {
        **{f"{attention}.{name}.weight": (inner, width) for name in "qkv"},
        f"{attention}.o.weight": (width, inner),
        f"{attention}.relative_attention_bias.weight": (spec.relative_attention_num_buckets, spec.num_heads),
        "layer.0.layer_norm.weight": (width,),
        **{f"{feed_forward}.{name}.weight": (spec.d_ff, width) for name in ("wi_0", "wi_1")},
        f"{feed_forward}.wo.weight": (width, spec.d_ff),
        "layer.1.layer_norm.weight": (width,),
    }
    expected = {f"encoder.block.{i}.{name}": shape for i in range(spec.num_layers) for name, shape in layer.items()}
    expected[FINAL_NORM] = (width,)
    only_copy = EMBEDDING_COPY in shapes and EMBEDDING not in shapes
    expected[EMBEDDING_COPY if only_copy else EMBEDDING] = (spec.vocab_size, width)
    folder.text_encoder.check(expected, ignore=(EMBEDDING, EMBEDDING_COPY))


def check_tied_embedding(folder: ModelFolder) -> None:
    """Check that both copies of the embedding are equal, if a checkpoint has two: otherwise prompts become noise.

    (https://github.com/huggingface/diffusers/issues/13105.) Compares a few rows. Raises WeightsError.
    """
    shapes = folder.text_encoder.shapes
    if EMBEDDING in shapes and EMBEDDING_COPY in shapes:
        rows = sorted({0, 1, 2, shapes[EMBEDDING][0] // 2, shapes[EMBEDDING][0] - 1})
        both = [folder.text_encoder.read_rows(name, rows, torch.float32) for name in (EMBEDDING, EMBEDDING_COPY)]
        if not torch.equal(*both):
            raise WeightsError(
                f"The text encoder's {EMBEDDING} and {EMBEDDING_COPY} differ: prompts would become noise.",
                hint=fetch_again(folder.text_encoder.tensors[EMBEDDING].file),
            )

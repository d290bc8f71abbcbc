"""`--embeddings`: prompts whose embeddings `wanduet encode` has written are not encoded again."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.request import GenerationRequest
from wanduet.untrusted import cut

if TYPE_CHECKING:
    from wanduet.engine.pipeline import Engine

EXAMPLE = 'For example: wanduet generate "a red circle moving left on a black background" --model miniature'


def prompt_of(prompt: str | None, embeddings: Sequence[Path]) -> str:
    """Return the prompt, or if there is none that of the first file of embeddings.

    Raises ConfigError if there is neither, UnreadableFileError.
    """
    if prompt is not None:
        return prompt
    if not embeddings:
        raise ConfigError("A prompt is missing.", hint=EXAMPLE)
    from wanduet.media.embeddings import load_embeddings

    return load_embeddings(embeddings[0]).text


def use_embeddings(files: Sequence[Path], engine: "Engine", requests: Iterable[GenerationRequest]) -> None:
    """Put the embeddings of files into the engine's cache, for the prompts of requests.

    Raises InvalidRequestError for a file of another text encoder, of another precision, or of a prompt that no request
    has; ConfigError without a cache; UnreadableFileError, OutputError.
    """
    if not files:
        return
    from wanduet.media.embeddings import load_embeddings
    from wanduet.models.text.tokenizer import clean_text
    from wanduet.runtime.text_host import CachedPromptEncoder

    prompts: set[str] = set()
    encoders: list[CachedPromptEncoder] = []
    for request in requests:
        resolved = engine.models.resolve(request)
        prompts |= {clean_text(resolved.prompt), clean_text(resolved.negative_prompt)}
        encoder = engine.models.text(engine.plan(request).text)
        if not isinstance(encoder, CachedPromptEncoder):
            raise ConfigError(
                f"{engine.models.spec.name} of random weights has no text encoder.", hint="Leave out --embeddings."
            )
        if encoder not in encoders:
            encoders.append(encoder)
    for file in files:
        prompt = load_embeddings(file)
        if prompt.text not in prompts:
            allowed = f"embeddings of the prompt or the negative prompt; these are of {cut(prompt.text)!r}"
            raise InvalidRequestError("embeddings", str(file), allowed)
        for encoder in encoders:
            encoder.adopt(prompt, str(file))

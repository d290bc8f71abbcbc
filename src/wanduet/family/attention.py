"""Self-attention in 8 bits as a request names it. Does not import torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from wanduet.errors import InvalidRequestError
from wanduet.family.spec import ModelSpec
from wanduet.family.step_caches import OFF
from wanduet.request_fields import Shown

FIELD = "quantize_attention"
QuantizeAttention = Literal["off", "int8", "int8-fast"]
FORMATS = ("int8", "int8-fast")  # from the smallest error to the fastest

AttentionField = Annotated[
    QuantizeAttention,
    Shown(row=7, label="Attention", off=OFF),
    Field(
        description="Compute the scores of self-attention in 8 bits, in place of the engine's attention: int8 or the less "
        "accurate int8-fast (GPUs of compute capability 8.0 and later; on Hopper the exact default is faster). Another video. A "
        "loss budget may choose it."
    ),
]


def attention_for(requested: str, configured: str) -> str:
    """Return the attention back end of a job, from the request's field and the engine's setting."""
    return configured if requested == OFF else requested


def check_quantize_attention(fields: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise InvalidRequestError for weights that have a sparse attention of their own."""
    attention = spec.transformer.attention
    if fields[FIELD] != OFF and attention != "dense":
        allowed = f"{OFF} with these weights, whose self-attention is {attention.upper()}"
        raise InvalidRequestError(FIELD, fields[FIELD], allowed, OFF)

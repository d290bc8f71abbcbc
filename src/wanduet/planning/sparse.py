"""Why self-attention is sparse or in 8 bits, for a plan's list of choices."""

from wanduet.family.attention import FIELD
from wanduet.family.sparsity import ALL, first_sparse_step, kept_share, own_share
from wanduet.family.spec import ModelSpec
from wanduet.family.step_caches import OFF
from wanduet.planning.cost import attention_speed
from wanduet.planning.hardware import DeviceInfo
from wanduet.planning.plan import Choice
from wanduet.request import ResolvedRequest


def sparse_choice(request: ResolvedRequest, spec: ModelSpec, by: str) -> Choice | None:
    """Return the choice; None if self-attention is dense. `by`: who has set the request's share."""
    attention = spec.transformer.attention
    if attention != "dense":
        share = own_share(spec.transformer, request.sparse)
        where = f"self-attention reads {share:.0%} of the key blocks in all steps, by {attention.upper()}"
        if request.sparse == ALL:
            return Choice("sparse", share, f"as these weights are trained: {where}")
        return Choice("sparse", share, f"{by}: {where}; these weights are trained for {spec.transformer.key_share:.0%}")
    if request.sparse == ALL:
        return None
    size = (request.generated_height, request.generated_width, request.num_frames)
    kept = kept_share(request.sparse, spec.num_tokens(*size))
    first = first_sparse_step(request.first_step, request.num_denoising_steps)
    why = f"self-attention reads {kept:.0%} of the key blocks from step {first + 1} on, but in the first block"
    return Choice("sparse", request.sparse, f"{by}: {why}; the video differs from the exact one")


def attention_choice(request: ResolvedRequest, by: str, device: DeviceInfo) -> Choice | None:
    """Return why the scores of self-attention are in 8 bits; None if they are not. `by`: who has set the request's field, unless
    that was its loss budget. `device`: of the transformer."""
    chosen = request.quantize_attention
    if chosen == OFF:
        return None
    by = attention_by(request, by)
    loss = f"; {request.price}" if request.speed is None and request.price is not None else ""
    why = f"{by}: self-attention's scores are in 8 bits{loss}; the video differs from the exact one"
    times = attention_speed(request, device)
    if times is None:
        return Choice(
            FIELD, chosen, f"{why}; the seconds are those of exact attention, as such a device was not measured"
        )
    return Choice(FIELD, chosen, f"{why}; measured on such a card, it is {times:.2f} times as fast as exact attention")


def attention_by(request: ResolvedRequest, by: str) -> str:
    """Return who has chosen the attention: `by`, or the request's loss budget."""
    if request.quantize_attention == OFF or request.loss_budget is None:
        return by
    return f"part of the fastest that is known to keep {request.loss_budget:g} dB here"

"""Why self-attention is sparse, for a plan's list of choices."""

from wanduet.family.sparsity import ALL, first_sparse_step, kept_share, own_share
from wanduet.family.spec import ModelSpec
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

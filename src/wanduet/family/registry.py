"""Models that are known by name, without their files."""

from dataclasses import replace

from wanduet.family import wan21
from wanduet.family.distilled import FEW_STEP, FewStep
from wanduet.family.spec import GenerationDefaults, ModelSpec, TransformerSpec


def with_few_steps(spec: ModelSpec, row: FewStep) -> ModelSpec:
    """Return the spec of few-step weights that were made from a model's."""
    return replace(
        spec,
        name=row.name,
        transformer=replace(spec.transformer, attention=row.attention, key_share=row.key_share),
        defaults=replace(spec.defaults, **row.defaults()),
    )


def with_few_step_lora(spec: ModelSpec, row: FewStep) -> ModelSpec:
    """Return the spec of a model with a few-step LoRA, whose sampling is the default."""
    return replace(spec, defaults=replace(spec.defaults, **row.defaults(), of_lora=not spec.defaults.timesteps))


MEMBERS = wan21.MEMBERS
DEFAULT_MODEL = MEMBERS[0].hub_id
RANDOM_SPECS = {member.random_name: member.spec for member in MEMBERS}
# And the smallest with each attention that weights are trained for: `random:1.3b-vsa`, `random:1.3b-sla`.
RANDOM_SPECS |= {
    f"{MEMBERS[0].random_name}-{row.attention}": with_few_steps(MEMBERS[0].spec, row)
    for row in FEW_STEP
    if row.attention != "dense" and row.keys
}
RANDOM_NAMES = {member.hub_id: member.random_name for member in MEMBERS}  # published hub id: random model of its shapes


def find_spec(model: str) -> ModelSpec | None:
    """Return the spec of a published hub id or of a random model's name; None for any other name."""
    return RANDOM_SPECS.get(RANDOM_NAMES.get(model, model))


def defaults_for(transformer: TransformerSpec) -> GenerationDefaults:
    """Return the defaults of the member with these shapes; of the default model if there is none."""
    return next((m.spec.defaults for m in MEMBERS if m.spec.transformer == transformer), MEMBERS[0].spec.defaults)

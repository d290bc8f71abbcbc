"""What is measured: the named speeds, single accelerators, other guidance, fewer steps, and two controls, each as a change of
a request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wanduet.config import Weights
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.attention import FIELD, FORMATS
from wanduet.family.guidance import GuidanceMode
from wanduet.family.sparsity import ALL
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import SPEEDS
from wanduet.family.step_caches import NAMES, OFF
from wanduet.kernels.dit.quantized import DTYPES
from wanduet.meta.prices import settings_key
from wanduet.request import GenerationRequest, ResolvedRequest

Kind = Literal["rungs", "accelerators", "changes", "fewer_steps", "controls"]
BF16_FLOOR, ANOTHER_SEED = "bf16_floor", "another_seed"
SEED_DISTANCE = 1_000_000
GATES = (0.7, 0.5)
INTERVALS = ("0.1-0.7",)
MODES: tuple[GuidanceMode, ...] = ("cfg", "cfg-zero", "apg")
KEPT = (0.5, 0.2)  # shares of the keys that sparse attention reads
# Of the steps. What else a user may do to be as fast, and by far the worst bargain.
SHARES = (0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make a video with less work, another guidance, or a control. `fields` replace those of the exact request; `weights` is
    the format of the weights in memory, if not the exact job's."""

    kind: Kind
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights | None = None

    @property
    def uses_other_kernels(self) -> bool:
        """Whether it is the exact job with other kernels."""
        return self.name == BF16_FLOOR

    def request(self, exact: GenerationRequest) -> GenerationRequest:
        """Return the request, from the exact one of the same prompt and seed. Raises InvalidRequestError."""
        fields = dict(self.fields)
        if self.name == ANOTHER_SEED:
            fields["seed"] = (exact.seed or 0) + SEED_DISTANCE
        return GenerationRequest.parse(**exact.model_dump() | fields)

    def settings(self, resolved: ResolvedRequest) -> dict[str, Any]:
        """Return what distinguishes it from the exact job, of the same form for equal variants."""
        found: dict[str, Any] = resolved.approximations
        if self.kind == "fewer_steps":
            found["num_inference_steps"] = resolved.num_inference_steps
        if self.kind == "changes":
            found["guidance_mode"] = resolved.guidance_mode
        if self.weights is not None:
            found["weights"] = self.weights
        return found | ({"control": self.name} if self.kind == "controls" else {})


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant that a model can run; `key`: in `Prices.rows`."""

    variant: Variant
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The key of its rows."""
        return settings_key(self.settings)


def all_variants(
    steps: int, asked: Mapping[str, Any], weights: Weights, with_attention: bool = False
) -> list[Variant]:  # fmt: skip
    """Return all variants of an exact job of so many steps with weights of this format. `asked`: a set of
    approximations that the user wants measured beside them. `with_attention`: each speed with attention in 8 bits too, among
    which a loss budget chooses."""
    found = [Variant("rungs", speed.name, speed.fields) for speed in SPEEDS]
    found += [Variant("accelerators", name, {"step_cache": name}) for name in NAMES]
    found += [Variant("accelerators", f"guidance gate {share:g}", {"guidance_gate": share}) for share in GATES]
    found += [
        Variant("accelerators", f"guidance interval {steps}", {"guidance_interval": steps}) for steps in INTERVALS
    ]
    found += [Variant("accelerators", f"sparse {share:g}", {"sparse": share}) for share in KEPT]
    found += [Variant("accelerators", f"products in {name}", {"quantize": name}) for name in DTYPES]
    found += [Variant("accelerators", f"attention in {name}", {FIELD: name}) for name in FORMATS]
    if with_attention:
        found += [
            Variant("accelerators", f"{speed.name}, attention in {name}", {**speed.fields, FIELD: name})
            for speed in SPEEDS[1:]
            for name in FORMATS
        ]
    found.append(Variant("accelerators", "low resolution first", {"low_res_first": True}))
    if weights == "auto":
        found.append(Variant("accelerators", "weights q8", weights="q8"))
    if asked:
        found.append(Variant("accelerators", "as asked", asked))
    found += [Variant("changes", f"guidance mode {mode}", {"guidance_mode": mode}) for mode in MODES]
    fewer = sorted({max(1, round(share * steps)) for share in SHARES} - {steps}, reverse=True)
    found += [
        Variant("fewer_steps", f"{count} step{'s' * (count > 1)}", {"num_inference_steps": count}) for count in fewer
    ]
    return [*found, Variant("controls", BF16_FLOOR), Variant("controls", ANOTHER_SEED)]


def possible(
    variants: Sequence[Variant], exact: GenerationRequest, spec: ModelSpec, plan: Callable[[GenerationRequest], object]
) -> tuple[list[Measured], dict[str, str]]:
    """Return the variants that the model and this machine can run, and for each other one, by name, what is allowed
    instead. `plan` raises InvalidRequestError or ConfigError for a request that this machine cannot run."""
    found, refused = [], {}
    for variant in variants:
        if variant.kind == "changes" and all(getattr(exact, name) == value for name, value in variant.fields.items()):
            continue  # no change
        try:
            resolved = variant.request(exact).resolve(spec)
            if resolved.quantize != OFF or resolved.quantize_attention != OFF or resolved.sparse < ALL:
                plan(variant.request(exact))
        except InvalidRequestError as error:
            refused[variant.name] = error.allowed
            continue
        except ConfigError as error:
            refused[variant.name] = error.message.removesuffix(".")
            continue
        found.append(Measured(variant, variant.settings(resolved)))
    return found, refused

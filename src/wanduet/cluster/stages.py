"""Decides whether to dedicate nodes to single stages, from predicted seconds. Pure: no clock, database or Ray.

Together, a replica encodes, denoises and decodes its jobs itself. Apart, encoders on nodes without GPUs encode new
prompts for the replicas' hosts, and some nodes only decode what others denoise. Both are optional: a replica that finds
no embeddings encodes, and one that finds no free decoder decodes. So only throughput matters, and for equal cards it
never improves: what a card gains by leaving its decodes to another, the other loses by not denoising.

Rates are jobs a second with a queue that is never empty, as a fluid model: each replica leaves the same fraction of its
decodes, as large as the decoders can take.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Literal

from wanduet.cluster.shapes import Stage

Mode = Literal["auto", "together", "apart"]
MARGIN = 0.05  # predictions are rough: smaller gains are ignored
HALVINGS = 30


@dataclass(frozen=True, slots=True)
class Costs:
    """Predicted seconds of a job's stages on one replica, inf if it does not fit.

    `overlaps`: a job is decoded while the next one is denoised, on another device.
    """

    denoise: float
    decode: float
    overlaps: bool = False

    def period(self, left: float = 0.0) -> float:
        """Return seconds between two jobs if a fraction `left` of the decodes is left to others."""
        decode = self.decode * (1.0 - left) if left < 1.0 else 0.0
        return max(self.denoise, decode) if self.overlaps else self.denoise + decode


@dataclass(frozen=True, slots=True)
class NodeCosts:
    """What one node could do: whole jobs on `replicas`, decodes of `decode` seconds on each of `decoders`, or encoding.

    `encode`: seconds between two new prompts on each of its replicas; `encode_dedicated`: on an encoder.
    """

    name: str = field(compare=False)
    replicas: int
    whole: Costs
    decoders: int = 0
    decode: float = inf
    encode: float = 0.0
    encode_dedicated: float = inf

    def rates(self, left: float) -> tuple[float, float]:
        """Return jobs a second with texts encoded here, and how many more with texts that an encoder encodes."""
        if not self.replicas or not isfinite(self.whole.denoise):
            return 0.0, 0.0
        possible = self.replicas / max(self.whole.period(left), 1e-9)
        own = min(possible, self.replicas / self.encode) if self.encode else possible
        return own, possible - own

    @property
    def decodes(self) -> float:
        """Decodes a second, as decoders."""
        return self.decoders / self.decode if self.decoders and isfinite(self.decode) else 0.0

    @property
    def encodes(self) -> float:
        """Prompts a second, as an encoder."""
        return 1.0 / self.encode_dedicated if isfinite(self.encode_dedicated) else 0.0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Which nodes are dedicated to a stage, the rates with and without that (jobs a second), and the reason."""

    stages: Mapping[str, Stage] = field(default_factory=dict)  # by node; the other nodes do all stages
    together: float = 0.0
    rate: float = 0.0
    left: float = 0.0  # fraction of the decodes that replicas leave to decoders
    reason: str = ""
    needed: frozenset[str] = frozenset()  # nodes that could not be dedicated, because some job fits no other node

    @property
    def apart(self) -> bool:
        """Whether any node is dedicated to a stage."""
        return bool(self.stages)

    @property
    def gain(self) -> float:
        """Gain of throughput over together: 0.25 is a quarter more."""
        return self.rate / self.together - 1.0 if self.together else (inf if self.rate else 0.0)


def plan_stages(
    nodes: Mapping[str, NodeCosts],
    *,
    mode: Mode = "auto",
    wishes: Mapping[str, Stage] | None = None,
    needed: frozenset[str] = frozenset(),
    before: Mapping[str, Stage] | None = None,
) -> StagePlan:
    """Choose a stage for each node.

    Returns together unless another choice is better by more than the margin; then the simplest choice that comes within
    the margin of the best. `wishes`: stages that operators requested for nodes; mode `apart` follows them whatever the
    rates are. `needed`: nodes that must do whole jobs, because some job fits no other node. `before`: the current
    choice, which is kept unless another is clearly better, because a change restarts replicas.
    """
    fleet = _Fleet(nodes, wishes or {}, needed)
    together, _ = fleet.rate({})
    if mode == "together":
        return StagePlan({}, together, together, 0.0, "together: asked for")
    encoders, decoders = fleet.encoders(), fleet.decoders()
    choices = list(_choices(encoders, decoders, fleet))
    if mode == "apart" and (wished := fleet.wished()):
        return fleet.plan(wished, together, labelled=True)
    best = max(choices, key=lambda stages: fleet.rate(stages)[0], default={})
    simplest: dict[str, Stage] = {}
    if (most := fleet.rate(best)[0]) > together * (1 + MARGIN):
        enough = max(together * (1 + MARGIN), most / (1 + MARGIN))
        simplest = next((stages for stages in choices if fleet.rate(stages)[0] > enough), best)
    kept = dict(before or {})
    may = {(name, "encode") for name in encoders} | {(name, "decode") for name in decoders}
    if kept and may.issuperset(kept.items()):
        rate = fleet.rate(kept)[0]
        if rate > together and rate * (1 + MARGIN) >= most:
            simplest = kept
    if simplest:
        return fleet.plan(simplest, together)
    return StagePlan({}, together, together, 0.0, fleet.why_together(best, together, bool(encoders), bool(decoders)))


def _choices(encoders: list[str], decoders: list[str], fleet: "_Fleet") -> Iterator[dict[str, Stage]]:
    """Yield choices, the simplest first: encoders, more and more decoders, both. Stop if a decoder gains nothing."""
    with_text: dict[str, Stage] = dict.fromkeys(encoders, "encode")
    if with_text:
        yield dict(with_text)
    for beside in ({}, with_text) if with_text else ({},):
        chosen: dict[str, Stage] = dict(beside)
        last = 0.0
        for name in decoders:
            chosen = {**chosen, name: "decode"}
            rate, _ = fleet.rate(chosen)
            if rate <= last:
                break
            last = rate
            yield chosen


class _Fleet:
    """The nodes' costs, and the rates of choices of stages."""

    def __init__(self, nodes: Mapping[str, NodeCosts], wishes: Mapping[str, Stage], needed: frozenset[str]) -> None:
        self._nodes = nodes
        self._wishes = wishes
        self._needed = needed

    def encoders(self) -> list[str]:
        """Return nodes that may encode: always all of them, since they can do nothing else."""
        return [name for name, node in self._nodes.items() if node.encodes and name not in self._needed]

    def decoders(self) -> list[str]:
        """Return nodes that may decode, those first that lose least: low rate of whole jobs for each decode."""
        may = [
            name
            for name, node in self._nodes.items()
            if node.decodes and name not in self._needed and self._wishes.get(name, "decode") == "decode"
        ]
        return sorted(may, key=lambda name: (self._nodes[name].rates(1.0)[0] / self._nodes[name].decodes, name))

    def wished(self) -> dict[str, Stage]:
        """Return the stages that operators requested, as far as possible."""
        able = {"encode": self.encoders(), "decode": self.decoders()}
        return {name: stage for name, stage in self._wishes.items() if name in able.get(stage, ())}

    def rate(self, stages: Mapping[str, Stage]) -> tuple[float, float]:
        """Return jobs a second, and the fraction of their decodes that is left to decoders."""
        whole = Counter(node for name, node in self._nodes.items() if stages.get(name, "all") == "all")
        decodes = sum(self._nodes[name].decodes for name, stage in stages.items() if stage == "decode")
        encodes = sum(self._nodes[name].encodes for name, stage in stages.items() if stage == "encode")

        def at(left: float) -> float:
            own = more = 0.0
            for node, count in whole.items():
                rates = node.rates(left)
                own, more = own + count * rates[0], more + count * rates[1]
            return own + min(encodes, more)

        if not decodes:
            return at(0.0), 0.0
        low, high = 0.0, 1.0
        if at(1.0) <= decodes:
            return at(1.0), 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * at(middle) <= decodes else (low, middle)
        return at(low), low

    def plan(self, stages: Mapping[str, Stage], together: float, labelled: bool = False) -> StagePlan:
        """Return a choice with its rate and reason: the gain, or the nodes' labels."""
        rate, left = self.rate(stages)
        plan = StagePlan(dict(stages), together, rate, left)
        parts = []
        decoding = [self._nodes[name] for name, stage in stages.items() if stage == "decode"]
        if decoding:
            cannot = all(not node.rates(0.0)[0] for node in decoding)
            reason = "cannot denoise this" if cannot else "do better at it than at denoising"
            reason = "as labelled" if labelled else reason
            parts.append(f"{_names(decoding)} decode {left:.0%} of the videos ({reason})")
        encoding = [self._nodes[name] for name, stage in stages.items() if stage == "encode"]
        if encoding:
            parts.append(
                f"{_names(encoding)} encode prompts ahead of the queue" + (" (as labelled)" if labelled else "")
            )
        gain = "nothing could be made together" if not isfinite(plan.gain) else f"{_percent(plan.gain)} throughput"
        return StagePlan(plan.stages, together, rate, left, f"apart: {' and '.join(parts)}; {gain}")

    def why_together(self, best: Mapping[str, Stage], together: float, may_encode: bool, may_decode: bool) -> str:
        """Return the reason why no node is dedicated."""
        if not may_encode and not may_decode:
            return "together: no node could do a stage only"
        gain = self.rate(best)[0] / together - 1.0 if together else 0.0
        kinds = {(node.whole, node.decode) for node in self._nodes.values() if node.decodes}
        reasons = []
        if may_decode:
            equal = len(kinds) == 1
            reasons.append(
                "equal cards gain nothing by sharing stages out" if equal else "cards do best with whole jobs"
            )
        if may_encode:
            reasons.append("the replicas' own hosts encode fast enough")
        return f"together: {' and '.join(reasons)}; the best way apart would bring {_percent(gain)}"


def _percent(gain: float) -> str:
    return f"{round(100 * gain):+d}%"  # rounding to int avoids -0


def _names(nodes: list[NodeCosts]) -> str:
    names = sorted({node.name for node in nodes})
    return ", ".join(names) if len(names) <= 3 else f"{len(nodes)} nodes"

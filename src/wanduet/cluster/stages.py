"""Whether the stages of jobs should live apart, from predicted seconds alone. Pure: no clock, no database, no Ray.

Together, a replica encodes, denoises and decodes its jobs itself. Apart, encoders on nodes without GPUs take new prompts
off the replicas' hosts, and whole nodes only decode what the others denoise. Neither takes anything away: a replica that
finds no embedding encodes, and one that finds no decoder free decodes. So the question is only whether it pays, and for
equal cards it never does: what a card gains by leaving its decodes to another, the other loses by not denoising.

Rates are those of a queue that never runs dry, in jobs a second, as a fluid: each replica hands on the same part of its
decodes, as large as the decoders can take.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Literal

from wanduet.cluster.shapes import Stage

Mode = Literal["auto", "together", "apart"]
MARGIN = 0.05  # predictions are rough: a gain below this is none
HALVINGS = 30


@dataclass(frozen=True, slots=True)
class Costs:
    """Predicted seconds of a job's stages on one replica, inf where it does not fit. `overlaps`: a job is decoded while
    the next is denoised, on a device of its own.
    """

    denoise: float
    decode: float
    overlaps: bool = False

    def period(self, left: float = 0.0) -> float:
        """Seconds between two jobs when the part `left` of the decodes is left to others."""
        decode = self.decode * (1.0 - left) if left < 1.0 else 0.0
        return max(self.denoise, decode) if self.overlaps else self.denoise + decode


@dataclass(frozen=True, slots=True)
class NodeCosts:
    """What one node could do of a job: as `replicas` that do all of it, as `decoders` of `decode` seconds each, as one
    encoder. `encode`: seconds between two new prompts on each of its replicas; `encode_alone`: on an encoder.
    """

    name: str = field(compare=False)
    replicas: int
    whole: Costs
    decoders: int = 0
    decode: float = inf
    encode: float = 0.0
    encode_alone: float = inf

    def rates(self, left: float) -> tuple[float, float]:
        """Jobs a second with their own text, and how many more it could make of prompts that are encoded elsewhere."""
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
        return 1.0 / self.encode_alone if isfinite(self.encode_alone) else 0.0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Which nodes do a stage only, the rates with and without that (jobs a second), and why, in words."""

    stages: Mapping[str, Stage] = field(default_factory=dict)  # by node; the others do all
    together: float = 0.0
    rate: float = 0.0
    left: float = 0.0  # the part of the decodes that replicas leave to decoders
    reason: str = ""
    needed: frozenset[str] = frozenset()  # nodes that had to be left out of it, for some job fits nowhere else

    @property
    def apart(self) -> bool:
        """Whether any node does a stage only."""
        return bool(self.stages)

    @property
    def gain(self) -> float:
        """Of throughput over together: 0.25 is a quarter more."""
        return self.rate / self.together - 1.0 if self.together else (inf if self.rate else 0.0)


def plan_stages(
    nodes: Mapping[str, NodeCosts],
    *,
    mode: Mode = "auto",
    wishes: Mapping[str, Stage] | None = None,
    needed: frozenset[str] = frozenset(),
    before: Mapping[str, Stage] | None = None,
) -> StagePlan:
    """Choose a stage for each node: together unless something beats it by more than the margin, and then the simplest
    that comes within the margin of the best.

    `wishes`: what operators said that nodes are for; with mode `apart` they are followed whatever the rates say.
    `needed`: nodes that must do whole jobs, since some job fits nowhere else. `before`: the choice so far, which is
    kept unless another is clearly better, for a change costs the replicas' time to come up.
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
    """From the simplest on: encoders, decoders by and by, both. A further decoder that brings nothing ends the row."""
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
    """The nodes' costs, and what a choice of stages would come to."""

    def __init__(self, nodes: Mapping[str, NodeCosts], wishes: Mapping[str, Stage], needed: frozenset[str]) -> None:
        self._nodes = nodes
        self._wishes = wishes
        self._needed = needed

    def encoders(self) -> list[str]:
        """Nodes that may encode: all of them at once, for they do nothing else."""
        return [name for name, node in self._nodes.items() if node.encodes and name not in self._needed]

    def decoders(self) -> list[str]:
        """Nodes that may decode, those first that lose least by it: they denoise nothing, or denoise slowest beside
        what they decode.
        """
        may = [
            name
            for name, node in self._nodes.items()
            if node.decodes and name not in self._needed and self._wishes.get(name, "decode") == "decode"
        ]
        return sorted(may, key=lambda name: (self._nodes[name].rates(1.0)[0] / self._nodes[name].decodes, name))

    def wished(self) -> dict[str, Stage]:
        """What operators said, where it can be done."""
        able = {"encode": self.encoders(), "decode": self.decoders()}
        return {name: stage for name, stage in self._wishes.items() if name in able.get(stage, ())}

    def rate(self, stages: Mapping[str, Stage]) -> tuple[float, float]:
        """Jobs a second, and the part of their decodes that is left to decoders."""
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
        """A choice with its rate and reason: that it pays, or that nodes were labelled so."""
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
        """The reason why nothing is to live apart."""
        if not may_encode and not may_decode:
            return "together: no node could do a stage only"
        gain = self.rate(best)[0] / together - 1.0 if together else 0.0
        kinds = {(node.whole, node.decode) for node in self._nodes.values() if node.decodes}
        said = []
        if may_decode:
            equal = len(kinds) == 1
            said.append("equal cards gain nothing by sharing stages out" if equal else "cards do best with whole jobs")
        if may_encode:
            said.append("the replicas' own hosts encode fast enough")
        return f"together: {' and '.join(said)}; the best way apart would bring {_percent(gain)}"


def _percent(gain: float) -> str:
    return f"{round(100 * gain):+d}%"  # a whole number knows no -0


def _names(nodes: list[NodeCosts]) -> str:
    names = sorted({node.name for node in nodes})
    return ", ".join(names) if len(names) <= 3 else f"{len(nodes)} nodes"

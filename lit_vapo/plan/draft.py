"""What a plan is made of: what the models hold, and phases that come on top of it."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from lit_vapo.models.pretrained import Pretrained, model_config
from lit_vapo.models.weightless import weightless
from lit_vapo.plan.dry_run import Found
from lit_vapo.plan.formulas import BANDWIDTH_USE, CUBLAS, UTILISATION, adam_bytes, seconds, sharded
from lit_vapo.plan.gpus import Gpu

# The columns of a table, from left to right.
PARTS = ("weights", "gradients", "optimiser", "casts", "activations", "cache", "logits", "workspace")
# Lightning drops the gradients of a step only when the next one has come to its way back.
OF_LIGHTNING = (1,)
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Setup:
    """Where a run is to run.

    Args:
        devices: Processes with a device each.
        sharded: FSDP2: weights, gradients and optimiser are divided among them. Otherwise each has all (DDP).
        precision: That of the trainer.
        on_cpu: On a CPU, which computes some things in another way.
    """

    devices: int = 1
    sharded: bool = False
    precision: str = "32-true"
    on_cpu: bool = False

    @property
    def mixed(self) -> torch.dtype | None:
        """The data type of autocast, `None` without it."""
        return MIXED.get(self.precision)


class Moment(NamedTuple):
    """A time at which a phase may take most.

    Attributes:
        parts: Bytes by part, besides what the models hold.
        gradients: Whether gradients are there.
    """

    parts: dict[str, float]
    gradients: bool = True


@dataclass
class Phase:
    """A part of an iteration, on one device.

    Attributes:
        name: What it is called.
        moments: Times at which it may take most.
        flops: Floating-point operations.
        traffic: Bytes read from memory, where that is what takes time.
        gathers: How often all weights cross the link, if they are sharded.
        exchanges: How often gradients do, once a weight update.
        backward: Passes that make gradients.
    """

    name: str
    moments: list[Moment]
    flops: float = 0.0
    traffic: float = 0.0
    gathers: float = 0.0
    exchanges: float = 0.0
    backward: float = 0.0


@dataclass
class Draft:
    """A run on one device that has all to itself.

    Attributes:
        weights: Bytes of all weights.
        trained: Bytes of those that are trained.
        gathered: Bytes that are whole for a while where weights are sharded.
        phases: What comes on top.
        half: Whether most products are in half precision.
        notes: What a reader should know.
        cut: Of what is trained, bytes that FSDP2 divides: whole models, not adapters and heads.
        whole: Of the weights, bytes that it does not divide.
    """

    weights: float
    trained: float
    gathered: float
    phases: list[Phase]
    half: bool
    notes: list[str] = field(default_factory=list)
    cut: float = 0.0
    whole: float = 0.0

    def stretched(self, other: Draft, by: float) -> Draft:
        """This draft and `by` times what another one has more than it: both with fewer blocks than are wanted.

        What a run takes is linear in the number of equal blocks.
        """

        def line(a: float, b: float) -> float:
            return a + by * (b - a)

        phases = []
        for one, two in zip(self.phases, other.phases, strict=True):
            moments = []
            for first, second in zip(one.moments, two.moments, strict=True):
                names = first.parts.keys() | second.parts.keys()
                parts = {name: line(first.parts.get(name, 0), second.parts.get(name, 0)) for name in names}
                moments.append(Moment(parts, first.gradients))
            flops, traffic = line(one.flops, two.flops), line(one.traffic, two.traffic)
            phases.append(replace(one, moments=moments, flops=flops, traffic=traffic))
        return replace(
            self,
            phases=phases,
            weights=line(self.weights, other.weights),
            trained=line(self.trained, other.trained),
            gathered=line(self.gathered, other.gathered),
            cut=line(self.cut, other.cut),
            whole=line(self.whole, other.whole),
        )


@dataclass
class Plan:
    """What each device of a run takes.

    Attributes:
        setup: Where it runs.
        phases: Name and bytes by part of each phase, all included.
        draft: What it was worked out from.
    """

    setup: Setup
    phases: dict[str, dict[str, float]]
    draft: Draft

    @property
    def peak(self) -> float:
        """Bytes of the phase that takes most."""
        return max(sum(parts.values()) for parts in self.phases.values())

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """Time of each phase in an iteration."""
        draft, out = self.draft, {}
        rate = UTILISATION * (gpu.half if draft.half else gpu.single)
        for phase in draft.phases:
            # Gradients go out and come back; those of what is cut go out with every pass, and stay where they belong.
            crossing = 2 * phase.exchanges * draft.trained
            if self.setup.sharded:
                crossing = 2 * phase.exchanges * (draft.trained - draft.cut) + phase.backward * draft.cut
                crossing += phase.gathers * (draft.weights - draft.whole)
            crossing *= (self.setup.devices - 1) / self.setup.devices
            work = seconds(phase.flops, rate, phase.traffic, BANDWIDTH_USE * gpu.bandwidth)
            out[phase.name] = max(work, crossing / gpu.link)
        return out


def planned(draft: Draft, setup: Setup) -> Plan:
    """What a draft comes to on each device of a setup."""
    devices = setup.devices if setup.sharded else 1
    # Where nothing is divided there is nothing to gather either.
    weights = draft.whole
    if draft.weights > draft.whole:
        weights += sharded(draft.weights - draft.whole, devices, draft.gathered)
    trained = draft.trained - draft.cut + sharded(draft.cut, devices, 0.0)
    # DistributedDataParallel sends gradients from buckets of its own.
    copies = 2 if setup.devices > 1 and not setup.sharded else 1
    phases = {}
    for phase in draft.phases:
        found = []
        for moment in phase.moments:
            gradients = copies * trained if moment.gradients else 0.0
            held = {"weights": weights, "gradients": gradients, "optimiser": adam_bytes(trained)}
            held["workspace"] = 0.0 if setup.on_cpu else CUBLAS
            found.append({part: held.get(part, 0.0) + moment.parts.get(part, 0.0) for part in PARTS})
        phases[phase.name] = max(found, key=lambda parts: sum(parts.values()))
    return Plan(setup, phases, draft)


def training_moments(found: Found, kept: float, step: float, without: Container[int]) -> list[Moment]:
    """The moments of a training pass and of the optimiser's step after it.

    Args:
        found: The pass, beside gradients: forward (0), back through the blocks (1), and what is left.
        kept: Bytes that are held besides.
        step: Bytes that the optimiser makes for a while.
        without: Numbers of the stretches in which no gradients are there, or come as activations go.
    """
    moments = []
    for number, parts in enumerate(found.moments):
        made = {name: size for name, size in parts.items() if name != "gradients"}
        made["workspace"] = made.get("workspace", 0.0) + kept
        moments.append(Moment(made, gradients=number not in without))
    return [*moments, Moment({"workspace": step + kept})]


# Depth.


def period(config: Any) -> int:
    """After how many blocks a model's kinds of blocks repeat.

    Examples:
        >>> from types import SimpleNamespace
        >>> period(SimpleNamespace(layer_types=["s", "s", "f", "s", "s", "f"])), period(SimpleNamespace())
        (3, 1)
    """
    kinds = list(getattr(config, "layer_types", None) or ())
    sizes = range(1, len(kinds) + 1)
    return next((p for p in sizes if all(kind == kinds[i % p] for i, kind in enumerate(kinds))), 1)


def stretched(base: Pretrained, uniform: bool, draft: Callable[[int], Draft]) -> Draft:
    """The draft of a model of many equal blocks, from drafts with few of them; otherwise that of all its blocks.

    Args:
        base: The model.
        uniform: Whether all blocks are treated alike.
        draft: Makes a draft with so many blocks; 0 for all.
    """
    with weightless():
        config = model_config(base)
    depth, step = int(config.num_hidden_layers), period(config)
    low, high = 2 * step, 3 * step
    if not uniform or depth <= high + 1:
        return draft(0)
    return draft(low).stretched(draft(high), (depth - low) / step)

"""What a plan is made of: what the models hold, and phases that come on top of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lit_vapo.models.pretrained import Pretrained, model_config
from lit_vapo.models.weightless import weightless
from lit_vapo.plan.formulas import BANDWIDTH_USE, UTILISATION, adam_bytes, seconds, sharded
from lit_vapo.plan.gpus import Gpu

# The columns of a table, from left to right.
PARTS = ("weights", "gradients", "optimiser", "casts", "activations", "cache", "logits", "workspace")
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


@dataclass
class Phase:
    """A part of an iteration, on one device.

    Attributes:
        name: What it is called.
        parts: Bytes at its peak by part, without what the models hold.
        flops: Floating-point operations.
        traffic: Bytes read from memory, where that is what takes time.
        gathers: How often all weights cross the link, if they are sharded.
        exchanges: How often gradients do, once a weight update.
        backward: Passes that make gradients.
        without_gradients: No gradients are there at the peak.
    """

    name: str
    parts: dict[str, float]
    flops: float = 0.0
    traffic: float = 0.0
    gathers: float = 0.0
    exchanges: float = 0.0
    backward: float = 0.0
    without_gradients: bool = False

    @property
    def peak(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


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
            names = one.parts.keys() | two.parts.keys()
            parts = {name: line(one.parts.get(name, 0), two.parts.get(name, 0)) for name in names}
            flops, traffic = line(one.flops, two.flops), line(one.traffic, two.traffic)
            phases.append(replace(one, parts=parts, flops=flops, traffic=traffic))
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
        held = {"weights": weights, "gradients": copies * trained, "optimiser": adam_bytes(trained)}
        if phase.without_gradients:
            held["gradients"] = 0.0
        phases[phase.name] = {part: held.get(part, 0.0) + phase.parts.get(part, 0.0) for part in PARTS}
    return Plan(setup, phases, draft)


# Depth.


def period(config: Any) -> int:
    """After how many blocks a model's kinds of blocks repeat.

    Example:
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


def larger(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The parts with the largest sum."""
    return max(found, key=lambda parts: sum(parts.values()))

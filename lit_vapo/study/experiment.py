"""What a study repeats and compares: the contract of all experiments, the record of one run, what is asked.

Nothing here needs scipy or statsmodels, so that the processes of a study need not load them.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple


class Repetition(NamedTuple):
    """One independent repetition of a setting.

    Attributes:
        number: Counted from 0.
        seed: Where all its random numbers come from, in [0, 2⁶³). All methods of the repetition share it.
    """

    number: int
    seed: int


def seed_of(seed: int, setting: str, repetition: int) -> int:
    """The seed of a repetition: another for each study, setting and repetition, and the same on every machine.

    Args:
        seed: The study's seed.
        setting: Name of the setting.
        repetition: Counted from 0.

    Returns:
        A number in [0, 2⁶³).
    """
    digest = hashlib.sha256(f"{seed}/{setting}/{repetition}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Record:
    """How one run of one method went.

    Attributes:
        method: Name of the method.
        setting: Name of the setting.
        repetition: Number of the repetition.
        seed: Its seed.
        kl: KL divergence from the reference along the run, in nats. The reference itself, at zero, need not be among
            them.
        true_return: True return of the policy at each of these, in units of the true reward.
        reference_return: True return of the reference, the same for all methods of the repetition.
        extra: Further figures of the run.
        final: Index of the policy that the run is judged by, as a list counts: the last point, if none is said.
    """

    method: str
    setting: str
    repetition: int
    seed: int
    kl: list[float]
    true_return: list[float]
    reference_return: float
    extra: dict[str, float] = field(default_factory=dict)
    final: int = -1

    def __post_init__(self) -> None:
        where = f"{self.setting}, {self.method}, repetition {self.repetition}"
        if not self.kl or len(self.kl) != len(self.true_return):
            sizes = f"{len(self.kl)} and {len(self.true_return)}"
            raise ValueError(f"{where}: expected kl and true_return of the same length >= 1, got {sizes}")
        if not -len(self.kl) <= self.final < len(self.kl):
            raise ValueError(f"{where}: expected final to be one of {len(self.kl)} points, got {self.final}")
        numbers = [*self.kl, *self.true_return, self.reference_return, *self.extra.values()]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{where}: expected finite numbers, got kl {self.kl}, true_return {self.true_return}")

    @property
    def gain(self) -> float:
        """True return of the final policy less the reference's."""
        return self.true_return[self.final] - self.reference_return

    def smoothed(self, window: int) -> Record:
        """The run with moving averages in place of its points, shorter by window − 1.

        A point of a trained policy is an estimate from one rollout; neighbours are nearly the same policy, and their
        mean is known better.

        Args:
            window: Points of each average; a shorter run becomes one point.

        Raises:
            ValueError: The run is judged by another point than its last, which has no mean of its own.
        """
        width = min(window, len(self.kl))
        if width == 1:
            return self
        if self.final not in (-1, len(self.kl) - 1):
            where = f"{self.setting}, {self.method}"
            raise ValueError(f"analysis.window: expected 1 where runs are judged by point {self.final} ({where})")
        kl, true_return = (
            [sum(points[end - width : end]) / width for end in range(width, len(points) + 1)]
            for points in (self.kl, self.true_return)
        )
        return replace(self, kl=kl, true_return=true_return, final=-1)

    def gain_at(self, level: float) -> float | None:
        """True return less the reference's where the run first reaches a KL, or None where it never does.

        Between its points, and between the reference (KL 0, gain 0) and the first, a run is taken to be straight over
        √KL, as small steps are: their gain is proportional to their length, and the KL to its square.

        Args:
            level: KL in nats, > 0.
        """
        # Sampled estimates of a KL may fall below zero.
        kl = [0.0, *(max(0.0, value) for value in self.kl)]
        gain = [0.0, *(value - self.reference_return for value in self.true_return)]
        for i in range(1, len(kl)):
            if kl[i] >= level > kl[i - 1]:
                before, here, after = kl[i - 1] ** 0.5, level**0.5, kl[i] ** 0.5
                share = (here - before) / (after - before)
                return gain[i - 1] + share * (gain[i] - gain[i - 1])
        return None


class Experiment(ABC):
    """What is repeated. A subclass says what the settings are and runs all methods of one or several repetitions.

    The methods of a repetition are paired: they start from the same policy and see the same random numbers wherever
    that is possible, so that what differs between them is the method.

    Attributes:
        settings: What is known of each setting, by name; names are words without slashes.
        methods: The methods by name; none if they are not known beforehand.
        block_size: How many repetitions are computed at once and kept in one file. 1 where a repetition takes long.
    """

    settings: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Any] = MappingProxyType({})
    block_size: int = 1

    @abstractmethod
    def run_block(self, setting: str, repetitions: Sequence[Repetition]) -> list[Record]:
        """Run every method once in each repetition, from random numbers of the repetition's seed alone.

        Args:
            setting: Name of the setting.
            repetitions: Which repetitions; the records of one must not depend on the others.

        Returns:
            One record for each method and repetition.
        """

    def run(self, setting: str, repetition: Repetition) -> list[Record]:
        """Run one repetition."""
        return self.run_block(setting, [repetition])


def expect(name: str, value: object, right: bool, what: str) -> None:
    """Refuse an option.

    Args:
        name: The option.
        value: What it is.
        right: Is it right?
        what: What is.

    Raises:
        ValueError: It is not right.
    """
    if not right:
        raise ValueError(f"{name}: expected {what}, got {value}")


def settings_grid(**lists: list[Any]) -> dict[str, dict[str, Any]]:
    """All combinations, named by what is not the same in all of them (or by everything where there is but one).

    Raises:
        ValueError: A list is empty, or holds a value twice.
    """
    for name, values in lists.items():
        expect(name, values, bool(values) and len(set(values)) == len(values), "a list of different values")
    shown = [name for name, values in lists.items() if len(values) > 1] or list(lists)[:1]
    found = {}
    for combination in product(*lists.values()):
        params = dict(zip(lists, combination, strict=True))
        found[",".join(f"{name}={params[name]:g}" for name in shown)] = params
    return found


class Joined(Experiment):
    """Several experiments in one study. A setting's name begins with the experiment's.

    Args:
        experiments: The experiments by name.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, experiments: dict[str, Experiment]) -> None:
        expect("experiments", "none", bool(experiments), "at least one")
        self.experiments = experiments
        self.settings = {f"{name}:{key}": x for name, e in experiments.items() for key, x in e.settings.items()}
        self.block_size = min(e.block_size for e in experiments.values())

    def run_block(self, setting: str, repetitions: Sequence[Repetition]) -> list[Record]:
        """Run the repetitions in the experiment that the setting belongs to."""
        name, _, inner = setting.partition(":")
        records = self.experiments[name].run_block(inner, repetitions)
        return [replace(record, setting=setting) for record in records]


@dataclass
class Analysis:
    """What is compared.

    Args:
        baselines: Methods that all others are compared with; in a setting without any of them, its first by name.
        kl: KL divergences in nats at which methods are compared beside their final policies.
        smallest_ratio: A variance ratio (baseline over method) below this is not worth having: where the whole interval
            lies below it, a lower variance does not hold.
        smallest_risk: The same for a risk reduction, in [0, 1].
        window: Consecutive points of a run that are averaged before anything is compared, the last ones for the final
            policy; 1 where points are exact.
    """

    baselines: list[str] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    smallest_ratio: float = 1.1
    smallest_risk: float = 0.01
    window: int = 1

    def __post_init__(self) -> None:
        expect("analysis.window", self.window, self.window >= 1, "at least 1")
        expect("analysis.kl", self.kl, all(level > 0 for level in self.kl), "levels > 0")

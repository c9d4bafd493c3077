"""Several sources of rewards as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from lit_vapo.functional import weighted_estimate
from lit_vapo.models.policy import Policy
from lit_vapo.models.trunk import Tap
from lit_vapo.rewards.normaliser import Normaliser
from lit_vapo.rewards.saved import load_reward
from lit_vapo.rewards.source import Responses, RewardSource, Scorer
from lit_vapo.types import RewardEstimate

# What follows `reward_` in keys that are logged already.
TAKEN = ("mean", "std", "gain", "gain_se", "win_rate")
# What settings of a source are called, whose values others set.
SETTINGS = ("trust", "class_path", "init_args")


class WeightedSum(RewardSource):
    """A weighted sum of sources: r = Σ_i w_i·r_i. Objectives see one estimate of it, logs each source by its name.

        mean = Σ_i w_i·mean_i,    variance = Σ_i w_i²·variance_i

    That is the variance of a sum whose sources err independently. Two ensembles that learned from the same preferences
    do not. Where member k of each source stands for the same draw (the same bootstrap, say), `aligned` sums member by
    member and takes the variance of the sums, which knows how sources err together. A source with one member is taken
    as exact: it adds to the mean, and to each member (`functional.sums.weighted_estimate`).

    Args:
        sources: Sources by name; a text is a folder. Names are letters, digits and `_`.
        weights: w_i by name, in units of the sum's reward by units of the source's; 1 for a source that is not named.
            A source of weight 0 is logged and otherwise left out.
        aligned: Member k stands for the same draw in all sources of two or more members, which are equally many.

    Raises:
        ValueError: There is no source, a name or a weight does not fit, all weights are 0, or sources are to be aligned
            whose members are not equally many, or not separate.
    """

    def __init__(
        self, sources: dict[str, RewardSource | str], weights: dict[str, float] | None = None, aligned: bool = False
    ) -> None:
        super().__init__()
        if not sources:
            raise ValueError("WeightedSum: sources: expected at least one source, got none")
        for name in sources:
            _check_name(name)
        for name, weight in (weights or {}).items():
            if name not in sources:
                raise ValueError(f"WeightedSum: weights: expected names among {', '.join(sources)}, got {name!r}")
            if not math.isfinite(weight):
                raise ValueError(f"WeightedSum: weights.{name}: expected a finite number, got {weight}")
        self.sources = sources
        self.weights = weights
        self.aligned = aligned
        self._weights = {name: float((weights or {}).get(name, 1.0)) for name in sources}
        if not any(self._weights.values()):
            raise ValueError(f"WeightedSum: weights: expected one that is not 0, got {weights}")
        made = {name: load_reward(source) if isinstance(source, str) else source for name, source in sources.items()}
        self.summands = nn.ModuleDict(made)
        counted = [source for name, source in made.items() if self._weights[name]]
        self._uncertain = [source.num_members for source in counted if source.num_members > 1]
        separate = all(source.separate_members for source in counted)
        if aligned and (len(set(self._uncertain)) > 1 or not separate):
            counts = ", ".join(f"{name}: {source.num_members}" for name, source in made.items())
            raise ValueError(
                "WeightedSum: aligned: expected sources with equally many separate members (or one), got " + counts
            )
        self.separate_members = separate and (aligned or len(self._uncertain) < 2)
        self.normaliser: Normaliser | None = None

    @property
    def num_members(self) -> int:
        """Members K: the most that a source has which counts."""
        return max(self._uncertain, default=1)

    def _each(self) -> list[tuple[str, RewardSource]]:
        """The sources with their names."""
        return list(self.summands.items())  # type: ignore[arg-type]

    def check(self) -> None:
        """Look whether each source is whole.

        Raises:
            ValueError: One is not; the message names it.
        """
        for name, source in self._each():
            with _named(name):
                source.check()
        self.columns = tuple(dict.fromkeys(column for _, source in self._each() for column in source.columns))

    def prepare(self, policy: Policy | None) -> None:
        """Load what the sources take."""
        for name, source in self._each():
            with _named(name):
                source.prepare(policy)
        if self._measured:
            self.normaliser = self.normaliser or Normaliser(self.num_members)

    @property
    def named(self) -> tuple[str, ...]:
        """The sources that count."""
        return tuple(name for name, weight in self._weights.items() if weight)

    @property
    def _measured(self) -> bool:
        """Whether the typical variance does not follow from those of the sources."""
        return self.aligned and len(self._uncertain) > 1

    def scorers(self) -> list[Scorer]:
        """Those of all sources that count."""
        counted = (cast("RewardSource", s) for name, s in self.summands.items() if self._weights[name])
        return [scorer for source in counted for scorer in source.scorers()]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Those of all sources, each once."""
        return tuple(dict.fromkeys(tap for _, source in self._each() for tap in source.taps))

    @property
    def calibrated(self) -> bool:
        """Whether all sources are, and the variance of their sum is known."""
        own = self.normaliser is None or bool(self.normaliser.calibrated)
        return own and all(source.calibrated for _, source in self._each())

    @property
    def unit(self) -> str:
        """What weights make of the sources' own."""
        return "units of the sum"

    @torch.no_grad()
    def calibrate(self, references: Iterable[Responses]) -> None:
        """Calibrate the sources that are not, and measure the typical variance where members are aligned."""
        # Each of them goes through all of it.
        batches = list(references)
        for name, source in self._each():
            if not source.calibrated:
                with _named(name):
                    source.calibrate(batches)
        if self.normaliser is not None:
            self.normaliser.measure(torch.cat([self.score(responses).variance for responses in batches]))

    def score(self, responses: Responses) -> RewardEstimate:
        """The sum; its parts are the estimates of the sources, each in its own unit; its features the first of theirs.

        Raises:
            ValueError: A source cannot score a response; the message names both.
        """
        parts: dict[str, RewardEstimate] = {}
        for name, source in self._each():
            with _named(name):
                parts[name] = source.score(responses)
        counts = [source.num_members for _, source in self._each()]
        total = weighted_estimate(list(parts.values()), list(self._weights.values()), counts, self.aligned)
        if self.normaliser is not None:
            total = total._replace(reference_variance=self.normaliser.reference_variance)
        features = next((part.features for part in parts.values() if part.features is not None), None)
        return total._replace(parts=parts, weights=dict(self._weights), features=features)

    def own_state(self) -> set[str]:
        """What the sources keep, and the typical variance of the sum."""
        own = {name for name in self.state_dict() if name.startswith("normaliser.")}
        return own | {f"summands.{name}.{key}" for name, source in self._each() for key in source.own_state()}


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A block whose errors say in which source they arose.

    Raises:
        ValueError: Whatever ValueError arose, with the source in front.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from error


def _check_name(name: str) -> None:
    """Refuse a name that would not do in a key of a log, or in a state dict."""
    usable = name.isidentifier() and name.isascii() and not hasattr(nn.ModuleDict(), name)
    if not usable or name in (*TAKEN, *SETTINGS) or name.startswith("member_"):
        raise ValueError(
            f"WeightedSum: sources: expected names of letters, digits and _ that mean nothing else, got {name!r}"
        )

"""Sources whose raw rewards come from elsewhere, and are centred and scaled here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from lit_vapo.functional import ensemble_estimate
from lit_vapo.models.policy import Policy
from lit_vapo.rewards.normaliser import Normaliser
from lit_vapo.rewards.source import Responses, RewardSource
from lit_vapo.types import RewardEstimate


class NormalisedSource(RewardSource):
    """Members whose raw rewards a subclass gives (`raw`); it says whether they are to be made comparable (`centred`).

    Attributes:
        normaliser: Origins, units and the typical variance of members; made in `prepare`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normaliser: Normaliser | None = None

    @property
    @abstractmethod
    def centred(self) -> bool:
        """Whether members are centred and scaled on responses of the reference policy, or keep their own units."""

    @abstractmethod
    def raw(self, responses: Responses) -> tuple[Tensor, Tensor | None]:
        """Raw rewards (B, K), each in its member's own unit, and to which responses they apply (B,); None for all."""

    def prepare(self, policy: Policy | None) -> None:
        """Make room for what `calibrate` measures."""
        self.normaliser = self.normaliser or Normaliser(self.num_members)

    @property
    def _normaliser(self) -> Normaliser:
        assert self.normaliser is not None, "`prepare` comes first"
        return self.normaliser

    @property
    def calibrated(self) -> bool:
        """Whether members are comparable and their typical variance is known; one in its own unit needs nothing."""
        needed = self.centred or self.num_members > 1
        return not needed or (self.normaliser is not None and bool(self.normaliser.calibrated))

    @property
    def unit(self) -> str:
        """Standard deviations, if members are centred and scaled."""
        return self._normaliser.unit if self.centred else super().unit

    @torch.no_grad()
    def calibrate(self, references: Iterable[Responses]) -> None:
        """Centre and scale members, if they are to be, and measure their typical variance.

        Raises:
            ValueError: Fewer than two responses have a reward, or a member gives all of them the same one.
        """
        rewards, applies = zip(*(self.raw(responses) for responses in references), strict=True)
        whole = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in rewards]
        known = torch.cat([y if x is None else x for x, y in zip(applies, whole, strict=True)])
        if int(known.sum()) < 2:
            raise ValueError(f"{self.name}: expected rewards of at least 2 reference responses, got {int(known.sum())}")
        joined = torch.cat(rewards)
        if self.centred:
            self._normaliser.fit_to(joined, known)
        else:
            self._normaliser.measure(_estimate(joined, known).variance)

    def score(self, responses: Responses) -> RewardEstimate:
        """Mean, variance and members (B, K), in standard deviations of the reference's rewards or in their own units.

        Raises:
            ValueError: As `raw`.
        """
        rewards, applies = self.raw(responses)
        estimate = _estimate(self._normaliser.normalise(rewards), applies)
        if self.num_members > 1 and bool(self._normaliser.calibrated):
            estimate = estimate._replace(reference_variance=self._normaliser.reference_variance)
        return estimate if applies is None or bool(applies.all()) else estimate._replace(applies=applies)

    @property
    def name(self) -> str:
        """How messages call it."""
        return type(self).__name__

    def own_state(self) -> set[str]:
        """Origins, units and the typical variance of members."""
        return {name for name in self.state_dict() if name.startswith("normaliser.")}


def _estimate(members: Tensor, applies: Tensor | None) -> RewardEstimate:
    """The estimate of members (B, K); nothing, and nothing uncertain, where they do not apply."""
    return ensemble_estimate(members if applies is None else torch.where(applies[:, None], members, 0.0))

"""An ensemble that lit-vapo trained, as a source of rewards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_vapo.models.critic import HiddenStates
from lit_vapo.models.digests import copy_sealed, seal
from lit_vapo.models.exported import same_model
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.trunk import Tap
from lit_vapo.rewards.ensemble_file import WEIGHTS_NAME, read_trusted_config
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.placement import Placement, SharedTrunk, place, reads_frozen_states
from lit_vapo.rewards.reward_model import RewardModel, ensemble_class
from lit_vapo.rewards.source import Responses, RewardSource, Scorer
from lit_vapo.types import RewardEstimate


class PlacedEnsemble(RewardSource):
    """Scores responses with members whose features come from where they are placed."""

    def __init__(self) -> None:
        super().__init__()
        self.model: RewardModel | None = None
        self._placement: Placement | None = None

    def put(self, placement: Placement) -> None:
        """Take the members from where they were placed."""
        self._placement, self.model = placement, placement.model

    @property
    def head(self) -> RewardHead:
        """The members, once they are loaded."""
        assert self.model is not None, "`prepare` comes first"
        return self.model.head

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The features, where the reference's pass has them."""
        return () if self._placement is None else self._placement.taps

    def scorers(self) -> list[Scorer]:
        """The members with their backbones, unless the reference's pass has their features."""
        return [Scorer(self.model, self.model.encode)] if self.model is not None and not self.taps else []

    @property
    def calibrated(self) -> bool:
        """Whether members are centred and scaled."""
        return bool(self.head.calibrated)

    @property
    def unit(self) -> str:
        """Standard deviations, once members are calibrated."""
        return self.head.unit

    def calibrate(self, references: Iterable[Responses]) -> None:
        """Centre and scale each member, and measure their typical variance."""
        self.head.calibrate(torch.cat([self._features(responses) for responses in references]))

    def score(self, responses: Responses) -> RewardEstimate:
        """Mean, variance and members (B, K), in standard deviations of the reference's rewards."""
        features = self._features(responses)
        estimate: RewardEstimate = self.head(features)
        # Where members differ in what they read, what they read on average.
        shown = features if features.ndim == 2 else features.mean(1)
        return estimate._replace(reference_variance=self.head.reference_variance, features=shown)

    def _features(self, responses: Responses) -> Tensor:
        assert self._placement is not None, "`prepare` comes first"
        return self._placement.features(responses)

    def linear_mean(self) -> tuple[Tensor, Tensor] | None:
        """The mean head, where members are linear and read the last token."""
        # What is trained on means of states says little of one: its values would be worse than none.
        assert self.model is not None, "`prepare` comes first"
        return self.head.linear_mean() if self.model.spec.pooling == "last" else None

    def own_state(self) -> set[str]:
        """The members: training may have calibrated them, and a folder may go away."""
        return {name for name in self.state_dict() if name.startswith("model.head.")}


class EnsembleReward(PlacedEnsemble):
    """An ensemble from a folder that `lit-vapo export` wrote.

    What it can share with the policy's base it shares (`placement.py`); how it scores does not depend on that.

    Args:
        folder: Folder of the ensemble.
        trust: Code outside of lit_vapo that the ensemble may run: classes by their Python name, models that bring code
            by folder or hub name.

    Raises:
        ValueError: There is no ensemble in the folder, or it asks for code it is not trusted with.
    """

    def __init__(self, folder: str, trust: list[str] | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.trust = trust
        # A folder that is none is refused before anything heavy is loaded.
        self._placed_for: int | None = None
        self._config = read_trusted_config(folder, trust)
        self._kind = ensemble_class(self._config)

    @property
    def base(self) -> Pretrained:
        """The model that its members read or change."""
        return self._config.spec.base

    @property
    def num_members(self) -> int:
        """Members K."""
        return self._config.num_members

    def reads(self) -> HiddenStates | None:
        """What the members read, if that is a frozen model."""
        spec = self._config.spec
        return HiddenStates(spec.base, spec.layer) if reads_frozen_states(self._config, self._kind) else None

    def prepare(self, policy: Policy | None) -> None:
        """Load the members, and of their backbones what the policy's base does not have; anew for another policy."""
        if self.model is None or (policy is not None and self._placed_for != id(policy)):
            self.put(place(Path(self.folder), self._config, self._kind, policy, self.trust))
            self._placed_for = id(policy)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the ensemble with the members as they are now; of the rest, what its own folder lists."""
        folder = Path(folder)
        copy_sealed(self.folder, folder)
        state = {k: v.contiguous().cpu() for k, v in self.head.saved_state().items()}
        save_file(state, folder / WEIGHTS_NAME)
        seal(folder)


class HeldEnsemble(PlacedEnsemble):
    """An ensemble that is in memory already, and reads the hidden states of the policy's base.

    Args:
        model: The ensemble; it needs no backbone.

    Raises:
        ValueError: Its members do not read frozen hidden states.
    """

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        if not model.head.shares_features:
            raise ValueError(
                f"HeldEnsemble: expected heads that share frozen hidden states, got {type(model.head).__name__}"
            )
        self.put(SharedTrunk(model))

    def prepare(self, policy: Policy | None) -> None:
        """See that the policy's base is what the members read.

        Raises:
            ValueError: It is another model.
        """
        assert self.model is not None
        base = self.model.spec.base
        if policy is not None and not same_model(base, policy.base):
            raise ValueError(
                f"HeldEnsemble: expected a policy on the base that its heads read, {base.path!r}, got one on "
                f"{policy.base.path!r}"
            )

    @property
    def num_members(self) -> int:
        """Members K."""
        return self.head.num_members

    def reads(self) -> HiddenStates | None:
        """What the members read."""
        assert self.model is not None
        return HiddenStates(self.model.spec.base, self.model.spec.layer)

"""Level 2 with learned rewards: an ensemble that learns from few preferences, some of them the wrong way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from lit_vapo.objectives.base import Objective
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.study.experiment import expect
from lit_vapo.study.experiments.language import LanguageModelStudy, Training
from lit_vapo.study.experiments.learner import Learner, preference_settings, state_pairs
from lit_vapo.study.experiments.truth import TrueReward
from lit_vapo.types import FeaturePairs


class LearnedEnsemble(LanguageModelStudy):
    """PPO against an ensemble that learned from preferences between responses of the reference.

    Every repetition draws its own pairs of responses and turns round each preference with the probability `flipped`;
    the members' initialisation and bootstrap are new as well.

    Args:
        prepared: Folder with language model, prompts and true reward (see `LanguageModelStudy`).
        methods: What each method maximises, by name.
        pairs: Numbers of preferences. Settings are all combinations of the lists.
        flipped: Probabilities that a preference is stated the wrong way round, in [0, 0.5].
        head: The estimator; its seed is the repetition's.
        training: How all methods train.
        steps: Steps of the estimator's optimiser, each on all pairs.
        head_learning_rate: Its first learning rate (AdamW, linear decay, as in the reward stage).

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        prepared: str,
        methods: dict[str, Objective],
        pairs: list[int],
        flipped: list[float],
        head: RewardHead | None = None,
        training: Training | None = None,
        steps: int = 200,
        head_learning_rate: float = 0.01,
    ) -> None:
        super().__init__(prepared, methods, training)
        self.learner = Learner(head or HeadEnsemble(10), steps, head_learning_rate)
        self.settings = preference_settings(pairs, flipped)

    def ensemble(self, params: Mapping[str, Any], seed: int) -> RewardHead:
        """An ensemble that learned from preferences of its own."""
        return self.learner.learn(self.preferences(seed=seed, **params), self.truth.reference, seed)

    def preferences(self, pairs: int, flipped: float, seed: int) -> FeaturePairs:
        """What the ensemble of a repetition learns from: pairs (N, H) of responses of the reference.

        Args:
            pairs: N.
            flipped: Probability that a preference is stated the wrong way round.
            seed: Where they come from.
        """
        true = self.truth.reward
        expect("truth.reward", true, true is not None, "a true reward of features to state preferences by")
        return draw_pairs(cast("TrueReward", true), pairs, flipped, seed)


def draw_pairs(true: TrueReward, pairs: int, flipped: float, seed: int) -> FeaturePairs:
    """Preferences between responses of the reference, no response in two of them.

    Args:
        true: The true reward, and the responses.
        pairs: N.
        flipped: Probability that a preference is stated the wrong way round.
        seed: Where they come from.

    Raises:
        ValueError: There are fewer than 2 N responses.
    """
    there = len(true.reference)
    if 2 * pairs > there:
        raise ValueError(f"pairs: expected at most {there // 2}, half of the responses there are, got {pairs}")
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(there, generator=generator)[: 2 * pairs].view(2, pairs)
    better = true(true.reference[first]) > true(true.reference[second])
    chosen, rejected = torch.where(better, first, second), torch.where(better, second, first)
    return state_pairs(true.reference[chosen], true.reference[rejected], flipped, generator)

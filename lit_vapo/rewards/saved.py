"""Sources of rewards from a folder, whatever is in it."""

from __future__ import annotations

from lit_vapo.rewards.ensemble import EnsembleReward
from lit_vapo.rewards.source import RewardSource


def load_reward(folder: str, trust: list[str] | None = None) -> RewardSource:
    """The source of rewards that a folder holds.

    Args:
        folder: Folder of an ensemble (`lit-vapo export`).
        trust: Code outside of lit_vapo that it may run: classes by their Python name, models that bring code by folder
            or hub name.

    Raises:
        ValueError: There is none, or it asks for code it is not trusted with.
    """
    return EnsembleReward(folder, trust)

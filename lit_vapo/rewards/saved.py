"""Sources of rewards from a folder, whatever is in it."""

from __future__ import annotations

from pathlib import Path

from lit_vapo.rewards.ensemble import EnsembleReward
from lit_vapo.rewards.ensemble_file import CONFIG_NAME as ENSEMBLE
from lit_vapo.rewards.pretrained import PretrainedRewards
from lit_vapo.rewards.pretrained_file import CONFIG_NAME as REWARDS
from lit_vapo.rewards.source import RewardSource


def load_reward(folder: str, trust: list[str] | None = None) -> RewardSource:
    """The source of rewards that a folder holds.

    Args:
        folder: Folder of an ensemble (`lit-vapo export`), or of public reward models (`lit-vapo reward calibrate`).
        trust: Code outside of lit_vapo that it may run: classes by their Python name, models that bring code by folder
            or hub name.

    Raises:
        ValueError: There is none, or it asks for code it is not trusted with.
    """
    if (Path(folder) / ENSEMBLE).is_file():
        return EnsembleReward(folder, trust)
    if (Path(folder) / REWARDS).is_file():
        return PretrainedRewards.from_pretrained(folder, trust)
    raise ValueError(
        f"reward: expected a folder with {ENSEMBLE} (written by `lit-vapo export`) or {REWARDS} (written by `lit-vapo "
        f"reward calibrate`), got {folder!r}"
    )

"""Variance-aware policy optimisation: alignment only as far as an ensemble of reward models agrees.

    import lit_vapo as lv

has what a script or a notebook needs: the stages' modules and data, and the settings that they take. What is chosen
among several is in `lv.objectives`, `lv.advantages` and `lv.rewards`. Names are looked up when they are asked for, so
that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PLACES = {
    "data.datamodule": ("PreferenceDataModule", "PromptDataModule", "SFTDataModule"),
    "models.critic": ("CriticSpec",),
    "models.generation": ("Sampling",),
    "models.pretrained": ("Lora", "Pretrained"),
    "rewards": ("load_reward",),
    "rewards.reward_model": ("RewardModel",),
    "stages.ppo.module": ("PPOModule",),
    "stages.ppo.update": ("UpdateSettings",),
    "stages.reward.module": ("RewardModule",),
    "stages.sft.module": ("SFTModule",),
}
# Classes that options name by their path are not exported here: files that a run has saved would call them otherwise.
_PARTS = ("advantages", "objectives", "rewards")
_HOMES = {name: place for place, names in _PLACES.items() for name in names}
__all__ = sorted([*_HOMES, *_PARTS])


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

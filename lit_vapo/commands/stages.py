"""The stages as commands, each with the module and the data that belong to it."""

from __future__ import annotations

from lit_vapo.commands.run import StageCLI
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule

# A stage's own module is imported where the stage runs: nobody waits for the others.


def sft(words: list[str]) -> None:
    """Make a base policy."""
    from lit_vapo.stages.sft.module import SFTModule

    StageCLI(SFTModule, SFTDataModule, stage="sft", args=words)


def reward(words: list[str]) -> None:
    """Train an ensemble."""
    from lit_vapo.stages.reward.module import RewardModule

    StageCLI(RewardModule, PreferenceDataModule, stage="reward", args=words)


def ppo(words: list[str]) -> None:
    """Align a policy."""
    from lit_vapo.stages.ppo.module import PPOModule

    StageCLI(PPOModule, PromptDataModule, stage="ppo", args=words)

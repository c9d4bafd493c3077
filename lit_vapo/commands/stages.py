"""The stages as commands, each with the module and the data that belong to it."""

from __future__ import annotations

import importlib
from typing import NamedTuple, cast

from lightning.pytorch import LightningDataModule, LightningModule

from lit_vapo.commands.run import StageCLI
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule


class Stage(NamedTuple):
    """A stage.

    Attributes:
        module: Its module, as `module:class`: it is imported where the stage runs, and nobody waits for the others.
        data: Its data.
    """

    module: str
    data: type[LightningDataModule]

    def load(self) -> type[LightningModule]:
        """Import its module."""
        path, _, name = self.module.partition(":")
        return cast("type[LightningModule]", getattr(importlib.import_module(path), name))


STAGES = {
    "ppo": Stage("lit_vapo.stages.ppo.module:PPOModule", PromptDataModule),
    "reward": Stage("lit_vapo.stages.reward.module:RewardModule", PreferenceDataModule),
    "sft": Stage("lit_vapo.stages.sft.module:SFTModule", SFTDataModule),
}


def sft(words: list[str]) -> None:
    """Make a base policy."""
    _run("sft", words)


def reward(words: list[str]) -> None:
    """Train an ensemble."""
    _run("reward", words)


def ppo(words: list[str]) -> None:
    """Align a policy."""
    _run("ppo", words)


def _run(name: str, words: list[str]) -> None:
    stage = STAGES[name]
    StageCLI(stage.load(), stage.data, stage=name, args=words)

"""From a checkpoint to a folder that other programs load."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_vapo.folders import check_new
from lit_vapo.modules.checkpoint import STAGE_KEY
from lit_vapo.modules.ppo import PPOModule
from lit_vapo.modules.reward import RewardModule
from lit_vapo.modules.sft import SFTModule


def export(checkpoint: str, output: str, classifier: bool = False) -> None:
    """Turn a checkpoint into a folder that other programs load.

    A policy becomes an ordinary transformers (or, with LoRA, peft) folder with its tokenizer and the critic below
    `critic`; a reward ensemble becomes a folder for `lit_vapo.models.reward.RewardModel.from_pretrained`.

    Args:
        checkpoint: A checkpoint of any stage.
        output: A folder that is new or empty.
        classifier: Write a head ensemble as a sequence classifier of transformers with one label for each member.

    Raises:
        ValueError: There is no such checkpoint, or it is of no known stage.
        FileExistsError: The folder has files in it.
    """
    if not Path(checkpoint).is_file():
        raise ValueError(f"--checkpoint: expected a checkpoint file, got {checkpoint!r}")
    check_new(output, "--output")
    stage = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(STAGE_KEY)
    if classifier and stage != RewardModule.stage:
        raise ValueError(f"--classifier: expected a checkpoint of the reward stage, got one of {stage!r}")
    if stage == PPOModule.stage:
        # The judge only watches training: it need not be there.
        module = PPOModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, gold=None)
        module.export(output)
    elif stage == RewardModule.stage:
        ensemble = RewardModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
        ensemble.export_classifier(output) if classifier else ensemble.export(output)
    elif stage == SFTModule.stage:
        SFTModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).export(output)
    else:
        raise ValueError(f"{checkpoint}: expected a checkpoint of lit-vapo (sft, reward or ppo), got stage {stage!r}")
    print(f"exported the {stage} checkpoint to {output}")

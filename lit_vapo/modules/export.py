"""From a checkpoint to a folder that other programs load."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning import LightningModule

from lit_vapo.folders import check_new, new_folder
from lit_vapo.modules.card import ensemble_card, policy_card
from lit_vapo.modules.checkpoint_file import STAGE_KEY, read_checkpoint
from lit_vapo.modules.ppo import PPOModule
from lit_vapo.modules.reward import RewardModule
from lit_vapo.modules.sft import SFTModule

M = TypeVar("M", bound=LightningModule)


def export(checkpoint: str, output: str, merge: bool = False, classifier: bool = False) -> None:
    """Turn a checkpoint into a folder that other programs load, with a model card.

    A policy becomes an ordinary peft folder (or, trained without LoRA or merged, transformers folder) with its
    tokenizer, the settings it was sampled with, and the critic below `critic`; a reward ensemble becomes a folder for
    `lit_vapo.models.reward.RewardModel.from_pretrained`.

    Args:
        checkpoint: A checkpoint of any stage.
        output: A folder that is new or empty; it is written whole or not at all.
        merge: Add a policy's adapters to the weights of its base, and write a whole model; not for a quantised base.
        classifier: Write a head ensemble as a sequence classifier of transformers with one label for each member.

    Raises:
        ValueError: There is no such checkpoint, it is of no known stage, or of one that has no such option.
        FileExistsError: The folder has files in it.
    """
    check_new(output, "--output")
    stage = read_checkpoint(checkpoint, "--checkpoint").get(STAGE_KEY)
    for option, given, owner in (("merge", merge, PPOModule.stage), ("classifier", classifier, RewardModule.stage)):
        if given and stage != owner:
            raise ValueError(f"--{option}: expected a checkpoint of the {owner} stage, got one of {stage!r}")
    if stage not in (SFTModule.stage, RewardModule.stage, PPOModule.stage):
        raise ValueError(f"{checkpoint}: expected a checkpoint of lit-vapo (sft, reward or ppo), got stage {stage!r}")
    with new_folder(output, "--output") as target:
        if stage == PPOModule.stage:
            # The judge only watches training: it need not be there.
            policy = _load(PPOModule, checkpoint, gold=None)
            policy.export(target, merge)
            card = policy_card(policy, target, output)
        elif stage == RewardModule.stage:
            ensemble = _load(RewardModule, checkpoint)
            ensemble.export_classifier(target) if classifier else ensemble.export(target)
            card = ensemble_card(ensemble, output, classifier)
        else:
            _load(SFTModule, checkpoint).export(target)
            card = None
        if card is not None:
            (target / "README.md").write_text(card)
    print(f"exported the {stage} checkpoint to {output}")


def _load(kind: type[M], checkpoint: str, **options: Any) -> M:
    return kind.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, **options)

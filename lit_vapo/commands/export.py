"""From a checkpoint to a folder that other programs load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning import LightningModule

from lit_vapo.commands.cards import ensemble_card, policy_card
from lit_vapo.folders import check_new, new_folder
from lit_vapo.models.digests import add_sealed
from lit_vapo.models.origin import ORIGIN_NAME, Origin
from lit_vapo.models.settings import construct, every_dict
from lit_vapo.models.trust import check_trusted
from lit_vapo.stages.checkpoint_file import STAGE_KEY, read_checkpoint
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.scoring import REWARD
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule

M = TypeVar("M", bound=LightningModule)


def export(
    checkpoint: str, output: str, merge: bool = False, classifier: bool = False, trust: list[str] | None = None
) -> None:
    """Turn a checkpoint into a folder that other programs load, with a model card.

    A policy becomes an ordinary peft folder (or, trained without LoRA or merged, transformers folder) with its
    tokenizer, the settings it was sampled with, and the critic below `critic`; a reward ensemble becomes a folder for
    `lit_vapo.rewards.reward_model.RewardModel.from_pretrained`.

    Args:
        checkpoint: A checkpoint of any stage.
        output: A folder that is new or empty; it is written whole or not at all.
        merge: Add a policy's adapters to the weights of its base, and write a whole model; not for a quantised base.
        classifier: Write a head ensemble as a sequence classifier of transformers with one label for each member.
        trust: Code outside of lit_vapo that the checkpoint may run: classes by their Python name, models that bring
            code by folder or hub name.

    Raises:
        ValueError: There is no such checkpoint, it is of no known stage, of one that has no such option, or it asks for
            code that it is not trusted with.
        FileExistsError: The folder has files in it.
    """
    stage = write_export(checkpoint, output, merge, classifier, trust)
    print(f"exported the {stage} checkpoint to {output}")


def write_export(
    checkpoint: str, output: str, merge: bool = False, classifier: bool = False, trust: list[str] | None = None
) -> str:
    """Do what `export` does, without a word.

    Returns:
        The stage that the checkpoint is of.
    """
    check_new(output, "--output")
    saved = read_checkpoint(checkpoint, "--checkpoint")
    stage = saved.get(STAGE_KEY)
    for option, given, owner in (("merge", merge, PPOModule.stage), ("classifier", classifier, RewardModule.stage)):
        if given and stage != owner:
            raise ValueError(f"--{option}: expected a checkpoint of the {owner} stage, got one of {stage!r}")
    if stage not in (SFTModule.stage, RewardModule.stage, PPOModule.stage):
        raise ValueError(f"{checkpoint}: expected a checkpoint of lit-vapo (sft, reward or ppo), got stage {stage!r}")
    with new_folder(output, "--output") as target:
        if stage == PPOModule.stage:
            # Who judges and who samples belongs to training: they need not be there.
            saved["hyper_parameters"] |= {"gold": None, "generator": None, "trust": trust}
            saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if not k.startswith(REWARD)}
            policy = _load(PPOModule, saved, trust, checkpoint)
            policy.export(target, merge)
            card = policy_card(policy, target, output)
        elif stage == RewardModule.stage:
            ensemble = _load(RewardModule, saved, trust, checkpoint)
            ensemble.export_classifier(target) if classifier else ensemble.export(target)
            card = ensemble_card(ensemble, output, classifier)
        else:
            _load(SFTModule, saved, trust, checkpoint).export(target)
            card = None
        add_sealed(target, ORIGIN_NAME, Origin.of(stage, Path(checkpoint)).text())
        if card is not None:
            card.save(target / "README.md")
    return str(stage)


def _load(kind: type[M], checkpoint: dict[str, Any], trust: Sequence[str] | None, name: str) -> M:
    """The module of a checkpoint.

    Made here rather than by Lightning, which imports whatever the hyperparameters name.
    """
    settings = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
    # Nothing is trained here. What stepped the weights is told on the card, and not made.
    stepped = {key: settings.pop(key) for key in ("optimizer", "lr_scheduler") if key in settings}
    check_trusted(settings, trust, name)
    for part in list(every_dict(settings, name)):
        if "trust" in part:
            # Whom to trust is not the checkpoint's to say, nor that of a source of rewards in it.
            part["trust"] = trust
    try:
        module = construct(kind, settings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    module.hparams.update(stepped)
    if isinstance(module, PPOModule):
        module.load_networks()
    else:
        module.configure_model()
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module

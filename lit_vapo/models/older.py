"""What earlier versions wrote, in the words of this one.

A folder, a checkpoint or a file of options that an earlier version wrote names classes and weights by where they stood
then. They are renamed where such files are read, before anything asks whether a name is trusted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Modules whose classes may be named in files: where they stood, and where they stand.
MOVED = {
    "lit_vapo.uncertainty.base": "lit_vapo.rewards.members.base",
    "lit_vapo.uncertainty.bayesian_linear": "lit_vapo.rewards.members.bayesian",
    "lit_vapo.uncertainty.full_ensemble": "lit_vapo.rewards.members.full",
    "lit_vapo.uncertainty.head_ensemble": "lit_vapo.rewards.members.heads",
    "lit_vapo.uncertainty.lora_ensemble": "lit_vapo.rewards.members.lora",
    "lit_vapo.uncertainty.mc_dropout": "lit_vapo.rewards.members.dropout",
    "lit_vapo.study.known_noise": "lit_vapo.study.experiments.noise",
    "lit_vapo.study.language": "lit_vapo.study.experiments.language",
    "lit_vapo.study.learned_ensemble": "lit_vapo.study.experiments.learned",
    "lit_vapo.study.planted_optima": "lit_vapo.study.experiments.planted",
    "lit_vapo.study.response_optima": "lit_vapo.study.experiments.responses",
    "lit_vapo.study.tabular": "lit_vapo.study.experiments.tabular",
    "lit_vapo.study.told": "lit_vapo.study.experiments.variance",
    "lit_vapo.study.variance": "lit_vapo.study.experiments.variance",
}
# Weights of a PPO checkpoint: how their names began, and how they begin; `None` for what nobody keeps any more.
WEIGHTS = {
    "kl_coef": "kl.coef",
    "networks.reward_model.": "reward.model.",
    "objective.reference_variance": None,
}
# What ensembles did not keep, and what it was: variances of members stayed as they came.
UNMODERATED = {"typical_variance": 1.0, "shrinkage": 0.0}


def renamed(settings: Any) -> Any:
    """Settings in which every class that has moved is named as it is now.

    Args:
        settings: Dicts, lists, texts and numbers.
    """
    if isinstance(settings, dict):
        return {key: renamed(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [renamed(value) for value in settings]
    if isinstance(settings, str):
        module, _, name = settings.rpartition(".")
        return f"{MOVED[module]}.{name}" if module in MOVED else settings
    return settings


def update_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Rename classes and weights of a checkpoint in place, and add what it lacks; one of this version stays so."""
    if "hyper_parameters" in checkpoint:
        checkpoint["hyper_parameters"] = renamed(checkpoint["hyper_parameters"])
    state = checkpoint["state_dict"]
    # The price of a nat is in every checkpoint of PPO.
    if "kl_coef" in state:
        state = {new: value for key, value in state.items() if (new := _new_name(key)) is not None}
    heads = [key.removesuffix("reference_variance") for key in state if key.endswith("head.reference_variance")]
    checkpoint["state_dict"] = {prefix + k: v for prefix in heads for k, v in unmoderated().items()} | state


def unmoderated() -> dict[str, Tensor]:
    """What the weights of an ensemble lack that knows nothing of moderated variances."""
    return {name: torch.tensor(value) for name, value in UNMODERATED.items()}


def _new_name(key: str) -> str | None:
    for old, new in WEIGHTS.items():
        if key.startswith(old):
            return None if new is None else new + key.removeprefix(old)
    return key

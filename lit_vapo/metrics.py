"""What is measured: thin torchmetrics over pure functions, and the statistics of a rollout.

Every key is defined in docs/metrics.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_vapo.functional import (
    kl_k1,
    kl_k3,
    masked_mean,
    preference_accuracy,
    preference_calibration_error,
    preference_nll,
    weighted_k3,
)
from lit_vapo.rollout import Rollout


class PreferenceMetrics(Metric):
    """Accuracy, NLL and calibration error of reward margins, for each member and for the members' mean.

    `update` takes raw margins (B, K), r_k(chosen) − r_k(rejected), in log-odds. `compute` returns a dict with
    `accuracy`, `nll` and `ece`, each (K + 1,): the members, then the mean of their margins.
    """

    full_state_update = False
    margins: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("margins", default=[], dist_reduce_fx="cat")

    def update(self, margins: Tensor) -> None:
        """Add the margins (B, K) of B pairs."""
        self.margins.append(margins.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """Metrics over all pairs seen, and their number `num_pairs`."""
        members = torch.cat(self.margins) if isinstance(self.margins, list) else self.margins
        margins = torch.cat([members, members.mean(1, keepdim=True)], dim=1)
        return {
            "accuracy": preference_accuracy(margins),
            "nll": preference_nll(margins),
            "ece": preference_calibration_error(margins),
            "num_pairs": torch.tensor(len(members)),
        }


def rollout_statistics(rollout: Rollout) -> dict[str, Tensor]:
    """Means over the responses (or response tokens) of one rollout; each a scalar."""
    log_ratio = rollout.log_ratio
    mask = rollout.response_mask
    estimate = rollout.estimate
    sigma = estimate.variance.clamp_min(0).sqrt()
    statistics = {
        "reward_mean": estimate.mean.mean(),
        "reward_std": estimate.mean.std(correction=0),
        "objective_reward": rollout.reward.mean(),
        "ensemble_sigma": sigma.mean(),
        "kl_k1": kl_k1(log_ratio).mean(),
        "kl_k3": kl_k3(log_ratio).mean(),
        "kl_weighted_k3": weighted_k3(log_ratio, rollout.kl_weight).mean(),
        "kl_weight_mean": rollout.kl_weight.mean(),
        "kl_weight_max": rollout.kl_weight.max(),
        "entropy": masked_mean(rollout.entropy, mask),
        "response_length": mask.sum(1).float().mean(),
        "eos_rate": rollout.stopped.float().mean(),
    }
    if rollout.gold is not None:
        statistics["gold"] = rollout.gold.mean()
    if estimate.members is not None:
        for k, mean in enumerate(estimate.members.mean(0)):
            statistics[f"reward_member_{k}"] = mean
    return statistics


def sample_rows(rollout: Rollout, policy: str) -> list[dict[str, Any]]:
    """One record for each response: texts, every member's score, σ, KL, weight, gold.

    Args:
        rollout: The responses.
        policy: Who gave them: `policy` or `reference`.
    """
    members = rollout.estimate.members
    sigma = rollout.estimate.variance.clamp_min(0).sqrt()
    log_ratio = rollout.log_ratio
    records = []
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        record: dict[str, Any] = {
            "policy": policy,
            "prompt": prompt,
            "response": response,
            "reward": float(rollout.estimate.mean[i]),
            "sigma": float(sigma[i]),
            "members": [] if members is None else [round(v, 6) for v in members[i].tolist()],
            "kl": float(log_ratio[i]),
            "kl_weight": float(rollout.kl_weight[i]),
        }
        if rollout.gold is not None:
            record["gold"] = float(rollout.gold[i])
        records.append(record)
    return records

"""What is measured: thin torchmetrics over pure functions, and the statistics of a rollout.

Every key is defined in docs/metrics.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_vapo.evaluation.report import PreferenceReport
from lit_vapo.functional import kl_k1, kl_k3, masked_mean, weighted_k3
from lit_vapo.functional.masked import check_same_shape
from lit_vapo.rollout import Rollout
from lit_vapo.types import PairLabels, RewardEstimate


class PreferenceMetrics(Metric):
    """Collects the margins of a split over batches and processes; `compute` gives a `PreferenceReport`.

    Pairs that are ties (probability 0.5) have no right answer: they are counted and otherwise left out. Pairs with a
    probability between 0.5 and 1 count as preferences for the chosen response; weights are not used. Samplers repeat
    rows to give every process as many; so each example id counts once, by its first occurrence, and rows are ordered by
    id, whatever the order and number of processes.
    """

    full_state_update = False
    example_ids: list[Tensor]
    columns: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("example_ids", default=[], dist_reduce_fx="cat")
        # One table for all numbers of a pair, so that processes exchange two tensors and not six.
        self.add_state("columns", default=[], dist_reduce_fx="cat")

    def update(self, margin: RewardEstimate, variance: Tensor, labels: PairLabels) -> None:
        """Add B pairs.

        Args:
            margin: Estimate of the raw margins (B,), in log-odds, with the members (B, K) or None.
            variance: Variance of the normalised reward of the chosen and the rejected response (B, 2).
            labels: What is known of the pairs.

        Raises:
            ValueError: A shape does not fit.
        """
        size = len(margin.mean)
        if variance.shape != (size, 2):
            raise ValueError(f"expected variance of shape ({size}, 2), got {tuple(variance.shape)}")
        check_same_shape(mean=margin.mean, example_ids=labels.example_ids)
        parts = [margin.mean[:, None], margin.variance[:, None], variance, labels.probability[:, None]]
        if margin.members is not None:
            parts.append(margin.members)
        self.columns.append(torch.cat([part.detach().float() for part in parts], dim=1))
        self.example_ids.append(labels.example_ids)

    def compute(self) -> PreferenceReport:
        """Report on all pairs seen, on the CPU."""
        ids, columns = dim_zero_cat(self.example_ids).cpu(), dim_zero_cat(self.columns).cpu()
        ids, order = ids.sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        ids, columns = ids[first], columns[order[first]]
        tie = columns[:, 4] == 0.5
        ids, columns = ids[~tie], columns[~tie]
        members = columns[:, 5:] if columns.shape[1] > 5 else None
        margin = RewardEstimate(columns[:, 0], columns[:, 1], members)
        return PreferenceReport(ids, margin, columns[:, 2:4], int(tie.sum()))


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

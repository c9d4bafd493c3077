"""What a PPO update learns from: advantages, and what each token counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.advantages.base import AdvantageEstimator, Reduce
from lit_vapo.functional import importance_weights, own_penalty, token_rewards
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.rollout import Rollout


class Experience(NamedTuple):
    """What the update learns from; B rows, T response tokens.

    Attributes:
        rows: Prompts and responses.
        logprobs: Log-probabilities under the policy that sampled them (B, T).
        advantages: Advantages (B, T).
        values: Values then (B, T), or `None` without a critic.
        value_states: Frozen states the critic reads (B, T, H), or `None`.
        returns: Targets of the critic (B, T), or `None` without one.
        weights: What the policy loss of each token counts (B, T), or `None` for all alike.
    """

    rows: TokenRows
    logprobs: Tensor
    advantages: Tensor
    values: Tensor | None = None
    value_states: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None

    def select(self, index: Tensor) -> Experience:
        """The rows of an index, cut to the longest response among them."""
        rows = self.rows.select(index)
        size = rows.response_mask.shape[1]
        # Those that may be None stand last, which the checker of types cannot see.
        cut = (None if x is None else x[index, :size] for x in self[1:])
        return Experience(rows, *cut)  # type: ignore[arg-type]


def compute_advantages(
    rollout: Rollout,
    kl_coef: float,
    advantage: AdvantageEstimator,
    all_sum: Reduce,
    ratio_cap: float | None = None,
) -> Experience:
    """Rewards per token, and what an estimator makes of them.

    With the exact KL of each token's distribution, what a token's own draw cost more than that is added to its own
    advantage, in the estimator's unit.

    Args:
        rollout: Responses and their scores.
        kl_coef: β, in units of reward per nat.
        advantage: Turns rewards into advantages.
        all_sum: Sum of a tensor over all processes.
        ratio_cap: Largest weight of a token whose sampler was not quite the policy, or `None` for no weights.

    Raises:
        ValueError: Rewards, log-probabilities, values or advantages are not finite, in this process or another.
    """
    mask = rollout.response_mask
    made = {"reward": rollout.reward, "kl_weight": rollout.kl_weight}
    for name in ("logprobs", "ref_logprobs", "values", "token_kl"):
        if (x := getattr(rollout, name)) is not None:
            made[name] = x[mask]
    _check_finite(made, all_sum)
    log_ratio = rollout.logprobs - rollout.ref_logprobs
    weight = rollout.kl_weight
    shared = all_sum(weight.sum()) / all_sum(torch.ones_like(weight).sum())
    kl = rollout.token_kl
    rewards = token_rewards(rollout.reward, log_ratio, weight, kl_coef, mask, shared, kl)
    advantages, returns, scale = advantage(
        rewards, rollout.values, mask, rollout.num_responses, all_sum, rollout.estimate
    )
    if kl is not None:
        own = own_penalty(log_ratio, kl, kl_coef, mask, shared)
        advantages = advantages + (own if scale is None else (own * scale).to(own))
    _check_finite({"advantages": advantages}, all_sum)
    weights = None
    if ratio_cap is not None and rollout.sampler_logprobs is not None:
        weights = importance_weights(rollout.logprobs, rollout.sampler_logprobs, mask, ratio_cap)
    return Experience(
        rollout.rows, rollout.logprobs, advantages, rollout.values, rollout.value_states, returns, weights
    )


def _check_finite(tensors: dict[str, Tensor], all_sum: Reduce) -> None:
    """Refuse NaN and infinity; counted over all processes, so that all stop and none waits for the others."""
    for name, x in tensors.items():
        bad = int(all_sum((~torch.isfinite(x)).sum()))
        if bad:
            raise ValueError(f"{name}: expected finite numbers, got {bad} that are NaN or infinite; no step was taken")

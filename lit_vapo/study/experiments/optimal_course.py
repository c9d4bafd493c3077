"""Runs without training: the exact optima of an objective as its KL becomes cheaper."""

from __future__ import annotations

from torch import Tensor

from lit_vapo.functional import bregman_kl, optimal_policy


def optimal_course(
    reward: Tensor, weight: Tensor, reference: Tensor, true: Tensor, coefs: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the optima stand at each coefficient, and what they earn.

    Args:
        reward: The objective's reward (R, n) of n responses, R times.
        weight: Its weight of each (R, n).
        reference: Probabilities of the reference, broadcast to (R, n).
        true: True rewards, broadcast to (R, n).
        coefs: Coefficients β (C,), in units of reward per nat.

    Returns:
        KL from the reference in nats, and true return, both (C, R), float64.
    """
    reward, weight, start = (x.expand(len(coefs), *reward.shape) for x in (reward, weight, reference))
    policy = optimal_policy(reward, start, coefs[:, None], weight)
    # Rounding may leave a small divergence below zero.
    return bregman_kl(policy, start).clamp_min(0), (policy * true).sum(-1)

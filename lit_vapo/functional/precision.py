"""Where a reward that is weighted by its precision has its zero."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lit_vapo.functional.masked import check_same_shape


def reward_origin(
    rewards: Tensor,
    weight: Tensor,
    log_ratio: Tensor,
    kl_coef: Tensor | float,
    num_responses: int,
    all_sum: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """The origin c of each response's reward at which (R − c)/w with a plain KL has the optimum of R with β·w·KL.

    That optimum is π0·exp((R − c)/(β·w)) with the c of its prompt that makes its probabilities sum to one. There
    (R − c)/w − β·ℓ = 0 for every response, ℓ = log π/π0, and so in the mean over any responses. From the others:

        c_i = Σ_{j≠i} (R_j/w_j − β·ℓ_j) / Σ_{j≠i} 1/w_j

    over the responses to the same prompt, or over those to all prompts where each has one. Near the reference this is
    the mean of R weighted by its precision 1/w. A response does not count for its own, so the gradient stays unbiased.

    Args:
        rewards: `(B,)`, R, in units of reward; n rows of a prompt stand together.
        weight: `(B,)`, w > 0, without a unit.
        log_ratio: `(B,)`, ℓ, in nats.
        kl_coef: β >= 0, in units of reward per nat.
        num_responses: n >= 1.
        all_sum: Sums a tensor over all processes; used where n = 1.

    Returns:
        `(B,)`, c in units of reward; 0 for a response that is the only one.

    Raises:
        ValueError: if shapes differ, or B is not a multiple of n.

    Examples:
        >>> import torch
        >>> reward_origin(torch.tensor([1.0, 4.0, 7.0]), torch.tensor([1.0, 2.0, 1.0]), torch.zeros(3), 0.1, 3)
        tensor([6., 4., 2.])
    """
    check_same_shape(rewards=rewards, weight=weight, log_ratio=log_ratio)
    if len(rewards) % num_responses:
        raise ValueError(f"expected a multiple of num_responses = {num_responses} rewards, got {len(rewards)}")
    precision = 1 / weight
    returns = rewards * precision - kl_coef * log_ratio
    if num_responses == 1:
        of_all, precision_of_all = all_sum(returns.sum()), all_sum(precision.sum())
    else:
        of_all, precision_of_all = (
            x.view(-1, num_responses).sum(1).repeat_interleave(num_responses) for x in (returns, precision)
        )
    # Of others, there is either none or a precision above 0; what is left of a sum less its one term is rounding.
    others = precision_of_all - precision
    alone = others <= 1e-6 * precision
    return ((of_all - returns) / others.masked_fill(alone, 1)).masked_fill(alone, 0)

"""Advantages of masked responses: from a critic (GAE), or from the other responses to the prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional.masked import accumulation_dtype, check_mask, check_same_shape

_BLOCK = 1024


class Advantages(NamedTuple):
    """Advantages and the targets of the value function.

    Attributes:
        advantages: `(B, T)`, zeros outside the mask; in units of reward, unless an estimator scales them.
        returns: `(B, T)`, advantages (unscaled) + values, zeros outside the mask; None without a critic.
        scale: `()` or `(B, 1)`, what a unit of reward is in these advantages; None for 1, where they are in units of
            reward. `advantages / scale` doubles where rewards and values do.
    """

    advantages: Tensor
    returns: Tensor | None
    scale: Tensor | None = None


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> Advantages:
    """Generalised advantage estimates.

        δ_t = r_t + γ * V_{t+1} - V_t,    A_t = Σ_{s >= t} (γλ)^(s-t) * δ_s

    with V = 0 after the last response token. λ = 0 gives the TD errors, λ = 1 the discounted reward to go
    minus the value. Source: Schulman et al., arXiv 1506.02438, equation 16. Nothing is whitened here; the
    caller does that (`masked_whiten`). Computed in float64.

    Args:
        rewards: `(B, T)`, in units of reward.
        values: `(B, T)`, the value before each token, in units of reward.
        response_mask: bool `(B, T)`, True = counts; each row is a run of True from t = 0, possibly empty.
        gamma: discount γ in [0, 1].
        gae_lambda: λ in [0, 1].

    Returns:
        Advantages and returns, both `(B, T)` in the dtype of `values`.

    Raises:
        ValueError: if shapes differ, a coefficient is out of range, or a response has a gap or does not start
            at t = 0.

    Examples:
        >>> mask = torch.tensor([[True, True, False]])
        >>> rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.6, 9.0]])
        >>> gae(rewards, values, mask, gae_lambda=0.5).advantages
        tensor([[0.3000, 0.4000, 0.0000]])
    """
    if rewards.ndim != 2:
        raise ValueError(f"expected rewards of shape (B, T), got {tuple(rewards.shape)}")
    check_same_shape(rewards=rewards, values=values)
    check_mask(rewards, response_mask, "rewards")
    for name, coefficient in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= coefficient <= 1.0:
            raise ValueError(f"expected {name} in [0, 1], got {coefficient}")
    gaps = (response_mask[:, 1:] & ~response_mask[:, :-1]).any(dim=1)
    if bool(gaps.any()):
        raise ValueError(
            "expected responses that run from t = 0 without a gap, "
            f"got a late start or a gap in row {int(gaps.nonzero()[0])}"
        )
    dtype = accumulation_dtype(rewards.device)
    zeros = torch.zeros_like(rewards, dtype=dtype)
    reward = torch.where(response_mask, rewards.to(dtype), zeros)
    value = torch.where(response_mask, values.to(dtype), zeros)
    next_value = torch.cat([value[:, 1:], zeros[:, :1]], dim=1)
    advantages = _discounted_sum(reward + gamma * next_value - value, gamma * gae_lambda)
    return Advantages(advantages.to(values.dtype), (advantages + value).to(values.dtype))


def _discounted_sum(deltas: Tensor, discount: float) -> Tensor:
    """Return Σ_{s >= t} discount^(s-t) * deltas_s for each t, by a product with a triangular matrix.

    Blocks bound the matrix of a long response; each hands its first sum on to the block before it.
    """
    rows, length = deltas.shape
    step = min(length, _BLOCK)
    positions = torch.arange(step, device=deltas.device)
    distance = positions[:, None] - positions[None, :]
    exponents = torch.arange(step + 1, device=deltas.device, dtype=deltas.dtype)
    powers: Tensor = torch.full_like(exponents, discount) ** exponents
    matrix = torch.where(distance >= 0, powers[distance.clamp(min=0)], torch.zeros_like(powers[:1]))
    carry = deltas.new_zeros(rows, 1)
    sums: list[Tensor] = []
    for block in reversed(deltas.split(_BLOCK, dim=1)):
        size = block.shape[1]
        total = block @ matrix[:size, :size] + carry * powers[1 : size + 1].flip(0)
        carry = total[:, :1]
        sums.append(total)
    return torch.cat(sums[::-1], dim=1)


def leave_one_out(rewards: Tensor, num_responses: int) -> Tensor:
    """Rewards less the mean reward of the other responses to the same prompt.

        A_i = R_i - 1/(n-1) * Σ_{j≠i} R_j = n/(n-1) * (R_i - mean_j R_j)

    Source: Kool et al. (2019); Ahmadian et al., arXiv 2402.14740.

    Args:
        rewards: `(B,)`, one for each response, in units of reward; n rows of a prompt stand together.
        num_responses: n >= 2.

    Returns:
        `(B,)`, in units of reward; each prompt's sum to 0.

    Raises:
        ValueError: if n < 2 or B is not a multiple of n.

    Examples:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]), 3)  # 1 - 4, 2 - 3.5, 6 - 1.5
        tensor([-3.0000, -1.5000,  4.5000])
    """
    groups = _groups(rewards, num_responses)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (num_responses - 1)
    return (groups - others).flatten().to(rewards.dtype)


def group_normalise(rewards: Tensor, num_responses: int, eps: float = 1e-4) -> Tensor:
    """Rewards centred and scaled over the responses to the same prompt.

        A_i = (R_i - mean_j R_j) / (std_j R_j + ε), with the unbiased standard deviation (ddof 1)

    Source: Shao et al., arXiv 2402.03300, §4.1.2, which leaves ddof and ε open.

    Args:
        rewards: `(B,)`, one for each response, in units of reward; n rows of a prompt stand together.
        num_responses: n >= 2.
        eps: ε > 0, in units of reward.

    Returns:
        `(B,)`, without a unit; zeros for a prompt whose responses have equal rewards.

    Raises:
        ValueError: if n < 2, B is not a multiple of n, or ε is not positive.

    Examples:
        >>> group_normalise(torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0]), 3, eps=1.0)
        tensor([-0.5000,  0.0000,  0.5000,  0.0000,  0.0000,  0.0000])
    """
    scale = group_scale(rewards, num_responses, eps)
    return (group_centre(rewards, num_responses) / scale).to(rewards.dtype)


def group_centre(rewards: Tensor, num_responses: int) -> Tensor:
    """Rewards less the mean of the responses to the same prompt.

    Args:
        rewards: `(B,)`, one for each response; n rows of a prompt stand together.
        num_responses: n >= 2.

    Returns:
        `(B,)`, in the unit of the rewards; each prompt's sum to 0.

    Raises:
        ValueError: if n < 2 or B is not a multiple of n.

    Examples:
        >>> group_centre(torch.tensor([1.0, 2.0, 6.0]), 3)
        tensor([-2., -1.,  3.])
    """
    groups = _groups(rewards, num_responses)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten().to(rewards.dtype)


def group_scale(rewards: Tensor, num_responses: int, eps: float = 1e-4) -> Tensor:
    """Standard deviation over the responses to the same prompt, for each of them.

    Args:
        rewards: `(B,)`, one for each response; n rows of a prompt stand together.
        num_responses: n >= 2.
        eps: ε > 0, added to it, in the unit of the rewards.

    Returns:
        `(B,)`, std_j R_j + ε with the unbiased standard deviation (ddof 1), in the unit of the rewards.

    Raises:
        ValueError: if n < 2, B is not a multiple of n, or ε is not positive.
    """
    if not eps > 0:
        raise ValueError(f"expected eps > 0, got {eps}")
    scale = _groups(rewards, num_responses).std(dim=1) + eps
    return scale.repeat_interleave(num_responses).to(rewards.dtype)


def group_shrink(rewards: Tensor, noise: Tensor, num_responses: int) -> Tensor:
    """What rewards with known noise say of the responses to a prompt, less the prompt's mean.

    Rewards are taken for R_i = s_i + e_i, where the noise e_i has variance v_i and the s_i differ within the prompt
    with variance S. The best linear guess of s_i shrinks towards the prompt's mean by its signal against its noise:

        w_i·(R_i - m),    w_i = S/(S + v_i),    m = Σ_j w_j·R_j / Σ_j w_j,    S = max(0, var_j R_j - mean_j v_j)

    S is what the noise leaves of the observed variance (ddof 1), by the method of moments. Without noise this is
    `group_centre`. Where there is more noise than there are differences, S is 0 and nothing is left.

    Source: signal and noise in the variance of a group's rewards, Pan et al., arXiv 2606.19818; the guess itself is
    the empirical Bayes one of Efron & Morris (1973).

    Args:
        rewards: `(B,)`, R, in units of reward; n rows of a prompt stand together.
        noise: `(B,)`, v >= 0, in units of reward squared.
        num_responses: n >= 2.

    Returns:
        `(B,)`, in units of reward; each prompt's sum to 0.

    Raises:
        ValueError: if shapes differ, n < 2 or B is not a multiple of n.

    Examples:
        >>> group_shrink(torch.tensor([0.0, 0.0, 6.0]), torch.tensor([4.0, 4.0, 4.0]), 3)  # S = 12 - 4, w = 2/3
        tensor([-1.3333, -1.3333,  2.6667])
    """
    check_same_shape(rewards=rewards, noise=noise)
    groups, variance = _groups(rewards, num_responses), _groups(noise, num_responses)
    signal = (groups.var(dim=1, keepdim=True) - variance.mean(dim=1, keepdim=True)).clamp_min(0)
    tiny = torch.finfo(groups.dtype).tiny
    # A response without noise in a prompt without differences has the prompt's mean.
    weight = signal / (signal + variance).clamp_min(tiny)
    mean = (weight * groups).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(tiny)
    return (weight * (groups - mean)).flatten().to(rewards.dtype)


def on_every_token(x: Tensor, response_mask: Tensor) -> Tensor:
    """Give each token of a response the response's number.

    Args:
        x: `(B,)`, one for each response.
        response_mask: bool `(B, T)`, True = counts.

    Returns:
        `(B, T)`, zeros outside the mask.

    Raises:
        ValueError: if the shapes do not fit or the mask is not boolean.

    Examples:
        >>> on_every_token(torch.tensor([2.0]), torch.tensor([[True, True, False]]))
        tensor([[2., 2., 0.]])
    """
    if response_mask.ndim != 2 or x.shape != response_mask.shape[:1]:
        raise ValueError(f"expected x of shape ({response_mask.shape[0]},), got {tuple(x.shape)}")
    check_mask(x[:, None].expand(response_mask.shape), response_mask)
    return torch.where(response_mask, x[:, None], torch.zeros_like(x[:, None]))


def _groups(rewards: Tensor, num_responses: int) -> Tensor:
    """The rewards of each prompt as a row, in the accumulation dtype."""
    if rewards.ndim != 1:
        raise ValueError(f"expected rewards of shape (B,), got {tuple(rewards.shape)}")
    if num_responses < 2:
        raise ValueError(f"expected num_responses >= 2, got {num_responses}")
    if len(rewards) % num_responses:
        raise ValueError(f"expected a multiple of {num_responses} rewards, n for each prompt, got {len(rewards)}")
    return rewards.to(accumulation_dtype(rewards.device)).reshape(-1, num_responses)

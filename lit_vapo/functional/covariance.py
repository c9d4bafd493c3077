"""How far members disagree about what a policy has gained: the covariance-weighted norm of its move.

Source: Banerjee, Saha, Gopalan, "Towards Reliable, Uncertainty-Aware Alignment", arXiv 2507.15906, with the whole
covariance of the members in place of its diagonal. Notation: J_k(π) = E_π[r_k] is member k's value of a policy,
ΔJ_k = J_k(π) - J_k(π0) its gain. With Σ the unbiased covariance over members of the rewards of all responses,

    ‖π - π0‖²_Σ = Σ_yz (π - π0)(y) Σ(y, z) (π - π0)(z) = Var_k(ΔJ_k)

so the norm needs K numbers and no matrix over responses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional.masked import check_same_shape


def member_weights(gain: Tensor, penalty: float, bound: bool = False, noise: Tensor | float = 0.0) -> Tensor:
    """How much the reward of each member counts where their disagreement about the gain is penalised.

    The gradient of mean_k ΔJ_k - λ·Var_k(ΔJ_k), or with `bound` of mean_k ΔJ_k - λ·Std_k(ΔJ_k), is the policy gradient
    of the reward Σ_k v_k·r_k(y) with

        v_k = 1/K - 2λ/(K - 1) · (ΔJ_k - mean ΔJ)         or       v_k = 1/K - λ/((K - 1)·Std) · (ΔJ_k - mean ΔJ)

    They sum to one. A member in whose eyes the policy gains more than average counts less, and may count against.
    With `bound`, Σ_k v_k·r_k(y) is never below mean_k r_k(y) - λ·σ(y) nor above mean_k r_k(y) + λ·σ(y) (Cauchy and
    Schwarz).

    Args:
        gain: `(…, K)`, ΔJ_k, in units of reward; a shift of all K does not matter.
        penalty: λ >= 0, in 1/units of reward; with `bound` in standard deviations.
        bound: penalise the standard deviation in place of the variance.
        noise: `(…)` or a number >= 0, added to Var_k under the root of Std. The variance of the gains' estimation
            error keeps a difference of gains that is nothing but noise from getting the full penalty.

    Returns:
        `(…, K)`; 1/K where all gains are equal.

    Raises:
        ValueError: if there are fewer than two members.

    Examples:
        >>> member_weights(torch.tensor([0.0, 1.0]), 0.25)  # 1/2 ∓ 2·0.25·(±0.5)
        tensor([0.7500, 0.2500])
    """
    count = gain.shape[-1] if gain.ndim else 0
    if count < 2:
        raise ValueError(f"expected gain of shape (…, K) with K >= 2, got {tuple(gain.shape)}")
    excess = gain - gain.mean(-1, keepdim=True)
    if not bound:
        return 1 / count - 2 * penalty / (count - 1) * excess
    variance = excess.square().sum(-1, keepdim=True) / (count - 1)
    variance = variance + torch.as_tensor(noise).to(variance)[..., None]
    # At no disagreement at all the norm has no gradient; zero is the subgradient that leaves the mean alone.
    slope = torch.where(variance > 0, variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt(), 0.0)
    direction = slope * excess
    # What rounding left of the mean has been blown up where gains are nearly equal: take it off again.
    direction = direction - direction.mean(-1, keepdim=True)
    return 1 / count - penalty / (count - 1) * direction


class PromptGains(NamedTuple):
    """What members think the policy gains on the prompt of each response.

    Attributes:
        gain: `(B, K)`, in units of reward.
        share: `(B,)`, how much of it was seen in the prompt's own responses, in [0, 1]; the rest is the batch's gain.
    """

    gain: Tensor
    share: Tensor


def prompt_gains(members: Tensor, log_ratio: Tensor, num_responses: int, batch_gain: Tensor) -> PromptGains:
    """Each member's gain on the prompt of each response, from the *other* responses to that prompt.

    A Bradley–Terry reward has a free offset per prompt and member, so J_k(π) at one prompt means nothing without
    J_k(π0) there. The same responses tell it, weighted by u_j = π0(y_j)/π(y_j):

        ΔJ_k(x) = s · ( mean_j r_k(y_j) - Σ_j u_j·r_k(y_j) / Σ_j u_j ) + (1 - s) · ΔJ_k,      s = min(1, mean_j u_j)

    Offsets cancel. Since E_π[u] = 1, s is the share of the reference's mass that the responses stand for: it is 1 at
    π = π0, and small once the policy has left. Then the responses no longer tell what the reference would have
    gained, and the gain over the whole batch stands in.

    Args:
        members: `(B, K)`, rewards; row i·n + j is response j to prompt i.
        log_ratio: `(B,)`, log π(y)/π0(y).
        num_responses: n >= 2, responses to each prompt. With 2 the one other response is no sample to compare with: the
            first term is zero.
        batch_gain: `(K,)`, ΔJ_k over all prompts.

    Raises:
        ValueError: n < 2, or B is no multiple of n.
    """
    check_same_shape(log_ratio=log_ratio, first_member=members[:, 0])
    if num_responses < 2:
        raise ValueError(f"gains per prompt: expected at least 2 responses to each prompt, got {num_responses}")
    if len(members) % num_responses:
        raise ValueError(f"expected {num_responses} responses to each prompt, got {len(members)} rows")
    grouped = members.unflatten(0, (-1, num_responses))
    own = torch.eye(num_responses, dtype=torch.bool, device=members.device)
    logits = -log_ratio.unflatten(0, (-1, 1, num_responses)).expand(-1, num_responses, -1)
    logits = logits.masked_fill(own, -math.inf)
    # Products summed in place of matrix products, which autocast would round.
    reference = (logits.softmax(-1)[..., None] * grouped[:, None]).sum(2)
    others = (grouped.sum(1, keepdim=True) - grouped) / (num_responses - 1)
    share = (logits.logsumexp(-1, keepdim=True) - math.log(num_responses - 1)).clamp_max(0).exp()
    gain = share * (others - reference) + (1 - share) * batch_gain
    return PromptGains(gain.flatten(0, 1), share.flatten())


def covariance_optimal_policy(
    members: Tensor,
    ref_probs: Tensor,
    kl_coef: float | Tensor,
    penalty: float,
    bound: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """The policy that maximises mean_k ΔJ_k - λ·Var_k(ΔJ_k) - β·KL(π‖π0), or Std_k with `bound`, over the simplex.

    With D_k = r_k - mean_k r_k and d = E_π[D] - E_π0[D], either penalty is the greatest t·d - h(t) over t (K,):
    h = (K - 1)/(4λ)·‖t‖², or h = 0 in the ball ‖t‖ <= λ/√(K - 1). So the optimum is a Gibbs policy of the reward
    mean_k r_k - t·D, and t minimises the convex function

        β·log E_π0[exp( (mean_k r_k - t·D)/β )] + t·E_π0[D] + h(t)

    by Newton's method with halved steps, in float64.

    Args:
        members: `(…, n, K)`, rewards by every member, in units of reward.
        ref_probs: `(…, n)`, π0 >= 0, summing to 1.
        kl_coef: β > 0, in units of reward per nat; a number, or `(…)` with one for each prompt.
        penalty: λ > 0, in 1/units of reward; with `bound` in standard deviations.
        bound: penalise the standard deviation in place of the variance.
        start: `(…, n)`, a policy to start from, e.g. the optimum at a β nearby; saves steps.

    Returns:
        `(…, n)` float64.

    Raises:
        ValueError: if shapes do not fit, or λ or β is not positive.

    Examples:
        >>> members, uniform = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0.5, 0.5])
        >>> pi = covariance_optimal_policy(members, uniform, kl_coef=0.1, penalty=2.0)
        >>> round(pi[0].item(), 4)  # the mean alone would give sigmoid(5) = 0.9933
        0.7062
    """
    if ref_probs.shape != members.shape[:-1]:
        raise ValueError(f"expected ref_probs of shape {tuple(members.shape[:-1])}, got {tuple(ref_probs.shape)}")
    price = torch.as_tensor(kl_coef, dtype=torch.float64).expand(ref_probs.shape[:-1])
    if not penalty > 0 or not bool((price > 0).all()):
        raise ValueError(f"expected penalty > 0 and kl_coef > 0, got {penalty} and {kl_coef}")
    count = members.shape[-1]
    mean, p0 = members.double().mean(-1), ref_probs.double()
    excess = members.double() - mean[..., None]
    excess = excess - (p0[..., None] * excess).sum(-2, keepdim=True)  # of the reference, so that d = E_π[D]
    # `curvature` of h for the variance; `radius` of the ball for the standard deviation.
    curvature, radius = (0.0, penalty / (count - 1) ** 0.5) if bound else ((count - 1) / (2 * penalty), math.inf)

    def logits(t: Tensor) -> Tensor:
        return p0.log() + (mean - (excess @ t[..., None])[..., 0]) / price[..., None]

    def dual(t: Tensor) -> Tensor:
        return price * logits(t).logsumexp(-1) + 0.5 * curvature * t.square().sum(-1)

    gain = ((p0 if start is None else start)[..., None] * excess).sum(-2)
    tilt = 1 / count - member_weights(gain, penalty, bound)
    for _ in range(50):
        policy = logits(tilt).softmax(-1)
        spread = (policy[..., None] * excess).sum(-2)
        centred = policy.sqrt()[..., None] * (excess - spread[..., None, :])
        hessian = centred.mT @ centred / price[..., None, None]
        change = _newton_target(hessian, spread, tilt, curvature, radius) - tilt
        # Halve the step where it does not descend by enough.
        slope = (change * (curvature * tilt - spread)).sum(-1)
        before, step = dual(tilt), torch.ones_like(slope)
        for _ in range(40):
            rises = dual(tilt + step[..., None] * change) > before + 1e-4 * step * slope + 1e-15 * before.abs()
            if not bool(rises.any()):
                break
            step = torch.where(rises, 0.5 * step, step)
        tilt = tilt + step[..., None] * change
        # Convergence is quadratic: the error left is about the square of the last step.
        if bool((change.abs() <= 1e-6 * (1 + tilt.abs())).all()):
            break
    return logits(tilt).softmax(-1)


def _newton_target(hessian: Tensor, spread: Tensor, tilt: Tensor, curvature: float, radius: float) -> Tensor:
    """Where the quadratic model of the dual is least: (H + μ)·u = d + H·t, with μ such that ‖u‖ <= radius."""
    values, basis = torch.linalg.eigh(hessian)
    right = ((spread + (hessian @ tilt[..., None])[..., 0])[..., None, :] @ basis)[..., 0, :]
    # A shift of all members moves no policy: in such directions there is nothing to solve for.
    right = right.masked_fill(values <= 1e-12 * values[..., -1:], 0.0)
    values = values.clamp_min(1e-300)
    shift = torch.full_like(values[..., :1], curvature)
    if math.isfinite(radius):
        low, high = torch.zeros_like(shift), right.norm(dim=-1, keepdim=True) / radius
        for _ in range(50):
            shift = 0.5 * (low + high)
            outside = (right / (values + shift)).norm(dim=-1, keepdim=True) > radius
            low, high = torch.where(outside, shift, low), torch.where(outside, high, shift)
        shift = high
    return (basis @ (right / (values + shift))[..., None])[..., 0]

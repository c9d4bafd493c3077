"""What steers a PPO run: how far the policy is from its reference, the price of that, and when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_vapo.advantages.base import Reduce
from lit_vapo.functional import adapt_kl_coef, kl_k3
from lit_vapo.rollout import Rollout

# Ziegler et al., arXiv 1909.08593, §2.2.
SLOWEST_GAIN = 0.1


def check_targets(kl_coef: float, kl_target: float | None, kl_budget: float | None) -> None:
    """Refuse prices and targets that make no sense.

    Raises:
        ValueError: β is negative, or the budget ends a run before it reaches its target.
    """
    if not kl_coef >= 0:
        raise ValueError(f"model.kl_coef: expected a number of 0 or more, got {kl_coef}")
    if kl_target is not None and kl_coef == 0:
        raise ValueError("model.kl_coef: expected a number above 0 to adapt to model.kl_target, got 0")
    if kl_target is not None and kl_budget is not None and kl_budget <= kl_target:
        raise ValueError(f"model.kl_budget: expected more than model.kl_target = {kl_target}, got {kl_budget}")


def global_kl(rollout: Rollout, all_sum: Reduce) -> Tensor:
    """Plain KL to the reference in nats: k3 of whole responses, mean over those of all processes, ().

    Args:
        rollout: Responses of this process.
        all_sum: Sum of a tensor over all processes.
    """
    k3 = kl_k3(rollout.log_ratio)
    return all_sum(k3.sum()) / all_sum(torch.tensor(float(len(k3)), device=k3.device))


def next_kl_coef(kl_coef: Tensor, kl: Tensor, target: float | None, iteration: int, iterations: int) -> Tensor:
    """β for the next iteration; the same β without a target.

    Ziegler et al.'s control, with two departures that make it useful in runs of tens of iterations.

    - The gain is their 0.1 an iteration, and in runs of fewer than 100 iterations as much more as lets β change by a
      factor of e² = 7.4 in a whole run. They limit the error to a fifth, so with a gain of 0.1 β could move by 2% an
      iteration, and a run of 20 would end with almost the β it began with. Neither gain depends on the batch size.
    - What is approached rises from 0 to the target over the first half of the run, as the KL itself has to start at 0.
      A fixed target would lower β all that time, and the policy would then shoot past it.

    Args:
        kl_coef: β now, ().
        kl: Plain KL to the reference over all processes, (), nats.
        target: The KL to approach, in nats, or `None`.
        iteration: Number of the iteration, from 1.
        iterations: Planned length of the run.
    """
    if target is None:
        return kl_coef
    gain = max(SLOWEST_GAIN, min(1.0, 10 / iterations))
    return adapt_kl_coef(kl_coef, kl.to(kl_coef), target * min(1.0, 2 * iteration / iterations), gain)


def over_budget(kl: Tensor, budget: float | None, iteration: int) -> bool:
    """Whether the policy has moved further than allowed; says so with both figures if it has.

    Args:
        kl: Plain KL to the reference over all processes, (), nats.
        budget: The most it may be, in nats, or `None`.
        iteration: Number of the iteration, from 1.
    """
    # NaN is not above anything: it is for the checks of the update to name.
    if budget is None or not float(kl) > budget:
        return False
    rank_zero_info(
        f"iteration {iteration}: the KL to the reference is {float(kl):.4g} nats per response (k3), above "
        f"model.kl_budget = {budget:g}: this iteration's update is not taken, and the run stops"
    )
    return True


@contextmanager
def named(iteration: int) -> Iterator[None]:
    """A block whose errors say in which iteration they arose.

    Raises:
        ValueError: Whatever ValueError arose, with the iteration in front.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"iteration {iteration}: {error}") from error

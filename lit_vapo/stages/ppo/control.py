"""What steers a PPO run: how far the policy is from its reference, the price of that, and when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_vapo.advantages.base import Reduce
from lit_vapo.functional import adapt_kl_coef, kl_k3
from lit_vapo.ranges import NonNegativeFloat, PositiveFloat, check_ranges
from lit_vapo.rollout import Rollout

# Ziegler et al., arXiv 1909.08593, §2.2.
SLOWEST_GAIN = 0.1

KLEstimator = Literal["sampled", "exact"]


class KLControl(nn.Module):
    """The price of a nat, the KL it is to lead to, and the KL that ends a run.

    Args:
        coef: β, the price of a nat of the weighted KL, in units of reward; >= 0.
        target: Plain KL to the reference to adapt β to, in nats per response, or `None` for a fixed β.
        budget: Plain KL above which a run ends, in nats per response, or `None`.
        estimator: What stands for a token's KL in the penalty: the log-ratio of the token that was drawn, or the exact
            KL of the distribution that it was drawn from.

    Attributes:
        coef: β now (); a buffer, so that checkpoints hold it.
        exact: Whether the exact KL of each token's distribution is wanted.

    Raises:
        ValueError: β is negative, the budget ends a run before it reaches its target, or there is no such estimator.
    """

    coef: Tensor

    def __init__(
        self,
        coef: NonNegativeFloat,
        target: PositiveFloat | None = None,
        budget: PositiveFloat | None = None,
        estimator: KLEstimator = "sampled",
    ) -> None:
        super().__init__()
        check_ranges(KLControl, locals(), "model.kl_")
        if estimator not in get_args(KLEstimator):
            raise ValueError(f"model.kl_estimator: expected one of {get_args(KLEstimator)}, got {estimator!r}")
        if target is not None and coef == 0:
            raise ValueError("model.kl_coef: expected a number above 0 to adapt to model.kl_target, got 0")
        if target is not None and budget is not None and budget <= target:
            raise ValueError(f"model.kl_budget: expected more than model.kl_target = {target}, got {budget}")
        self.target = target
        self.budget = budget
        self.exact = estimator == "exact"
        self.register_buffer("coef", torch.tensor(float(coef)))

    def adapt(self, kl: Tensor, iteration: int, iterations: int) -> None:
        """Set β for the next iteration; without a target it stays.

        Ziegler et al.'s control, with two departures that make it useful in runs of tens of iterations.

        - The gain is their 0.1 an iteration, and in runs of fewer than 100 iterations as much more as lets β change by
          a factor of e² = 7.4 in a whole run. They limit the error to a fifth, so with a gain of 0.1 β could move by 2%
          an iteration, and a run of 20 would end with almost the β it began with. Neither gain depends on the batch
          size.
        - What is approached rises from 0 to the target over the first half of the run, as the KL itself has to start at
          0. A fixed target would lower β all that time, and the policy would then shoot past it.

        Args:
            kl: Plain KL to the reference over all processes, (), nats.
            iteration: Number of the iteration, from 1.
            iterations: Planned length of the run.
        """
        if self.target is None:
            return
        gain = max(SLOWEST_GAIN, min(1.0, 10 / iterations))
        due = self.target * min(1.0, 2 * iteration / iterations)
        self.coef.copy_(adapt_kl_coef(self.coef, kl.to(self.coef), due, gain))

    def statistics(self, mean_weight: Tensor) -> dict[str, Tensor]:
        """β, and the price of a nat on average.

        Args:
            mean_weight: Mean w over the responses of all processes, ().
        """
        return {"kl_coef": self.coef.clone(), "effective_kl_coef": self.coef * mean_weight}

    def over_budget(self, kl: Tensor, iteration: int) -> bool:
        """Whether the policy has moved further than allowed; says so with both figures if it has.

        Args:
            kl: Plain KL to the reference over all processes, (), nats.
            iteration: Number of the iteration, from 1.
        """
        # NaN is not above anything: it is for the checks of the update to name.
        if self.budget is None or not float(kl) > self.budget:
            return False
        rank_zero_info(
            f"iteration {iteration}: the KL to the reference is {float(kl):.4g} nats per response (k3), above "
            f"model.kl_budget = {self.budget:g}: this iteration's update is not taken, and the run stops"
        )
        return True


def global_kl(rollout: Rollout, all_sum: Reduce) -> Tensor:
    """Plain KL to the reference in nats: k3 of whole responses, mean over those of all processes, ().

    Args:
        rollout: Responses of this process.
        all_sum: Sum of a tensor over all processes.
    """
    k3 = kl_k3(rollout.log_ratio)
    return all_sum(k3.sum()) / all_sum(torch.tensor(float(len(k3)), device=k3.device))


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

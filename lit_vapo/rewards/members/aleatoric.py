"""Heads that tell how good a response is and how much people differ about it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lit_vapo.functional import bradley_terry_loss, ensemble_estimate, noise_variance, noisy_log_odds
from lit_vapo.ranges import PositiveFloat, PositiveInt, Smoothing, check_ranges
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.types import PairLabels, RewardEstimate

# Log-noise stays within ±: a response far from the training pairs has no noise of e^50.
LARGEST_LOG_NOISE = 8.0


class AleatoricEnsemble(HeadEnsemble):
    """K linear heads for the reward μ_k and K for the noise of labels τ_k, on one backbone (2605.11865).

        P_k(a ≻ b) = Φ( (μ_a − μ_b) / √(τ_a² + τ_b²) ),    μ = w_k·φ,    τ² = 4/π · exp(v_k·φ + c_k)

    Two things are told apart: the *ignorance* of the model, Var_k(μ_k), which more pairs lower, and the *noise* of
    labels, mean_k τ_k², which they do not. An estimate has both, `variance` and `aleatoric`, in squared units of the
    reference's rewards. Labels may be soft (the share of people who prefer a response).

    Preferences know μ and τ up to a common origin and unit. `anchor` holds the unit in training, by a penalty on
    (v_k·φ + c_k)², and also draws responses to the same noise where few pairs say otherwise. Calibration on the
    reference's responses then fixes origin and unit (`functional/aleatoric.py` derives this). A *margin* is the
    log-odds of the preference, so the noise is in it; its variance is over members.

    Args:
        num_members: Number of members K. A variance needs at least 2.
        anchor: Weight of the penalty on the squared log-noise of both responses, in nats per pair.
        variance: What objectives get for a variance: `epistemic` (members' disagreement about μ), `aleatoric` (noise of
            labels), or `total`, their sum.
        bootstrap: Weight pairs by Poisson(1) counts per member; if off, members differ by initialisation only.
        label_smoothing: Share of preferences taken to be stated the wrong way round, in [0, 0.5).
        seed: Seed of initialisation and bootstrap.
        moderated: Shrink σ² of each response to the typical one, as far as K − 1 degrees of freedom leave it unknown.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        num_members: PositiveInt = 100,
        anchor: PositiveFloat = 0.003,
        variance: Literal["epistemic", "aleatoric", "total"] = "epistemic",
        bootstrap: bool = True,
        label_smoothing: Smoothing = 0.0,
        seed: int = 0,
        moderated: bool = True,
    ) -> None:
        super().__init__(num_members, None, bootstrap, label_smoothing, seed=seed, moderated=moderated)
        check_ranges(AleatoricEnsemble, locals())
        self.anchor = anchor
        self.variance = variance

    def make_parameters(self, hidden_size: int) -> None:
        """Draw the weights of μ; all responses begin with the same noise."""
        super().make_parameters(hidden_size)
        self.noise_weight = nn.Parameter(torch.zeros(self.num_members, hidden_size))
        self.noise_bias = nn.Parameter(torch.zeros(self.num_members))

    def log_noise(self, features: Tensor) -> Tensor:
        """Logarithm s of the noise of labels (B, K), relative to the typical one, float32."""
        with torch.autocast(features.device.type, enabled=False):
            noise = torch.addmm(self.noise_bias, features.float(), self.noise_weight.T)
            return noise.clamp(-LARGEST_LOG_NOISE, LARGEST_LOG_NOISE)

    def forward(self, features: Tensor) -> RewardEstimate:
        """Estimate of the normalised reward, with the noise of labels (B,) in its units squared."""
        found = self.estimate(self.rewards(features))
        noise = (noise_variance(self.log_noise(features)) / self.reward_scale.square()).mean(1)
        told = {"epistemic": found.variance, "aleatoric": noise, "total": found.variance + noise}
        return found._replace(variance=told[self.variance], aleatoric=noise)

    def margin(self, chosen: Tensor, rejected: Tensor) -> RewardEstimate:
        """Estimate of the log-odds of the preference, its variance over members."""
        return ensemble_estimate(self._log_odds(chosen, rejected))

    def _log_odds(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        noise = self.log_noise(chosen), self.log_noise(rejected)
        return noisy_log_odds(self.rewards(chosen), self.rewards(rejected), *noise)

    def loss(self, chosen: Tensor, rejected: Tensor, labels: PairLabels) -> Tensor:
        """Negative log-likelihood of the (soft) labels and the anchor, summed over members."""
        weights = self.pair_weights(labels, self.num_members)
        log_odds = self._log_odds(chosen, rejected)
        fit = bradley_terry_loss(
            log_odds,
            torch.zeros_like(log_odds),
            margin=labels.margin,
            probability=labels.probability,
            weights=weights,
            label_smoothing=self.label_smoothing,
        )
        squares = self.log_noise(chosen).square() + self.log_noise(rejected).square()
        return (fit + self.anchor * (weights * squares).mean(0)).sum()

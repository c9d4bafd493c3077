"""One evaluation of a reward ensemble, as a table of pairs and the figures that follow from it.

Every figure is defined in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lit_vapo.functional import (
    RiskCoverage,
    auroc,
    brier,
    constant_share,
    disagreement,
    preference_accuracy,
    preference_calibration_error,
    preference_nll,
    risk_coverage,
    spearman,
)
from lit_vapo.types import RewardEstimate


class PreferenceReport:
    """What a set of pairs says about a reward ensemble: its accuracy, its calibration, and whether it knows its errors.

    A pair's margin Δ_k = r_k(x, chosen) − r_k(x, rejected) is in log-odds, before normalisation; Δ̄ is the mean over
    members and σ_Δ the square root of its variance over members (ddof 1). Figures are computed when they are asked for.
    Those of an empty report are NaN. With one member, or an estimator without spread, σ is 0 everywhere: then AUROC is
    0.5 (NaN where the mean makes no error, or nothing but errors), Spearman NaN, and the risk–coverage curve flat.

    A plain class on purpose: torchmetrics turns each tensor of one element that it finds in the tuple or dataclass of
    a `compute` into a scalar, so that a report of one pair would lose its shapes.

    Args:
        example_ids: Identity of each pair (N,), int64, rising.
        margin: Estimate of the margins (N,), with the members (N, K) or None.
        response_variance: Variance of the normalised reward of the chosen and the rejected response (N, 2).
        num_ties: How many pairs were left out because nobody preferred either response.
        responses: Normalised reward of both responses by each member, and last by their mean (N, 2, K + 1).
        response_noise: Variance of what people say of both responses (N, 2), in the same unit; NaN, or None for all,
            where the estimator does not tell it apart.
    """

    def __init__(
        self,
        example_ids: Tensor,
        margin: RewardEstimate,
        response_variance: Tensor,
        num_ties: int = 0,
        responses: Tensor | None = None,
        response_noise: Tensor | None = None,
    ) -> None:
        self.example_ids = example_ids
        self.margin = margin
        self.margin_sigma = margin.sigma
        self.response_sigma = response_variance.clamp_min(0).sqrt()
        self.num_ties = num_ties
        self.responses = responses
        noise = torch.full_like(response_variance, torch.nan) if response_noise is None else response_noise
        self.response_noise = noise.sqrt()

    @property
    def num_pairs(self) -> int:
        """N, ties left out."""
        return len(self.example_ids)

    @property
    def num_members(self) -> int:
        """K; 0 where the estimator has no discrete members."""
        return 0 if self.margin.members is None else self.margin.members.shape[1]

    @cached_property
    def margins(self) -> Tensor:
        """Margins (N, K + 1) of the members, and last their mean."""
        mean = self.margin.mean[:, None]
        return mean if self.margin.members is None else torch.cat([self.margin.members, mean], dim=1)

    @cached_property
    def accuracy(self) -> Tensor:
        """Accuracy (K + 1,) of the members, and last of the mean."""
        return self._figure(preference_accuracy)

    @cached_property
    def nll(self) -> Tensor:
        """Negative log-likelihood (K + 1,) in nats, the mean last."""
        return self._figure(preference_nll)

    @cached_property
    def ece(self) -> Tensor:
        """Expected calibration error (K + 1,), the mean last."""
        return self._figure(preference_calibration_error)

    @cached_property
    def brier(self) -> Tensor:
        """Brier score (K + 1,), the mean last."""
        return self._figure(brier)

    def _figure(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(self.margins) if self.num_pairs else self.margins.new_full(self.margins.shape[1:], torch.nan)

    @cached_property
    def error(self) -> Tensor:
        """Error (N,) of the mean: 1 where it prefers the wrong response, 0.5 where it prefers neither, else 0."""
        return 0.5 * (1 - torch.sign(self.margin.mean))

    @cached_property
    def disagreement(self) -> Tensor:
        """Share () of pairs on which members do not all prefer the same response; NaN without members."""
        members = self.margin.members
        return torch.tensor(torch.nan) if members is None or not self.num_pairs else disagreement(members)

    @cached_property
    def error_auroc(self) -> Tensor:
        """How often () σ_Δ is larger on a pair that the mean gets wrong than on one it gets right.

        Pairs on which the mean prefers neither are neither, and left out.
        """
        decided = self.error != 0.5
        if not bool(decided.any()):
            return torch.tensor(torch.nan)
        return auroc(self.margin_sigma[decided], self.error[decided] == 1)

    @cached_property
    def error_spearman(self) -> Tensor:
        """Rank correlation () of σ_Δ and the error of the mean."""
        return spearman(self.margin_sigma, self.error) if self.num_pairs else torch.tensor(torch.nan)

    @cached_property
    def constant_share(self) -> Tensor:
        """Share () of σ² of a response that is one constant for each member; NaN without members."""
        if self.responses is None or not self.num_pairs:
            return torch.tensor(torch.nan)
        members = self.responses[..., :-1].flatten(0, 1)
        return constant_share(members) if members.shape[1] else torch.tensor(torch.nan)

    @property
    def noise(self) -> dict[str, float]:
        """Mean σ of a response over members and over people, by name; empty where nobody tells the noise of labels."""
        if bool(self.response_noise.isnan().all()):
            return {}
        means = self.response_sigma.mean(), self.response_noise.mean()
        return {"response_sigma": float(means[0]), "response_noise": float(means[1])}

    @cached_property
    def risk_coverage(self) -> RiskCoverage:
        """Error rate of the mean among the pairs with the least σ_Δ, and the area under that curve."""
        if self.num_pairs:
            return risk_coverage(self.margin_sigma, self.error)
        nan, empty = torch.tensor(torch.nan), torch.zeros(0)
        return RiskCoverage(empty, empty, nan, nan)

    def select(self, index: Tensor) -> PreferenceReport:
        """Report on some of the pairs: `index` is a mask (N,) or a list of positions in rising order."""
        mean, variance, members = self.margin[:3]
        margin = RewardEstimate(mean[index], variance[index], None if members is None else members[index])
        responses = None if self.responses is None else self.responses[index]
        variances = self.response_sigma[index].square(), self.response_noise[index].square()
        return PreferenceReport(self.example_ids[index], margin, variances[0], 0, responses, variances[1])

    def summary(self) -> dict[str, float]:
        """What is logged of a split, by the names of docs/metrics.md; `member_*` only where there are members."""
        figures = {"accuracy": self.accuracy, "nll": self.nll, "ece": self.ece, "brier": self.brier}
        out = {name: float(values[-1]) for name, values in figures.items()}
        if self.num_members:
            out |= {f"member_{name}": float(values[:-1].mean()) for name, values in figures.items()}
            out["disagreement"] = float(self.disagreement)
        out["margin_sigma"] = float(self.margin_sigma.mean())
        out["sigma_constant_share"] = float(self.constant_share)
        out["error_auroc"] = float(self.error_auroc)
        out["error_spearman"] = float(self.error_spearman)
        out["aurc"] = float(self.risk_coverage.area)
        return out

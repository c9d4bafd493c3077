"""Pure torch maths: no state, no input or output, no logging, no configuration."""

from lit_vapo.functional.advantages import Advantages, gae, group_normalise, leave_one_out, on_every_token
from lit_vapo.functional.best_of_n import best_of_n, best_of_n_kl
from lit_vapo.functional.calibration import (
    ReliabilityCurve,
    brier,
    expected_calibration_error,
    preference_accuracy,
    preference_calibration_error,
    preference_nll,
    reliability_curve,
)
from lit_vapo.functional.comparison import Gain, paired_gain, win_rate
from lit_vapo.functional.covariance import PromptGains, covariance_optimal_policy, member_weights, prompt_gains
from lit_vapo.functional.ensemble import (
    constant_share,
    ensemble_estimate,
    example_uniforms,
    fit_normaliser,
    margin_estimate,
    normalise_members,
    nuclear_diversity,
    poisson_bootstrap,
)
from lit_vapo.functional.intervals import Interval, auroc_interval, share_interval
from lit_vapo.functional.kl import adapt_kl_coef, kl_k1, kl_k2, kl_k3, sequence_log_ratio, weighted_k3
from lit_vapo.functional.laplace import Posterior, held_out_nll, laplace_preference
from lit_vapo.functional.logprobs import TokenLogprobs, token_logprobs
from lit_vapo.functional.masked import Moments, masked_mean, masked_sum, masked_var, masked_whiten, moments
from lit_vapo.functional.off_policy import SamplerGap, importance_weights, sampler_gap
from lit_vapo.functional.ppo import (
    PolicyTerms,
    ValueTerms,
    approx_kl,
    explained_variance,
    policy_loss_terms,
    value_loss_terms,
)
from lit_vapo.functional.preference import bradley_terry_loss
from lit_vapo.functional.repetition import Repetition, repetition
from lit_vapo.functional.rewards import clip_rewards, token_rewards
from lit_vapo.functional.sums import weighted_estimate
from lit_vapo.functional.tabular import (
    bregman_kl,
    match_kl,
    objective,
    optimal_policy,
    risk_vanilla,
    risk_variance_aware,
)
from lit_vapo.functional.uncertainty import (
    RiskCoverage,
    auroc,
    disagreement,
    fit_temperature,
    risk_coverage,
    spearman,
)

__all__ = [
    "Advantages",
    "Gain",
    "Interval",
    "Moments",
    "PolicyTerms",
    "Posterior",
    "PromptGains",
    "ReliabilityCurve",
    "Repetition",
    "RiskCoverage",
    "SamplerGap",
    "TokenLogprobs",
    "ValueTerms",
    "adapt_kl_coef",
    "approx_kl",
    "auroc",
    "auroc_interval",
    "best_of_n",
    "best_of_n_kl",
    "bradley_terry_loss",
    "bregman_kl",
    "brier",
    "clip_rewards",
    "constant_share",
    "covariance_optimal_policy",
    "disagreement",
    "ensemble_estimate",
    "example_uniforms",
    "expected_calibration_error",
    "explained_variance",
    "fit_normaliser",
    "fit_temperature",
    "gae",
    "group_normalise",
    "held_out_nll",
    "importance_weights",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "laplace_preference",
    "leave_one_out",
    "margin_estimate",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "match_kl",
    "member_weights",
    "moments",
    "normalise_members",
    "nuclear_diversity",
    "objective",
    "on_every_token",
    "optimal_policy",
    "paired_gain",
    "poisson_bootstrap",
    "policy_loss_terms",
    "preference_accuracy",
    "preference_calibration_error",
    "preference_nll",
    "prompt_gains",
    "reliability_curve",
    "repetition",
    "risk_coverage",
    "risk_vanilla",
    "risk_variance_aware",
    "sampler_gap",
    "sequence_log_ratio",
    "share_interval",
    "spearman",
    "token_logprobs",
    "token_rewards",
    "value_loss_terms",
    "weighted_estimate",
    "weighted_k3",
    "win_rate",
]

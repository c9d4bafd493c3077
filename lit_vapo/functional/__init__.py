"""Pure torch maths: no state, no input or output, no logging, no configuration."""

from lit_vapo.functional.advantages import (
    Advantages,
    gae,
    group_centre,
    group_normalise,
    group_scale,
    group_shrink,
    leave_one_out,
    on_every_token,
)
from lit_vapo.functional.aleatoric import noise_variance, noisy_log_odds
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
from lit_vapo.functional.drawing import draw
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
from lit_vapo.functional.gradient_noise import GradientSignal, gradient_signal
from lit_vapo.functional.intervals import Interval, auroc_interval, share_interval
from lit_vapo.functional.kl import adapt_kl_coef, kl_k1, kl_k2, kl_k3, sequence_log_ratio, weighted_k3
from lit_vapo.functional.laplace import Posterior, held_out_nll, laplace_preference
from lit_vapo.functional.logprobs import TokenLogprobs, token_kl, token_logprobs
from lit_vapo.functional.masked import (
    Moments,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    moments,
    whitening_scale,
)
from lit_vapo.functional.moderation import (
    VariancePrior,
    fit_variance_prior,
    inverse_trigamma,
    moderated_variance,
    shrinkage,
)
from lit_vapo.functional.off_policy import SamplerGap, importance_weights, sampler_gap
from lit_vapo.functional.outliers import (
    Spread,
    chi_square_quantile,
    fit_spread,
    held_out_distances,
    outlier_bound,
    squared_distance,
)
from lit_vapo.functional.ppo import (
    PolicyTerms,
    ValueTerms,
    approx_kl,
    explained_variance,
    policy_loss_terms,
    value_loss_terms,
)
from lit_vapo.functional.precision import reward_origin
from lit_vapo.functional.preference import bradley_terry_loss
from lit_vapo.functional.repetition import Repetition, repetition
from lit_vapo.functional.rewards import clip_rewards, own_penalty, token_rewards
from lit_vapo.functional.risk import lower_tail_mean, soft_minimum
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
    "GradientSignal",
    "Interval",
    "Moments",
    "PolicyTerms",
    "Posterior",
    "PromptGains",
    "ReliabilityCurve",
    "Repetition",
    "RiskCoverage",
    "SamplerGap",
    "Spread",
    "TokenLogprobs",
    "ValueTerms",
    "VariancePrior",
    "adapt_kl_coef",
    "approx_kl",
    "auroc",
    "auroc_interval",
    "best_of_n",
    "best_of_n_kl",
    "bradley_terry_loss",
    "bregman_kl",
    "brier",
    "chi_square_quantile",
    "clip_rewards",
    "constant_share",
    "covariance_optimal_policy",
    "disagreement",
    "draw",
    "ensemble_estimate",
    "example_uniforms",
    "expected_calibration_error",
    "explained_variance",
    "fit_normaliser",
    "fit_spread",
    "fit_temperature",
    "fit_variance_prior",
    "gae",
    "gradient_signal",
    "group_centre",
    "group_normalise",
    "group_scale",
    "group_shrink",
    "held_out_distances",
    "held_out_nll",
    "importance_weights",
    "inverse_trigamma",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "laplace_preference",
    "leave_one_out",
    "lower_tail_mean",
    "margin_estimate",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "match_kl",
    "member_weights",
    "moderated_variance",
    "moments",
    "noise_variance",
    "noisy_log_odds",
    "normalise_members",
    "nuclear_diversity",
    "objective",
    "on_every_token",
    "optimal_policy",
    "outlier_bound",
    "own_penalty",
    "paired_gain",
    "poisson_bootstrap",
    "policy_loss_terms",
    "preference_accuracy",
    "preference_calibration_error",
    "preference_nll",
    "prompt_gains",
    "reliability_curve",
    "repetition",
    "reward_origin",
    "risk_coverage",
    "risk_vanilla",
    "risk_variance_aware",
    "sampler_gap",
    "sequence_log_ratio",
    "share_interval",
    "shrinkage",
    "soft_minimum",
    "spearman",
    "squared_distance",
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "value_loss_terms",
    "weighted_estimate",
    "weighted_k3",
    "whitening_scale",
    "win_rate",
]

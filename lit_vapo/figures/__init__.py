"""Pictures of reward ensembles and of policies. Every function writes one PNG."""

from lit_vapo.figures.policies import overoptimisation
from lit_vapo.figures.rewards import member_scores, preference_pictures, reliability, risk_coverage, sigma_histogram

__all__ = [
    "member_scores",
    "overoptimisation",
    "preference_pictures",
    "reliability",
    "risk_coverage",
    "sigma_histogram",
]

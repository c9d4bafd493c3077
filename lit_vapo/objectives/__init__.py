"""What PPO maximises: one class in one file, all behind `Objective`."""

from lit_vapo.objectives.base import Objective, Score
from lit_vapo.objectives.conditional_value_at_risk import ConditionalValueAtRisk
from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.objectives.entropic import Entropic
from lit_vapo.objectives.lower_confidence import LowerConfidence
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.precision_weighted import PrecisionWeighted
from lit_vapo.objectives.single_reward import SingleReward
from lit_vapo.objectives.uncertainty_weighted import UncertaintyWeighted
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.objectives.worst_case import WorstCase
from lit_vapo.plugins import import_all

import_all(__name__, __path__)

__all__ = [
    "ConditionalValueAtRisk",
    "CovarianceAware",
    "Entropic",
    "LowerConfidence",
    "MeanReward",
    "Objective",
    "PrecisionWeighted",
    "Score",
    "SingleReward",
    "UncertaintyWeighted",
    "VarianceAware",
    "WorstCase",
]

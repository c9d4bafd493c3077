"""Estimators of the advantage: what each token is better than."""

from lit_vapo.advantages.base import AdvantageEstimator, GroupBaseline, WholeResponses
from lit_vapo.advantages.gae import Gae
from lit_vapo.advantages.gdpo import Gdpo
from lit_vapo.advantages.grpo import Grpo
from lit_vapo.advantages.rloo import Rloo
from lit_vapo.advantages.rvpo import Rvpo
from lit_vapo.advantages.signal_to_noise import SignalToNoise
from lit_vapo.plugins import import_all

import_all(__name__, __path__)

__all__ = [
    "AdvantageEstimator",
    "Gae",
    "Gdpo",
    "GroupBaseline",
    "Grpo",
    "Rloo",
    "Rvpo",
    "SignalToNoise",
    "WholeResponses",
]

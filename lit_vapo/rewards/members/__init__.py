"""The members of an ensemble: what they are made of, how they score, how they learn."""

from lit_vapo.plugins import import_all
from lit_vapo.rewards.members.aleatoric import AleatoricEnsemble
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.dropout import McDropout
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble

import_all(__name__, __path__)

__all__ = [
    "AleatoricEnsemble",
    "BayesianLinear",
    "FullEnsemble",
    "HeadEnsemble",
    "LoraEnsemble",
    "McDropout",
    "RewardHead",
]

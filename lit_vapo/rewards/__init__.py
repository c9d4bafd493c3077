"""Rewards: one door (`RewardSource`), and what stands behind it."""

from lit_vapo.plugins import import_all
from lit_vapo.rewards.combined import WeightedSum
from lit_vapo.rewards.ensemble import EnsembleReward, HeldEnsemble
from lit_vapo.rewards.function import FunctionReward
from lit_vapo.rewards.pretrained import PretrainedRewards
from lit_vapo.rewards.remote import RemoteReward
from lit_vapo.rewards.saved import load_reward
from lit_vapo.rewards.source import Responses, RewardSource

import_all(__name__, __path__)

__all__ = [
    "EnsembleReward",
    "FunctionReward",
    "HeldEnsemble",
    "PretrainedRewards",
    "RemoteReward",
    "Responses",
    "RewardSource",
    "WeightedSum",
    "load_reward",
]

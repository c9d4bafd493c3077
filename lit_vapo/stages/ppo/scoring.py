"""What a run of PPO has to do with its source of rewards: calibrate it, and keep of it what cannot be read again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.settings import whole_paths
from lit_vapo.models.sharding import Sharing
from lit_vapo.models.tensor_parallel import KEY
from lit_vapo.rewards import Responses, RewardSource
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.stages.ppo.evaluation import EvaluatedPolicy
from lit_vapo.stages.settings import plain

# What the state of the source of rewards begins with.
REWARD = "reward."


class ScoredPolicy(EvaluatedPolicy):
    """A policy with a source of rewards; training is the subclass's."""

    reward: RewardSource
    networks: ActorCritic | None

    def setup(self, stage: str) -> None:
        """Refuse what the reward lacks before models are loaded.

        Raises:
            ValueError: The source of rewards is not whole, or prompts lack a column that it reads.
        """
        self.reward.check()
        datamodule = cast("PromptDataModule | None", getattr(self.trainer, "datamodule", None))
        if datamodule is not None:
            datamodule.check_columns(self.reward.columns)
        super().setup(stage)

    def share_networks(self, sharing: Sharing) -> None:
        """Share actor, reference and critic with other processes.

        Raises:
            ValueError: Members of the ensemble hang in matrix products that would be split.
        """
        assert self.networks is not None
        hung = any(isinstance(m, RewardModel) and m.lender is not None for m in self.reward.modules())
        if hung and sharing.tensor.size() > 1:
            raise ValueError(
                f"{KEY}: expected 1 for a LoraEnsemble on the policy's base, got {sharing.tensor.size()}: its adapters "
                "belong to whole layers. Share weights instead (data_parallel_size), or score with heads."
            )
        self.networks.share(sharing)

    @torch.no_grad()
    def calibrate(self, references: Iterable[Responses]) -> None:
        """Calibrate the source on responses of the reference, and give all processes what the first one found.

        A function or a service need not say the same thing twice.
        """
        self.reward.calibrate(references)
        own = self.reward.state_dict()
        names = sorted(self.reward.own_state())
        told = self.trainer.strategy.broadcast({name: own[name].cpu() for name in names})
        for name in names:
            own[name].copy_(told[name])

    def kept_keys(self) -> set[str]:
        """What trains, what steers, and what the source of rewards cannot be read again without."""
        return super().kept_keys() | {f"{REWARD}{name}" for name in self.reward.own_state()}

    def choose_state(self, checkpoint: dict[str, Any]) -> None:
        """Take what a checkpoint knows of its source of rewards only if this run has the same."""
        then = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("reward")
        now = whole_paths(plain(self.hparams["reward"]), "reward")
        if then == now:
            return
        rank_zero_info(f"reward: the checkpoint's was {then!r}; this run's is {now!r}, and is calibrated by itself")
        saved, own = checkpoint["state_dict"], self.state_dict()
        checkpoint["state_dict"] = {k: v for k, v in saved.items() if not k.startswith(REWARD)}
        checkpoint["state_dict"] |= {k: own[k] for k in self.kept_keys() if k.startswith(REWARD)}

"""What a run of PPO has to do with its source of rewards: calibrate it, and keep of it what cannot be read again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_vapo.advantages.base import AdvantageEstimator
from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Lora
from lit_vapo.models.settings import whole_paths
from lit_vapo.models.sharding import Sharing
from lit_vapo.models.tensor_parallel import KEY
from lit_vapo.progress import watched
from lit_vapo.rewards import Responses, RewardSource
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.rollout import Rollout
from lit_vapo.stages.base import trained
from lit_vapo.stages.ppo.alarm import Alarm
from lit_vapo.stages.ppo.control import KLControl
from lit_vapo.stages.ppo.evaluation import EvaluatedPolicy
from lit_vapo.stages.seeding import seeded
from lit_vapo.stages.settings import plain
from lit_vapo.stages.sharing import sum_of_all

# What the state of the source of rewards begins with, and that of the alarm.
REWARD, ALARM = "reward.", "alarm."


class ScoredPolicy(EvaluatedPolicy):
    """A policy with a source of rewards; training is the subclass's."""

    reward: RewardSource
    networks: ActorCritic | None
    advantage: AdvantageEstimator
    sampling: Sampling
    alarm: Alarm | None
    num_reference: int
    lora: Lora | None
    kl: KLControl

    def about(self) -> dict[str, str]:
        """The model, what of it trains, and what for."""
        given = self.hparams["reward"]
        reward = given if isinstance(given, str) else type(self.reward).__name__
        return {
            **super().about(),
            "trains": trained(self.lora),
            "reward": f"{reward}, {self.reward.num_members or 'no'} members",
            "objective": f"{type(self.objective).__name__}, β = {float(self.kl.coef):.3g}",
        }

    def check_choices(self) -> None:
        """Refuse what the objective or the advantage cannot use, before anything heavy is loaded.

        Raises:
            ValueError: They need other members, or more responses to a prompt.
        """
        self.advantage.check_responses(self.sampling.num_responses)
        source = self.reward
        self.advantage.check_rewards(source.num_members, source.separate_members, source.named)
        self.objective.check_members(source.num_members, source.separate_members)
        self.objective.check_responses(self.sampling.num_responses)

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

    def _sum(self, x: Tensor) -> Tensor:
        """Sum over all processes."""
        return sum_of_all(self, x)

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
        if self.average is not None:
            self.average.restart()

    def meet_reference(self, datamodule: PromptDataModule) -> None:
        """Let the reference answer prompts, if something has to be learned from that: a calibration, or an alarm."""
        assert self.maker is not None
        assert self.networks is not None
        unfitted = self.alarm is not None and not self.alarm.fitted
        if self.reward.calibrated and not unfitted:
            return
        what = "calibrating" if not self.reward.calibrated else "fitting the alarm"
        self.print(f"reward: {what} on {self.num_reference} reference responses")
        batches = [b.to(self.device) for b in datamodule.prompt_batches("train", self.num_reference)]
        with seeded(self.seed):
            references = list(self.maker.references(watched(batches, "reference: batch")))
            if not self.reward.calibrated:
                self.calibrate(references)
                self.networks.warm_start_critic(self.reward.linear_mean())
            if unfitted:
                self.fit_alarm(references)

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

    @torch.no_grad()
    def fit_alarm(self, references: Iterable[Responses]) -> None:
        """Show the alarm responses of the reference, and give all processes what the first one found."""
        assert self.alarm is not None
        self.alarm.fit([self.reward.estimate(responses) for responses in references])
        self.alarm.take(self.trainer.strategy.broadcast({k: x.cpu() for k, x in self.alarm.state_dict().items()}))

    def rings(self, rollout: Rollout) -> bool:
        """Whether the alarm ends the run with these responses."""
        return self.alarm is not None and self.alarm.rings(rollout.marks, self._sum, self.iteration)

    def kept_keys(self) -> set[str]:
        """What trains, what steers, and what the source of rewards cannot be read again without."""
        return super().kept_keys() | {f"{REWARD}{name}" for name in self.reward.own_state()}

    def choose_state(self, checkpoint: dict[str, Any]) -> None:
        """Take what a checkpoint knows of its source of rewards only if this run has the same."""
        super().choose_state(checkpoint)
        then = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("reward")
        now = whole_paths(plain(self.hparams["reward"]), "reward")
        self._choose_alarm(checkpoint, then == now)
        if then == now:
            return
        rank_zero_info(f"reward: the checkpoint's was {then!r}; this run's is {now!r}, and is calibrated by itself")
        saved, own = checkpoint["state_dict"], self.state_dict()
        checkpoint["state_dict"] = {k: v for k, v in saved.items() if not k.startswith(REWARD)}
        checkpoint["state_dict"] |= {k: own[k] for k in self.kept_keys() if k.startswith(REWARD)}

    def _choose_alarm(self, checkpoint: dict[str, Any], same_reward: bool) -> None:
        """Take what a checkpoint's alarm knows, if this run has one that looks at the same."""
        saved, own = checkpoint["state_dict"], self.state_dict()
        held = {k: v for k, v in saved.items() if k.startswith(ALARM)}
        if self.alarm is not None and held and same_reward:
            self.alarm.make_room({k.removeprefix(ALARM): v.shape for k, v in held.items()})
        else:
            kept = {k: v for k, v in own.items() if k.startswith(ALARM)}
            checkpoint["state_dict"] = {k: v for k, v in saved.items() if k not in held} | kept

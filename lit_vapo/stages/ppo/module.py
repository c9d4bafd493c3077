"""Variance-aware PPO: one training step is one iteration of rollout and update."""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_vapo.advantages.base import AdvantageEstimator
from lit_vapo.advantages.gae import Gae
from lit_vapo.data.collate import PromptBatch
from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.metrics import rollout_statistics, speeds
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.averaging import WeightAverage
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.exported import check_policy
from lit_vapo.models.generation import Generator, Sampling
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.vocabulary import check_embeddings
from lit_vapo.objectives.base import Objective
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.ranges import NonNegativeFloat, OpenUnitInterval, PositiveFloat, TwoOrMore, check_ranges
from lit_vapo.rewards import RewardSource, load_reward
from lit_vapo.rollout import Rollout, RolloutMaker
from lit_vapo.stages.guards import check_context, check_precision
from lit_vapo.stages.optimisers import OptimizerChoice, SchedulerChoice, build_optimizer, check_optimizer
from lit_vapo.stages.ppo.alarm import Alarm, AlarmSettings
from lit_vapo.stages.ppo.control import KLControl, KLEstimator, global_kl, named
from lit_vapo.stages.ppo.evaluation import AVERAGE
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.scoring import ALARM, ScoredPolicy
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings, chosen_critic
from lit_vapo.stages.schedule import planned_iterations
from lit_vapo.stages.seeding import seeded_batch
from lit_vapo.stages.settings import unpickled
from lit_vapo.stages.sharing import rows_of_all, sharers
from lit_vapo.types import TextReward


class PPOModule(ScoredPolicy):
    """Aligns a language model with PPO against a source of rewards.

    One batch of prompts is one iteration: the policy answers, the source scores, the objective turns scores
    into a reward and a KL weight, and the responses are learned from in several epochs of minibatches.

    Args:
        base: The language model to align; its frozen self is the reference.
        reward: Where rewards come from: a folder (an ensemble that `lit-vapo export` wrote, or public reward models
            that were saved), or a source of rewards, as `FunctionReward`.
        objective: What to maximise; `null` is `VarianceAware`.
        lora: Adapters to train (`lora.rank: 16`); `null` trains all weights and keeps the base beside them as the
            reference, quantised if `base.quantization` says so.
        policy: Folder of an exported policy to start from; its critic is taken along if it has one that fits. An
            adapter of `base` brings the settings of `lora` with it (`lora` may be `null`). The reference stays `base`.
        critic: What the critic reads, where the advantage needs one; leave it out where it does not.
        sampling: How responses are drawn.
        advantage: What a token is better than: `Gae` (`null`) asks a critic, the others compare the responses to a
            prompt (`sampling.num_responses` of 2 or more) and need none.
        update: How PPO learns from them.
        learning_rate: Peak learning rate of the actor.
        critic_learning_rate: Peak learning rate of the critic.
        optimizer: `adamw`, or another by its class (`torch.optim.SGD`), which takes all but `lr` in `init_args`.
        lr_scheduler: `linear` falls to 0 over the run; or another by its class, which makes a step with each iteration.
        ema_decay: The policy that is evaluated and exported is the exponential moving average of the weights over
            iterations with this decay; the one that samples is what is averaged. `null` for no average.
        kl_coef: β, the price of a nat of the objective's *weighted* KL to the reference, in units of reward; >= 0.
        kl_target: Adapt β so that the *plain* KL to the reference (`train/kl_k3`: k3 of whole responses, over all
            processes) rises to this many nats per response over the first half of the run and stays there; `null`
            keeps β fixed.
        kl_budget: End the run once the plain KL (`train/kl_k3`) is above this many nats per response. The update
            of the iteration that finds out is not taken; the policy that is saved has overstepped by no more than the
            update before it. (With `min_epochs` or `min_steps` the trainer goes on until these are met, without updates
            while the policy is above the budget.) `null` for no limit.
        kl_estimator: What stands for a token's KL in the penalty, as far as its weight is the same for all responses:
            `sampled`, the log-ratio of the token drawn, or `exact`, the KL of the whole distribution it was drawn from,
            which is less noisy and takes two more products with the head per scored token (in float32 a pass, too).
        reward_clip: Largest absolute terminal reward, or `null`.
        missing_eos_penalty: Taken off the reward of a response cut off at `max_new_tokens`.
        gold: A judge that only watches: its mean is logged, training never sees it.
        num_reference: How many reference responses calibrate an ensemble that is not calibrated yet, or fit an alarm.
        seed: Seed of evaluation samples, so that evaluations differ by the policy alone.
        generator: Who draws the responses; `null` for `TransformersGenerator`.
        alarm: Watch for responses that are unlike the reference's, without a judge; `null` for not.
        trust: Code outside of lit_vapo that the ensemble in `reward` may run: classes by their Python name, models that
            bring code by folder or hub name.
    """

    stage = "ppo"

    def __init__(
        self,
        base: Pretrained,
        reward: RewardSource | str,
        objective: Objective | None = None,
        lora: Lora | None = None,
        policy: str | None = None,
        critic: CriticSpec | None = None,
        sampling: Sampling | None = None,
        advantage: AdvantageEstimator | None = None,
        update: UpdateSettings | None = None,
        learning_rate: PositiveFloat = 1e-5,
        critic_learning_rate: PositiveFloat = 1e-4,
        optimizer: OptimizerChoice = "adamw",
        lr_scheduler: SchedulerChoice = "linear",
        ema_decay: OpenUnitInterval | None = None,
        kl_coef: NonNegativeFloat = 0.05,
        kl_target: PositiveFloat | None = None,
        kl_budget: PositiveFloat | None = None,
        kl_estimator: KLEstimator = "sampled",
        reward_clip: PositiveFloat | None = None,
        missing_eos_penalty: float = 0.0,
        gold: TextReward | None = None,
        num_reference: TwoOrMore = 256,
        seed: int = 0,
        generator: Generator | None = None,
        alarm: AlarmSettings | None = None,
        trust: list[str] | None = None,
    ) -> None:
        super().__init__()
        check_ranges(PPOModule, locals(), "model.")
        check_optimizer(PPOModule, locals())
        kl = KLControl(kl_coef, kl_target, kl_budget, kl_estimator)
        with unpickled():
            self.save_hyperparameters()
        self.automatic_optimization = False
        self.base = base
        self.objective = objective or VarianceAware()
        # A policy that is not there or of another base is refused before anything heavy is loaded.
        self.lora = lora if policy is None else check_policy(policy, base, lora)
        self.policy = policy
        self.sampling = sampling or Sampling()
        self.advantage = advantage or Gae()
        self.update = update or UpdateSettings()
        self.critic = chosen_critic(critic, self.advantage, self.update)
        self.learning_rate = learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.ema_decay = ema_decay
        self.kl = kl
        self.reward_clip = reward_clip
        self.missing_eos_penalty = missing_eos_penalty
        self.gold = gold
        self.num_reference = num_reference
        self.seed = seed
        self.generator = generator or TransformersGenerator()
        self.alarm = None if alarm is None else Alarm(alarm)
        self.trust = trust
        self.networks: ActorCritic | None = None
        self.reward = load_reward(reward, trust) if isinstance(reward, str) else reward
        self.check_choices()
        self.objective.price(kl.coef)

    # 1. Building.

    def configure_model(self) -> None:
        """Load actor, reference, critic and what scores."""
        if self.networks is not None:
            return
        networks = self.load_networks()
        self.reward.prepare(networks.policy)
        networks.warm_start_critic(self.reward.linear_mean())
        self.share(self.share_networks)
        if self.policy is not None:
            rank_zero_info(f"policy: starts from {self.policy}; its critic from {networks.critic_start}")

    def load_networks(self) -> ActorCritic:
        """Load actor, reference and critic: all that an export needs."""
        networks = self.networks = ActorCritic(self.base, self.lora, self.critic, self.policy, self.reward.reads())
        self.objective.prepare(self.reward.num_members)
        self.first_objective = copy.deepcopy(self.objective)
        if self.ema_decay is not None:
            self.average = WeightAverage(networks.actor_parameters, self.ema_decay)
        return networks

    def start(self) -> None:
        """What needs the device and the data: the rollout maker, and a calibrated source of rewards."""
        assert self.networks is not None
        # The loss scaler of 16-mixed belongs to one step a batch, and an iteration takes many.
        check_precision(self.trainer.precision, "32-true", "bf16-mixed")
        datamodule = cast("PromptDataModule | None", getattr(self.trainer, "datamodule", None))
        if datamodule is None:
            raise ValueError("trainer: expected a PromptDataModule (it has the tokenizer), got plain dataloaders")
        longest = datamodule.max_prompt_length + self.sampling.max_new_tokens
        limits = "data.max_prompt_length + model.sampling.max_new_tokens"
        config = self.networks.policy.causal_lm.config
        check_context(config, longest, limits)
        check_embeddings(config, datamodule.text_tokenizer, *datamodule.largest_token())
        self.maker = RolloutMaker(
            self.networks,
            self.reward,
            datamodule.text_tokenizer,
            self.sampling,
            self.gold,
            self.reward_clip,
            self.missing_eos_penalty,
            generator=self.generator,
            marks=None if self.alarm is None else self.alarm.marks,
            exact_kl=self.kl.exact,
        )
        self.maker.open(longest, self._root, self.weights_version)
        self.meet_reference(datamodule)

    def on_fit_start(self) -> None:
        """Get ready to roll out."""
        self.start()

    # 2. Training: one step is one iteration.

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Roll out, learn, log.

        Raises:
            ValueError: Something is not finite; the message names the iteration.
        """
        started = time.perf_counter()
        assert self.maker is not None
        self.objective.price(self.kl.coef)
        with named(self.iteration), seeded_batch(self, sharers(self).rank):
            values, version = self.advantage.needs_critic, self.weights_version
            rollout = self.maker.make(batch, self.objective, values=values, all_sum=self._sum, version=version)
            kl = global_kl(rollout, self._sum)
            if self.rings(rollout) or self.kl.over_budget(kl, self.iteration):
                self.trainer.should_stop = True
                learned = {"updates": torch.zeros(())}
            else:
                update_started = time.perf_counter()
                learned = self._learn(rollout)
                rollout.seconds["update"] = time.perf_counter() - update_started
        statistics = {
            **rollout_statistics(rollout, partial(rows_of_all, self)),
            **self.objective.statistics(),
            **learned,
        }
        self._log_iteration(rollout, statistics, time.perf_counter() - started)
        planned = planned_iterations(self, self.update.epochs * self.update.minibatches)
        self.kl.adapt(kl, self.iteration, planned)
        if self.trainer.max_steps > 0 and self.iteration >= planned:
            # Updates that `max_approx_kl` ended early have left steps over, but no learning rate.
            self.trainer.should_stop = True

    def _learn(self, rollout: Rollout) -> dict[str, Tensor]:
        """Advantages, the update, and the learning rate's next step; statistics of the update."""
        assert self.maker is not None
        assert self.networks is not None
        cap = self.update.sampler_ratio_cap
        experience = compute_advantages(rollout, float(self.kl.coef), self.advantage, self._sum, cap)
        optimizer = cast("torch.optim.Optimizer", self.optimizers())
        learned = PPOUpdate(self, self.networks, self.update, self.maker.shaping).run(
            experience, optimizer, self.iteration > self.update.critic_warmup, rollout.num_responses
        )
        cast("Any", self.lr_schedulers()).step()
        if self.average is not None:
            self.average.update()
        return learned

    def _log_iteration(self, rollout: Rollout, values: dict[str, Tensor], total: float) -> None:
        values["iteration"] = torch.tensor(float(self.iteration))
        values |= self.kl.statistics(values["kl_weight_mean"]) | speeds(rollout, total)
        shown = {"reward_mean", "gold", "kl_k3", "ensemble_sigma", "tokens_per_second"}
        for name, value in values.items():
            at: dict[str, Any] = {"prog_bar": name in shown, "sync_dist": True, "batch_size": len(rollout.prompts)}
            self.log(f"train/{name}", value.to(self.device), **at)

    def configure_optimizers(self) -> Any:
        """One optimiser for actor and critic, each with its own learning rate, and its schedule."""
        assert self.networks is not None
        groups: list[dict[str, Any]] = [{"params": self.networks.actor_parameters(), "lr": self.learning_rate}]
        if self.networks.critic is not None:
            groups.append({"params": self.networks.critic_parameters(), "lr": self.critic_learning_rate})
        planned = partial(planned_iterations, self, self.update.epochs * self.update.minibatches)
        optimizer, scheduler = build_optimizer(self.optimizer, self.lr_scheduler, groups, planned)
        return [optimizer], [scheduler]

    # 3. Checkpoints and export.

    def _is_own_state(self, name: str) -> bool:
        return name.startswith(("kl.", "objective.", AVERAGE, ALARM))

    def export(self, folder: str | Path, merge: bool = False) -> None:
        """Write the policy as an ordinary transformers or peft folder, and the critic, if any, beside it.

        Args:
            folder: A new or empty folder.
            merge: Add adapters to the weights and write a whole model.

        Raises:
            FileExistsError: The folder has files in it.
            ValueError: Adapters of a quantised base are to be merged.
        """
        assert self.networks is not None
        with self.product():
            self.networks.save_pretrained(folder, self.sampling, merge)

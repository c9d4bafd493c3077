"""Our side of `benchmarks/trl_ppo.py`: the PPO stage itself, under a Lightning trainer."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from ppo_job import Answer, Job, Stopwatch, serve

from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, quiet
from lit_vapo.objectives.single_reward import SingleReward
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings


class Laps(Callback):
    """Tells the stopwatch of iterations."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.watch.watch(trainer.optimizers[0], pl_module.networks.policy.causal_lm)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """An iteration is done."""
        reward = float(trainer.callback_metrics["train/reward_mean"])
        self.watch.lap(pl_module.networks.policy.causal_lm, reward)


def work(job: Job, answer: Answer) -> None:
    """Run PPO."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet()
    torch.manual_seed(job.seed)
    data = PromptDataModule(
        tokenizer=job.policy,
        prompts=job.prompts,
        validation_fraction=0.0,
        batch_size=job.batch_size,
        max_prompt_length=job.max_prompt_length,
    )
    module = PPOModule(
        Pretrained(job.policy),
        job.ensemble,
        SingleReward(),
        critic=CriticSpec(job.critic),
        sampling=Sampling(job.response_length),
        # The peer does not clip gradients.
        update=UpdateSettings(job.epochs, job.minibatches, max_grad_norm=1e9),
        learning_rate=job.learning_rate,
        # A head on frozen states may learn faster than a model of its own: ten times as fast, as our defaults are.
        critic_learning_rate=job.learning_rate * (10 if job.critic == "reference" else 1),
        kl_coef=job.kl_coef,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=job.iterations,
        callbacks=[Laps(Stopwatch(job, answer))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    serve(work)

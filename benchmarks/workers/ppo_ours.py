"""Our side of `benchmarks/trl_ppo.py` and `ppo_speed.py`: the PPO stage itself, under a Lightning trainer."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from ppo_job import Answer, Job, Stopwatch, serve

from lit_vapo import objectives
from lit_vapo.advantages import Gae, Grpo, Rloo
from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.weights import quiet
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings

PHASES = ("generate", "score", "update")
ADVANTAGES = {"gae": Gae, "rloo": Rloo, "grpo": Grpo}


class Laps(Callback):
    """Tells the stopwatch of iterations."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.watch.watch(trainer.optimizers[0], pl_module.networks.policy.causal_lm)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """An iteration is done."""
        figures = trainer.callback_metrics
        reward = float(figures["train/reward_mean"])
        answer = self.watch.answer
        answer.tokens.append(float(figures["train/response_length"]) * self.watch.job.batch_size)
        for phase in PHASES:
            speed = float(figures[f"train/{phase}_tokens_per_second"])
            answer.phases.setdefault(phase, []).append(answer.tokens[-1] / speed)
        with pl_module.product():
            self.watch.lap(pl_module.networks.policy, reward)


def critic_speed(job: Job) -> float:
    """How many times as fast as the policy the critic learns.

    A head on frozen states may learn faster than a model of its own: ten times as fast, as our defaults are. Adapters
    learn faster than all weights do, and that head no faster for it.
    """
    if job.critic == "own":
        return 1
    return 10 if job.lora_rank is None else 3


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
        batch_size=job.batch_size // job.responses,
        max_prompt_length=job.max_prompt_length,
    )
    module = PPOModule(
        Pretrained(job.policy, dtype=job.dtype),
        job.ensemble,
        getattr(objectives, job.objective)(),
        lora=None if job.lora_rank is None else Lora(job.lora_rank, 2.0 * job.lora_rank),
        critic=CriticSpec(job.critic) if job.advantage == "gae" else None,
        advantage=ADVANTAGES[job.advantage](),
        sampling=Sampling(job.response_length, num_responses=job.responses),
        # The peer does not clip gradients.
        update=UpdateSettings(job.epochs, job.minibatches, max_grad_norm=1e9),
        learning_rate=job.learning_rate,
        critic_learning_rate=job.learning_rate * critic_speed(job),
        kl_coef=job.kl_coef,
        ema_decay=job.ema_decay,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=job.processes,
        strategy="ddp" if job.processes > 1 else "auto",
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

"""What a study notes of a run while it trains."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_vapo.data.collate import PromptBatch
from lit_vapo.study.experiments.truth import Truth

# What of its last iteration a run's record tells.
SHOWN = ("train/objective_reward", "train/ensemble_sigma", "train/kl_weight_mean", "train/kl_coef", "train/entropy")


class TrainingCourse(Callback):
    """Notes KL and true return along a run; training knows nothing of it.

    Points are the rollouts, or the evaluations on held-out prompts, which are of the averaged policy if there is one.
    Both have few prompts, and more is to be had from some than from others. Where it is known what the reference earns
    on each, that of the point's is taken off and that of all put in its place: the expectation is the same, and methods
    that come to a KL at different rollouts are not compared by their prompts (a control variate).

    Args:
        truth: What is true; where a judge knows it, it is the run's gold judge.
        held_out: Whether points are evaluations, and not rollouts.

    Attributes:
        kl: KL to the reference at each point, nats (k1: the mean log-ratio of whole responses).
        true_return: Mean true reward of each point, as if on all prompts.
        last: Some statistics of the last rollout.
    """

    def __init__(self, truth: Truth, held_out: bool = False) -> None:
        self.truth = truth
        self.held_out = held_out
        self.kl: list[float] = []
        self.true_return: list[float] = []
        self.last: dict[str, float] = {}
        self._worth = float("nan")
        self._answered: list[tuple[float, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the features that the ensemble is given."""
        if self.truth.reward is None:
            return
        reward: Any = pl_module.reward
        reward.head.register_forward_hook(self._note)

    def _note(self, head: nn.Module, given: tuple[Tensor], estimate: object) -> None:
        assert self.truth.reward is not None
        self._worth = float(self.truth.reward(given[0]).mean())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Note what the iteration was, and its rollout if that is a point."""
        logged = trainer.callback_metrics
        self.last = {name.partition("/")[2]: float(logged[name]) for name in SHOWN}
        if not self.held_out:
            worth = self._worth if self.truth.judge is None else float(logged["train/gold"])
            self._point(float(logged["train/kl_k1"]), worth, batch.example_ids)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, *args: Any
    ) -> None:
        """Note what these prompts brought; the policy answers them last, after its reference."""
        self._answered.append((self._worth, batch.example_ids))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the point; all batches are of one size."""
        logged, answered = trainer.callback_metrics, self._answered
        self._answered = []
        worth = fmean(worth for worth, _ in answered) if self.truth.judge is None else float(logged["val/gold"])
        self._point(float(logged["val/kl_k1"]), worth, torch.cat([ids for _, ids in answered]))

    def _point(self, kl: float, worth: float, prompts: Tensor) -> None:
        known = self.truth.prompts
        self.kl.append(kl)
        self.true_return.append(worth if known is None else worth - known.ease(prompts))

"""What a study notes of a run while it trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_vapo.data.collate import PromptBatch
from lit_vapo.study.experiments.truth import Truth

# What of its last iteration a run's record tells.
SHOWN = ("train/objective_reward", "train/ensemble_sigma", "train/kl_weight_mean", "train/kl_coef", "train/entropy")


class TrainingCourse(Callback):
    """Notes KL and true return of every rollout; training knows nothing of it.

    A rollout has few prompts, and more is to be had from some than from others. Where it is known what the reference
    earns on each, that of the rollout's is taken off and that of all put in its place: the expectation is the same, and
    methods that come to a KL at different rollouts are not compared by their prompts (a control variate).

    Args:
        truth: What is true; where a judge knows it, it is the run's gold judge.

    Attributes:
        kl: KL to the reference at each rollout, nats (k1: the mean log-ratio of whole responses).
        true_return: Mean true reward of each rollout, as if on all prompts.
        last: Some statistics of the last one.
    """

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.kl: list[float] = []
        self.true_return: list[float] = []
        self.last: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the features that the ensemble is given, once an iteration."""
        if self.truth.reward is None:
            return
        reward: Any = pl_module.reward
        reward.head.register_forward_hook(self._note)

    def _note(self, head: nn.Module, given: tuple[Tensor], estimate: object) -> None:
        assert self.truth.reward is not None
        self.true_return.append(float(self.truth.reward(given[0]).mean()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Note the rest of the iteration."""
        logged = {name: float(x) for name, x in trainer.callback_metrics.items()}
        self.kl.append(logged["train/kl_k1"])
        if self.truth.reward is None:
            self.true_return.append(logged["train/gold"])
        if self.truth.prompts is not None:
            self.true_return[-1] -= self.truth.prompts.ease(batch.example_ids)
        self.last = {name.partition("/")[2]: logged[name] for name in SHOWN}

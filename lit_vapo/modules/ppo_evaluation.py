"""How the PPO stage evaluates: the policy (and, in a test, its reference) answers held-out prompts."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lit_vapo.data.collate import PromptBatch
from lit_vapo.metrics import rollout_statistics, sample_rows
from lit_vapo.models.policy import Role
from lit_vapo.modules.checkpoint import TrainedWeightsModule, seeded
from lit_vapo.objectives.base import Objective
from lit_vapo.rollout import RolloutMaker


class EvaluatedPolicy(TrainedWeightsModule):
    """Evaluates a policy on held-out prompts; training is the subclass's.

    Every batch is answered with random numbers that depend on `seed` and its number alone, so evaluations differ by the
    policy.
    """

    objective: Objective
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.maker: RolloutMaker | None = None
        self.samples: list[dict[str, Any]] = []

    @abstractmethod
    def start(self) -> None:
        """Make the rollout maker, now that device and data are known."""

    def on_validation_start(self) -> None:
        """Get ready to roll out, if `validate` is all that runs."""
        if self.maker is None:
            self.start()
        self.samples = []

    def on_test_start(self) -> None:
        """Get ready to roll out."""
        self.start()
        self.samples = []

    def _evaluate(self, batch: PromptBatch, batch_idx: int, prefix: str, role: Role) -> None:
        assert self.maker is not None
        with seeded(self.seed * 100_003 + batch_idx):
            rollout = self.maker.make(batch, self.objective, role, values=False)
        owner = "policy" if role == "actor" else "reference"
        self.samples += sample_rows(rollout, owner)
        for name, value in rollout_statistics(rollout).items():
            self.log(f"{prefix}/{name}", value, on_epoch=True, sync_dist=True, batch_size=len(batch.prompts))

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The policy answers held-out prompts."""
        self._evaluate(batch, batch_idx, "val", "actor")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Reference and policy answer the same held-out prompts, with the same random numbers."""
        self._evaluate(batch, batch_idx, "test_reference", "reference")
        self._evaluate(batch, batch_idx, "test", "actor")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Responses of the policy, scored."""
        if self.maker is None:
            self.start()
        assert self.maker is not None
        with seeded(self.seed * 100_003 + batch_idx):
            records = sample_rows(self.maker.make(batch, self.objective, "actor", values=False), "policy")
        self.samples += records
        return records

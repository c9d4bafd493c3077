"""Training an ensemble of reward models on preferences."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, freeze, load_backbone
from lit_vapo.models.sharding import Sharing
from lit_vapo.models.tensor_parallel import KEY
from lit_vapo.models.trunk import Pooling, join_rows
from lit_vapo.ranges import NonNegativeFloat, PositiveFloat, TwoOrMore, check_ranges
from lit_vapo.rewards.classifier import save_classifier
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.stages.optimisers import OptimizerChoice, SchedulerChoice, build_optimizer, check_optimizer
from lit_vapo.stages.reward.building import BuiltRewards, Layer
from lit_vapo.stages.reward.evaluation import Batch
from lit_vapo.stages.schedule import total_steps
from lit_vapo.stages.seeding import seeded_batch
from lit_vapo.stages.settings import unpickled
from lit_vapo.stages.sharing import even_share, loss_of_all
from lit_vapo.types import FeaturePairs, PairLabels


class RewardModule(BuiltRewards):
    """Trains an uncertainty estimator (`RewardHead`) on preferences.

    Where all members read one frozen backbone, the features of all pairs are computed once and cached, and the heads
    train from them.
    Whenever a checkpoint is written, every member is centred and scaled on responses of the reference policy, which
    are sampled once at the start.

    Args:
        base: The backbone.
        head: The uncertainty estimator; `null` is `HeadEnsemble`.
        layer: Read the hidden states after this many blocks; `null` for the last, `auto` for what predicts the
            validation pairs best. Middle layers often say more about a text's quality than the last one, which prepares
            the next token. What is above is dropped. `auto` tries a quarter, a half, three quarters and all of the
            blocks in one pass; it is the last without such pairs, or where features are trained or streamed.
        pooling: `mean` averages over the response, `last` reads its last token. Neither reads the token that ended it.
        freeze_backbone: Keep the backbone's weights and train from cached features.
        learning_rate: Peak learning rate of heads and adapters.
        backbone_learning_rate: Peak learning rate of backbones that are trained.
        weight_decay: Decoupled weight decay of all that is trained, by `adamw`.
        optimizer: `adamw`, or another by its class (`torch.optim.SGD`), which takes all but `lr` in `init_args`.
        lr_scheduler: `linear` falls to 0 over the run; or another by its class, with a step at each update.
        reference: The reference policy, whose responses fix each member's origin and unit; `base` for the base itself,
            `null` leaves that to the start of PPO.
        reference_sampling: How the reference responds; use what PPO will use.
        num_reference: How many prompts it responds to.
        feature_cache: Folder of the feature cache; `null` for `features` in the run's folder.
        member: Train this member alone, where members share nothing (`FullEnsemble`); see `lit-vapo reward join`.
        seed: Seed of the reference's responses.
    """

    stage = "reward"

    def __init__(
        self,
        base: Pretrained,
        head: RewardHead | None = None,
        layer: Layer = "auto",
        pooling: Pooling = "mean",
        freeze_backbone: bool = True,
        learning_rate: PositiveFloat = 1e-3,
        backbone_learning_rate: PositiveFloat = 1e-5,
        weight_decay: NonNegativeFloat = 0.01,
        optimizer: OptimizerChoice = "adamw",
        lr_scheduler: SchedulerChoice = "linear",
        reference: Pretrained | Literal["base"] | None = None,
        reference_sampling: Sampling | None = None,
        num_reference: TwoOrMore = 256,
        feature_cache: str | None = None,
        member: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_ranges(RewardModule, locals(), "model.")
        check_optimizer(RewardModule, locals())
        self.head = head or HeadEnsemble()
        self.head.check_backbone(base.quantization, freeze_backbone)
        with unpickled():
            self.save_hyperparameters()
        if member is not None:
            self.head.select(member)
        self.base = base
        self.layer = layer
        self.spec = FeatureSpec(base, None if layer == "auto" else layer, pooling)
        self.freeze_backbone = freeze_backbone
        self.learning_rate = learning_rate
        self.backbone_learning_rate = backbone_learning_rate
        self.weight_decay = weight_decay
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.reference = base if reference == "base" else reference
        self.reference_sampling = reference_sampling or Sampling()
        self.num_reference = num_reference
        self.feature_cache = feature_cache
        self.seed = seed
        self.settled_at = self.calibrated_at = -1

    # 1. Training.

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of the chosen and of the rejected responses."""
        if isinstance(batch, FeaturePairs):
            return batch.chosen, batch.rejected
        # One pass for both sides: twice the rows in each matrix product.
        ids, lengths = join_rows((batch.chosen_ids, batch.rejected_ids), (batch.chosen_lengths, batch.rejected_lengths))
        features = self.reward_model().encode(ids, lengths, batch.prompt_lengths.repeat(2))
        return features[: len(batch.chosen_ids)], features[len(batch.chosen_ids) :]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the ensemble, summed over members: mean over the pairs of all processes.

        Raises:
            ValueError: It is not finite.
        """
        # Heads draw by pair, so that no process needs numbers of its own.
        with seeded_batch(self, rank=0):
            labels = self._shared(batch.labels)
            with self.head.learning_from(labels):
                chosen, rejected = self.encode(batch)
            loss = self.head.loss(chosen, rejected, labels)
        shown = loss_of_all(self, loss, batch_idx) / len(self.head.present_members)
        self.log("train/loss", shown, prog_bar=True, batch_size=len(chosen))
        return loss

    def _shared(self, labels: PairLabels) -> PairLabels:
        """Labels whose weights make a mean over the pairs here this process's part of the mean over all that count.

        By way of the weights, any head's loss is shared rightly, and what does not depend on pairs stays as it is.
        """
        counts = torch.ones_like(labels.weight, dtype=torch.bool) if labels.counts is None else labels.counts
        return labels._replace(weight=labels.weight * counts * (len(counts) / even_share(self, counts.sum())))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Centre and scale the members as they are now, and save that with them."""
        self.settle()
        self.calibrate()
        # Nothing but the head has changed since the state was taken, and of a head every process has all.
        checkpoint["state_dict"] |= {name: x for name, x in self.state_dict().items() if self._is_own_state(name)}
        super().on_save_checkpoint(checkpoint)

    def settle(self) -> None:
        """Let the head see all training pairs, where it needs to; once at each step."""
        if not self.head.settles or self.trainer.state.fn != "fit" or self.trainer.global_step == self.settled_at:
            return
        self.settled_at = self.trainer.global_step
        loader = self.trainer.train_dataloader if self.pairs is None else self.pairs.all_pairs()
        with torch.no_grad():
            self.head.settle(self._encoded(batch) for batch in cast("Any", loader))

    def _encoded(self, batch: Batch) -> FeaturePairs:
        batch = cast("Batch", self.transfer_batch_to_device(batch, self.device, 0))
        return FeaturePairs(*self.encode(batch), batch.labels)

    def about(self) -> dict[str, str]:
        """The model, and the members on it."""
        return {**super().about(), "members": f"{self.head.num_members}, {type(self.head).__name__}"}

    def calibrate(self) -> None:
        """Centre and scale the members on the reference's responses, if there is a reference; once at each step."""
        if self.reference_inputs is None or self.trainer.global_step == self.calibrated_at:
            return
        self.calibrated_at = self.trainer.global_step
        features = self.reference_inputs
        if isinstance(features, list):
            features = compute_features(self.reward_model(), features, self.device)
        self.head.calibrate(features.to(self.device))

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule; head and backbone have their own learning rates."""
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr": self.learning_rate}]
        if self.backbone is not None and any(p.requires_grad for p in self.backbone.parameters()):
            groups.append({"params": list(self.backbone.parameters()), "lr": self.backbone_learning_rate})
        total = partial(total_steps, self)
        optimizer, scheduler = build_optimizer(self.optimizer, self.lr_scheduler, groups, total, self.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # 2. Processes that share weights.

    @property
    def shares_base(self) -> bool:
        """Whether weights are there while heads train; features are computed by the first process, with all of them."""
        return not self.frozen_features

    def check_tensor_parallel(self, size: int) -> None:
        """Refuse to split products into which members hang their adapters.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{KEY}: expected 1 in the reward stage, got {size}: members' adapters and heads belong to whole layers. "
            "Share weights instead (data_parallel_size)."
        )

    def share_backbones(self, sharing: Sharing) -> None:
        """Share what the members are trained on with other processes."""
        for backbone in self.head.passes(self.backbone):
            sharing.share(backbone)

    # 3. Checkpoints and export.

    def _is_own_state(self, name: str) -> bool:
        return name.startswith("head.")

    def export_classifier(self, folder: str | Path) -> None:
        """Write linear heads as a sequence classifier that transformers loads by itself."""
        backbone = self.backbone or freeze(load_backbone(self.spec.base, self.spec.layer))
        save_classifier(RewardModel(self.spec, self.head, backbone), folder)

    def export(self, folder: str | Path) -> None:
        """Write the ensemble as a folder that `RewardModel.from_pretrained` loads."""
        self.reward_model().save_pretrained(folder, save_backbone=not self.freeze_backbone)

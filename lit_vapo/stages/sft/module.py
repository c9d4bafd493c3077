"""Supervised fine-tuning: makes a base policy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from lit_vapo.data.collate import SFTBatch
from lit_vapo.metrics import TokenLoss
from lit_vapo.models.digests import seal
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import length_mask
from lit_vapo.models.vocabulary import check_embeddings
from lit_vapo.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, check_ranges
from lit_vapo.stages.base import TrainedWeightsModule, trained
from lit_vapo.stages.guards import check_context
from lit_vapo.stages.optimisers import OptimizerChoice, SchedulerChoice, build_optimizer, check_optimizer
from lit_vapo.stages.schedule import total_steps
from lit_vapo.stages.sharing import even_share, loss_of_all


class SFTModule(TrainedWeightsModule):
    """Maximises the log-likelihood of responses given their prompts.

    Args:
        base: The language model to fine-tune.
        lora: Adapters to train (`lora.rank: 16`); `null` trains all weights.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of `adamw`.
        warmup_steps: Steps over which the learning rate rises before it falls (`linear`).
        optimizer: `adamw`, or another by its class (`torch.optim.SGD`), which takes all but `lr` in `init_args`.
        lr_scheduler: `linear` falls to 0 over the run; or another by its class, with a step at each update.
    """

    stage = "sft"

    def __init__(
        self,
        base: Pretrained,
        lora: Lora | None = None,
        learning_rate: PositiveFloat = 2e-5,
        weight_decay: NonNegativeFloat = 0.0,
        warmup_steps: NonNegativeInt = 0,
        optimizer: OptimizerChoice = "adamw",
        lr_scheduler: SchedulerChoice = "linear",
    ) -> None:
        super().__init__()
        check_ranges(SFTModule, locals(), "model.")
        check_optimizer(SFTModule, locals())
        self.save_hyperparameters()
        self.base = base
        self.lora = lora
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.policy: Policy | None = None
        self.losses = nn.ModuleDict({split: TokenLoss() for split in ("val", "test")})

    def about(self) -> dict[str, str]:
        """The model, and what of it trains."""
        return {**super().about(), "trains": trained(self.lora)}

    def configure_model(self) -> None:
        """Load the language model."""
        if self.policy is not None:
            return
        self.policy = Policy(self.base, self.lora, keep_reference=False)
        self.share(self.policy.share)
        datamodule = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        if datamodule is not None:
            config = self.policy.causal_lm.config
            check_context(config, datamodule.longest_pair())
            check_embeddings(config, datamodule.text_tokenizer, *datamodule.largest_token())

    def _nll(self, batch: SFTBatch) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of each response (B,), and its number of tokens (B,)."""
        assert self.policy is not None
        # Without a prompt nothing predicts the first token.
        prompts = batch.prompt_lengths.clamp_min(1)
        sizes = batch.lengths - prompts
        mask = length_mask(sizes, int(sizes.max()))
        rows = TokenRows(batch.input_ids, prompts, mask)
        return -self.policy.response_logprobs("actor", rows, Shaping()).logprobs.sum(1), sizes

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        """Loss of one batch: mean over the response tokens of all processes.

        Raises:
            ValueError: It is not finite.
        """
        nll, tokens = self._nll(batch)
        loss = nll[batch.counts].sum() / even_share(self, tokens[batch.counts].sum())
        self.log("train/loss", loss_of_all(self, loss, batch_idx), prog_bar=True, batch_size=len(nll))
        return loss

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        """Collect the loss of one held-out batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: SFTBatch, batch_idx: int) -> None:
        """Collect the loss of one held-out batch."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: SFTBatch, split: str) -> None:
        metric = cast("TokenLoss", self.losses[split])
        metric.update(*self._nll(batch), batch.example_ids)
        self.log(f"{split}/loss", metric, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule."""
        assert self.policy is not None
        groups = [{"params": self.policy.actor_parameters(), "lr": self.learning_rate}]
        total = partial(total_steps, self)
        optimizer, scheduler = build_optimizer(
            self.optimizer, self.lr_scheduler, groups, total, self.weight_decay, self.warmup_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def export(self, folder: str | Path) -> None:
        """Write the model as an ordinary transformers folder with its tokenizer, adapters merged.

        Adapters of a quantised base cannot be merged without loss: they become a peft folder.
        """
        assert self.policy is not None
        self.policy.save_pretrained(folder, merge=self.base.quantization is None)
        cast("Any", load_tokenizer(self.base)).save_pretrained(folder)
        seal(folder)

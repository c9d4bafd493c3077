"""Training in one process or, as a script or by torchrun, in two: what is left of it stands in a file for each kind."""

import sys
import warnings
from pathlib import Path

import ppo_helpers
import torch
from lightning.pytorch import Callback

from lit_vapo.data.collate import SFTBatch
from lit_vapo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.sharding import is_sharded, whole
from lit_vapo.rewards.members.aleatoric import AleatoricEnsemble
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.dropout import McDropout
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule

# Rows of a batch over all processes.
TOGETHER = 8


def sft(lora):
    return lambda base: SFTModule(base, lora, learning_rate=1e-3)


def reward(make, freeze=True, **kwargs):
    options = {"learning_rate": 1e-3, "backbone_learning_rate": 1e-4, "freeze_backbone": freeze, **kwargs}
    return lambda base: RewardModule(base, make(), **options)


KINDS = {
    "sft_lora": sft(Lora(4, 16.0)),
    "sft_full": sft(None),
    "heads": reward(lambda: HeadEnsemble(3)),
    "aleatoric": reward(lambda: AleatoricEnsemble(3)),
    "heads_trained": reward(lambda: HeadEnsemble(3), freeze=False),
    "lora": reward(lambda: LoraEnsemble(3, rank=2)),
    "lora_diverse": reward(lambda: LoraEnsemble(3, rank=2, diversity=0.5)),
    "bayesian": reward(lambda: BayesianLinear(3)),
    "dropout": reward(lambda: McDropout(3)),
    "full": reward(lambda: FullEnsemble(2)),
}


class Keep(Callback):
    """Keeps what a fit leaves: the pairs of every step and what it logs, the figures at the end, the weights."""

    def __init__(self, path):
        self.path = path
        self.left = {"pairs": [], "logged": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        labels = batch if isinstance(batch, SFTBatch) else batch.labels
        ids, counts = (pl_module.all_gather(x).flatten() for x in (labels.example_ids, labels.counts))
        self.left["pairs"].append(sorted(ids[counts].tolist()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left["logged"].append(float(trainer.callback_metrics["train/loss"]))

    def on_fit_end(self, trainer, pl_module):
        weights = {name: whole(x) for name, x in ppo_helpers.state(pl_module).items()}
        sharded = any(is_sharded(module) for module in pl_module.modules())
        if trainer.is_global_zero:
            self.left["figures"] = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k}
            torch.save({**self.left, "weights": weights, "sharded": sharded}, self.path)


def run(kind, model, preferences, folder, world=1, strategy="ddp_fork", **kwargs):
    """A fit of one kind."""
    folder = Path(folder)
    data = SFTDataModule if kind.startswith("sft") else PreferenceDataModule
    data = data(model, preferences=preferences, validation_fraction=0.3, max_length=64, batch_size=TOGETHER // world)
    torch.manual_seed(0)
    keep = Keep(folder / f"{kind}_{world}.pt")
    options = {"max_epochs": 2, "log_every_n_steps": 1, "devices": world, "callbacks": [keep], **kwargs}
    if world > 1:
        options["strategy"] = strategy
    ppo_helpers.trainer(folder / f"{kind}_{world}", **options).fit(KINDS[kind](Pretrained(model)), data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind in sys.argv[5:] or KINDS:
        run(kind, *sys.argv[1:4], world=2, strategy=sys.argv[4])

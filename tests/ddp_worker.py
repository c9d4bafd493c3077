"""Run as a script: one PPO update in two processes, from the rollout that a test left in a file."""

import sys
import warnings
from functools import partial
from pathlib import Path

import ppo_helpers
import torch

from lit_vapo.metrics import rollout_statistics
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Shaping
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.rollout import Rollout
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings
from lit_vapo.stages.sharing import rows_of_all
from lit_vapo.types import RewardEstimate

SETTINGS = UpdateSettings(epochs=2, minibatches=1, micro_batch_tokens=40, entropy_coef=0.01)
TENSORS = ("stopped", "logprobs", "ref_logprobs", "entropy", "values", "reward", "kl_weight")


def save_rollout(path, rollout):
    """Write what an update needs of a rollout."""
    torch.save({"rows": tuple(rollout.rows), **{n: getattr(rollout, n) for n in TENSORS}}, path)


def load_rollout(path, rank, world):
    """Every `world`-th row of a rollout, cut to the longest response among them."""
    saved = torch.load(path, weights_only=True)
    index = torch.arange(rank, len(saved["reward"]), world)
    rows = TokenRows(*saved.pop("rows")).select(index)
    size = rows.response_mask.shape[1]
    part = {n: x[index, :size] if x.ndim > 1 else x[index] for n, x in saved.items()}
    part["value_states"] = None
    texts = [""] * len(index)
    return Rollout(
        rows=rows, prompts=texts, responses=texts, estimate=RewardEstimate(part["reward"], part["reward"], None), **part
    )


class FixedRollout(PPOModule):
    """Learns from a file in place of its own rollout, and leaves its weights in another."""

    def __init__(self, model, reward, folder):
        options = {"critic_learning_rate": 1e-3, "update": SETTINGS, "critic": CriticSpec("lora")}
        super().__init__(Pretrained(model), reward, lora=Lora(4, 16.0), learning_rate=1e-3, **options)
        self.folder = Path(folder)

    def configure_model(self):
        torch.manual_seed(0)
        super().configure_model()

    def training_step(self, batch, batch_idx):
        trainer = self.trainer
        rollout = load_rollout(self.folder / "rollout.pt", trainer.global_rank, trainer.world_size)
        experience = compute_advantages(rollout, 0.05, self.advantage, self._sum)
        # So that halves are the same rows: by two rows each of one process, or by one of each of two.
        each = 2 // trainer.world_size
        updater = PPOUpdate(self, self.networks, self.update, Shaping())
        learned = updater.run(experience, self.optimizers(), num_responses=each)
        report = {**rollout_statistics(rollout, partial(rows_of_all, self)), **learned}
        if trainer.is_global_zero:
            torch.save((ppo_helpers.state(self), report), self.folder / f"world_{trainer.world_size}.pt")


def run(model, reward, folder, **kwargs):
    """One update."""
    data = ppo_helpers.prompt_data(model, Path(folder))
    trainer = ppo_helpers.trainer(folder, limit_train_batches=1, limit_val_batches=0, **kwargs)
    trainer.fit(FixedRollout(model, reward, folder), data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run(*sys.argv[1:4], devices=2, strategy="ddp_fork")

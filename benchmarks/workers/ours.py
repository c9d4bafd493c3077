"""Our side of `benchmarks/reward_uq.py`: the reward stage itself, under a Lightning trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from job import Answer, Job, serve
from lightning.pytorch import Trainer

from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.weights import quiet
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.stages.reward import building
from lit_vapo.stages.reward.module import RewardModule


class Timed(RewardModule):
    """The reward stage with a clock."""

    prepared = 0.0
    now: Callable[[], float]

    def configure_model(self) -> None:
        """Time what is made ready."""
        start = self.now()
        super().configure_model()
        self.prepared += self.now() - start

    def _pair_features(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Time the backbone's features, where it is frozen."""
        start = self.now()
        features = super()._pair_features(split)
        self.prepared += self.now() - start
        return features

    def on_train_start(self) -> None:
        """Start the clock."""
        self.started = self.now()

    def on_train_end(self) -> None:
        """Stop the clock."""
        self.seconds = self.now() - self.started


def fit(job: Job, head: RewardHead, epochs: int, loads: list[float]) -> tuple[Timed, float]:
    """Train, and return the module and the seconds of everything from the texts on."""
    start = job.now()
    torch.manual_seed(0)
    loads.clear()
    data = PreferenceDataModule(
        tokenizer=job.model,
        preferences=job.pairs,
        validation_fraction=0.0,
        batch_size=job.batch_size,
        max_length=job.max_length,
    )
    module = Timed(
        Pretrained(job.model, dtype=job.dtype),
        head=head,
        learning_rate=job.learning_rate,
        weight_decay=0.0,
        feature_cache=str(Path(job.work) / "features"),
    )
    module.now = job.now
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=job.work,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module, job.now() - start


def stopwatch(job: Job, loads: list[float]) -> Any:
    """Loading of the backbone, timed."""
    load = building.load_backbone

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = job.now()
        backbone = load(*args, **kwargs)
        loads.append(job.now() - start)
        return backbone

    return timed


def work(job: Job) -> Answer:
    """Train what the job says."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet()
    torch.set_num_threads(job.threads)
    loads: list[float] = []
    building.load_backbone = stopwatch(job, loads)
    if job.part == "heads":
        module, seconds = fit(job, HeadEnsemble(job.members, bootstrap=False), 1, loads)
        whole = module.prepared - sum(loads) + module.seconds
        rest = seconds - whole
        again, _ = fit(job, HeadEnsemble(job.members, bootstrap=False), job.epochs, loads)
        return Answer(again.seconds, whole, rest, again.trainer.global_step)
    head: RewardHead = FullEnsemble(job.members, bootstrap=job.bootstrap)
    if job.part == "adapters":
        head = LoraEnsemble(
            num_members=job.members,
            rank=job.rank,
            alpha=job.alpha,
            target_modules=job.targets,
            top_layers=None if job.top_layers == job.layers else job.top_layers,
            bootstrap=job.bootstrap,
        )
    module, seconds = fit(job, head, job.epochs, loads)
    whole = module.prepared - sum(loads) + module.seconds
    return Answer(module.seconds, whole, seconds - whole, module.trainer.global_step)


if __name__ == "__main__":
    serve(work)

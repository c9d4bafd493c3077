"""The peer's side of `benchmarks/reward_uq.py`: RewardUQ's own pipelines and trainers, for its own interpreter.

Needs rewarduq 0.1.0 and nothing of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from job import Answer, Job, serve
from rewarduq.methods.lora_ensemble import (
    LoraEnsembleModelConfig,
    LoraEnsemblePipeline,
    LoraEnsembleTrainer,
    LoraEnsembleTrainerConfig,
)
from rewarduq.methods.mlp_head_ensemble import (
    MLPHeadEnsembleModelConfig,
    MLPHeadEnsemblePipeline,
    MLPHeadEnsembleTrainer,
    MLPHeadEnsembleTrainerConfig,
)
from trainer import Clock, quiet


def options(job: Job, epochs: int, name: str) -> dict[str, Any]:
    """Settings of the peer's trainers; what costs time and is not training is off."""
    return {
        "output_dir": str(Path(job.work) / name),
        "per_device_train_batch_size": job.batch_size,
        "per_device_eval_batch_size": max(1, job.feature_tokens // job.max_length),
        "num_train_epochs": epochs,
        "max_length": job.max_length,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "regularization_towards_initial_weights": 0.0,
        "center_rewards_coefficient": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def texts(job: Job) -> datasets.Dataset:
    """The pairs, kept in memory."""
    return datasets.Dataset.from_list([json.loads(line) for line in Path(job.pairs).read_text().splitlines()])


def heads(job: Job, epochs: int) -> tuple[float, float, float, int]:
    """Seconds of training, of features and training, and of everything; steps."""
    start = job.now()
    pipeline = MLPHeadEnsemblePipeline(
        MLPHeadEnsembleModelConfig(
            base_model_name_or_path=job.model,
            base_model_init_kwargs={"dtype": job.dtype},
            head_num_layers=1,
            num_heads=job.members,
        ),
        MLPHeadEnsembleTrainerConfig(
            precompute_features=True,
            precompute_features_path=str(Path(job.work) / "features"),
            **options(job, epochs, "heads"),
        ),
    )
    clock = Clock(job.now)
    trainer = MLPHeadEnsembleTrainer(
        model=pipeline.model,
        args=pipeline.trainer_config,
        train_dataset=texts(job),
        processing_class=pipeline.model.tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    end = job.now()
    train = clock.ends[-1] - clock.begins[-1]
    return train, clock.ends[-1] - clock.ends[0], end - start, trainer.state.global_step


def adapter(job: Job, member: int) -> tuple[float, float, int]:
    """Seconds of training and of everything for one member; steps."""
    start = job.now()
    torch.manual_seed(member)
    bottom = job.layers - job.top_layers
    lora = {
        "r": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "target_modules": job.targets,
        "modules_to_save": ["score"],
        "layers_to_transform": list(range(bottom, job.layers)) if bottom else None,
    }
    pipeline = LoraEnsemblePipeline(
        LoraEnsembleModelConfig(
            base_model_name_or_path=job.model,
            base_model_init_kwargs={"dtype": job.dtype, "num_labels": 1},
            peft_config=lora,
        ),
        LoraEnsembleTrainerConfig(**options(job, job.epochs, f"member_{member}")),
    )
    # The pipeline turns it on whatever its configuration says.
    pipeline.trainer_config.gradient_checkpointing = job.checkpointing
    clock = Clock(job.now)
    trainer = LoraEnsembleTrainer(
        model=pipeline.model,
        args=pipeline.trainer_config,
        train_dataset=texts(job),
        processing_class=pipeline.tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    end = job.now()
    return clock.ends[-1] - clock.begins[-1], end - start, trainer.state.global_step


def work(job: Job) -> Answer:
    """Train what the job says: all heads at once, or the adapters one after another."""
    quiet(job.threads)
    if job.part == "heads":
        _, whole, everything, _ = heads(job, 1)
        train, _, _, steps = heads(job, job.epochs)
        return Answer(train, whole, everything - whole, steps)
    runs = [adapter(job, member) for member in range(job.members)]
    train = sum(run[0] for run in runs)
    return Answer(train, train, sum(run[1] for run in runs) - train, runs[0][2])


if __name__ == "__main__":
    serve(work)

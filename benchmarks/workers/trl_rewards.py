"""TRL's side of `benchmarks/reward_uq.py`: one reward model on a frozen backbone, by its own trainer.

Needs trl 1.12.0 and nothing of ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import torch
from job import Answer, Job, serve
from trainer import Clock, quiet
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


def work(job: Job) -> Answer:
    """Train the head alone."""
    quiet(job.threads)
    start = job.now()
    dtype = getattr(torch, job.dtype)
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=dtype)
    model.base_model.requires_grad_(False)
    clock = Clock(job.now)
    trainer = RewardTrainer(
        model,
        RewardConfig(
            output_dir=str(Path(job.work) / "trl"),
            per_device_train_batch_size=job.batch_size,
            num_train_epochs=job.epochs,
            max_length=job.max_length,
            learning_rate=job.learning_rate,
            lr_scheduler_type="linear",
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=datasets.Dataset.from_list([json.loads(x) for x in Path(job.pairs).read_text().splitlines()]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[clock],
    )
    trainer.train()
    everything = job.now() - start
    seconds = clock.ends[-1] - clock.begins[-1]
    return Answer(seconds, seconds, everything - seconds, trainer.state.global_step)


if __name__ == "__main__":
    serve(work)

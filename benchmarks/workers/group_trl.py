"""The peer's side of `benchmarks/ppo_speed.py` for RLOO and GRPO: TRL's own trainers, for its own interpreter.

Needs trl 1.12.0 and nothing of ours.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from ppo_job import Answer, Job, Stopwatch, serve
from trainer import adapters, quiet
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TRAINERS = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}


class Laps(transformers.TrainerCallback):
    """Tells the stopwatch of iterations, each of so many weight updates."""

    def __init__(self, watch: Stopwatch, updates: int) -> None:
        self.watch = watch
        self.updates = updates

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Start the clock; what counts is the optimiser below accelerate's, which leaves steps out."""
        self.watch.watch(getattr(optimizer, "optimizer", optimizer), model)

    def on_log(self, args: Any, state: Any, control: Any, model: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """An iteration is done: the trainer logs as often."""
        if "reward" in logs and state.global_step % self.updates == 0:
            self.watch.lap(model, logs["reward"])


def work(job: Job, answer: Answer) -> None:
    """Train with groups of responses to each prompt."""
    quiet(threads=1)
    tokenizer = AutoTokenizer.from_pretrained(job.policy, padding_side="left")
    texts = [json.loads(line)["prompt"] for line in Path(job.prompts).read_text().splitlines()]
    gap = "" if tokenizer("a ")["input_ids"] != tokenizer("a")["input_ids"] else " "
    dtype = getattr(torch, job.dtype)
    policy = AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32 if job.lora_rank is None else dtype)
    reward = AutoModelForSequenceClassification.from_pretrained(job.classifier, dtype=dtype)
    trainer, config = TRAINERS[job.advantage]
    updates = job.epochs * job.minibatches
    with tempfile.TemporaryDirectory() as folder:
        options = config(
            output_dir=folder,
            # A step is a minibatch; a rollout is sampled for so many of them, and read so many times.
            per_device_train_batch_size=job.batch_size // job.minibatches,
            steps_per_generation=job.minibatches,
            num_iterations=job.epochs,
            gradient_accumulation_steps=1,
            max_steps=job.iterations * updates,
            num_generations=job.responses,
            max_completion_length=job.response_length,
            temperature=1.0,
            top_k=0,
            beta=job.kl_coef,
            learning_rate=job.learning_rate,
            # Gradients are not clipped on any side.
            max_grad_norm=1e9,
            optim="adamw_torch",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=updates,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job.seed,
        )
        run = trainer(
            policy,
            reward,
            options,
            # The reward model reads both as one text, which the tokenizer of whole words does not part by itself.
            datasets.Dataset.from_list([{"prompt": text + gap} for text in texts]),
            processing_class=tokenizer,
            reward_processing_classes=AutoTokenizer.from_pretrained(job.policy),
            callbacks=[Laps(Stopwatch(job, answer), updates)],
            peft_config=adapters(job.lora_rank),
        )
        run.remove_callback(transformers.PrinterCallback)
        run.train()


if __name__ == "__main__":
    serve(work)

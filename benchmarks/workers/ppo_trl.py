"""The peer's side of `benchmarks/trl_ppo.py` and `ppo_speed.py`: TRL's own PPO trainer, for its own interpreter.

Needs trl 1.12.0 and nothing of ours.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
import transformers
from ppo_job import Answer, Job, Stopwatch, serve
from trainer import adapters, quiet
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Laps(transformers.TrainerCallback):
    """Tells the stopwatch of iterations."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.reward = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Note the mean reward."""
        self.reward = logs.get("objective/scores", self.reward)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        """Start the clock; what counts is the optimiser below accelerate's, which leaves steps out."""
        self.watch.watch(getattr(optimizer, "optimizer", optimizer), model.policy)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """An iteration is done."""
        self.watch.lap(model.policy, self.reward)


def leave_end_unread(reward: torch.nn.Module, end: int) -> None:
    """Let the reward model take the token that ends a response for padding, as it does on our side.

    It has not learned what that token is worth; TRL would read it there.
    """
    get_reward = ppo_trainer.get_reward

    def unread(model: torch.nn.Module, ids: torch.Tensor, pad: int, context: int) -> Any:
        return get_reward(model, ids.masked_fill(ids == end, pad) if model is reward else ids, pad, context)

    ppo_trainer.get_reward = unread


def work(job: Job, answer: Answer) -> None:
    """Run PPO."""
    quiet(threads=1)
    tokenizer = AutoTokenizer.from_pretrained(job.policy, padding_side="left")
    texts = [json.loads(line)["prompt"] for line in Path(job.prompts).read_text().splitlines()]
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    dtype = getattr(torch, job.dtype)
    # Without adapters the policy trains whole.
    held = torch.float32 if job.lora_rank is None else dtype
    policy = AutoModelForCausalLM.from_pretrained(job.policy, dtype=held)
    reference = AutoModelForCausalLM.from_pretrained(job.policy, dtype=dtype) if job.lora_rank is None else None
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(job.classifier, dtype=x) for x in (dtype, torch.float32)
    )
    leave_end_unread(reward, tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        options = PPOConfig(
            output_dir=folder,
            # With accumulation, `num_mini_batches` would do nothing.
            per_device_train_batch_size=job.batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=job.minibatches,
            num_ppo_epochs=job.epochs,
            total_episodes=job.batch_size * job.iterations,
            local_rollout_forward_batch_size=job.batch_size,
            response_length=job.response_length,
            stop_token="eos",
            temperature=1.0,
            kl_coef=job.kl_coef,
            learning_rate=job.learning_rate,
            optim="adamw_torch",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            num_sample_generations=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job.seed,
        )
        laps = Laps(Stopwatch(job, answer))
        trainer = PPOTrainer(
            options,
            tokenizer,
            policy,
            reference,
            reward,
            datasets.Dataset.from_list(rows),
            value,
            callbacks=[laps],
            peft_config=adapters(job.lora_rank),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    serve(work)

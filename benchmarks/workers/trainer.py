"""What workers share whose peer trains with a trainer of transformers; imports nothing of ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import torch
import transformers


class Clock(transformers.TrainerCallback):
    """When trainings began and ended. Before it computes features RewardUQ calls a training of no steps."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.begins: list[float] = []
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.begins.append(self.now())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(self.now())


def quiet(threads: int) -> None:
    """Nothing but the training: no warnings, no bars, so many threads."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)


def adapters(rank: int | None) -> Any:
    """The adapters that a policy trains, as peft wants them; `None` where all weights train."""
    from peft import LoraConfig

    if rank is None:
        return None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")

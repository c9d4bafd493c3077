"""Which optimiser steps the weights, and how its learning rate goes: ours, or those that the user names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lit_vapo.stages.schedule import linear_decay

# Like Lightning's `OptimizerCallable`, but that the learning rate is handed over, too: so options offer no `lr`, which
# the groups of parameters would overrule.
OptimizerChoice = Literal["adamw"] | Callable[[Iterable[Any], float], Optimizer]
SchedulerChoice = Literal["linear"] | Callable[[Optimizer], LRScheduler]


def check_optimizer(module: type, settings: dict[str, Any]) -> None:
    """Refuse settings of our optimiser or schedule beside another, which would not read them.

    Args:
        module: Whose constructor takes the settings; its defaults are not refused.
        settings: What it was given, by parameter.

    Raises:
        ValueError: A setting would do nothing, or there is no such optimiser or schedule.
    """
    for key, own, part in (("optimizer", "adamw", "weight_decay"), ("lr_scheduler", "linear", "warmup_steps")):
        choice = settings[key]
        if choice == own:
            continue
        if not callable(choice):
            raise ValueError(f"model.{key}: expected {own}, or a class by its path, got {choice!r}")
        if part in settings and settings[part] != inspect.signature(module).parameters[part].default:
            raise ValueError(
                f"model.{part}: expected none beside model.{key}, since it is a setting of {own}, got {settings[part]}"
            )


def build_optimizer(
    optimizer: OptimizerChoice,
    lr_scheduler: SchedulerChoice,
    groups: list[dict[str, Any]],
    total: Callable[[], int],
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
) -> tuple[Optimizer, LRScheduler]:
    """An optimiser of some groups of parameters, each with its learning rate (`lr`), and the schedule of these.

    Args:
        optimizer: `adamw`, or what makes another of groups and a learning rate.
        lr_scheduler: `linear`, or what makes another for an optimiser.
        groups: The groups.
        total: Says how many steps of the schedule the run has; asked for `linear` alone.
        weight_decay: Decoupled weight decay of `adamw`.
        warmup_steps: Steps over which `linear` rises first.

    Raises:
        ValueError: One of them refuses its settings or the weights, or the schedule wants a figure at each step.
    """
    if callable(optimizer):
        with _named("optimizer"):
            stepped = optimizer(groups, groups[0]["lr"])
    else:
        stepped = torch.optim.AdamW(groups, weight_decay=weight_decay)
    if not callable(lr_scheduler):
        return stepped, LambdaLR(stepped, linear_decay(total(), warmup_steps))
    with _named("lr_scheduler"):
        scheduler = lr_scheduler(stepped)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("model.lr_scheduler: expected a schedule by steps alone, got ReduceLROnPlateau")
    return stepped, scheduler


@contextmanager
def _named(key: str) -> Iterator[None]:
    """A block in which somebody's class is made.

    Raises:
        ValueError: The class refused, in its words.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.{key}: {error}") from error

"""Runs a stage and measures the peak of each of its phases; `benchmarks/plan.py` starts it.

What is measured on a CPU is every allocation of PyTorch's allocator, by its profiler, over the bytes of the loaded
weights; on a GPU the peak that its allocator tells.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from lit_vapo.commands.run import StageCLI
from lit_vapo.commands.stages import STAGES
from lit_vapo.models.weights import quiet
from lit_vapo.rollout import RolloutMaker
from lit_vapo.rollout.passes import Passes
from lit_vapo.stages.ppo.update import PPOUpdate

MARK = "phase:"


def constant_rewards(completions: list[str]) -> list[float]:
    """A reward that takes no memory."""
    return [float(len(response)) for response in completions]


# What a GPU's allocator told of the last time that each phase came.
ON_GPU: dict[str, int] = {}


def marked(owner: type, method: str, phase: str) -> None:
    """Mark the time that a method takes as a phase."""
    inner = getattr(owner, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        if not torch.cuda.is_available():
            with record_function(MARK + phase):
                return inner(*args, **kwargs)
        torch.cuda.reset_peak_memory_stats()
        out = inner(*args, **kwargs)
        ON_GPU[phase] = torch.cuda.max_memory_allocated()
        return out

    setattr(owner, method, outer)


def held(module: torch.nn.Module) -> int:
    """Bytes of the weights, with the scales of 8-bit ones."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.SCB for p in module.parameters() if getattr(p, "SCB", None) is not None]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def peaks(events: list[Any], weights: int) -> dict[str, int]:
    """Peak of the last time that each phase came, by the allocations and releases until then."""
    spans = {e.name(): (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith(MARK)}
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total, found = weights, dict.fromkeys(spans, 0)
    for moment, size in memory:
        total += size
        for name, (start, end) in spans.items():
            if start <= moment <= end:
                found[name] = max(found[name], total)
    return {name.removeprefix(MARK): peak for name, peak in found.items()}


def main(stage: str, words: list[str]) -> None:
    """Run `fit` of a stage, and print the peaks as JSON."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet()
    torch.manual_seed(0)
    marked(RolloutMaker, "_generate", "rollout")
    marked(Passes, "score", "scoring")
    marked(PPOUpdate, "run", "update")

    class Built(StageCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    kind = STAGES[stage]
    run = Built(kind.load(), kind.data, stage=stage, args=["fit", *words])
    module: Any = run.model
    module.configure_model()
    weights = held(module)
    trainer: Trainer = run.trainer
    if stage != "ppo":
        # The way forward and back is within.
        marked(type(trainer.strategy), "optimizer_step", "training")
    if torch.cuda.is_available():
        trainer.fit(module, datamodule=run.datamodule)
        found = ON_GPU
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.fit(module, datamodule=run.datamodule)
        found = peaks(list(profiler.profiler.kineto_results.events()), weights)
    print(json.dumps({"weights": weights, "phases": found}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""`lit-vapo plan`: will a run fit, and how long does it take."""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lit_vapo.commands.plan_settings import Settings, chosen_stage, read_settings
from lit_vapo.models.weights import quiet
from lit_vapo.plan.draft import Plan
from lit_vapo.plan.formulas import fits
from lit_vapo.plan.gpus import GB, GPUS, Gpu, find_gpu
from lit_vapo.plan.ppo import PPOJob
from lit_vapo.plan.report import figures, table

SMALLER, ROWS, DEVICES = 1024, 8, (2, 4, 8, 16)
BITS = "model.base.quantization"


def plan(words: Sequence[str]) -> None:
    """Say what each phase of a run takes on each device, whether that fits, and what would make it fit.

    Args:
        words: The command line after `lit-vapo plan`: options of its own, and those of `fit` of a stage.

    Raises:
        ValueError: The GPU or the stage is not known, or the settings are refused.
    """
    quiet()
    warnings.simplefilter("ignore")
    own, rest = _own(list(words))
    gpus = [find_gpu(own.gpu)] if own.gpu else list(GPUS.values())
    stage, rest = chosen_stage(rest)
    settings = read_settings(stage, rest, own.devices, own.strategy)
    made = settings.plan()
    tight = own.gpu is not None and not fits(made.peak, gpus[0].memory)
    better = _better(stage, rest, own, settings, gpus[0]) if tight else None
    if own.json:
        record = {"run": settings.title, **figures(made, gpus)}
        if tight:
            record["change"] = None if better is None else {"options": better.options, **figures(better.plan, gpus)}
        print(json.dumps(record, indent=2))
        return
    print(f"{settings.title}\n\n{table(made, gpus)}")
    if tight:
        print(f"\n{_advice(better, gpus[0])}")


def _own(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and all others."""
    parser = argparse.ArgumentParser(
        "lit-vapo plan",
        usage="lit-vapo plan [ppo|reward|sft] [options of the stage's fit] [options below]",
        description=(inspect.getdoc(plan) or "").partition("\n\n")[0],
        epilog="All other options are those of `lit-vapo ppo fit`, `reward fit` or `sft fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", help=f"plan for this one: {', '.join(GPUS)}; without it, for each")
    parser.add_argument("--devices", type=int, help="how many there are; otherwise what the trainer's settings say")
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], help="how they share; otherwise as the trainer's")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes and seconds")
    return parser.parse_known_args(words)


# What would make it fit.


class Change(NamedTuple):
    """Something that makes a run smaller.

    Attributes:
        name: What it is.
        options: Options of the stage.
        devices: How many devices it takes, `None` for as many as before.
    """

    name: str
    options: dict[str, str]
    devices: int | None = None


class Better(NamedTuple):
    """A run that fits.

    Attributes:
        names: What was changed.
        options: What to add to the command line.
        plan: What it takes.
    """

    names: list[str]
    options: list[str]
    plan: Plan


def changes(settings: Settings) -> Iterator[Change]:
    """What would make a run smaller, cheapest first.

    That is what changes nothing that is learned, then what costs time, then what changes the model, then devices.
    """
    job, base = settings.job, settings.job.base
    if isinstance(job, PPOJob):
        if job.micro_batch_tokens > SMALLER:
            yield Change("smaller microbatches", {"model.update.micro_batch_tokens": str(SMALLER)})
        rows = job.prompts
    else:
        rows = getattr(job, "rows", 0) or getattr(job, "pairs", 0)
    if not base.gradient_checkpointing:
        yield Change("gradient checkpointing", {"model.base.gradient_checkpointing": "true"})
    if rows > ROWS:
        more = {} if isinstance(job, PPOJob) else {"trainer.accumulate_grad_batches": str(rows // ROWS)}
        yield Change("smaller batches", {"data.batch_size": str(ROWS), **more})
    adapters = getattr(job, "lora", True)
    if adapters is None:
        yield Change("adapters (LoRA)", {"model.lora.rank": "16"})
    trains_base = getattr(getattr(job, "head", None), "owns_backbones", False) or not getattr(job, "frozen", True)
    if not trains_base:
        for bits in ("8bit", "4bit"):
            if base.quantization is None or (base.quantization, bits) == ("8bit", "4bit"):
                yield Change(f"{bits[0]} bits a weight", {BITS: bits})
    for devices in DEVICES:
        if devices > settings.setup.devices:
            yield Change(f"{devices} devices with FSDP2", {}, devices)


def _better(stage: str, words: list[str], own: argparse.Namespace, settings: Settings, gpu: Gpu) -> Better | None:
    """The first change that makes a run fit; then the first few of them together."""
    listed = list(changes(settings))
    tried = [[change] for change in listed] + [listed[: n + 1] for n in range(1, len(listed))]
    for chosen in tried:
        options = {name: value for change in chosen for name, value in change.options.items()}
        devices = max((change.devices or 0 for change in chosen), default=0) or own.devices
        strategy = "fsdp2" if any(change.devices for change in chosen) else own.strategy
        if strategy == "fsdp2" and options.get(BITS, settings.job.base.quantization) == "8bit":
            # FSDP2 cannot divide 8-bit weights.
            options[BITS] = "4bit"
        added = [f"--{name}={value}" for name, value in options.items()]
        made = read_settings(stage, [*words, *added], devices, strategy).plan()
        if fits(made.peak, gpu.memory):
            if strategy == "fsdp2":
                added += ["--trainer.strategy=fsdp2", f"--trainer.devices={devices}"]
            return Better([change.name for change in chosen], added, made)
    return None


def _advice(better: Better | None, gpu: Gpu) -> str:
    if better is None:
        return f"It does not fit the {gpu.name}, nor with all that was tried: take a smaller model or a larger GPU."
    taken = sum(better.plan.seconds(gpu).values())
    return (
        f"It does not fit the {gpu.name}. With {', '.join(better.names)} it does: {better.plan.peak / GB:.1f} GB, "
        f"{taken:.3g} s an iteration. Add:\n  {' '.join(better.options)}"
    )

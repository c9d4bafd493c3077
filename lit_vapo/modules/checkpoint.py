"""What the stages share about checkpoints: only trained weights are saved, and misfits are named."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lit_vapo.models.settings import whole_paths
from lit_vapo.modules.checkpoint_file import FIGURES_KEY, STAGE_KEY

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class TrainedWeightsModule(LightningModule):
    """A LightningModule whose checkpoints hold what training changed and nothing else.

    Frozen weights come from the base model, so a checkpoint of adapters on a large base stays small. `stage` is
    written into each checkpoint, and one of another stage or architecture is refused by name.
    """

    stage: str = ""

    def __init__(self) -> None:
        super().__init__()
        # What the run had logged when it was last saved, by key: a model card tells it.
        self.figures: dict[str, float] = {}

    def kept_keys(self) -> set[str]:
        """Names in the state dict that a checkpoint keeps: trained parameters, and buffers outside frozen models."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | {name for name in self.state_dict() if self._is_own_state(name)}

    def _is_own_state(self, name: str) -> bool:
        """Whether an untrained entry (a buffer, say) belongs to the run rather than to a frozen base."""
        return False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights, note the stage and the latest figures.

        Raises:
            ValueError: A trained weight is not finite; nothing is written, so that the checkpoint before it stays.
        """
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise ValueError(f"checkpoint: expected finite weights, got NaN or infinity in {name}; not saved")
        kept = self.kept_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint[STAGE_KEY] = self.stage
        logged = {} if self._trainer is None else self.trainer.callback_metrics
        self.figures.update({key: float(value) for key, value in logged.items() if "/" in key})
        checkpoint[FIGURES_KEY] = dict(self.figures)
        settings = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if settings is not None:
            # Made in Python rather than from a config: write what the command line would have written.
            plainly = whole_paths(plain(dict(settings)))
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {"_instantiator": INSTANTIATOR, **plainly}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, and fill in the frozen weights it left out.

        Raises:
            ValueError: Another stage, other parameters or other shapes.
        """
        stage = checkpoint.get(STAGE_KEY)
        if stage != self.stage:
            raise ValueError(f"checkpoint: expected one of stage {self.stage!r}, got one of stage {stage!r}")
        self.figures = dict(checkpoint.get(FIGURES_KEY, {}))
        self._tell_differences(checkpoint)
        own = self.state_dict()
        saved = checkpoint["state_dict"]
        _refuse("unknown weights", (k for k in saved if k not in own))
        _refuse("no weights for", (k for k in self.kept_keys() if k not in saved))
        for key, value in saved.items():
            if own[key].shape != value.shape:
                raise ValueError(
                    f"checkpoint of another architecture: expected {key} of shape {tuple(own[key].shape)}, "
                    f"got {tuple(value.shape)}"
                )
        for key, value in own.items():
            # A 4-bit weight writes how it is quantised under keys of its own, and reads none.
            if ".weight." not in key:
                saved.setdefault(key, value)

    def _tell_differences(self, checkpoint: dict[str, Any]) -> None:
        """Name every setting that differs from the checkpoint's: its state goes on, whatever the setting says."""
        then, now = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}), plain(dict(self.hparams))
        for key in sorted(then.keys() & now.keys()):
            if plain(then[key]) != now[key]:
                rank_zero_info(
                    f"checkpoint: model.{key} was {then[key]!r} and is now {now[key]!r}; weights, optimiser and "
                    "learning-rate schedule go on from the checkpoint"
                )


def _refuse(problem: str, keys: Iterable[str]) -> None:
    found = sorted(keys)
    if found:
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise ValueError(f"checkpoint of another architecture: {problem} {shown} ({len(found)} in all)")


def check_context(config: Any, longest: int, key: str = "data.max_length") -> None:
    """Refuse data that a model's context cannot hold.

    Args:
        config: The model's configuration.
        longest: Tokens of the longest sequence there is or may be.
        key: What limits it.

    Raises:
        ValueError: The longest sequence has more tokens than the model has positions.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"{key}: expected at most the model's context of {context} tokens, got a sequence of {longest}"
        )


def linear_decay(total: int, warmup: int = 0, floor: float = 0.0) -> Callable[[int], float]:
    """Learning-rate factor by step: up over `warmup` steps, then straight down to `floor` at `total`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = max(0.0, (total - step) / max(1, total - warmup))
        return max(floor, min(1.0, left))

    return factor


def check_positive(**values: float | None) -> None:
    """Raise ValueError for the first keyword that is not above zero (None is allowed)."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"model.{name}: expected a number above 0, got {value}")


def check_precision(given: str, *allowed: str) -> None:
    """Refuse a precision in which training would go wrong.

    Half precision throughout would round small updates away; a base's own weights are set by its `dtype`.

    Raises:
        ValueError: It is none of those allowed.
    """
    if given not in allowed:
        raise ValueError(f"trainer.precision: expected {' or '.join(allowed)}, got {given}")


def total_steps(module: LightningModule) -> int:
    """Planned batches of the whole run.

    Raises:
        ValueError: The run has no end.
    """
    trainer: Any = module.trainer
    if getattr(trainer.datamodule, "streams", False):
        # To ask would be to read, before the place of a resumed run is known; and a stream does not tell its length.
        return int(trainer.max_steps)
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("trainer: expected max_epochs or max_steps, got a run without end")
    return int(total)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """A block whose random numbers depend on `numbers` alone, and leave the stream outside as it was."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def seeded_batch(module: LightningModule) -> AbstractContextManager[None]:
    """A block with the random numbers of this batch of the run.

    They depend on the seed of the process, the number of the batch and the rank alone: a resumed run draws what the
    uninterrupted one would have drawn, whatever else drew numbers before.
    """
    return seeded(torch.initial_seed(), module.trainer.fit_loop.total_batch_idx, module.global_rank)


@contextmanager
def unpickled() -> Iterator[None]:
    """Silence Lightning's remark on modules among the hyperparameters: the command line stores their class path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`.*")
        yield


def plain(value: Any) -> Any:
    """A setting as numbers, strings, lists and dicts, so that reading a checkpoint runs no pickled code.

    An object becomes its class path and constructor arguments, read back from attributes of the same names.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    names = [name for name in inspect.signature(type(value).__init__).parameters if hasattr(value, name)]
    class_path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": class_path, "init_args": {name: plain(getattr(value, name)) for name in names}}

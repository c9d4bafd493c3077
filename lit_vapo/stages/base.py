"""What the stages share: checkpoints hold only trained weights, and misfits are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from lit_vapo.models.fingerprint import model_fingerprints, named_folders
from lit_vapo.models.older import update_checkpoint
from lit_vapo.models.pretrained import Lora, Pretrained, model_config
from lit_vapo.models.settings import whole_paths
from lit_vapo.models.sharding import Sharing, check_cut, local
from lit_vapo.models.tensor_parallel import KEY, check_split
from lit_vapo.stages.checkpoint_file import FIGURES_KEY, STAGE_KEY
from lit_vapo.stages.settings import plain
from lit_vapo.stages.sharing import average_gradients, clip_gradients, sum_of_all
from lit_vapo.stages.strategy import check_strategy, sharing_of

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def trained(lora: Lora | None) -> str:
    """What of a model trains, in words."""
    return "all weights" if lora is None else f"adapters of rank {lora.rank}"


class TrainedWeightsModule(LightningModule):
    """A LightningModule whose checkpoints hold what training changed and nothing else.

    Frozen weights come from the base model, so a checkpoint of adapters on a large base stays small. `stage` is
    written into each checkpoint, and one of another stage or architecture is refused by name.
    """

    stage: str = ""
    base: Pretrained

    def __init__(self) -> None:
        super().__init__()
        # What the run had logged when it was last saved, by key: a model card tells it.
        self.figures: dict[str, float] = {}
        # Weight updates behind the weights, if they are of a checkpoint or a run.
        self.trained_steps: int | None = None

    def about(self) -> dict[str, str]:
        """What a run of this is about, in a few lines by what they are called."""
        held = self.base.quantization or ("" if self.base.dtype == "auto" else self.base.dtype)
        return {"model": self.base.path + (f", {held}" if held else "")}

    # Strategies.

    @property
    def shares_base(self) -> bool:
        """Whether a strategy that shards finds anything of the base to share."""
        return True

    def setup(self, stage: str) -> None:
        """Refuse a strategy under which the run would go wrong, before models are loaded.

        Raises:
            ValueError: The strategy is none that was tested, or cannot shard what it should.
        """
        sharing = sharing_of(check_strategy(self.trainer.strategy))
        if sharing is None or not self.shares_base:
            return
        if sharing.tensor.size() > 1:
            self.check_tensor_parallel(sharing.tensor.size())
        check_cut(self.base)

    def check_tensor_parallel(self, size: int) -> None:
        """Refuse to split what cannot be split over so many processes.

        Raises:
            ValueError: The base, or something on it, cannot.
        """
        if self.base.quantization is not None:
            raise ValueError(f"{KEY}: expected 1 on a {self.base.quantization} base, got {size}")
        check_split(model_config(self.base), size, trains_all=self.hparams.get("lora") is None)

    def share(self, cut: Callable[[Sharing], None]) -> None:
        """Let models be shared by a function of the processes that do so, where the strategy says so."""
        sharing = None if self._trainer is None else sharing_of(self.trainer.strategy)
        if sharing is None or not self.shares_base:
            return
        cut(sharing)
        for parameter in self.parameters():
            # What is read from a file is the same everywhere; what is drawn begins as in the first process.
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                drawn = parameter.data.to(self.trainer.strategy.root_device)
                torch.distributed.broadcast(drawn, 0)
                parameter.data.copy_(drawn)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients of what is not sharded; a stage that steps by itself does so itself."""
        if self.automatic_optimization:
            average_gradients(self)

    def on_fit_end(self) -> None:
        """Remember how far the weights have come."""
        self.trained_steps = self.trainer.global_step

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients, whole and sharded."""
        if sharing_of(self.trainer.strategy) is None or gradient_clip_val is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm in (None, "norm"):
            clip_gradients((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)
        else:
            raise ValueError(
                f"trainer.gradient_clip_algorithm: expected norm under fsdp2, got {gradient_clip_algorithm}"
            )

    def kept_keys(self) -> set[str]:
        """Names in the state dict that a checkpoint keeps: trained parameters, and buffers outside frozen models."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | {name for name in self.state_dict() if self._is_own_state(name)}

    def _is_own_state(self, name: str) -> bool:
        """Whether an untrained entry (a buffer, say) belongs to the run rather than to a frozen base."""
        return False

    def fingerprints(self) -> dict[str, str]:
        """What tells the models and folders that the settings name from others, by key."""
        settings = plain(dict(self.hparams))
        # Written by runs, not read from others.
        return model_fingerprints({k: v for k, v in settings.items() if k != "feature_cache"}, "model")

    def folders(self) -> dict[str, Path]:
        """The folders that the settings name, by key."""
        return named_folders(plain(dict(self.hparams)), "model")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights, note the stage and the latest figures.

        Raises:
            ValueError: A trained weight is not finite; nothing is written, so that the checkpoint before it stays.
        """
        trained = {name: local(x) for name, x in self.named_parameters() if x.requires_grad}
        if trained:
            # Each process looks at its part, and all find out together.
            wrong = sum_of_all(self, torch.stack([(~torch.isfinite(x)).any() for x in trained.values()]).int())
            if wrong.any():
                name = list(trained)[int(wrong.nonzero()[0])]
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
            plainly = whole_paths(plain(dict(settings)) | self.chosen())
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {"_instantiator": INSTANTIATOR, **plainly}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, and fill in the frozen weights it left out.

        Raises:
            ValueError: Another stage, other parameters or other shapes.
        """
        stage = checkpoint.get(STAGE_KEY)
        if stage != self.stage:
            raise ValueError(f"checkpoint: expected one of stage {self.stage!r}, got one of stage {stage!r}")
        update_checkpoint(checkpoint)
        self.figures = dict(checkpoint.get(FIGURES_KEY, {}))
        self.trained_steps = checkpoint.get("global_step")
        self._check_optimizer(checkpoint)
        self._tell_differences(checkpoint)
        self.choose_state(checkpoint)
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

    def choose_state(self, checkpoint: dict[str, Any]) -> None:
        """Leave out of a checkpoint's state, in place, what is not for this run."""
        return

    def chosen(self) -> dict[str, Any]:
        """What the module has chosen where settings left it the choice (an objective, say), as checkpoints hold it."""
        left = [name for name, value in self.hparams.items() if value is None]
        return {name: plain(getattr(self, name)) for name in left if getattr(self, name, None) is not None}

    def _check_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with an optimiser or a schedule that could not read the state of the checkpoint's.

        Raises:
            ValueError: It is of another class.
        """
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        for key, default in (("optimizer", "adamw"), ("lr_scheduler", "linear")):
            # Checkpoints of earlier versions know none but ours.
            settings = (checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}), self.hparams)
            then, now = (plain(x.get(key, default)) for x in settings)
            then, now = (x["class_path"] if isinstance(x, dict) else x for x in (then, now))
            if then != now:
                raise ValueError(f"model.{key}: expected {then}, whose state the checkpoint has, got {now}")

    def _tell_differences(self, checkpoint: dict[str, Any]) -> None:
        """Name every setting that differs from the checkpoint's: its state goes on, whatever the setting says."""
        then, now = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}), plain(dict(self.hparams))
        chosen = self.chosen()
        for key in sorted(then.keys() & now.keys()):
            if plain(then[key]) not in (now[key], chosen.get(key, now[key])):
                rank_zero_info(
                    f"checkpoint: model.{key} was {then[key]!r} and is now {now[key]!r}; weights, optimiser and "
                    "learning-rate schedule go on from the checkpoint"
                )


def _refuse(problem: str, keys: Iterable[str]) -> None:
    found = sorted(keys)
    if found:
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise ValueError(f"checkpoint of another architecture: {problem} {shown} ({len(found)} in all)")

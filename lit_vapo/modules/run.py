"""A LightningCLI for one stage: where a run lives, what it keeps, and what it refuses to overwrite."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.callbacks.samples import SampleTable
from lit_vapo.models.pretrained import quiet
from lit_vapo.modules.options import StageParser

FINISHED = "finished.json"
# What Lightning takes for --ckpt_path in place of a file; all of them lie in the run's own folder.
RESUME_WORDS = ("best", "last", "hpc")
NOISE = (
    # Lightning is handed arguments while the command line has some: the stage's name, here.
    ".*LightningCLI's args parameter is intended to run from within.*",
    # A folder that holds a run is refused before this, unless it is resumed.
    ".*Checkpoint directory .* exists and is not empty.*",
    # Nobody who sets nothing aside for validation needs to hear that nothing was.
    ".*Total length of `list` across ranks is zero.*",
    # Frozen models belong in evaluation mode, and a policy has no dropout, so its mode does not matter.
    ".*module\\(s\\) in eval mode at the start of training.*",
)


class SaveConfig(SaveConfigCallback):
    """Writes the full configuration beside the logs, and into W&B."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give W&B the whole configuration; Lightning alone would give it the model's only."""
        config = json.loads(self.parser.dump(self.config, format="json", skip_none=False))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"lit_vapo": config}, allow_val_change=True)


class StageCLI(LightningCLI):
    """`fit`, `validate` and `test` of one stage, and `predict` of the ppo stage.

    A run lives in `trainer.default_root_dir`: `checkpoints/`, `logs/version_N/` (metrics.csv, config.yaml),
    samples, evaluations, and `finished.json` once it ended. A folder that holds a run is not written over unless told
    to.

    Args:
        model_class: The stage's module.
        datamodule_class: The stage's data.
        stage: Name of the stage.
        args: Command line.
    """

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        stage: str,
        args: Sequence[str] | None = None,
    ) -> None:
        self.stage = stage
        self.replaced: list[Path] = []
        quiet()
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        super().__init__(
            model_class,
            datamodule_class,
            save_config_callback=SaveConfig,
            parser_class=StageParser,
            # The modules make their own optimisers; options that do nothing would mislead.
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": f"runs/{stage}"},
            parser_kwargs={"prog": f"lit-vapo {stage}"},
            args=list(args) if args is not None else None,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run: checkpoints, sample tables, overwriting."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.enable_version_counter": False})
        if self.stage == "ppo":
            parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Replace the run that the folder holds, if there is one.",
        )

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyperparameters beat the command line without a word. Here a
        # checkpoint gives weights and state, differing settings are named on loading, and a misfit is refused.
        return

    def before_instantiate_classes(self) -> None:
        """Checkpoints go to a place that does not depend on the logger, and are read without pickles."""
        config = self.config[self.subcommand]
        if config["trainer"]["default_root_dir"] is None:
            raise ValueError("trainer.default_root_dir: expected a folder for the run, got null")
        self.root = Path(config["trainer"]["default_root_dir"]).expanduser()
        if config["checkpoint"]["dirpath"] is None:
            config["checkpoint"]["dirpath"] = str(self.root / "checkpoints")
        if "weights_only" in config and config["weights_only"] is None:
            config["weights_only"] = True
        # Before the models are loaded: a refusal should come at once.
        resumed = config["ckpt_path"]
        if resumed not in (None, *RESUME_WORDS) and "://" not in resumed and not Path(resumed).exists():
            raise ValueError(f"--ckpt_path: expected a checkpoint, got {resumed!r}, which does not exist")
        if self.subcommand == "fit":
            self._guard(config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that always keeps a metrics.csv."""
        if self.config[self.subcommand]["trainer"]["logger"] in (None, True, False):
            kwargs["logger"] = False
        trainer = super().instantiate_trainer(**kwargs)
        others: list[Logger] = list(trainer.loggers)
        csv = [x for x in others if isinstance(x, CSVLogger)] or [CSVLogger(str(self.root), name="logs")]
        # First, since the first logger's folder is where the configuration goes.
        trainer.loggers = [*csv, *(x for x in others if not isinstance(x, CSVLogger))]
        return trainer

    @rank_zero_only
    def _guard(self, config: Any) -> None:
        """Refuse a folder that holds a run, unless told to resume or to overwrite.

        Raises:
            ValueError: The folder holds a run.
        """
        checkpoints = Path(config["checkpoint"]["dirpath"])
        held = [p for p in (self.root / FINISHED, *sorted(checkpoints.glob("*.ckpt"))) if p.exists()]
        resumed = config["ckpt_path"]
        if resumed is not None and (resumed in RESUME_WORDS or Path(resumed).resolve().parent == checkpoints.resolve()):
            return
        if not held:
            return
        if not config["overwrite"]:
            raise ValueError(
                f"trainer.default_root_dir: expected a folder without a run, got {self.root}, which holds "
                f"{held[0].name}. "
                f"Resume with --ckpt_path={checkpoints}/last.ckpt, replace it with --overwrite=true, or choose "
                "another folder."
            )
        written = ("samples_*.jsonl", "evaluations.csv", "overoptimisation.png", "test")
        self.replaced = [*held, *(path for pattern in written for path in self.root.glob(pattern))]

    @rank_zero_only
    def before_fit(self) -> None:
        """Remove the run that is replaced, now that the configuration of the new one is known to be sound."""
        for path in self.replaced:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @rank_zero_only
    def after_fit(self) -> None:
        """Mark the run as finished."""
        record = {
            "stage": self.stage,
            "steps": self.trainer.global_step,
            "ended": datetime.now(UTC).isoformat(),
        }
        (self.root / FINISHED).write_text(json.dumps(record, indent=2) + "\n")

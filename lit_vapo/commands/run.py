"""A LightningCLI for one stage: where a run lives, what it keeps, and what it refuses to overwrite."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.callbacks.lineage import Lineage
from lit_vapo.callbacks.metrics_file import MetricsFile
from lit_vapo.callbacks.plain_progress import lines_for_bar
from lit_vapo.callbacks.run_summary import RunSummary
from lit_vapo.callbacks.samples import SampleTable
from lit_vapo.commands.endings import told, write_page
from lit_vapo.commands.options import Parser, check_models, refuse_secrets
from lit_vapo.commands.resume import WORDS, Found, checkpoint_meant, ends, found_to_resume, read
from lit_vapo.commands.run_folder import (
    CHECKPOINTS,
    FINISHED,
    Claim,
    check_folders,
    held_by_run,
    left_by_killed_run,
    refuse_foreign,
    remove,
    replaced_by_run,
)
from lit_vapo.commands.save_config import SaveConfig
from lit_vapo.folders import absolute, write_whole
from lit_vapo.models.weights import quiet
from lit_vapo.trackers import go_on, lasting

# What the best checkpoint is kept by, where the stage has one figure for that.
MONITOR = {"reward": "val/nll", "sft": "val/loss"}


class StageParser(Parser, LightningArgumentParser):
    """The parser of a stage."""

    all_options = "--help_all"


class StageCLI(LightningCLI):
    """`fit`, `validate` and `test` of one stage, and `predict` of the ppo stage.

    A run lives in `trainer.default_root_dir`: `checkpoints/`, `logs/version_N/` (metrics.csv, config.yaml),
    samples, evaluations, and `report.html` and `finished.json` once it ended. A folder that holds a run is not written
    over unless told to.

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
        self.resumed: Found | None = None
        self.own = self.began = False
        self.claim: Claim | None = None
        self.trial = False
        quiet()
        try:
            with told(self):
                super().__init__(
                    model_class,
                    datamodule_class,
                    save_config_callback=SaveConfig,
                    parser_class=StageParser,
                    # The modules make their own optimisers; options that do nothing would mislead.
                    auto_configure_optimizers=False,
                    seed_everything_default=0,
                    # `about` says what trains; a table of modules in two thousand parts says nothing more.
                    trainer_defaults={"default_root_dir": f"runs/{stage}", "enable_model_summary": False},
                    parser_kwargs={"prog": f"lit-vapo {stage}"},
                    args=list(args) if args is not None else None,
                )
        finally:
            self._leave()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run: checkpoints, sample tables, overwriting."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.monitor": MONITOR.get(self.stage)})
        if self.stage == "ppo":
            parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_argument(
            "--resume",
            action=ActionYesNo(no_prefix="no_"),
            default=False,
            help="Go on from the newest whole checkpoint of the run's folder. Begin where there is none, and do "
            "nothing where the run is finished.",
        )
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
        """Say where the run lives, and refuse what can be refused before models are loaded."""
        config = self.config[self.subcommand]
        refuse_secrets(config)
        if self.subcommand != "fit":
            # A checkpoint may be judged anywhere, and nothing is saved there.
            warnings.filterwarnings("ignore", message="The dirpath has changed from .*")
        if self.subcommand == "predict" and self.stage != "ppo":
            raise ValueError(f"lit-vapo {self.stage}: expected fit, validate or test, got predict")
        if config["trainer"]["default_root_dir"] is None:
            raise ValueError("trainer.default_root_dir: expected a folder for the run, got null")
        self.root = Path(config["trainer"]["default_root_dir"])
        self.trial = bool(config["trainer"]["fast_dev_run"])
        if self.trial:
            # Every process finds this place, and nothing in it outlives the trial.
            self.root = self.root.with_name(f".{self.root.name}.fast_dev_run")
            config["trainer"]["default_root_dir"] = str(self.root)
        # Not a setting: it would be saved with the others, and go along into the next run that is made of them.
        self.checkpoints = Path(config["checkpoint"]["dirpath"] or self.root / CHECKPOINTS)
        if "weights_only" in config and config["weights_only"] is None:
            config["weights_only"] = True
        checkpoints = self.checkpoints if self.subcommand == "fit" and not self.trial else None
        check_folders(self.root, checkpoints, config["model"].get("feature_cache"))
        self._check_resumed(config)
        check_models(config)
        config["data"]["tokenizer"] = config["data"]["tokenizer"] or config["model"]["base"]["path"]
        for name in ("reward", "policy"):
            # Like the models' own: what a checkpoint remembers is found from elsewhere.
            if isinstance(config["model"].get(name), str):
                config["model"][name] = absolute(config["model"][name])
        if self.subcommand == "fit" and not self.trial:
            self._guard(config)

    def _check_resumed(self, config: Any) -> None:
        """Find the checkpoint that is meant, and refuse one that cannot be.

        Raises:
            ValueError: It is missing, no checkpoint, or none is given where random weights would be judged.
        """
        given = config["ckpt_path"]
        if config["resume"] and self.subcommand == "fit":
            self.resumed = found_to_resume(config, self.root, self.checkpoints)
        elif given in WORDS:
            self.resumed = checkpoint_meant(given, self.checkpoints)
        elif given is not None and given != "hpc" and "://" not in given:
            if not Path(given).exists():
                raise ValueError(f"--ckpt_path: expected a checkpoint, got {given!r}, which does not exist")
            self.resumed = read(Path(given), "--ckpt_path")
        if self.resumed is not None:
            config["ckpt_path"] = given = str(self.resumed.path)
            self.own = self.resumed.path.resolve().parent == self.checkpoints.resolve()
        self.own = self.own or given == "hpc"
        if given is None and self.stage == "reward" and self.subcommand != "fit":
            raise ValueError(
                f"--ckpt_path: expected the checkpoint of the ensemble to {self.subcommand}, got none: its members "
                "would be random"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that always keeps a metrics.csv."""
        if self.config[self.subcommand]["trainer"]["logger"] in (None, True, False):
            kwargs["logger"] = False
        checkpoint = self._get(self.config_init, "checkpoint")
        checkpoint.dirpath = str(self.checkpoints.resolve())
        state = self.resumed.run_state if self.resumed is not None and self.own and self.subcommand == "fit" else {}
        checkpoint.state.began_with = state.get("reads", {})
        trainer = super().instantiate_trainer(**kwargs)
        chosen = self._get(self.config_init, "trainer")["callbacks"]
        trainer.callbacks = lines_for_bar(trainer.callbacks, chosen)  # type: ignore[attr-defined]
        if self.trial:
            return trainer
        trainer.callbacks[:0] = [RunSummary(str(self.root), checkpoint), Lineage()]  # type: ignore[attr-defined]
        go_on(trainer.loggers, state.get("trackers", []))
        trainer.loggers = lasting(trainer.loggers, str(self.root))
        # Their files go on where a resumed run's stand.
        files = [self.root / name for name in state.get("files", {})]
        trainer.loggers = [MetricsFile.like(x, files) if isinstance(x, CSVLogger) else x for x in trainer.loggers]
        return trainer

    @rank_zero_only
    def _guard(self, config: Any) -> None:
        """Claim the run's folder; refuse one that holds a run, unless told to resume or to overwrite.

        Raises:
            ValueError: The folder holds a run, or another run holds the folder.
        """
        refuse_foreign(self.root, self.checkpoints, self.own)
        left = left_by_killed_run(self.root)
        self.claim = Claim(self.root)
        held = held_by_run(self.root, self.checkpoints)
        if self.own:
            # It is not finished any more.
            self.replaced = [self.root / FINISHED]
            return
        if not held:
            self.replaced = left
            return
        if not config["overwrite"]:
            raise ValueError(
                f"trainer.default_root_dir: expected a folder without a run, got {self.root}, which holds "
                f"{held[0].relative_to(self.root)}. "
                "Go on with --resume, replace it with --overwrite=true, or choose another folder."
            )
        self.replaced = replaced_by_run(self.root, held)

    def _leave(self) -> None:
        """Let the folder of the run go."""
        if self.claim is not None:
            self.claim.release(keep=self.began and not held_by_run(self.root, self.checkpoints))
        if self.trial:
            rank_zero_only(shutil.rmtree)(self.root, ignore_errors=True)

    @rank_zero_only
    def before_fit(self) -> None:
        """Remove the run that is replaced, now that the configuration of the new one is known to be sound."""
        remove(self.replaced)
        if self.claim is not None:
            # For whoever comes after a kill.
            self.claim.note(logs=self._logs)
            self.began = True

    def after_fit(self) -> None:
        """Mark the run as finished.

        Raises:
            ValueError: It had nothing to do.
        """
        config = self.config[self.subcommand]
        if not self._get(self.config_init, "checkpoint").trained and not config["resume"]:
            raise ValueError(
                f"fit: expected at least one batch to train on, got none at step {self.trainer.global_step} of "
                f"trainer.max_steps={self.trainer.max_steps}, epoch {self.trainer.current_epoch} of "
                f"trainer.max_epochs={self.trainer.max_epochs}"
            )
        if self.trial or not self.trainer.is_global_zero:
            return
        record = {
            "stage": self.stage,
            "steps": self.trainer.global_step,
            "ends": ends(config["trainer"]),
            "ended": datetime.now(UTC).isoformat(),
            "logs": self._logs,
        }
        # Before the mark: a run that is killed meanwhile goes on, and ends with its page.
        if self.claim is not None:
            self.claim.note(**record)
        write_page(self.root)
        write_whole(self.root / FINISHED, json.dumps(record, indent=2) + "\n")

    def after_validate(self) -> None:
        """Refuse to end as if something had been validated."""
        self._refuse_nothing("validate on", "validation", self.trainer.num_val_batches)

    def after_test(self) -> None:
        """Refuse to end as if something had been tested."""
        self._refuse_nothing("test on", "test", self.trainer.num_test_batches)
        if not self.trial and self.trainer.is_global_zero:
            write_page(self.root, next(iter(self._logs), None))

    def after_predict(self) -> None:
        """Refuse to end as if something had been answered."""
        self._refuse_nothing("respond to", "test", self.trainer.num_predict_batches)

    @property
    def _logs(self) -> list[str]:
        """Where metrics and configuration are, from the run's folder; Lightning would ask all processes."""
        return [os.path.relpath(x.log_dir, self.root) for x in self.trainer.loggers if isinstance(x, MetricsFile)]

    def _refuse_nothing(self, what: str, split: str, batches: Sequence[int | float]) -> None:
        if not sum(batches):
            kind = "prompts" if self.stage == "ppo" else "preferences"
            raise ValueError(
                f"data.{kind}_{split}: expected {kind} to {what}, got none; give files, or set a part aside "
                f"(data.{split}_fraction)"
            )

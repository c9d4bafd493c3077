"""The configuration of a run, written beside its logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.folders import write_whole
from lit_vapo.stages.base import TrainedWeightsModule
from lit_vapo.trackers import log_configuration


class SaveConfig(SaveConfigCallback):
    """Writes the full configuration beside the logs, and into W&B.

    A run that is resumed with other settings has `config-2.yaml` beside the first, and so on.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, unless it stands there already."""
        # Asked by all processes, which wait for each other's answer.
        folder = trainer.log_dir
        if folder is not None and trainer.is_global_zero:
            # What options left to the module is told as it has chosen.
            for name, value in cast("TrainedWeightsModule", pl_module).chosen().items():
                self.config["model"][name] = value
            text = self.parser.dump(self._lasting(trainer), skip_none=False)
            path, number = Path(folder) / "config.yaml", 1
            while path.is_file() and path.read_text(encoding="utf-8") != text:
                number += 1
                path = path.with_name(f"config-{number}.yaml")
            write_whole(path, text)
            self.save_config(trainer, pl_module, stage)

    def _lasting(self, trainer: Trainer) -> object:
        """The configuration without what was said of one start: a run that is made of it would be told so, too."""
        config = self.config.clone()
        for name in ("overwrite", "resume"):
            config[name] = False
        checkpoint = next((x for x in trainer.callbacks if isinstance(x, RunCheckpoint)), None)  # type: ignore[attr-defined]
        if checkpoint is not None and checkpoint.owns(config.get("ckpt_path")):
            config["ckpt_path"] = None
        return config

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give W&B the whole configuration; Lightning alone would give it the model's only."""
        config = json.loads(self.parser.dump(self.config, format="json", skip_none=False))
        log_configuration(trainer.loggers, config)

"""How the reward stage validates and tests: one step, figures, files, pictures, tables."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_vapo import figures
from lit_vapo.data.collate import PreferenceBatch
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.evaluation.preference_files import FIGURES, write_report
from lit_vapo.evaluation.preference_record import said_of, tested
from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.metrics import PreferenceMetrics
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.stages.base import TrainedWeightsModule
from lit_vapo.trackers import log_picture, log_table
from lit_vapo.types import FeaturePairs

Batch = PreferenceBatch | FeaturePairs
SHOWN = ("accuracy", "nll", "ece")
TEST_FOLDER = "test"
# A temperature that was fitted on fewer validation pairs has made calibration worse.
FEW_PAIRS = 100


class EvaluatedRewards(TrainedWeightsModule):
    """Evaluates a reward ensemble on pairs; training is the subclass's.

    A test also fits a temperature on the validation pairs, tells the pairs of `data.preferences_ood` from its own by σ,
    breaks its figures down by `subset`, and writes files and pictures into `test` in the run's folder.
    """

    head: RewardHead

    def __init__(self) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict({split: PreferenceMetrics() for split in ("val", "test", "ood")})
        self.evaluation: dict[str, Any] | None = None
        self.validated: PreferenceReport | None = None

    @abstractmethod
    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of the chosen and of the rejected responses."""

    @abstractmethod
    def settle(self) -> None:
        """Let the head see all training pairs, where it needs to."""

    @property
    def pairs(self) -> PreferenceDataModule | None:
        """The data of the run; `None` for an export, or with somebody's own loaders."""
        return getattr(self.trainer, "datamodule", None) if self._trainer is not None else None

    @abstractmethod
    def calibrate(self) -> None:
        """Make members comparable, if there is a reference."""

    @abstractmethod
    def cut_rewards(self, split: str) -> tuple[Tensor, Tensor] | None:
        """Rewards of some responses of a split, whole and cut in half; `None` with somebody's own loaders."""

    def on_validation_start(self) -> None:
        """Score with what the training pairs say so far."""
        self.settle()
        self.calibrate()

    def setup(self, stage: str) -> None:
        """Refuse a test of nothing."""
        super().setup(stage)
        if stage == "test" and self.pairs is not None and not self.pairs.preference_rows("test"):
            raise ValueError("data.preferences_test: expected pairs to test on (or a part set aside), got none")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect margins."""
        self._collect(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect margins of one of the splits that a test serves."""
        self._collect(batch, self.pairs.test_splits()[dataloader_idx] if self.pairs is not None else "test")

    def _collect(self, batch: Batch, split: str) -> None:
        chosen, rejected = self.encode(batch)
        margin = self.head.margin(chosen, rejected)
        bad = ~torch.isfinite(margin.mean)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            identity = int(batch.labels.example_ids[row])
            where = self.pairs.place(identity) if self.pairs is not None else f"pair {identity}"
            raise ValueError(f"{where}: expected a finite score, got {float(margin.mean[row])}")
        metric = cast("PreferenceMetrics", self.metrics[split])
        metric.update(margin, self.head(chosen), self.head(rejected), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of members and mean."""
        self.validated = self._report("val")
        self._log_figures("val", self.validated.summary())

    def on_train_end(self) -> None:
        """Say in plain words what the last validation found."""
        if self.validated is not None and self.validated.num_pairs:
            cut = self.cut_rewards("val")
            found = said_of(self.validated, self._rows("val"), cut, bool(self.head.calibrated))
            self._tell(found, "validation")

    def on_test_epoch_end(self) -> None:
        """Log the figures, and write them with their pictures and tables."""
        splits = self.pairs.test_splits() if self.pairs is not None else ["test"]
        reports = {split: self._report(split) for split in splits}
        report = reports["test"]
        cut = self.cut_rewards("test") if report.num_pairs else None
        found = tested(reports, self._rows("test"), cut, bool(self.head.calibrated))
        self.evaluation = {"step": self.trained_steps, **found}
        fitted = self.evaluation.get("temperature", {})
        shown = {k: fitted[k] for k in ("temperature", "nll_calibrated", "ece_calibrated") if k in fitted}
        more = {"ood_auroc": self.evaluation["ood_auroc"]} if "ood_auroc" in self.evaluation else {}
        self._log_figures("test", report.summary() | shown | more)
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir) / TEST_FOLDER
            write_report(folder, report, self.evaluation)
            figures.preference_pictures(report, folder, self.head.unit, reports.get("ood"))
            self._log_tables(folder)
            if "verdict" in self.evaluation:
                self._tell(self.evaluation["verdict"], "test")
            if fitted and (count := reports["val"].num_pairs) < FEW_PAIRS:
                self.print(
                    f"  Temperature: {count} validation pairs are few to fit one on; with it, the ECE of "
                    f"the test pairs went from {fitted['ece']:.3f} to {fitted['ece_calibrated']:.3f}."
                )

    def _rows(self, split: str) -> list[dict[str, Any]] | None:
        """Tokenised pairs of a split; `None` with somebody's own loaders."""
        return None if self.pairs is None else self.pairs.preference_rows(split)

    def _tell(self, found: dict[str, Any], name: str) -> None:
        self.print(f"\nWhat the {name} pairs say of this ensemble:")
        for sentence in found["sentences"]:
            self.print(f"  {sentence}")

    def _report(self, split: str) -> PreferenceReport:
        metric = cast("PreferenceMetrics", self.metrics[split])
        report = metric.compute()
        metric.reset()
        return report

    def _log_figures(self, prefix: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            # The metric has already met all processes; the mean over them of equal numbers changes nothing.
            self.log(f"{prefix}/{name}", value, prog_bar=name in SHOWN, sync_dist=True)

    def _log_tables(self, folder: Path) -> None:
        assert self.evaluation is not None
        rows = [[k, *row.values()] for k, row in enumerate(self.evaluation["members"])]
        rows.append(["mean", *self.evaluation["mean"].values()])
        subsets = self.evaluation.get("subsets")
        loggers = self.trainer.loggers
        log_table(loggers, "test/members", ["member", *FIGURES], [[str(row[0]), *row[1:]] for row in rows])
        if subsets:
            log_table(loggers, "test/subsets", list(subsets[0]), [list(row.values()) for row in subsets])
        for picture in ("reliability", "risk_coverage", "sigma"):
            if (folder / f"{picture}.png").is_file():
                log_picture(loggers, f"test/{picture}", folder / f"{picture}.png")

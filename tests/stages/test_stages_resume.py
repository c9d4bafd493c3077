"""A resumed run is the run that was never stopped: the same batches, noise, figures and weights, bit for bit."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import helpers
import ppo_helpers
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from lit_vapo.advantages.rloo import Rloo
from lit_vapo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.rewards.members.aleatoric import AleatoricEnsemble
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.dropout import McDropout
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.stages.ppo.alarm import AlarmSettings
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr("lit_vapo.figures.overoptimisation", lambda *args: None)


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """What modules and data of all stages are made of."""
    folder = tmp_path_factory.mktemp("resume")
    files = {"preferences": helpers.tiny_preferences(folder / "pairs.jsonl", 12)}
    files["preferences_validation"] = helpers.tiny_preferences(folder / "held.jsonl", 3)
    return Made(tiny_model_dir, folder, files, ppo_helpers.ensemble(folder / "ensemble", tiny_model_dir))


def step_by_two(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)


class Made(NamedTuple):
    model: str
    folder: Path
    files: dict[str, str]
    ensemble: str

    def pairs(self, kind, **options):
        """Three batches of pairs, and one held-out batch."""
        return kind(self.model, **self.files, **{"batch_size": 4, "max_length": 64, "stream_buffer": 8, **options})

    def sft(self, lora=None, **options):
        return SFTModule(Pretrained(self.model), lora, learning_rate=1e-3), self.pairs(SFTDataModule, **options)

    def reward(self, head, **options):
        sampling = {"reference": Pretrained(self.model), "reference_sampling": Sampling(4), "num_reference": 4}
        cache = str(self.folder / "features")
        module = RewardModule(
            Pretrained(self.model), head, feature_cache=cache, learning_rate=1e-2, **sampling, **options
        )
        return module, self.pairs(PreferenceDataModule)

    def ppo(self, **options):
        """Three batches of prompts, and one held-out batch."""
        data = ppo_helpers.prompt_data(self.model, self.folder, 12, 4, prompts_validation=self.files["preferences"])
        return ppo_helpers.ppo_module(self.model, self.ensemble, **options), data


OTHER = {"optimizer": partial(torch.optim.NAdam, decoupled_weight_decay=True), "lr_scheduler": step_by_two}
RUNS = {
    "sft": lambda made: made.sft(),
    "sft adapters, two workers": lambda made: made.sft(Lora(2), num_workers=2),
    "sft stream": lambda made: made.sft(streaming=True, validation_fraction=0.0),
    "sft stream, two workers": lambda made: made.sft(streaming=True, validation_fraction=0.0, num_workers=2),
    "cached features": lambda made: made.reward(HeadEnsemble(3)),
    "noise of labels": lambda made: made.reward(AleatoricEnsemble(3)),
    "dropout": lambda made: made.reward(McDropout(3)),
    "settled head": lambda made: made.reward(BayesianLinear(3)),
    "reward adapters": lambda made: made.reward(LoraEnsemble(2)),
    "trained backbone": lambda made: made.reward(HeadEnsemble(3), freeze_backbone=False),
    "ppo": lambda made: made.ppo(kl_target=1.0),
    "ppo with an alarm": lambda made: made.ppo(alarm=AlarmSettings(level=0.2, stop_share=0.9), num_reference=8),
    "another optimiser": lambda made: made.reward(HeadEnsemble(3), **OTHER),
    "ppo with another optimiser": lambda made: made.ppo(**OTHER),
    "ppo without critic": lambda made: made.ppo(
        advantage=Rloo(), objective=CovarianceAware(), sampling=Sampling(6, num_responses=2)
    ),
}


class Keep(Checkpoint):
    """Saves wherever Lightning does, under the number of batches before it."""

    def __init__(self, folder, watch):
        self.folder = folder
        self.watch = watch
        self.seen = {}

    def _save(self, trainer, when):
        name = f"{when} {trainer.fit_loop.total_batch_idx + 1}"
        self.seen[name] = len(self.watch.rows)
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, "epoch")


class Watch(Callback):
    """Keeps what each batch held, what was logged of it, and of each validation."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._note(trainer, "train/", batch_idx, [x.tolist() for x in tensors(batch)])

    def on_validation_end(self, trainer, pl_module):
        self._note(trainer, "val/")

    def _note(self, trainer, prefix, *what):
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
        # As a string, in which NaN equals NaN.
        figures = str({k: v for k, v in sorted(figures.items()) if not k.endswith("per_second")})
        self.rows.append((prefix, trainer.current_epoch, trainer.global_step, *what, figures))


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [x for field in batch for x in tensors(field)] if isinstance(batch, tuple) else []


def fit(make, made, folder, checkpoint=None, **options):
    """A run, or the rest of one: what it saw, the checkpoint it ends with, and where it saved."""
    torch.manual_seed(3)
    module, data = make(made)
    watch = Watch()
    keep = Keep(folder, watch)
    callbacks = [watch, keep] if checkpoint is None else [watch]
    trainer = ppo_helpers.trainer(folder, callbacks=callbacks, enable_checkpointing=checkpoint is None, **options)
    # A resumed process has drawn other numbers before.
    torch.rand(1 if checkpoint is None else 7)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return watch.rows, torch.load(folder / "end.ckpt", weights_only=True), keep.seen


def same(a, b):
    """Equal, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def points(seen):
    """In the middle of the first epoch, at its end, and in the second."""
    return ["batch 1", next(point for point in seen if point.startswith("epoch")), "batch 5"]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(made, tmp_path, name):
    # Two epochs of three batches; a stream does not tell its length.
    options = {"max_steps": 6, "max_epochs": 9} if "stream" in name else {"max_epochs": 2}
    rows, end, seen = fit(RUNS[name], made, tmp_path / "whole", **options)
    for point in points(seen):
        rest, resumed, _ = fit(RUNS[name], made, tmp_path / "resumed", tmp_path / "whole" / f"{point}.ckpt", **options)
        assert rest == rows[seen[point] :], point
        ends_alike(resumed, end)


@pytest.mark.parametrize(
    "options",
    [{"max_epochs": 3, "limit_train_batches": 2}, {"max_steps": 7, "max_epochs": -1, "val_check_interval": 2}],
)
def test_wherever_the_run_stopped(made, tmp_path, options):
    make = RUNS["cached features"]
    rows, end, seen = fit(make, made, tmp_path / "whole", **options)
    # Lightning resumes no validation that was due when the checkpoint was written, and may count an epoch's batches
    # otherwise: what is learned from is the same.
    for point, before in seen.items():
        rest, resumed, _ = fit(make, made, tmp_path / "resumed", tmp_path / "whole" / f"{point}.ckpt", **options)
        assert learned(rest) == learned(rows[before:]), point
        ends_alike(resumed, end)


@pytest.mark.parametrize("name", ["cached features", "sft stream", "ppo without critic"])
def test_a_run_that_is_given_more_steps_is_served_what_comes_next(made, tmp_path, name):
    updates = 4 if "ppo" in name else 1
    options = {"max_epochs": -1, "limit_val_batches": 0}
    rows, _, _ = fit(RUNS[name], made, tmp_path / "whole", max_steps=5 * updates, **options)
    fit(RUNS[name], made, tmp_path / "first", max_steps=2 * updates, **options)
    rest, _, _ = fit(
        RUNS[name], made, tmp_path / "more", tmp_path / "first" / "end.ckpt", max_steps=5 * updates, **options
    )
    # The learning rate decays to another end, so weights differ.
    assert [batch for batch, _ in learned(rest)] == [batch for batch, _ in learned(rows)[2:]]


def learned(rows):
    """What was learned from, and what was logged of it."""
    return [row[4:] for row in rows if row[0] == "train/"]


def ends_alike(one, other):
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        same(one[key], other[key])

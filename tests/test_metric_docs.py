"""Every key that a run logs is defined in docs/metrics.md, and every key defined there is logged."""

import re
from pathlib import Path

import ppo_helpers
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from samplers import TruthfulGenerator

from lit_vapo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.rewards import FunctionReward, WeightedSum
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.stages.ppo.alarm import AlarmSettings
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule
from lit_vapo.types import TextReward

PART = re.compile("/(reward|sigma)_")
DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


class Judge(TextReward):
    def __call__(self, prompts, responses):
        return torch.zeros(len(prompts))


def documented():
    """Documented keys of each stage, as stage → set of `split/quantity`; `k` in a name stands for a number."""
    stage, splits, keys = None, [], {}
    for line in DOCS.read_text().splitlines():
        if line.startswith("## "):
            found = re.search(r"`lit-vapo (\w+)`", line)
            stage, splits = found.group(1) if found else None, []
        elif line.startswith(("Split", "Splits")):
            splits = re.findall(r"`(\w+)`", line)
        elif stage and (row := re.match(r"\| `([\w/]+)`", line)):
            name = row.group(1)
            keys.setdefault(stage, set()).update([name] if "/" in name else [f"{s}/{name}" for s in splits])
    return keys


def logged(make_module, data, folder):
    """Keys of a tiny run's fit and test, as they stand in metrics.csv."""
    logger = CSVLogger(folder, name="logs")
    kwargs = {"logger": logger, "log_every_n_steps": 1, "limit_train_batches": 2}
    module = make_module()
    ppo_helpers.trainer(folder, **kwargs).fit(module, data)
    ppo_helpers.trainer(folder, **kwargs).test(make_module(), data, verbose=False)
    names = set()
    for file in folder.glob("logs/*/metrics.csv"):
        names |= set(file.read_text().splitlines()[0].split(","))
    return names - {"epoch", "step"}


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tiny_preferences_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    options = {"preferences": tiny_preferences_file, "validation_fraction": 0.3, "max_length": 64, "batch_size": 4}
    ensemble = ppo_helpers.ensemble(folder / "ensemble", tiny_model_dir)
    base = Pretrained(tiny_model_dir)
    prompts = ppo_helpers.prompt_data(tiny_model_dir, folder, validation_fraction=0.5)

    def ppo():
        sampling = Sampling(6, num_responses=2)
        reward = WeightedSum({"ensemble": ensemble, "length": FunctionReward("reward_functions:length")})
        return ppo_helpers.ppo_module(
            tiny_model_dir,
            reward,
            gold=Judge(),
            alarm=AlarmSettings(),
            sampling=sampling,
            objective=CovarianceAware(),
            generator=TruthfulGenerator(),
            kl_estimator="exact",
        )

    return {
        "sft": logged(lambda: SFTModule(base), SFTDataModule(tiny_model_dir, **options), folder / "sft"),
        "reward": logged(
            lambda: RewardModule(base, HeadEnsemble(3)),
            PreferenceDataModule(tiny_model_dir, **options, test_fraction=0.2, preferences_ood=tiny_preferences_file),
            folder / "reward",
        ),
        "ppo": logged(ppo, prompts, folder / "ppo"),
    }


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_logged_keys_are_the_documented_ones(runs, stage):
    found = {re.sub(r"_\d+$", "_k", name) for name in runs[stage]}
    # The sources of the sum.
    found = {re.sub("_(ensemble|length)$", "_NAME", name) if PART.search(name) else name for name in found}
    expected = documented()[stage]
    assert found - expected == set(), "logged but not defined in docs/metrics.md"
    assert expected - found == set(), "defined in docs/metrics.md but not logged"

"""An objective with a memory, in a PPO run: it learns in training alone, and checkpoints keep what it knows."""

import ppo_helpers
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_vapo.objectives.covariance_aware import CovarianceAware


class Counting(CovarianceAware):
    """Counts the calls of `observe` and of `forward`."""

    def __init__(self):
        super().__init__()
        self.observed, self.scored = [], 0

    def observe(self, estimate, log_ratio, num_responses, all_sum):
        score = super().observe(estimate, log_ratio, num_responses, all_sum)
        self.observed.append((estimate.members, log_ratio, num_responses, score.reward))
        return score

    def forward(self, estimate):
        self.scored += 1
        return super().forward(estimate)


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("reward"), tiny_model_dir)


def test_training_observes_evaluation_does_not_and_checkpoints_keep_the_state(tiny_model_dir, reward, tmp_path):
    module = ppo_helpers.ppo_module(tiny_model_dir, reward, objective=Counting())
    data = ppo_helpers.prompt_data(tiny_model_dir, tmp_path, count=24, validation_fraction=0.5)
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True)
    options = {"limit_train_batches": 2, "limit_val_batches": 1, "enable_checkpointing": True}
    rows = ppo_helpers.fit_ppo(module, data, tmp_path, callbacks=[saver], **options)
    objective = module.objective
    assert len(objective.observed) == 2
    assert objective.scored > 0  # validation
    for members, log_ratio, num_responses, score in objective.observed:
        assert members.shape == (4, 3)
        assert log_ratio.shape == score.shape == (4,)
        assert num_responses == 1
    # The running average: the second batch of 4 leaves the first a weight of 512/516.
    first, second = (members for members, *_ in objective.observed)
    expected = first.sum(0) * 512 / 516 + second.sum(0)
    torch.testing.assert_close(objective.totals[:3], expected)
    # What PPO learned from, and what was logged.
    assert rows[-1]["train/objective_reward"] == pytest.approx(float(objective.observed[-1][3].mean()), rel=1e-4)
    logged = [rows[-1][f"train/member_weight_{k}"] for k in range(3)]
    assert logged == pytest.approx(objective.weights.tolist())
    assert sum(logged) == pytest.approx(1.0, rel=1e-5)
    again = ppo_helpers.ppo_module(tiny_model_dir, reward, objective=CovarianceAware())
    ppo_helpers.trainer(tmp_path, callbacks=[saver], enable_checkpointing=True).validate(
        again, data, ckpt_path=tmp_path / "kept" / "last.ckpt", weights_only=True, verbose=False
    )
    torch.testing.assert_close(again.objective.totals, objective.totals)
    torch.testing.assert_close(again.objective.weights, objective.weights)

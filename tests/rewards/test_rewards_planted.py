"""σ follows noise that is known: preferences planted with it (see benchmarks/planted_noise.py)."""

import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.planted_noise import from_features, from_tokens, pairs_task, plant, redrawn_noise, votes_task
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble

MEMBERS = 12
TASKS = {"pairs": pairs_task(seed=0), "votes": votes_task(seed=0)}


@pytest.fixture(scope="module")
def learned(tiny_model_dir):
    """σ of each kind's margin by estimator, task and whether there is a bootstrap; each is trained once."""
    known = {}

    def sigma(kind, task, bootstrap=True):
        key = kind, task, bootstrap
        if key not in known:
            head = kind(MEMBERS, bootstrap=bootstrap)
            if head.shares_features:
                known[key] = from_features(head, TASKS[task])
            else:
                known[key] = from_tokens(head, tiny_model_dir, TASKS[task])
        return known[key]

    return sigma


def correlation(sigma, noise):
    return spearmanr(sigma.numpy(), noise.numpy()).statistic


def test_the_noise_of_a_known_task():
    # 100 pairs of one annotator, an even race: 1/√(100 · 1 · ½ · ½) = 0.2. Four annotators halve it.
    task = plant(pairs=(100, 100), votes=(1, 4), kinds=2, largest_margin=0.0)
    assert sorted(task.noise.tolist()) == pytest.approx([0.1, 0.2])
    assert len(task.kind) == 200
    assert set(task.share[task.votes[task.kind] == 1].tolist()) == {0.0, 1.0}
    assert set(task.share[task.votes[task.kind] == 4].tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}


@pytest.mark.parametrize("task", TASKS)
def test_the_formula_agrees_with_new_draws_of_all_labels(task):
    task = TASKS[task]
    assert task.noise.max() / task.noise.min() > 6
    # 2,000 draws: a standard deviation within 1/√4000 = 1.6%; the delta method errs by some 3% at 24 pairs.
    torch.testing.assert_close(redrawn_noise(task), task.noise, rtol=0.07, atol=0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", [HeadEnsemble, LoraEnsemble])
def test_sigma_follows_the_noise(kind, task, learned):
    sigma, noise = learned(kind, task), TASKS[task].noise
    assert correlation(sigma, noise) >= 0.8
    # It is of the noise's size too: twelve members know σ to 1/√22 = 21%, and the median of twenty better.
    assert 0.75 < (sigma / noise).median() < 1.25
    # Noise that belongs to other kinds: |ρ| of 20 unrelated values has a standard deviation of 1/√19 = 0.23.
    generator = torch.Generator().manual_seed(0)
    shuffled = [correlation(sigma, noise[torch.randperm(len(noise), generator=generator)]) for _ in range(20)]
    assert abs(sum(shuffled) / 20) < 4 * 0.23 / 20**0.5


@pytest.mark.parametrize("kind", [HeadEnsemble, LoraEnsemble])
def test_without_bootstrap_members_agree_and_sigma_does_not_follow(kind, learned):
    sigma, noise = learned(kind, "votes", bootstrap=False), TASKS["votes"].noise
    assert correlation(sigma, noise) < 0.5
    assert (sigma / noise).median() < 0.2


def test_without_bootstrap_rarity_alone_gives_the_order_but_not_the_size(learned):
    # What is rare is learned slowly, so the little that is left of the initialisation is ordered like the noise.
    sigma, noise = learned(HeadEnsemble, "pairs", bootstrap=False), TASKS["pairs"].noise
    assert correlation(sigma, noise) > 0.5
    assert (sigma / noise).median() < 0.1

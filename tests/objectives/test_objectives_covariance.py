"""CovarianceAware: what it remembers, over batches, processes and prompts."""

import pytest
import torch

from lit_vapo.functional import ensemble_estimate
from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.objectives.mean_reward import MeanReward


def prepared(count=3, **kwargs):
    objective = CovarianceAware(**kwargs)
    objective.prepare(count)
    return objective


def observe(objective, members, log_ratio=None, num_responses=1, all_sum=lambda x: x):
    estimate = ensemble_estimate(members)
    log_ratio = torch.zeros(len(members)) if log_ratio is None else log_ratio
    return objective.observe(estimate, log_ratio, num_responses, all_sum)


def random_members(seed, rows=8, count=3):
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed)) + torch.tensor([0.0, 0.5, 1.0])


def test_by_hand():
    # Gains are the members' means: (1, 2, 6); variance (4 + 1 + 9)/2 = 7. Form variance, λ = 0.05:
    # weights 1/3 - 0.05·(-2, -1, 3) = (13, 11.5, 5.5)/30; the row (0, 1, 5): 1.3 = (11.5 + 27.5)/30.
    objective = prepared(penalty=0.05, form="variance", window=0)
    score = observe(objective, torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 7.0]]))
    torch.testing.assert_close(score.reward, torch.tensor([1.3, 3.3]))
    torch.testing.assert_close(score.kl_weight, torch.ones(2))
    weights = torch.stack([objective.statistics()[f"member_weight_{k}"] for k in range(3)])
    torch.testing.assert_close(weights, torch.tensor([13.0, 11.5, 5.5]) / 30)
    # Form bound, λ = 1: both rows disagree by σ² = 7, so the noise of a mean of two is 7/2, Std = √10.5.
    score = observe(prepared(penalty=1.0, window=0), torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 7.0]]))
    torch.testing.assert_close(score.reward, torch.tensor([2.0, 4.0]) - 7 / 10.5**0.5)


def test_evaluation_uses_the_weights_of_the_last_training_batch():
    objective, members = prepared(), random_members(0)
    fresh = ensemble_estimate(random_members(1))
    torch.testing.assert_close(objective(fresh), MeanReward()(fresh))
    score = observe(objective, members)
    torch.testing.assert_close(objective(ensemble_estimate(members)), score)


def test_the_running_average_forgets():
    # A window of 8 and batches of 8: what came before counts half.
    first, second = random_members(0), random_members(1)
    objective = prepared(form="variance", penalty=0.1, window=8)
    observe(objective, first)
    observe(objective, second)
    torch.testing.assert_close(objective.totals[:3] / objective.totals[-1], (first / 2 + second).sum(0) / 12)
    batch_alone = prepared(form="variance", penalty=0.1, window=0)
    observe(batch_alone, first)
    torch.testing.assert_close(batch_alone.totals[-1], torch.tensor(8.0))
    observe(batch_alone, second)
    torch.testing.assert_close(batch_alone.totals[:3] / 8, second.mean(0))


@pytest.mark.parametrize("per_prompt", [False, True])
def test_two_processes_are_one(per_prompt):
    members, log_ratio = random_members(0), torch.randn(8, generator=torch.Generator().manual_seed(2))
    whole = prepared(per_prompt=per_prompt)
    expected = observe(whole, members, log_ratio, 4)
    halves, totals = [(members[:4], log_ratio[:4]), (members[4:], log_ratio[4:])], []
    for _ in range(3):  # the second sum depends on the first: each round knows one more
        both, scores, sent = [prepared(per_prompt=per_prompt) for _ in halves], [], []
        for objective, half in zip(both, halves, strict=True):
            known, calls = iter(totals), []
            scores.append(observe(objective, *half, 4, lambda x, k=known, c=calls: c.append(x) or next(k, x)))
            sent.append(calls)
        totals = [sum(x) for x in zip(*sent, strict=True)]
    torch.testing.assert_close(torch.cat([s.reward for s in scores]), expected.reward)
    for objective in both:
        torch.testing.assert_close(objective.totals, whole.totals)
        torch.testing.assert_close(objective.weights, whole.weights)


@pytest.mark.parametrize("form", ["bound", "variance"])
@pytest.mark.parametrize("per_prompt", [False, True])
def test_weights_sum_to_one_and_no_penalty_is_the_mean_reward(form, per_prompt):
    members = random_members(0)
    objective = prepared(form=form, per_prompt=per_prompt)
    observe(objective, members, torch.full((8,), 0.5), 4)
    torch.testing.assert_close(objective.weights.sum(), torch.tensor(1.0))
    assert (objective.weights - 1 / 3).abs().max() > 0.01
    free = prepared(form=form, per_prompt=per_prompt, penalty=0.0)
    torch.testing.assert_close(observe(free, members, None, 4), MeanReward()(ensemble_estimate(members)))


def test_a_member_that_sees_more_gain_counts_less():
    objective = prepared()
    observe(objective, random_members(0, rows=200))
    assert objective.weights[0] > objective.weights[1] > objective.weights[2]


def test_per_prompt_ignores_what_members_add_to_one_prompt():
    # Members agree but for an offset on each prompt, and the policy is where it began: nobody sees a gain.
    shared = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 3)
    offsets = torch.tensor([[1.0, -2.0, 1.0], [0.0, 3.0, -3.0]]).repeat_interleave(4, 0)
    score = observe(prepared(per_prompt=True), shared + offsets, None, 4)
    torch.testing.assert_close(score.reward, (shared + offsets).mean(1))


def test_per_prompt_needs_several_responses():
    with pytest.raises(ValueError, match="expected at least 2 responses to each prompt, got 1"):
        observe(prepared(per_prompt=True), random_members(0))
    with pytest.raises(ValueError, match="expected model.sampling.num_responses of at least 2, got 1"):
        prepared(per_prompt=True).check_responses(1)
    prepared(per_prompt=True).check_responses(2)
    prepared().check_responses(1)


def test_no_weight_is_rounded_by_autocast():
    members, log_ratio = random_members(0), torch.linspace(-1, 1, 8)
    expected = observe(prepared(per_prompt=True), members, log_ratio, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = observe(prepared(per_prompt=True), members, log_ratio, 4)
    torch.testing.assert_close(score, expected)


def test_another_ensemble_starts_afresh():
    objective = prepared()
    observe(objective, random_members(0))
    objective.prepare(4)
    torch.testing.assert_close(objective.weights, torch.full((4,), 0.25))
    assert not objective.totals.any()

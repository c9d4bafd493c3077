"""Importance weights and the gap between sampler and learner: by hand, in the limits, and against an enumeration."""

import pytest
import torch

from lit_vapo.functional import importance_weights, policy_loss_terms, sampler_gap

ONES = torch.ones(1, 3, dtype=torch.bool)
LEARNER = torch.tensor([[0.5, 0.2, 0.9]]).log()
SAMPLER = torch.tensor([[0.25, 0.4, 0.3]]).log()


def test_weights_are_ratios_up_to_the_cap():
    # 0.5/0.25 = 2; 0.2/0.4 = 0.5; 0.9/0.3 = 3, cut at 2.5.
    torch.testing.assert_close(importance_weights(LEARNER, SAMPLER, ONES, 2.5), torch.tensor([[2.0, 0.5, 2.5]]))


def test_an_equal_sampler_has_weights_of_exactly_one():
    for cap in (1.0, 2.0):
        assert torch.equal(importance_weights(LEARNER, LEARNER.clone(), ONES, cap), torch.ones(1, 3))


def test_padding_weighs_one_and_reaches_nothing():
    mask = torch.tensor([[True, False, False]])
    learner, sampler = LEARNER.clone().requires_grad_(), SAMPLER.clone()
    sampler[0, 1], sampler[0, 2] = torch.nan, torch.inf
    weights = importance_weights(learner, sampler, mask, 5.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0, 1.0]]))
    assert not weights.requires_grad
    assert torch.isfinite(sampler_gap(LEARNER, sampler, mask).kl)


def test_an_impossible_token_does_not_overflow():
    weights = importance_weights(torch.zeros(1, 1), torch.full((1, 1), -9999.0), torch.ones(1, 1, dtype=torch.bool), 3)
    assert weights.item() == 3


def test_the_gap_is_the_mean_over_tokens_and_the_largest_ratio():
    # r = 2, 0.5, 3: r - 1 - log r = 0.306853, 0.193147, 0.901388; their mean is 0.467129.
    gap = sampler_gap(LEARNER, SAMPLER, ONES)
    assert gap.kl.item() == pytest.approx(0.467129, rel=1e-5)
    assert gap.ratio_max.item() == pytest.approx(3.0, rel=1e-6)
    # Where every token is less likely, the largest ratio is below 1, whatever the padding.
    low = sampler_gap(SAMPLER, LEARNER, torch.tensor([[True, False, False]]))
    assert low.ratio_max.item() == pytest.approx(0.5, rel=1e-6)


def test_the_gap_is_over_the_tokens_of_all_processes():
    parts = [(LEARNER[:, :1], SAMPLER[:, :1]), (LEARNER[:, 1:], SAMPLER[:, 1:])]
    rows = []
    for learner, sampler in parts:
        sampler_gap(learner, sampler, torch.ones_like(learner, dtype=torch.bool), lambda x: rows.append(x) or x)
    whole = sampler_gap(LEARNER, SAMPLER, ONES)
    for learner, sampler in parts:
        mask = torch.ones_like(learner, dtype=torch.bool)
        found = sampler_gap(learner, sampler, mask, lambda x: torch.cat(rows))
        torch.testing.assert_close(torch.stack(found), torch.stack(whole))


def test_the_gap_estimates_the_kl_of_two_distributions():
    torch.manual_seed(3)
    p, q = torch.randn(2, 12).log_softmax(-1)
    drawn = torch.multinomial(q.exp(), 200_000, replacement=True)[None]
    found = sampler_gap(p[drawn], q[drawn], torch.ones_like(drawn, dtype=torch.bool)).kl
    assert found.item() == pytest.approx((q.exp() * (q - p)).sum().item(), rel=0.02)


def expected_gradient(logits, sampler, advantages, cap):
    """Gradient of the mean loss over all tokens that a sampler may draw, each counted by its probability there."""
    logits = logits.clone().requires_grad_()
    learner = logits.log_softmax(-1)[None]
    mask = torch.ones_like(learner, dtype=torch.bool)
    loss = policy_loss_terms(learner, learner.detach(), advantages[None], mask, 0.2).loss
    if cap is not None:
        loss = loss * importance_weights(learner.detach(), sampler[None], mask, cap)
    (sampler.exp() * loss[0]).sum().backward()
    return logits.grad


def test_weights_undo_a_sampler_that_is_wrong():
    # It samples at temperature 1.6 what is learned at 1.
    torch.manual_seed(0)
    logits, advantages = 2 * torch.randn(20), torch.randn(20)
    wrong = (logits / 1.6).log_softmax(-1)
    true = expected_gradient(logits, logits.log_softmax(-1), advantages, None)
    plain, whole, cut = (expected_gradient(logits, wrong, advantages, cap) for cap in (None, 1e6, 2.0))
    torch.testing.assert_close(whole, true, rtol=1e-4, atol=1e-6)
    assert (plain - true).norm() > 0.2 * true.norm()
    assert (cut - true).norm() < 0.25 * (plain - true).norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: importance_weights(LEARNER, SAMPLER, ONES, 0.0), "expected cap > 0, got 0.0"),
     (lambda: importance_weights(LEARNER, SAMPLER[:, :2], ONES, 1.0), "shape"),
     (lambda: sampler_gap(LEARNER, SAMPLER, ONES.float()), "bool")],
    ids=["cap", "shape", "mask"],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

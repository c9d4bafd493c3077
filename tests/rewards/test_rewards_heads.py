"""Known answers of the estimators on shared features."""

import pytest
import torch

from lit_vapo.functional import laplace_preference
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.dropout import McDropout
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.types import FeaturePairs, PairLabels

HIDDEN = 8


def features(count, seed=0):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def labels(count):
    return PairLabels(torch.zeros(count), torch.ones(count), torch.ones(count), torch.arange(count))


def settled(members=10, count=50, **kwargs):
    head = BayesianLinear(members, **kwargs)
    head.build(HIDDEN)
    chosen, rejected = features(count, 1) + 0.2, features(count, 2)
    head.settle([FeaturePairs(chosen, rejected, labels(count))])
    head.calibrate(features(200, 3))
    return head, chosen, rejected


def test_the_posterior_is_that_of_the_pairs_in_whatever_batches():
    head, chosen, rejected = settled(prior_precision=0.7)
    expected = laplace_preference(chosen - rejected, prior_precision=0.7)
    torch.testing.assert_close(head.mode, expected.mode, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.factor, expected.factor, atol=1e-5, rtol=1e-4)
    again = BayesianLinear(prior_precision=0.7)
    again.build(HIDDEN)
    again.settle([FeaturePairs(chosen[i:j], rejected[i:j], labels(j - i)) for i, j in ((0, 20), (20, 50))])
    torch.testing.assert_close(again.mode, head.mode, atol=1e-5, rtol=1e-4)


def test_the_exact_variance_is_that_of_very_many_draws():
    head, chosen, rejected = settled(members=20_000)
    margin = head.margin(chosen, rejected)
    # The sample variance of n draws has a relative error of √(2/n) = 1%; five of them.
    torch.testing.assert_close(margin.members.var(1), margin.variance, rtol=0.05, atol=0)
    torch.testing.assert_close(margin.members.mean(1), margin.mean, atol=0.05, rtol=0.05)
    estimate = head(chosen)
    torch.testing.assert_close(estimate.members.var(1), estimate.variance, rtol=0.05, atol=0)


def test_variance_is_of_the_distance_to_the_reference_responses():
    head, _, _ = settled()
    centre = features(200, 3).mean(0)
    estimate = head(torch.stack([centre, centre + 1]))
    torch.testing.assert_close(estimate.mean[0], torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(estimate.variance[0], torch.tensor(0.0), atol=1e-8, rtol=0)
    covariance = head.factor @ head.factor.T
    scale = (features(200, 3) @ head.mode).std()
    torch.testing.assert_close(estimate.variance[1], covariance.sum() / scale**2)


def test_dropout_members_are_fixed_subnetworks():
    head = McDropout(5, dropout=0.4)
    head.build(HIDDEN)
    x = features(6)
    for k in range(5):
        for b in range(6):
            kept = [i for i in range(HIDDEN) if head.masks[k, i] > 0]
            expected = sum(x[b, i] * head.weight[i] / 0.6 for i in kept)
            torch.testing.assert_close(head.rewards(x)[b, k], torch.as_tensor(expected))
    assert len({tuple(mask.tolist()) for mask in head.masks}) == 5
    assert (head.masks > 0).float().mean().item() == pytest.approx(0.6, abs=0.15)


def test_dropout_training_uses_one_new_mask_for_both_sides_of_a_pair():
    head = McDropout(5, dropout=0.5)
    head.build(HIDDEN)
    x = features(4)
    ids = torch.arange(4)
    scores = head.training_rewards(torch.cat([x, x]), ids)
    torch.testing.assert_close(scores[:4], scores[4:])  # the same response on both sides
    assert not torch.allclose(scores, head.training_rewards(torch.cat([x, x]), ids))
    # Unbiased: the mean over many masks is the head without dropout.
    torch.manual_seed(0)
    mean = torch.stack([head.training_rewards(torch.cat([x, x]), ids)[:4, 0] for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, x @ head.weight, atol=0.06, rtol=0)


def test_dropout_masks_do_not_depend_on_which_process_has_a_pair():
    head = McDropout(5, dropout=0.5)
    head.build(HIDDEN)
    x, ids = features(6), torch.tensor([4, 9, 2])

    def masked(index):
        torch.manual_seed(0)
        return head.training_rewards(x[[*index, *(i + 3 for i in index)]], ids[index])[:, 0]

    whole = masked([0, 1, 2])
    torch.testing.assert_close(masked([2, 0]), whole[[2, 0, 5, 3]])
    torch.testing.assert_close(masked([1]), whole[[1, 4]])


@pytest.mark.parametrize("centering", [0.0, 0.1])
def test_a_bias_is_learned_where_something_tells_what_it_is(centering):
    head = HeadEnsemble(3, centering=centering)
    head.build(HIDDEN)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        head.loss(features(5, 1) + 1, features(5, 2) + 1, labels(5)).backward()
        optimizer.step()
    assert bool(head.bias.any()) == (centering > 0)


def test_dropout_of_a_hidden_layer():
    head = McDropout(3, dropout=0.5, hidden_width=6)
    head.build(HIDDEN)
    x = features(4)
    hidden = torch.tanh(x @ head.hidden_weight.T + head.hidden_bias)
    torch.testing.assert_close(head.rewards(x)[:, 1], (hidden * head.masks[1]) @ head.weight)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"dropout: expected a number between 0 and 1, got 1"):
        McDropout(dropout=1)
    with pytest.raises(ValueError, match=r"prior_precision: expected a number above 0, got 0"):
        BayesianLinear(prior_precision=0)
    for kind in (BayesianLinear, McDropout):
        with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 0.5\), got 0.5"):
            kind(label_smoothing=0.5)

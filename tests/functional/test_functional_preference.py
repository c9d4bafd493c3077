"""The Bradley-Terry loss of an ensemble."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_expit

from lit_vapo.functional import bradley_terry_loss, poisson_bootstrap


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=generator), torch.randn(6, 3, generator=generator)


def test_hand_worked_values():
    # Member 0: difference log 3, probability 3/4. Member 1: difference 0, probability 1/2.
    loss = bradley_terry_loss(torch.tensor([[math.log(3.0), 1.0]]), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3), math.log(2.0)]))


def test_margin_smoothing_and_centering_hand_worked():
    # z = log 9 - 0 - log 3 = log 3; 0.9 * log(4/3) + 0.1 * log 4 + 0.5 * (log 9)^2.
    loss = bradley_terry_loss(
        torch.tensor([[math.log(9.0)]]),
        torch.tensor([[0.0]]),
        margin=torch.tensor([math.log(3.0)]),
        label_smoothing=0.1,
        centering=0.5,
    )
    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4.0) + 0.5 * math.log(9.0) ** 2
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_against_scipy(scores):
    chosen, rejected = scores
    difference = (chosen - rejected).numpy()
    np.testing.assert_allclose(bradley_terry_loss(chosen, rejected), -log_expit(difference).mean(0), rtol=1e-5)


def test_weighting_by_n_equals_repeating_n_times(scores):
    chosen, rejected = scores
    margin = torch.arange(6) / 10
    options = {"label_smoothing": 0.1, "centering": 0.3}
    ids = torch.arange(6)
    weights = poisson_bootstrap(ids, num_members=3, seed=1)
    assert weights.unique().numel() > 2
    weighted = bradley_terry_loss(chosen, rejected, margin=margin, weights=weights, **options)
    for member in range(3):
        rows = ids.repeat_interleave(weights[:, member].long())
        repeated = bradley_terry_loss(chosen[rows], rejected[rows], margin=margin[rows], **options)[member]
        # The two divide their sums by 6 and by the number of repeated rows.
        torch.testing.assert_close(weighted[member] * 6, repeated * len(rows))


def test_members_do_not_mix_and_keep_their_order(scores):
    chosen, rejected = scores
    together = bradley_terry_loss(chosen, rejected)
    alone = [bradley_terry_loss(chosen[:, [k]], rejected[:, [k]]).item() for k in range(3)]
    torch.testing.assert_close(together, torch.tensor(alone))
    # Summed over members, each member's gradient is that of its own loss alone.
    leaf = chosen.clone().requires_grad_()
    bradley_terry_loss(leaf, rejected).sum().backward()
    single = chosen[:, [1]].clone().requires_grad_()
    bradley_terry_loss(single, rejected[:, [1]]).sum().backward()
    torch.testing.assert_close(leaf.grad[:, [1]], single.grad)


def test_a_shift_of_both_scores_changes_nothing_but_the_centering(scores):
    chosen, rejected = scores
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 2, rejected + 2),
        bradley_terry_loss(chosen, rejected),
        rtol=1e-5,
        atol=1e-6,
    )
    assert not torch.allclose(
        bradley_terry_loss(chosen + 2, rejected + 2, centering=0.1),
        bradley_terry_loss(chosen, rejected, centering=0.1),
    )


def test_extreme_differences_stay_finite():
    loss = bradley_terry_loss(torch.tensor([[-1e4], [1e4]]), torch.zeros(2, 1))
    torch.testing.assert_close(loss, torch.tensor([5e3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": torch.zeros(5)}, r"expected margin of shape \(6,\), got \(5,\)"),
        ({"weights": torch.ones(6, 1)}, r"expected weights of shape \(6, 3\), as chosen, got \(6, 1\)"),
        ({"label_smoothing": 0.5}, r"expected label_smoothing in \[0, 0.5\), got 0.5"),
        ({"centering": -1.0}, r"expected centering >= 0, got -1.0"),
    ],
)
def test_bad_options_are_refused(scores, options, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(*scores, **options)


def test_bad_shapes_are_refused(scores):
    chosen, rejected = scores
    with pytest.raises(ValueError, match=r"expected rejected of shape \(6, 3\), as chosen, got \(5, 3\)"):
        bradley_terry_loss(chosen, rejected[:5])
    with pytest.raises(ValueError, match=r"expected chosen of shape \(B, K\) with B >= 1, got \(0, 3\)"):
        bradley_terry_loss(chosen[:0], rejected[:0])

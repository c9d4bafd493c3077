"""Many optima at once, against the one at a time."""

import pytest
import torch

from lit_vapo.functional import bregman_kl, optimal_policy
from lit_vapo.functional.optima import optimal_policies, policy_kl


def case(rows=40, n=7, spread=2.0):
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(rows, n, generator=generator, dtype=torch.float64) * 3
    ref = torch.randn(n, generator=generator, dtype=torch.float64).softmax(0)
    price = (spread * torch.randn(rows, n, generator=generator, dtype=torch.float64)).exp()
    return reward, ref, price


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_each_row_is_the_optimum_of_its_own(spread):
    reward, ref, price = case(spread=spread)
    found = optimal_policies(reward, ref, price)
    for r, p, policy in zip(reward, price, found, strict=True):
        torch.testing.assert_close(policy, optimal_policy(r, ref, 1.0, p), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(found), dtype=torch.float64))


def test_by_hand():
    # As in the test of one optimum: R = 1 + log(3/2), 1 − 2 log 2 with prices 1, 2 give (3/4, 1/4).
    log = torch.tensor([1.5, 2.0], dtype=torch.float64).log()
    reward = torch.stack([1 + log[0], 1 - 2 * log[1]])
    found = optimal_policies(reward, torch.tensor([0.5, 0.5]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=1e-7, atol=0)


def test_prices_broadcast_and_limits_hold():
    reward, ref, _ = case(rows=3)
    found = optimal_policies(reward, ref, torch.tensor([1e9, 1e-3])[:, None, None])
    assert found.shape == (2, 3, 7)
    torch.testing.assert_close(found[0], ref.expand(3, -1), rtol=1e-6, atol=0)
    assert (found[1].argmax(-1) == reward.argmax(-1)).all()
    assert (found[1].amax(-1) > 1 - 1e-9).all()


def test_divergence_of_each_row():
    reward, ref, price = case(rows=5)
    policy = optimal_policies(reward, ref, price)
    expected = torch.stack([bregman_kl(row, ref) for row in policy])
    torch.testing.assert_close(policy_kl(policy, ref), expected)
    assert policy_kl(ref[None], ref).item() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"price": torch.tensor([1.0, 0.0])}, "expected finite prices > 0, got one of 0.0"),
        ({"ref_probs": torch.tensor([1.0, 0.0])}, "expected ref_probs > 0 that sum to 1"),
        ({"reward": torch.tensor([0.0, torch.nan])}, "expected rewards with finite entries"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"reward": torch.tensor([1.0, 0.0]), "ref_probs": torch.tensor([0.5, 0.5]), "price": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        optimal_policies(**good | change)

"""The Laplace posterior of a linear reward: against scikit-learn, finite differences, and by hand."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import logsigmoid

from lit_vapo.functional import laplace_preference


def differences(count=40, size=5, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.3


def cost(w, x, margin=0.0, q=1.0, v=1.0, precision=1.0):
    z = x @ w - margin
    return (v * (-q * logsigmoid(z) - (1 - q) * logsigmoid(-z))).sum() + precision / 2 * w.square().sum()


def test_one_pair_by_hand():
    # Δφ = 2, λ = 4: the mode solves 4w = 2·σ(−2w). At w = 0.2 the sides are 0.8 and 2·0.401312 = 0.802625, their slopes
    # 4 and −4·0.2403 = −0.961, so the root is 0.2 + 0.002625/4.961 = 0.20053.
    # H = 4 + p(1−p)·4 with p = σ(0.40106) = 0.59894: 4 + 4·0.24021 = 4.96084.
    posterior = laplace_preference(torch.tensor([[2.0]], dtype=torch.float64), prior_precision=4.0)
    assert posterior.mode.item() == pytest.approx(0.20053, abs=1e-5)
    assert posterior.factor.item() == pytest.approx(1 / math.sqrt(4.96084), abs=1e-5)


@pytest.mark.parametrize("precision", [0.1, 1.0, 30.0])
def test_mode_is_that_of_logistic_regression(precision):
    x = differences()
    # The same rows and their mirror images, so that both classes are there; each counts once.
    flipped = torch.arange(40) % 3 == 0
    features = torch.where(flipped[:, None], -x, x)
    reference = LogisticRegression(C=1 / precision, fit_intercept=False, tol=1e-10, max_iter=10_000)
    reference.fit(features.numpy(), (~flipped).numpy())
    posterior = laplace_preference(x, prior_precision=precision)
    torch.testing.assert_close(posterior.mode, torch.from_numpy(reference.coef_[0]), atol=1e-4, rtol=1e-4)


def test_everything_a_pair_says_counts():
    x = differences()
    generator = torch.Generator().manual_seed(1)
    q, v, margin = (torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(3))
    posterior = laplace_preference(x, margin=margin, probability=q, weights=v, prior_precision=0.5)
    w = posterior.mode.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(cost(w, x, margin, q, v, 0.5), w)
    assert gradient.abs().max() < 1e-6
    hessian = torch.autograd.functional.hessian(lambda w: cost(w, x, margin, q, v, 0.5), posterior.mode)
    torch.testing.assert_close(posterior.factor @ posterior.factor.T, torch.linalg.inv(hessian), rtol=1e-8, atol=1e-8)


def test_weights_are_repetitions():
    x = differences(3)
    index = torch.tensor([0, 0, 1, 2, 2, 2])
    weighted = laplace_preference(x, weights=torch.tensor([2.0, 1.0, 3.0]))
    repeated = laplace_preference(x[index])
    torch.testing.assert_close(weighted.mode, repeated.mode, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(weighted.factor, repeated.factor, atol=1e-8, rtol=1e-6)


def test_start_does_not_matter_even_far_away():
    x = 50 * differences()
    near = laplace_preference(x, prior_precision=0.01)
    far = laplace_preference(x, prior_precision=0.01, start=torch.full((5,), 100.0, dtype=torch.float64))
    torch.testing.assert_close(near.mode, far.mode, atol=1e-6, rtol=1e-6)


def test_limits():
    x = differences()
    # A strong prior: w = 0 and covariance I/λ. Ties: the mode is zero.
    strong = laplace_preference(x, prior_precision=1e8)
    assert strong.mode.abs().max() < 1e-5
    torch.testing.assert_close(
        strong.factor @ strong.factor.T, torch.eye(5, dtype=x.dtype) / 1e8, atol=1e-13, rtol=1e-3
    )
    assert laplace_preference(x, probability=torch.full((40,), 0.5)).mode.abs().max() < 1e-9
    # More data, less variance.
    more = laplace_preference(torch.cat([x, differences(400, seed=2)]))
    few = laplace_preference(x)
    assert (more.factor @ more.factor.T).trace() < (few.factor @ few.factor.T).trace()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected differences of shape \(B, H\) with B >= 1, got \(3,\)"):
        laplace_preference(torch.ones(3))
    with pytest.raises(ValueError, match=r"expected prior_precision > 0, got 0"):
        laplace_preference(torch.ones(3, 1), prior_precision=0)
    with pytest.raises(ValueError, match=r"expected weights of shape \(3,\), got \(2,\)"):
        laplace_preference(torch.ones(3, 1), weights=torch.ones(2))
    x = torch.ones(3, 1)
    x[1] = float("nan")
    with pytest.raises(ValueError, match=r"expected finite features, got NaN or infinity in pair 1"):
        laplace_preference(x)

"""Best-of-n against every subset and every order of ties."""

import itertools
import math

import pytest
import torch

from lit_vapo.functional import best_of_n, best_of_n_kl


def brute_force(ranking, values):
    """Mean value of the best over all subsets of each size; equal ranks in all their orders."""
    size = len(ranking)
    orders = []
    for order in itertools.permutations(range(size)):
        curve = []
        for n in range(1, size + 1):
            subsets = list(itertools.combinations(range(size), n))
            # Ties go to whoever comes last in this order.
            chosen = [max(subset, key=lambda i: (ranking[i], order[i])) for subset in subsets]
            curve.append(sum(values[i] for i in chosen) / len(subsets))
        orders.append(curve)
    return [sum(column) / len(orders) for column in zip(*orders, strict=True)]


def test_hand_worked():
    # Ranks of 5, 1, 4, 2 → values 10, 0, 4, 8. Best of 2: {5}: 3 of 6 pairs, {4}: 2 of 6, {2}: 1 of 6.
    # Best of 3: of 4 triples 3 contain the 5, one has 4 as its best.
    curve = best_of_n(torch.tensor([[5.0, 1.0, 4.0, 2.0]]), torch.tensor([[10.0, 0.0, 4.0, 8.0]]))
    expected = [22 / 4, (3 * 10 + 2 * 4 + 8) / 6, (3 * 10 + 4) / 4, 10]
    torch.testing.assert_close(curve, torch.tensor([expected]))


@pytest.mark.parametrize("ranking", [[3, 1, 2, 5, 4], [1, 1, 2, 2, 2], [0, 0, 0, 0, 0], [2, 1, 2, 1, 3], [7]], ids=str)
def test_against_all_subsets(ranking):
    values = torch.randn(len(ranking), dtype=torch.float64)
    found = best_of_n(torch.tensor([ranking], dtype=torch.float64), values[None])
    expected = brute_force(ranking, values.tolist())
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_rows_do_not_mix():
    # Equal values in neighbouring rows are no ties.
    ranking = torch.tensor([[1.0, 2.0], [2.0, 2.0], [2.0, 3.0]])
    values = torch.randn(3, 2)
    found = best_of_n(ranking, values)
    for i in range(3):
        torch.testing.assert_close(found[i : i + 1], best_of_n(ranking[i : i + 1], values[i : i + 1]))


def test_ends_and_order():
    ranking, values = torch.randn(4, 60), torch.randn(4, 60)
    curve = best_of_n(ranking, values)
    torch.testing.assert_close(curve[:, 0], values.mean(1))
    torch.testing.assert_close(curve[:, -1], values.gather(1, ranking.argmax(1, keepdim=True))[:, 0])
    assert (best_of_n(ranking, ranking).diff(dim=1) >= 0).all()
    torch.testing.assert_close(best_of_n(ranking.exp(), values), curve)


def test_it_is_unbiased():
    # The maximum of n uniform numbers is n/(n + 1) on average, whatever N.
    draws = torch.rand(20_000, 5)
    expected = torch.arange(1, 6) / torch.arange(2.0, 7)
    torch.testing.assert_close(best_of_n(draws, draws).mean(0), expected, atol=0.006, rtol=0)


def test_large_n_is_exact():
    # Binomials of 1500 do not fit a double; ranks are the values, whose expected maximum is n (N + 1)/(n + 1).
    ranks = torch.arange(1.0, 1501, dtype=torch.float64)[None]
    n = torch.arange(1, 1501, dtype=torch.float64)
    torch.testing.assert_close(best_of_n(ranks, ranks)[0], n * 1501 / (n + 1), rtol=1e-10, atol=0)


def test_kl_bound_is_the_kl_where_no_two_responses_are_the_same():
    # M equally likely responses, ranked: the best of n is the i-th with ((i/M)^n − ((i − 1)/M)^n).
    size, n = 20_000, torch.tensor([1, 2, 5])
    edges = torch.arange(size + 1, dtype=torch.float64) / size
    best = (edges[None] ** n[:, None]).diff(dim=1)
    exact = torch.xlogy(best, best * size).sum(1)
    found = best_of_n_kl(n.double())
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=0)
    assert (found >= exact - 1e-12).all()
    assert found[2].item() == pytest.approx(math.log(5) - 4 / 5)
    few = (torch.arange(3, dtype=torch.float64)[None] / 2) ** n[:, None]
    few = few.diff(dim=1)
    assert (torch.xlogy(few, few * 2).sum(1) < found)[1:].all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected values of shape \(1, 2\), as ranking, got \(1, 3\)"):
        best_of_n(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"expected ranking of shape \(P, N\) with P, N >= 1, got \(0, 2\)"):
        best_of_n(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="expected ranking without NaN, got 1"):
        best_of_n(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="expected n >= 1, got 0"):
        best_of_n_kl(torch.tensor([2, 0]))

"""Log-probabilities, entropies and exact KLs of tokens from hidden states."""

import math

import pytest
import torch

from lit_vapo.functional import logprobs as module
from lit_vapo.functional import token_kl, token_logprobs

N, H, V = 7, 5, 11


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, bias


def reference(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, withheld=None):
    """The same by log_softmax over all logits at once, from which withheld tokens are taken out."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    outcomes = []
    for i, row in enumerate(logits / temperature):
        taken = withheld[1].tolist() if withheld is not None and withheld[0][i] else []
        left = [v for v in range(V) if v not in taken]
        distribution = torch.distributions.Categorical(logits=row[left])
        where = torch.tensor(left.index(int(targets[i])))
        outcomes.append((distribution.log_prob(where), distribution.entropy()))
    return tuple(torch.stack(column) for column in zip(*outcomes, strict=True))


def gradients(function, tensors):
    """Gradients of a fixed mix of log-probabilities and entropies with respect to the tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    logprobs, entropy = function(*leaves)
    mix = torch.arange(1.0, N + 1, dtype=torch.float64)
    return torch.autograd.grad((mix * logprobs).sum() + (mix.square() * entropy).sum(), leaves)


def test_hand_worked_values():
    # Hidden 1 on weights (0, log 3): probabilities 1/4 and 3/4, entropy log 4 - 3/4 log 3.
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3.0)]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25), math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(4.0) - 0.75 * math.log(3.0)))


def test_temperature_hand_worked():
    # At temperature 1/2 the logits double: odds 9 to 1.
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3.0)]])
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([1]), temperature=0.5)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.9)]))


def test_withheld_tokens_hand_worked():
    # Weights (0, log 3, log 4): odds 1 to 3 to 4. Without the last token 1/4 and 3/4, as above; the second row has all.
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3.0)], [math.log(4.0)]])
    withheld = torch.tensor([True, False]), torch.tensor([2])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1, 1]), withheld=withheld)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(3 / 4), math.log(3 / 8)]))
    whole = math.log(8.0) - (3 * math.log(3.0) + 4 * math.log(4.0)) / 8
    torch.testing.assert_close(entropy, torch.tensor([math.log(4.0) - 0.75 * math.log(3.0), whole]))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 2.0, "temperature": 1.3},
        {"temperature": 0.7, "withheld": (torch.arange(N) % 3 == 0, torch.tensor([0, 3, 9]))},
    ],
)
def test_equals_log_softmax_with_gradients_however_chunked(inputs, chunk_size, options):
    hidden, weight, targets, bias = inputs
    mine = token_logprobs(hidden, weight, targets, bias=bias, chunk_size=chunk_size, **options)
    theirs = reference(hidden, weight, targets, bias, **options)
    torch.testing.assert_close(mine.logprobs, theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.entropy, theirs[1], rtol=1e-12, atol=1e-12)
    mine_grad = gradients(
        lambda h, w, b: token_logprobs(h, w, targets, bias=b, chunk_size=chunk_size, **options),
        (hidden, weight, bias),
    )
    theirs_grad = gradients(lambda h, w, b: reference(h, w, targets, b, **options), (hidden, weight, bias))
    for one, other in zip(mine_grad, theirs_grad, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_chunks_are_recomputed_for_a_gradient(inputs, monkeypatch):
    hidden, weight, targets, _ = inputs
    calls = []
    plain = module._logits

    def counted(*arguments):
        calls.append(arguments[0].shape[0])
        return plain(*arguments)

    monkeypatch.setattr(module, "_logits", counted)
    out = token_logprobs(hidden.requires_grad_(), weight, targets, chunk_size=3)
    assert calls == [3, 3, 1]
    out.logprobs.sum().backward()
    assert sorted(calls) == [1, 1, 3, 3, 3, 3]


def test_without_a_gradient_nothing_is_checkpointed(inputs, monkeypatch):
    hidden, weight, targets, _ = inputs
    monkeypatch.delattr(module, "checkpoint")
    token_logprobs(hidden, weight, targets, chunk_size=3)
    with torch.no_grad():
        token_logprobs(hidden.requires_grad_(), weight, targets, chunk_size=3)


def test_default_chunk_follows_the_memory_limit(inputs, monkeypatch):
    hidden, weight, targets, _ = inputs
    rows = []
    plain = module._logits
    monkeypatch.setattr(module, "_logits", lambda *a: rows.append(len(a[0])) or plain(*a))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * V * 2)  # two rows of float32 logits
    token_logprobs(hidden, weight, targets)
    assert rows == [2, 2, 2, 1]


def test_no_rows_work(inputs):
    _, weight, _, _ = inputs
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, H)


def test_half_precision_gives_float32(inputs):
    hidden, weight, targets, _ = inputs
    out = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert out.logprobs.dtype == out.entropy.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = logits.log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(out.logprobs, expected)


def test_huge_logits_stay_finite():
    hidden, weight = torch.ones(1, 1), torch.tensor([[1e4], [-1e4]])
    out = token_logprobs(hidden, weight, torch.tensor([1]))
    assert out.logprobs.item() == -2e4
    assert out.entropy.item() == 0.0


def test_bad_arguments_are_refused(inputs):
    hidden, weight, targets, bias = inputs
    with pytest.raises(ValueError, match=r"expected hidden \(N, H\) and weight \(V, H\), got \(7, 5\) and"):
        token_logprobs(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"expected targets of shape \(7,\), got \(6,\)"):
        token_logprobs(hidden, weight, targets[:6])
    with pytest.raises(ValueError, match=r"expected bias of shape \(11,\), got \(10,\)"):
        token_logprobs(hidden, weight, targets, bias=bias[:10])
    with pytest.raises(ValueError, match=r"expected withheld positions of shape \(7,\) and type bool, got \(11,\) and"):
        token_logprobs(hidden, weight, targets, withheld=(torch.zeros(11, dtype=torch.bool), targets))
    with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
        token_logprobs(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="expected chunk_size > 0, got 0"):
        token_logprobs(hidden, weight, targets, chunk_size=0)


def kl_by_torch(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature=1.0, softcap=None, withheld=None):
    """The same by torch's distributions, from which withheld tokens are taken out."""
    both = []
    for states, head, b in ((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)):
        logits = states @ head.T + b
        both.append((logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature)
    found = []
    for i, (p, q) in enumerate(zip(*both, strict=True)):
        taken = withheld[1].tolist() if withheld is not None and withheld[0][i] else []
        left = [v for v in range(V) if v not in taken]
        categorical = torch.distributions.Categorical
        found.append(torch.distributions.kl_divergence(categorical(logits=p[left]), categorical(logits=q[left])))
    return torch.stack(found)


@pytest.fixture
def two_sides(inputs):
    hidden, weight, _, bias = inputs
    generator = torch.Generator().manual_seed(1)
    shapes = ((N, H + 1), (V, H + 1), (V,))
    ref_hidden, ref_weight, ref_bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return (hidden, weight, ref_hidden, ref_weight), {"bias": bias, "ref_bias": ref_bias}


def test_kl_hand_worked():
    # (1/4, 3/4) from (1/2, 1/2): 1/4 log(1/2) + 3/4 log(3/2). The other way round: 1/2 log 2 + 1/2 log(2/3).
    state = torch.ones(1, 1)
    one, even = torch.tensor([[0.0], [math.log(3.0)]]), torch.zeros(2, 1)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    torch.testing.assert_close(token_kl(state, one, state, even), torch.tensor([expected]))
    expected = 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(token_kl(state, even, state, one), torch.tensor([expected]))


def test_kl_leaves_withheld_tokens_out():
    # Odds 1 : 3 : 4 from 1 : 1 : 1. Without the last token (1/4, 3/4) from (1/2, 1/2), as above; row two has all.
    states = torch.ones(2, 1)
    head, even = torch.tensor([[0.0], [math.log(3.0)], [math.log(4.0)]]), torch.zeros(3, 1)
    found = token_kl(states, head, states, even, withheld=(torch.tensor([True, False]), torch.tensor([2])))
    whole = 1 / 8 * math.log(3 / 8) + 3 / 8 * math.log(9 / 8) + 1 / 2 * math.log(3 / 2)
    torch.testing.assert_close(found, torch.tensor([0.25 * math.log(0.5) + 0.75 * math.log(1.5), whole]))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 2.0, "temperature": 1.3},
        {"temperature": 0.7, "withheld": (torch.arange(N) % 3 == 0, torch.tensor([0, 3, 9]))},
    ],
)
def test_kl_equals_torch_s_with_gradients_however_chunked(two_sides, chunk_size, options):
    tensors, biases = two_sides
    leaves = [x.clone().requires_grad_() for x in tensors]
    mine = token_kl(*leaves, **biases, chunk_size=chunk_size, **options)
    theirs = kl_by_torch(*leaves, **biases, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    mix = torch.arange(1.0, N + 1, dtype=torch.float64)
    one, other = (torch.autograd.grad((mix * kl).sum(), leaves) for kl in (mine, theirs))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_kl_is_the_mean_of_the_sampled_log_ratio(two_sides):
    (hidden, weight, ref_hidden, ref_weight), biases = two_sides
    kl, options = torch.zeros(N, dtype=torch.float64), {"temperature": 0.7}
    for token in range(V):
        targets = torch.full((N,), token)
        logprobs = token_logprobs(hidden, weight, targets, bias=biases["bias"], **options).logprobs
        ref = token_logprobs(ref_hidden, ref_weight, targets, bias=biases["ref_bias"], **options).logprobs
        kl += logprobs.exp() * (logprobs - ref)
    torch.testing.assert_close(token_kl(hidden, weight, ref_hidden, ref_weight, **biases, **options), kl)


def test_kl_of_a_policy_from_itself_is_zero(inputs):
    hidden, weight, _, bias = inputs
    found = token_kl(hidden, weight, hidden.clone(), weight, bias=bias, ref_bias=bias)
    assert found.tolist() == [0.0] * N


def test_kl_in_half_precision_is_float32(two_sides):
    tensors, _ = two_sides
    halves = [x.bfloat16() for x in tensors]
    p, q = ((states @ head.T).float().log_softmax(-1) for states, head in (halves[:2], halves[2:]))
    found = token_kl(*halves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1))


def test_kl_keeps_no_more_logits_than_a_chunk(two_sides, monkeypatch):
    tensors, biases = two_sides
    rows, plain = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda *a: rows.append(len(a[0])) or plain(*a))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2 * 4 * V * 2)  # two rows of float32 logits of both
    token_kl(*tensors, **biases)
    assert rows == [2, 2, 2, 2, 2, 2, 1, 1]


def test_kl_of_two_that_do_not_fit_is_refused(two_sides):
    (hidden, weight, ref_hidden, ref_weight), _ = two_sides
    with pytest.raises(ValueError, match="expected as many tokens in both heads, got 11 and 10"):
        token_kl(hidden, weight, ref_hidden, ref_weight[:10])
    with pytest.raises(ValueError, match="expected as many positions of both, got 7 and 6"):
        token_kl(hidden, weight, ref_hidden[:6], ref_weight)
    with pytest.raises(ValueError, match="expected softcap > 0, got 0"):
        token_kl(hidden, weight, ref_hidden, ref_weight, softcap=0.0)

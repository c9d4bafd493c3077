"""Token log-probabilities and entropies from hidden states."""

import math

import pytest
import torch

from lit_vapo.functional import logprobs as module
from lit_vapo.functional import token_logprobs

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
    plain = module._chunk_logprobs

    def counted(*arguments):
        calls.append(arguments[0].shape[0])
        return plain(*arguments)

    monkeypatch.setattr(module, "_chunk_logprobs", counted)
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
    plain = module._chunk_logprobs
    monkeypatch.setattr(module, "_chunk_logprobs", lambda *a: rows.append(len(a[0])) or plain(*a))
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

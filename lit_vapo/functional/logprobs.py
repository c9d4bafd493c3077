"""Log-probabilities, entropies and KLs of tokens from hidden states, without keeping all their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = 256 * 2**20


class TokenLogprobs(NamedTuple):
    """What the policy says about the tokens that were chosen.

    Attributes:
        logprobs: `(N,)`, log-probability of each target token, in nats.
        entropy: `(N,)`, entropy of the distribution it was drawn from, in nats.
    """

    logprobs: Tensor
    entropy: Tensor


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    withheld: tuple[Tensor, Tensor] | None = None,
    chunk_size: int | None = None,
) -> TokenLogprobs:
    """Log-probability of each target token, and the entropy it was drawn from.

        logits = softcap(hidden @ weight.T + bias) / temperature,    softcap(z) = c * tanh(z / c)
        logits[v] = -inf  where token v is withheld
        logprob = logits[target] - logsumexp(logits)

    The matrix product runs in the dtype of its inputs, or that of autocast, everything after it in float32 (float64
    stays). Where that is bfloat16, logits are rounded to eight bits before they get here. Rows
    are processed in chunks, and when a gradient is needed each chunk is recomputed in the backward pass, so
    that the logits of only one chunk are alive at a time. Pass the selected (response) positions only.

    Args:
        hidden: `(N, H)`, the last hidden state at the position that predicts each target.
        weight: `(V, H)`, the output embedding.
        targets: `(N,)` int64, token ids in [0, V).
        bias: `(V,)`, or None.
        temperature: the one the tokens were sampled at, > 0.
        softcap: c of a logit cap as in Gemma 2 (arXiv 2408.00118, section 2), > 0; None for no cap.
        withheld: `(N,)` bool and `(M,)` int64: at the positions where the first is True, the tokens of the second
            could not be drawn, as under a minimum length; None for no such tokens.
        chunk_size: rows in a chunk; by default what keeps its float32 logits below 256 MB.

    Returns:
        TokenLogprobs, two `(N,)` tensors; N = 0 works. Logits are expected to be finite before tokens are withheld.

    Raises:
        ValueError: if shapes do not fit, or if temperature, softcap or chunk_size is not positive.

    Examples:
        >>> out = token_logprobs(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
        >>> [round(x.item(), 4) for x in out]  # uniform over 4 tokens: log(1/4) and log(4)
        [-1.3863, 1.3863]
    """
    _check(hidden, weight, targets, bias, withheld)
    _check_positive(temperature=temperature, softcap=softcap, chunk_size=chunk_size)
    where, ids = withheld if withheld is not None else (torch.zeros_like(targets, dtype=torch.bool), targets[:0])

    def chunk(hidden: Tensor, targets: Tensor, where: Tensor) -> tuple[Tensor, ...]:
        logits = _logits(hidden, weight, bias, temperature, softcap)
        allowed = _withhold(logits, where, ids)
        normaliser = allowed.logsumexp(dim=-1)
        logprobs = allowed.gather(-1, targets[:, None]).squeeze(-1) - normaliser
        # A probability of 0 times a finite logit: 0·log 0 is 0, in the gradient too.
        entropy = normaliser - (allowed.softmax(dim=-1) * logits).sum(dim=-1)
        return logprobs, entropy

    rows = chunk_size or max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    return TokenLogprobs(*_in_chunks(chunk, (hidden, targets, where), rows, (hidden, weight, bias)))


def token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    withheld: tuple[Tensor, Tensor] | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Exact KL of the policy's next-token distribution from the reference's, at each position.

        KL = Σ_v π(v) * ( log π(v) - log π0(v) ),    over tokens v that are not withheld

    It is what the sampled log-ratio log π(a)/π0(a) is on average over the token a. Logits are made as in
    `token_logprobs`, those of both with the same shaping, and with one chunk of each alive at a time. Source: Amini et
    al., arXiv 2504.10637, whose estimator of the KL of whole responses is the sum over their tokens.

    Args:
        hidden: `(N, H)`, the policy's last hidden state at each position.
        weight: `(V, H)`, its output embedding.
        ref_hidden: `(N, H')`, the reference's states at the same positions.
        ref_weight: `(V, H')`, its output embedding, over the same tokens.
        bias: `(V,)`, or None.
        ref_bias: `(V,)`, or None.
        temperature: the one the tokens were sampled at, > 0.
        softcap: c of a logit cap, > 0; None for no cap.
        withheld: as for `token_logprobs`; these tokens have probability 0 under both.
        chunk_size: rows in a chunk; by default what keeps the float32 logits of both below 256 MB.

    Returns:
        `(N,)`, in nats, in float32 (float64 stays). Rounding may put one that is 0 a millionth of a nat below.

    Raises:
        ValueError: if shapes do not fit, or if temperature, softcap or chunk_size is not positive.

    Examples:
        >>> state, head = torch.ones(1, 1), torch.tensor([[1.0], [3.0]]).log()
        >>> token_kl(state, head, state, torch.zeros(2, 1))  # (1/4, 3/4) from (1/2, 1/2): log 2 - H(1/4)
        tensor([0.1308])
    """
    positions = hidden.new_zeros(hidden.shape[:1], dtype=torch.int64)
    _check(hidden, weight, positions, bias, withheld)
    _check(ref_hidden, ref_weight, positions[: len(ref_hidden)], ref_bias, None)
    if hidden.shape[0] != ref_hidden.shape[0]:
        raise ValueError(f"expected as many positions of both, got {hidden.shape[0]} and {ref_hidden.shape[0]}")
    if weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(f"expected as many tokens in both heads, got {weight.shape[0]} and {ref_weight.shape[0]}")
    _check_positive(temperature=temperature, softcap=softcap, chunk_size=chunk_size)
    where, ids = withheld if withheld is not None else (positions.bool(), positions[:0])

    def chunk(hidden: Tensor, ref_hidden: Tensor, where: Tensor) -> tuple[Tensor, ...]:
        logits = _logits(hidden, weight, bias, temperature, softcap)
        ref_logits = _logits(ref_hidden, ref_weight, ref_bias, temperature, softcap)
        allowed = _withhold(logits, where, ids)
        # As for the entropy, logits that stay finite stand where the probability is 0.
        gap = allowed.logsumexp(dim=-1) - _withhold(ref_logits, where, ids).logsumexp(dim=-1)
        return ((allowed.softmax(dim=-1) * (logits - ref_logits)).sum(dim=-1) - gap,)

    rows = chunk_size or max(1, _CHUNK_BYTES // (8 * weight.shape[0]))
    (kl,) = _in_chunks(
        chunk, (hidden, ref_hidden, where), rows, (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    )
    return kl


def _in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    rows: tuple[Tensor, ...],
    size: int,
    differentiable: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """Columns that a function gives of rows, some rows at a time; recomputed in the backward pass if there is one."""
    if len(rows[0]) <= size:
        return function(*rows)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    parts = [
        checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) if needs_grad else function(*chunk)
        for chunk in zip(*(x.split(size) for x in rows), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, withheld: tuple[Tensor, Tensor] | None
) -> None:
    """Raise ValueError where the shapes of `token_logprobs` do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden (N, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected targets of shape ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if withheld is not None and (withheld[0].shape != targets.shape or withheld[0].dtype != torch.bool):
        raise ValueError(
            f"expected withheld positions of shape {tuple(targets.shape)} and type bool, "
            f"got {tuple(withheld[0].shape)} and {withheld[0].dtype}"
        )


def _check_positive(**numbers: float | None) -> None:
    """Raise ValueError where a number that was given is not above 0."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"expected {name} > 0, got {value}")


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """Logits of some rows, before tokens are withheld, in at least float32."""
    logits = linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1.0 else logits / temperature


def _withhold(logits: Tensor, where: Tensor, ids: Tensor) -> Tensor:
    """The logits, -inf where a token could not be drawn."""
    if not len(ids):
        return logits
    tokens = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device).index_fill(0, ids, True)
    return logits.masked_fill(where[:, None] & tokens, -torch.inf)

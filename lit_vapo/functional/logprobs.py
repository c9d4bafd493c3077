"""Log-probabilities and entropies of tokens from hidden states, without keeping all their logits."""

from __future__ import annotations

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

    The matrix product runs in the dtype of its inputs, everything after it in float32 (float64 stays). Rows
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

    Example:
        >>> out = token_logprobs(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
        >>> [round(x.item(), 4) for x in out]  # uniform over 4 tokens: log(1/4) and log(4)
        [-1.3863, 1.3863]
    """
    _check(hidden, weight, targets, bias, withheld)
    for name, value in (("temperature", temperature), ("softcap", softcap), ("chunk_size", chunk_size)):
        if value is not None and not value > 0:
            raise ValueError(f"expected {name} > 0, got {value}")
    where, ids = withheld if withheld is not None else (torch.zeros_like(targets, dtype=torch.bool), targets[:0])
    rows = chunk_size or max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    if hidden.shape[0] <= rows:
        return TokenLogprobs(*_chunk_logprobs(hidden, weight, targets, where, ids, bias, temperature, softcap))
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    parts = []
    for chunk, wanted, here in zip(hidden.split(rows), targets.split(rows), where.split(rows), strict=True):
        arguments = (chunk, weight, wanted, here, ids, bias, temperature, softcap)
        parts.append(
            checkpoint(_chunk_logprobs, *arguments, use_reentrant=False, preserve_rng_state=False)
            if needs_grad
            else _chunk_logprobs(*arguments)
        )
    return TokenLogprobs(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


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


def _chunk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    where: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one chunk of rows."""
    logits = linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature != 1.0:
        logits = logits / temperature
    allowed = logits
    if len(ids):
        tokens = torch.zeros(weight.shape[0], dtype=torch.bool, device=logits.device).index_fill(0, ids, True)
        allowed = logits.masked_fill(where[:, None] & tokens, -torch.inf)
    normaliser = allowed.logsumexp(dim=-1)
    logprobs = allowed.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    # A probability of 0 times a finite logit: 0·log 0 is 0, in the gradient too.
    entropy = normaliser - (allowed.softmax(dim=-1) * logits).sum(dim=-1)
    return logprobs, entropy

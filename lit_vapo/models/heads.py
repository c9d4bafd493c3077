"""What the heads of language models make of hidden states: log-probabilities, entropies, KLs.

The (B, T, V) logits are never made: a head is applied to the response positions only, in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_vapo.functional import TokenLogprobs, token_kl, token_logprobs
from lit_vapo.models.shaping import Shaping


def head_logprobs(
    lm: PreTrainedModel, states: Tensor, targets: Tensor, response_mask: Tensor, shaping: Shaping
) -> TokenLogprobs:
    """Log-probabilities and entropies (B, T) of response tokens; zeros where the mask is False.

    Args:
        lm: The language model whose head is applied.
        states: States that predict each response token (B, T, H).
        targets: Response tokens (B, T).
        response_mask: True where a token counts (B, T).
        shaping: What happened to the logits when the tokens were drawn.
    """
    head = lm.get_output_embeddings()
    out = token_logprobs(
        states[response_mask],
        head.weight,
        targets[response_mask],
        bias=getattr(head, "bias", None),
        **_shaped(lm, response_mask, shaping),
    )
    return TokenLogprobs(*(_spread(x, response_mask) for x in out))


def head_kl(
    lm: PreTrainedModel,
    states: Tensor,
    reference: PreTrainedModel,
    ref_states: Tensor,
    response_mask: Tensor,
    shaping: Shaping,
) -> Tensor:
    """Exact KL of each response token's distribution from the reference's (B, T), nats; zeros where the mask is False.

    Args:
        lm: The language model whose head makes the policy's logits.
        states: The policy's states that predict each response token (B, T, H).
        reference: The language model whose head makes the reference's; of the same architecture.
        ref_states: The reference's states (B, T, H).
        response_mask: True where a token counts (B, T).
        shaping: What happened to the logits when the tokens were drawn.
    """
    head, ref_head = lm.get_output_embeddings(), reference.get_output_embeddings()
    kl = token_kl(
        states[response_mask],
        head.weight,
        ref_states[response_mask],
        ref_head.weight,
        bias=getattr(head, "bias", None),
        ref_bias=getattr(ref_head, "bias", None),
        **_shaped(lm, response_mask, shaping),
    )
    return _spread(kl, response_mask)


def _spread(x: Tensor, response_mask: Tensor) -> Tensor:
    """The numbers (N,) of response tokens, each in its place (B, T)."""
    zeros = torch.zeros(response_mask.shape, dtype=torch.float32, device=x.device)
    return zeros.masked_scatter(response_mask, x)


def _shaped(lm: PreTrainedModel, response_mask: Tensor, shaping: Shaping) -> dict[str, Any]:
    """What happened to the logits of response tokens, as `token_logprobs` and `token_kl` are told."""
    withheld = None
    if shaping.min_new_tokens:
        early = torch.arange(response_mask.shape[1], device=response_mask.device) < shaping.min_new_tokens
        stops = torch.tensor(shaping.stops, device=response_mask.device, dtype=torch.long)
        withheld = early.expand_as(response_mask)[response_mask], stops
    return {
        "temperature": shaping.temperature / _logit_scale(lm),
        "softcap": getattr(lm.config, "final_logit_softcapping", None),
        "withheld": withheld,
    }


def _logit_scale(lm: PreTrainedModel) -> float:
    """Some architectures multiply (Cohere) or divide (Granite) their logits by a constant."""
    return float(getattr(lm.config, "logit_scale", None) or 1.0) / float(
        getattr(lm.config, "logits_scaling", None) or 1.0
    )

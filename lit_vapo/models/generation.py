"""Sampling responses with transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@dataclass
class Sampling:
    """How responses are drawn.

    Only the temperature shapes the distribution: top-k, top-p, penalties and a minimum length would make the
    log-probabilities of the sampled tokens differ from those PPO computes, so they are always off.

    Args:
        max_new_tokens: Longest response.
        temperature: The logits are divided by it, in sampling and in every log-probability alike.
        stop_token_ids: Tokens that end a response, besides the model's own end-of-sequence tokens.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    stop_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"sampling.temperature: expected a positive number, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens: expected at least 1, got {self.max_new_tokens}")


class Generated(NamedTuple):
    """Sampled responses.

    Attributes:
        response_ids: Token ids (B, T), anything after the end of a response.
        response_lengths: Tokens of each response (B,), a stop token included.
        stopped: Whether a stop token ended the response (B,).
    """

    response_ids: Tensor
    response_lengths: Tensor
    stopped: Tensor


def stop_ids(lm: PreTrainedModel, sampling: Sampling, eos_token_id: int | None) -> list[int]:
    """All tokens that end a response: the model's, the tokenizer's and the user's."""
    configured = getattr(lm.generation_config, "eos_token_id", None)
    own = configured if isinstance(configured, list) else [configured]
    ids = {i for i in (*own, eos_token_id, *(sampling.stop_token_ids or [])) if i is not None}
    return sorted(ids)


@torch.no_grad()
def sample(
    lm: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    sampling: Sampling,
    stops: list[int],
    pad: int,
) -> Generated:
    """Sample one response for each prompt.

    Args:
        lm: The language model, adapters switched as wanted.
        prompt_ids: Token ids (B, P), left-padded.
        prompt_lengths: Tokens of each prompt (B,).
        sampling: How to draw.
        stops: Tokens that end a response.
        pad: Token that fills the rest; it may equal a stop token.
    """
    size = prompt_ids.shape[1]
    mask = torch.arange(size, device=prompt_ids.device) >= size - prompt_lengths[:, None]
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
    )
    # transformers fills what `config` leaves open from the model's own settings, which may shape the distribution
    # (min-p, suppressed tokens, a minimum length, …).
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        out = lm.generate(input_ids=prompt_ids, attention_mask=mask.long(), generation_config=config)
    finally:
        lm.generation_config = own
    responses = cast("Tensor", out)[:, size:]
    is_stop = torch.isin(responses, torch.tensor(stops, device=responses.device, dtype=responses.dtype))
    stopped = is_stop.any(1)
    first = is_stop.long().argmax(1) + 1
    lengths = torch.where(stopped, first, torch.full_like(first, responses.shape[1]))
    return Generated(responses, lengths, stopped)

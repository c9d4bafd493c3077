"""What one iteration of PPO learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_vapo.data.collate import PromptBatch
from lit_vapo.functional import SamplerGap, sequence_log_ratio
from lit_vapo.models.generation import Generated
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import length_mask
from lit_vapo.types import RewardEstimate


@dataclass(kw_only=True)
class Rollout:
    """Responses of a policy and all that is known about them.

    B counts responses. A prompt has `num_responses` of them, in rows that stand together: with n responses to a prompt,
    row i·n + j is response j to prompt i.

    Attributes:
        rows: Prompts and responses.
        prompts: Text of each response's prompt.
        responses: Text of each response.
        stopped: Whether a stop token or a stop string ended the response (B,).
        logprobs: Log-probabilities under the policy that sampled them (B, T), computed by the model that learns.
        ref_logprobs: Log-probabilities under the reference (B, T).
        entropy: Entropy of the policy at each position (B, T), nats.
        values: Values before each token (B, T), or `None` if nobody asked.
        value_states: States the critic reads (B, T, H), if they are frozen.
        estimate: What the source of rewards says.
        reward: Terminal reward by the objective, clipped and penalised (B,).
        kl_weight: Weight of the KL penalty (B,).
        gold: Gold reward (B,), if there is a judge.
        seconds: Time spent by phase.
        num_responses: Responses to each prompt.
        columns: Further columns of the prompts' file by name, B values each.
        sampler_logprobs: Log-probabilities that the sampler says its tokens had (B, T), if it says so.
        sampler: How far the sampler is from the model that learns, over all processes, if it says so.
        marks: Further numbers of each response (B,), by name.
        token_kl: Exact KL of each token's distribution from the reference's (B, T), nats, if the penalty is by it.
    """

    rows: TokenRows
    prompts: list[str]
    responses: list[str]
    stopped: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    value_states: Tensor | None
    estimate: RewardEstimate
    reward: Tensor
    kl_weight: Tensor
    gold: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    num_responses: int = 1
    columns: dict[str, list[Any]] = field(default_factory=dict)
    sampler_logprobs: Tensor | None = None
    sampler: SamplerGap | None = None
    marks: dict[str, Tensor] = field(default_factory=dict)
    token_kl: Tensor | None = None

    @property
    def response_mask(self) -> Tensor:
        """True at response tokens (B, T)."""
        return self.rows.response_mask

    @property
    def log_ratio(self) -> Tensor:
        """Log π(y)/π0(y) of whole responses (B,)."""
        return sequence_log_ratio(self.logprobs, self.ref_logprobs, self.response_mask)


def assemble_rows(batch: PromptBatch, generated: Generated) -> TokenRows:
    """Join B left-padded prompts and n responses to each into B·n right-padded rows.

    Raises:
        ValueError: A response has no token, or the prompts have not equally many responses.
    """
    count = len(generated.response_lengths)
    each, left_over = divmod(count, len(batch.lengths))
    if left_over or not each:
        raise ValueError(f"expected equally many responses to each of {len(batch.lengths)} prompts, got {count}")
    if int(generated.response_lengths.min()) < 1:
        prompt = batch.prompts[int(generated.response_lengths.argmin()) // each]
        raise ValueError(f"expected at least one token in each response, got none for prompt {prompt!r}")
    size = int(generated.response_lengths.max())
    prompt_size = batch.input_ids.shape[1]
    lengths = batch.lengths.repeat_interleave(each)
    joined = torch.cat([batch.input_ids.repeat_interleave(each, dim=0), generated.response_ids[:, :size]], dim=1)
    # Roll each row's left padding over to its right end.
    shift = (prompt_size - lengths)[:, None]
    index = (torch.arange(joined.shape[1], device=joined.device) + shift) % joined.shape[1]
    mask = length_mask(generated.response_lengths, size)
    return TokenRows(joined.gather(1, index), lengths, mask)

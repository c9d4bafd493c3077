"""Generate, score, assemble: what one iteration of PPO learns from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lit_vapo.data.collate import PromptBatch
from lit_vapo.data.tokenise import prompt_ids, response_ids
from lit_vapo.functional import clip_rewards, sequence_log_ratio
from lit_vapo.models.actor_critic import ActorCritic, Rows
from lit_vapo.models.features import compute_features, length_batches
from lit_vapo.models.generation import Generated, Sampling, sample, stop_ids
from lit_vapo.models.policy import Role
from lit_vapo.models.trunk import length_mask
from lit_vapo.objectives.base import Objective
from lit_vapo.types import RewardEstimate, TextReward, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Rollout:
    """Responses of a policy and all that is known about them.

    Attributes:
        rows: Prompts and responses.
        prompts: Text of each prompt.
        responses: Text of each response.
        stopped: Whether a stop token ended the response (B,).
        logprobs: Log-probabilities under the policy that sampled them (B, T).
        ref_logprobs: Log-probabilities under the reference (B, T).
        entropy: Entropy of the policy at each position (B, T), nats.
        values: Values before each token (B, T), or `None` if nobody asked.
        value_states: States the critic reads (B, T, H), if they are frozen.
        estimate: The ensemble's estimate.
        reward: Terminal reward by the objective, clipped and penalised (B,).
        kl_weight: Weight of the KL penalty (B,).
        gold: Gold reward (B,), if there is a judge.
        seconds: Time spent by phase.
    """

    rows: Rows
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

    @property
    def response_mask(self) -> Tensor:
        """True at response tokens (B, T)."""
        return self.rows.response_mask

    @property
    def log_ratio(self) -> Tensor:
        """Log π(y)/π0(y) of whole responses (B,)."""
        return sequence_log_ratio(self.logprobs, self.ref_logprobs, self.response_mask)


class _Scored(NamedTuple):
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    value_states: Tensor | None
    features: Tensor | None


def assemble_rows(batch: PromptBatch, generated: Generated) -> Rows:
    """Join left-padded prompts and their responses into right-padded rows.

    Raises:
        ValueError: A response has no token.
    """
    if int(generated.response_lengths.min()) < 1:
        row = int(generated.response_lengths.argmin())
        raise ValueError(f"expected at least one token in each response, got none for prompt {batch.prompts[row]!r}")
    size = int(generated.response_lengths.max())
    prompt_size = batch.input_ids.shape[1]
    joined = torch.cat([batch.input_ids, generated.response_ids[:, :size]], dim=1)
    # Roll each row's left padding over to its right end.
    shift = (prompt_size - batch.lengths)[:, None]
    index = (torch.arange(joined.shape[1], device=joined.device) + shift) % joined.shape[1]
    mask = length_mask(generated.response_lengths, size)
    return Rows(joined.gather(1, index), batch.lengths, mask)


class RolloutMaker:
    """Makes rollouts with fixed models, objective and sampling.

    Args:
        networks: Actor, critic, reference and reward.
        tokenizer: The policy's tokenizer.
        sampling: How responses are drawn.
        gold: A judge that training never sees, or `None`.
        reward_clip: Largest absolute terminal reward, or `None`.
        missing_eos_penalty: Taken off the reward of a response that no stop token ended.
        tokens_per_batch: Tokens of a scoring pass, padding included.
    """

    def __init__(
        self,
        networks: ActorCritic,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        gold: TextReward | None = None,
        reward_clip: float | None = None,
        missing_eos_penalty: float = 0.0,
        tokens_per_batch: int = 4096,
    ) -> None:
        self.networks = networks
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.gold = gold
        self.reward_clip = reward_clip
        self.missing_eos_penalty = missing_eos_penalty
        self.tokens_per_batch = tokens_per_batch
        self.stops = stop_ids(networks.policy.causal_lm, sampling, tokenizer.eos_token_id)
        self.pad = pad_id(tokenizer, self.stops)
        self._reward_encoder: Callable[[str, str, bool], TokenSequence] | None = None

    @torch.no_grad()
    def make(
        self,
        batch: PromptBatch,
        objective: Objective,
        role: Role = "actor",
        values: bool = True,
        all_sum: Callable[[Tensor], Tensor] | None = None,
    ) -> Rollout:
        """Sample a response to each prompt as actor or reference, and score it.

        Args:
            batch: Prompts, left-padded.
            objective: Turns the ensemble's estimate into reward and KL weight.
            role: Who answers.
            values: Whether the critic is asked.
            all_sum: Sums over all processes; given in training, where the objective may learn from the responses.

        Raises:
            ValueError: A response is empty, or a reward is not finite.
        """
        started = time.perf_counter()
        policy = self.networks.policy
        generated = policy.generate(role, batch.input_ids, batch.lengths, self.sampling, self.stops, self.pad)
        rows = assemble_rows(batch, generated)
        responses = self._decode(rows)
        generated_at = time.perf_counter()
        scored = self._score(rows, role, values)
        features = scored.features
        if features is None:
            features = self._own_features(batch.prompts, responses, generated.stopped)
        estimate = self.networks.reward_model.head(features)
        _check_finite(estimate, batch.prompts)
        if all_sum is None:
            score = objective(estimate)
        else:
            log_ratio = sequence_log_ratio(scored.logprobs, scored.ref_logprobs, rows.response_mask)
            score = objective.observe(estimate, log_ratio, getattr(self.sampling, "num_responses", 1), all_sum)
        reward = clip_rewards(score.reward, self.reward_clip)
        reward = torch.where(generated.stopped, reward, reward - self.missing_eos_penalty)
        return Rollout(
            rows,
            batch.prompts,
            responses,
            generated.stopped,
            *scored[:-1],
            estimate,
            reward,
            score.kl_weight,
            None if self.gold is None else self.gold(batch.prompts, responses).to(reward),
            {"generate": generated_at - started, "score": time.perf_counter() - generated_at},
        )

    def reference_features(self, batches: list[PromptBatch]) -> Tensor:
        """Features (N, H) of responses of the reference, to calibrate an ensemble on."""
        features = []
        policy = self.networks.policy
        for batch in batches:
            out = policy.generate("reference", batch.input_ids, batch.lengths, self.sampling, self.stops, self.pad)
            rows = assemble_rows(batch, out)
            if self.networks.shares_base:
                scored = self._score(rows, "reference", values=False)
                assert scored.features is not None
                features.append(scored.features)
            else:
                features.append(self._own_features(batch.prompts, self._decode(rows), out.stopped))
        return torch.cat(features)

    def _decode(self, rows: Rows) -> list[str]:
        bounds = zip(rows.input_ids, rows.prompt_lengths, rows.lengths, strict=True)
        return [self.tokenizer.decode(ids[start:end], skip_special_tokens=True) for ids, start, end in bounds]

    def _score(self, rows: Rows, role: Role, values: bool) -> _Scored:
        """Log-probabilities, values and features in batches of similar length."""
        size = rows.response_mask.shape[1]
        parts: list[Tensor] = []
        outputs: list[_Scored] = []
        for chosen in length_batches(rows.lengths.tolist(), self.tokens_per_batch):
            index = torch.tensor(chosen, device=rows.input_ids.device)
            part = rows.select(index)
            reference = self.networks.reference(part, self.sampling.temperature)
            sampler = self.networks.actor(part, self.sampling.temperature) if role == "actor" else reference
            outputs.append(
                _Scored(
                    _widen(sampler.logprobs, size),
                    _widen(reference.logprobs, size),
                    _widen(sampler.entropy, size),
                    _widen(self.networks.values(part, reference.value_states), size) if values else None,
                    None if reference.value_states is None or not values else _widen(reference.value_states, size),
                    reference.features,
                )
            )
            parts.append(index)
        order = torch.cat(parts).argsort()
        columns = [torch.cat(c)[order] if c[0] is not None else None for c in zip(*outputs, strict=True)]
        return _Scored(*columns)  # type: ignore[arg-type]

    def _own_features(self, prompts: list[str], responses: list[str], stopped: Tensor) -> Tensor:
        """Features by the ensemble's own backbone, re-tokenised with its own tokenizer."""
        model = self.networks.reward_model
        if self._reward_encoder is None:
            self._reward_encoder = pair_encoder(model.load_tokenizer())
        encode = self._reward_encoder
        sequences = [encode(p, r, bool(s)) for p, r, s in zip(prompts, responses, stopped.tolist(), strict=True)]
        return compute_features(model, sequences, stopped.device).to(stopped.device)


def sample_references(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[PromptBatch],
    sampling: Sampling,
) -> list[TokenSequence]:
    """Responses of a frozen language model to prompts, as token sequences.

    Args:
        lm: The reference policy, on its device.
        tokenizer: Its tokenizer.
        batches: Prompts, left-padded.
        sampling: How it responds.
    """
    stops = stop_ids(lm, sampling, tokenizer.eos_token_id)
    sequences = []
    for batch in batches:
        ids, lengths = batch.input_ids.to(lm.device), batch.lengths.to(lm.device)
        generated = sample(lm, ids, lengths, sampling, stops, pad_id(tokenizer, stops))
        rows = assemble_rows(batch._replace(input_ids=ids, lengths=lengths), generated)
        for row, prompt, length in zip(
            rows.input_ids.tolist(), rows.prompt_lengths.tolist(), rows.lengths.tolist(), strict=True
        ):
            sequences.append(TokenSequence(row[:length], prompt))
    return sequences


def pad_id(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """A token to fill rows with. Masks come from lengths, so it may be any."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else (stops or [0])[0]


def pair_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str, bool], TokenSequence]:
    """A function from prompt text, response text and 'it ended by itself' to token ids."""

    def encode(prompt: str, response: str, ended: bool) -> TokenSequence:
        # A chat template has written the special tokens already.
        templated = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
        start = prompt_ids(tokenizer, prompt, templated)
        return TokenSequence(start + response_ids(tokenizer, response, append_eos=ended), len(start))

    return encode


def _widen(x: Tensor, size: int) -> Tensor:
    """Zeros appended along the response axis (B, T, …) up to `size`."""
    missing = size - x.shape[1]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)


def _check_finite(estimate: RewardEstimate, prompts: list[str]) -> None:
    bad = ~torch.isfinite(estimate.mean)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"expected finite rewards, got {float(estimate.mean[row])} for prompt {prompts[row]!r}")

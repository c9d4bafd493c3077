"""Makes rollouts: generates and scores."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_vapo.data.collate import PromptBatch
from lit_vapo.functional import clip_rewards, sequence_log_ratio
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.generation import Generated, Generator, Sampling, stop_ids
from lit_vapo.models.policy import Role
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.vocabulary import vocabulary_size
from lit_vapo.objectives.base import Objective
from lit_vapo.rewards.source import Responses, RewardSource
from lit_vapo.rollout.ending import EndingWatch
from lit_vapo.rollout.passes import Passes
from lit_vapo.rollout.responses import Encoders
from lit_vapo.rollout.rollout import Rollout, assemble_rows
from lit_vapo.rollout.sampler import compared, refuse_stale
from lit_vapo.types import Prompt, RewardEstimate, TextReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RolloutMaker:
    """Makes rollouts with fixed models, rewards and sampling.

    Args:
        networks: Actor, critic and reference.
        reward: Scores the responses; `prepare` was called.
        tokenizer: The policy's tokenizer.
        sampling: How responses are drawn.
        gold: A judge that training never sees, or `None`.
        reward_clip: Largest absolute terminal reward, or `None`.
        missing_eos_penalty: Taken off the reward of a response that no stop token ended.
        tokens_per_batch: Tokens of a scoring pass, padding included.
        generator: Who draws the responses; transformers, unless said otherwise.
        marks: What to note of each response besides its scores, by name, from its estimate.
        exact_kl: In training, also find the exact KL of each token's distribution from the reference's.
    """

    def __init__(
        self,
        networks: ActorCritic,
        reward: RewardSource,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        gold: TextReward | None = None,
        reward_clip: float | None = None,
        missing_eos_penalty: float = 0.0,
        tokens_per_batch: int = 4096,
        generator: Generator | None = None,
        marks: Callable[[RewardEstimate], dict[str, Tensor]] | None = None,
        exact_kl: bool = False,
    ) -> None:
        self.networks = networks
        self.reward = reward
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.gold = gold
        self.reward_clip = reward_clip
        self.missing_eos_penalty = missing_eos_penalty
        self.stops = stop_ids(networks.policy.causal_lm, sampling, tokenizer.eos_token_id)
        self.shaping = sampling.shaping(self.stops)
        self.generator = generator or TransformersGenerator()
        self.marks = marks
        self._warned = False
        self._passes = Passes(networks, self.shaping, tokens_per_batch, exact_kl)
        self._ending = EndingWatch()
        self._encoders = Encoders()

    def open(self, longest: int, folder: Path, version: int) -> None:
        """Get the generator ready, before anything else.

        Args:
            longest: Most tokens of a prompt with its response.
            folder: The run's, for files.
            version: Version of the policy's weights.

        Raises:
            ValueError: It cannot answer for this policy.
        """
        about: dict[str, Any] = {"longest": longest, "folder": folder, "version": version}
        self.generator.open(self.networks.policy, self.tokenizer, self.sampling, **about)

    @torch.no_grad()
    def make(
        self,
        batch: PromptBatch,
        objective: Objective,
        role: Role = "actor",
        values: bool = True,
        all_sum: Callable[[Tensor], Tensor] | None = None,
        version: int = 0,
    ) -> Rollout:
        """Sample responses to each prompt as actor or reference, and score them.

        Args:
            batch: Prompts, left-padded.
            objective: Turns the estimate of the reward into reward and KL weight.
            role: Who answers.
            values: Whether the critic is asked.
            all_sum: Sums over all processes; given in training, where the objective may learn from the responses.
            version: Version of the policy's weights; equal versions have equal weights.

        Raises:
            ValueError: A response is empty, a reward is not finite, or responses are those of other weights.
        """
        started = time.perf_counter()
        generated = self._generate(batch, role, self.sampling, version)
        self._warn_if_all_are_cut_off(generated.stopped)
        rows = assemble_rows(batch, generated)
        each = self.sampling.num_responses
        prompts = [prompt for prompt in batch.prompts for _ in range(each)]
        texts = self._decode(rows)
        generated_at = time.perf_counter()
        scored = self._passes.score(rows, role, self.reward.taps, values, all_sum is not None, generated.own)
        sampler_logprobs, sampler = compared(generated, scored.logprobs, rows.response_mask, self.generator.max_kl)
        responses = self._responses(batch, rows, texts, generated.stopped, scored.pooled)
        estimate = self.reward.estimate(responses)
        if all_sum is None:
            score = objective(estimate)
        else:
            self._ending.look(estimate.mean, generated.stopped)
            log_ratio = sequence_log_ratio(scored.logprobs, scored.ref_logprobs, rows.response_mask)
            score = objective.observe(estimate, log_ratio, each, all_sum)
            rows = rows._replace(lower_states=scored.lower_states)
        reward = clip_rewards(score.reward, self.reward_clip)
        reward = torch.where(generated.stopped, reward, reward - self.missing_eos_penalty)
        gold = None
        if self.gold is not None:
            gold = self.gold(prompts, texts).to(reward)
        return Rollout(
            rows=rows,
            prompts=prompts,
            responses=texts,
            stopped=generated.stopped,
            logprobs=scored.logprobs,
            ref_logprobs=scored.ref_logprobs,
            entropy=scored.entropy,
            values=scored.values,
            value_states=scored.value_states,
            estimate=estimate,
            reward=reward,
            kl_weight=score.kl_weight,
            gold=gold,
            seconds={"generate": generated_at - started, "score": time.perf_counter() - generated_at},
            num_responses=each,
            columns=dict(responses.columns),
            sampler_logprobs=sampler_logprobs,
            sampler=sampler,
            marks={} if self.marks is None else self.marks(estimate),
            token_kl=scored.kl,
        )

    @torch.no_grad()
    def references(self, batches: Iterable[PromptBatch]) -> Iterator[Responses]:
        """Responses of the reference, one to each prompt, to calibrate a source of rewards on."""
        sampling = replace(self.sampling, num_responses=1)
        for batch in batches:
            out = self._generate(batch, "reference", sampling)
            rows = assemble_rows(batch, out)
            # Without a tap there is nothing that a pass of the reference could tell.
            taps = self.reward.taps
            pooled = self._passes.score(rows, "reference", taps, values=False, own=out.own).pooled if taps else []
            yield self._responses(batch, rows, self._decode(rows), out.stopped, pooled)

    def _responses(
        self, batch: PromptBatch, rows: TokenRows, texts: list[str], finished: Tensor, pooled: list[Tensor]
    ) -> Responses:
        """What a source of rewards is offered."""
        each = len(texts) // len(batch.prompts)
        asked = [Prompt(text) for text in batch.prompts] if batch.asked is None else batch.asked
        prompts = [prompt for prompt in asked for _ in range(each)]

        return Responses(
            prompts=prompts,
            texts=texts,
            finished=finished,
            rows=rows,
            tokenizer=self.tokenizer,
            vocabulary_size=vocabulary_size(self.networks.policy.causal_lm.config),
            encode=self._encoders.writer(prompts, texts, finished.tolist()),
            columns={name: [x for x in column for _ in range(each)] for name, column in (batch.columns or {}).items()},
            pooled=dict(zip(self.reward.taps, pooled, strict=True)),
        )

    @torch.no_grad()
    def _generate(self, batch: PromptBatch, role: Role, sampling: Sampling, version: int = 0) -> Generated:
        self.generator.sync(self.networks.policy, role, version)
        with self.networks.policy.acting_as(role) as lm:
            found = self.generator(lm, self.tokenizer, batch.input_ids, batch.lengths, sampling, self.stops)
        if role == "actor":
            refuse_stale(found.weights_version, version)
        return found

    def _warn_if_all_are_cut_off(self, stopped: Tensor) -> None:
        can_stop = bool(self.stops or self.sampling.stop_strings)
        if can_stop and not self._warned and not stopped.any():
            self._warned = True
            warnings.warn(
                f"0 of {len(stopped)} responses (0%) ended by themselves, all were cut off at "
                f"{self.sampling.max_new_tokens} tokens: their rewards are those of unfinished texts. Give them more "
                "room (model.sampling.max_new_tokens) or more to end with (stop_token_ids, stop_strings).",
                stacklevel=2,
            )

    def _decode(self, rows: TokenRows) -> list[str]:
        bounds = zip(rows.input_ids, rows.prompt_lengths, rows.lengths, strict=True)
        return [self.tokenizer.decode(ids[start:end], skip_special_tokens=True) for ids, start, end in bounds]

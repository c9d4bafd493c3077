"""Actor, critic and reference in as few forward passes as they allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lit_vapo.folders import new_folder
from lit_vapo.functional import TokenLogprobs
from lit_vapo.models.critic import (
    Critic,
    CriticSpec,
    HiddenStates,
    Reads,
    load_critic,
    own_trunk,
    save_critic,
    saved_trunk,
)
from lit_vapo.models.digests import seal
from lit_vapo.models.exported import same_model
from lit_vapo.models.generation import Sampling, generation_config, stop_ids
from lit_vapo.models.lower_blocks import LowerBlocks
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.sharding import Sharing
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import Tap, content_lengths, length_mask, pool, response_states, run_trunk

CRITIC_NAME = "critic"


class ReferencePass(NamedTuple):
    """Everything that one pass through the frozen base yields.

    Attributes:
        logprobs: Log-probabilities of the responses under the reference (B, T).
        entropy: Entropy of the reference at each position (B, T), nats.
        value_states: States for the critic (B, T, H), or `None` if it has another trunk.
        pooled: Pooled hidden states (B, H) for each tap that was asked for.
        states: States that predict each response token (B, T, H), or `None` if nobody asked.
        lower_states: What the blocks below the policy's adapters make of all tokens (B, L, H); `None` where there are
            none.
    """

    logprobs: Tensor
    entropy: Tensor
    value_states: Tensor | None
    pooled: list[Tensor]
    states: Tensor | None = None
    lower_states: Tensor | None = None


class ActorCritic(nn.Module):
    """The networks that PPO trains, and their reference.

    One pass of the reference, which the KL needs anyway, also serves the critic and whoever asks for hidden states of
    it.

    Args:
        base: The language model to align.
        lora: Adapters to train, or `None` to train all weights.
        critic: What the critic reads; `None` builds no critic.
        policy: Folder of an exported policy to start from (see `Policy`), with its critic if that fits.
        reads: What rewards are computed from: where it is the critic's model, the critic reads at the same depth, and
            may start from the mean reward.

    Attributes:
        critic_start: Where the critic's weights come from, in words.
    """

    def __init__(
        self,
        base: Pretrained,
        lora: Lora | None,
        critic: CriticSpec | None,
        policy: str | None = None,
        reads: HiddenStates | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.critic_trunk = None if critic is None else critic.trunk
        critic_base = critic.base if critic is not None and critic.trunk == "own" else None
        comparable = reads is not None and same_model(reads.base, critic_base or base)
        # Value and reward are read at the same depth where they read the same model.
        self.value_layer = reads.layer if reads is not None and comparable else None
        # Above that depth the critic holds nothing: nothing there would ever get a gradient.
        self.policy = Policy(
            base, lora, critic_adapter=self.critic_trunk == "lora", critic_depth=self.value_layer, start=policy
        )
        self.lower = LowerBlocks(self.policy)
        self.warm = critic is not None and critic.warm_start and comparable
        self.critic: Critic | None = None
        self.critic_start = "zeros"
        if critic is not None:
            self._make_critic(critic, policy)

    def _make_critic(self, spec: CriticSpec, policy: str | None) -> None:
        """The critic, with the weights of the policy it was exported with if they fit."""
        folder = Path(policy) / CRITIC_NAME if policy is not None else None
        path = (spec.base or self.base).path if spec.trunk == "own" else self.base.path
        # Adapters are at home in the model they adapt, which need not be the base.
        self.reads = Reads(spec.trunk, self.policy.start.path if spec.trunk == "lora" else path, self.value_layer)
        trunk = None
        if spec.trunk == "own":
            saved = saved_trunk(folder, self.reads) if folder is not None else None
            if saved is not None:
                saved.gradient_checkpointing = (spec.base or self.base).gradient_checkpointing
            # A saved one is cut off already.
            trunk = (
                own_trunk(spec, self.base, self.value_layer)
                if saved is None
                else own_trunk(replace(spec, base=saved), saved)
            )
        self.critic = Critic(int(trunk.config.hidden_size) if trunk is not None else self.policy.hidden_size, trunk)
        if folder is not None and load_critic(folder, self.critic, self._critic_adapters(), self.reads):
            self.critic_start, self.warm = str(folder), False

    def _critic_adapters(self) -> dict[str, nn.Parameter]:
        """The critic's adapters on the policy's base, by name."""
        return {n: p for n, p in self.policy.lm.named_parameters() if ".critic." in n}

    def warm_start_critic(self, linear: tuple[Tensor, Tensor] | None) -> None:
        """Start the value head from a mean reward, where both read the same hidden states.

        Args:
            linear: Weight (H,) and bias () of the mean reward, or `None` if it is not linear.
        """
        if self.critic is not None and self.warm and self.critic.warm_start(linear):
            self.critic_start = "the mean reward"

    @torch.no_grad()
    def reference(
        self, rows: TokenRows, shaping: Shaping, taps: Sequence[Tap] = (), keep_states: bool = False
    ) -> ReferencePass:
        """One pass through the frozen base."""
        return self.policy.within("reference", lambda _: self._reference(rows, shaping, taps, keep_states))

    def _reference(self, rows: TokenRows, shaping: Shaping, taps: Sequence[Tap], keep_states: bool) -> ReferencePass:
        read_here = self.value_layer if self.critic_trunk == "reference" else None
        layers = [None, read_here, *(tap.layer for tap in taps)]
        with self.lower.keep() as kept:
            last, valued, *tapped = self.policy.layers("reference", rows.input_ids, rows.lengths, layers)
        if kept and not self.lower.tried:
            real = length_mask(rows.lengths, rows.input_ids.shape[1])
            with self.lower.give(kept[0]):
                again = self.policy.hidden("reference", rows.input_ids, rows.lengths).last
            self.lower.compare(last[real], again[real])
        logprobs = self.policy.logprobs("reference", last, *rows[:3], shaping)
        size = rows.response_mask.shape[1]
        states = response_states(last, rows.prompt_lengths, size) if keep_states else None
        value_states = None
        if self.critic_trunk == "reference":
            value_states = response_states(valued, rows.prompt_lengths, size)
        pooled = _pooled(rows, taps, tapped)
        lower_states = kept[0] if kept and self.lower.depth else None
        return ReferencePass(logprobs.logprobs, logprobs.entropy, value_states, pooled, states, lower_states)

    @torch.no_grad()
    def features(self, rows: TokenRows, taps: Sequence[Tap]) -> list[Tensor]:
        """What `reference` yields for the taps alone (B, H), from a pass that goes no deeper than they read."""
        if not taps:
            return []
        hidden = self.policy.layers("reference", rows.input_ids, rows.lengths, [tap.layer for tap in taps])
        return _pooled(rows, taps, hidden)

    def actor(self, rows: TokenRows, shaping: Shaping) -> TokenLogprobs:
        """Log-probabilities and entropies of the responses under the policy (B, T)."""
        with self.lower.give(rows.lower_states):
            return self.policy.response_logprobs("actor", rows, shaping)

    def actor_with_kl(self, rows: TokenRows, shaping: Shaping, ref_states: Tensor) -> tuple[TokenLogprobs, Tensor]:
        """The same, and the exact KL of each token's distribution from the reference's (B, T), nats, from one pass.

        Args:
            rows: The sequences.
            shaping: How the responses were drawn.
            ref_states: What `reference` kept of its states (B, T, H).
        """

        def work(_: object) -> list[Tensor]:
            hidden = self.policy.hidden("actor", rows.input_ids, rows.lengths).last
            kl = self.policy.kl(hidden, ref_states, rows, shaping)
            return [*self.policy.logprobs("actor", hidden, *rows[:3], shaping), kl]

        with self.lower.give(rows.lower_states):
            *logprobs, kl = self.policy.within("actor", work)
        return TokenLogprobs(*logprobs), kl

    def values(self, rows: TokenRows, value_states: Tensor | None) -> Tensor:
        """Values before each response token (B, T).

        Args:
            rows: The sequences.
            value_states: What `reference` kept for the critic, if that is what it reads.

        Raises:
            ValueError: There is no critic.
        """
        if self.critic is None:
            raise ValueError("values: expected networks with a critic, got some without")
        if value_states is not None:
            return cast("Tensor", self.critic(value_states))
        if self.critic.trunk is not None:
            hidden = run_trunk(self.critic.trunk, rows.input_ids, rows.lengths, self.value_layer).tapped
        else:
            hidden = self.policy.hidden("critic", rows.input_ids, rows.lengths, self.value_layer).tapped
        return cast("Tensor", self.critic(response_states(hidden, rows.prompt_lengths, rows.response_mask.shape[1])))

    def share(self, sharing: Sharing) -> None:
        """Share policy, reference and the critic's own trunk with other processes."""
        self.policy.share(sharing)
        if self.critic is not None and self.critic.trunk is not None:
            sharing.share(self.critic.trunk)

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the policy loss trains."""
        return self.policy.actor_parameters()

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the value loss trains; nothing without a critic."""
        if self.critic is None:
            return []
        return [*self.critic.parameters(), *self.policy.critic_parameters()]

    def save_pretrained(self, folder: str | Path, sampling: Sampling, merge: bool = False) -> None:
        """Write the policy, its tokenizer, how it is sampled, and below `critic` the critic, if any.

        Args:
            folder: Where to; it is written whole or not at all.
            sampling: How the policy was sampled in training.
            merge: Add adapters to the weights (see `Policy.save_pretrained`).

        Raises:
            FileExistsError: The folder is not empty.
            ValueError: Adapters of a quantised base are to be merged.
        """
        tokenizer = load_tokenizer(self.base)
        stops = stop_ids(self.policy.causal_lm, sampling, tokenizer.eos_token_id)
        pad = {} if tokenizer.pad_token_id is None else {"pad_token_id": int(tokenizer.pad_token_id)}
        # Before adapters are merged, if they are to be: that takes the critic's away.
        adapters = {n: p.detach().contiguous() for n, p in self._critic_adapters().items()}
        with new_folder(folder, "--output") as target:
            self.policy.save_pretrained(target, merge)
            tokenizer.save_pretrained(target)
            # After the model's own, which transformers writes beside whole weights.
            generation_config(sampling, stops, **pad).save_pretrained(target)
            if self.critic is not None:
                save_critic(target / CRITIC_NAME, self.critic, adapters, self.reads)
            seal(target)


def _pooled(rows: TokenRows, taps: Sequence[Tap], hidden: Sequence[Tensor]) -> list[Tensor]:
    """Features of the responses (B, H) from the hidden states (B, L, H) that each tap reads."""
    found = []
    for tap, states in zip(taps, hidden, strict=True):
        read = content_lengths(rows.input_ids, rows.lengths, rows.prompt_lengths, tap.ends)
        found.append(pool(states, read, rows.prompt_lengths, tap.pooling))
    return found

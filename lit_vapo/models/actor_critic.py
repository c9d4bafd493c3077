"""Actor, critic, reference and reward features in as few forward passes as they allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_vapo.folders import new_folder
from lit_vapo.functional import TokenLogprobs
from lit_vapo.models.critic import Critic, CriticSpec, Reads, load_critic, own_trunk, save_critic, saved_trunk
from lit_vapo.models.digests import seal
from lit_vapo.models.exported import same_place
from lit_vapo.models.generation import Sampling, Shaping, generation_config, stop_ids
from lit_vapo.models.policy import Policy, Role
from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.models.trunk import content_lengths, pool, response_states, run_trunk
from lit_vapo.rewards.reward_model import RewardModel, ensemble_class
from lit_vapo.rewards.ensemble_file import read_trusted_config

CRITIC_NAME = "critic"


class ReferencePass(NamedTuple):
    """Everything that one pass through the frozen base yields.

    Attributes:
        logprobs: Log-probabilities of the responses under the reference (B, T).
        entropy: Entropy of the reference at each position (B, T), nats.
        features: Pooled features for the reward heads (B, H), or `None` if the ensemble has another base.
        value_states: States for the critic (B, T, H), or `None` if it has another trunk.
    """

    logprobs: Tensor
    entropy: Tensor
    features: Tensor | None
    value_states: Tensor | None


class ActorCritic(nn.Module):
    """The networks of PPO.

    If the reward ensemble reads frozen hidden states of the policy's own base, its features come from the
    reference's pass, which the KL needs anyway; the same goes for the critic's states. Members that adapt that base
    hang their adapters into it, so that it is in memory once.

    Args:
        base: The language model to align.
        lora: Adapters to train, or `None` to train all weights.
        critic: What the critic reads; `None` builds no critic.
        reward: Folder of the reward ensemble.
        policy: Folder of an exported policy to start from (see `Policy`), with its critic if that fits.
        trust: Code that the ensemble may ask for (see `RewardModel.from_pretrained`).

    Attributes:
        critic_start: Where the critic's weights come from, in words.
    """

    def __init__(
        self,
        base: Pretrained,
        lora: Lora | None,
        critic: CriticSpec | None,
        reward: str,
        policy: str | None = None,
        trust: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        config = read_trusted_config(reward, trust)
        spec, kind = config.spec, ensemble_class(config)
        frozen = not config.own_backbone and kind.shares_features
        same = _same_model(spec.base, base)
        self.shares_base = frozen and same
        # Members of a truncated base keep one of their own: the blocks above would run for nothing, K times over.
        adapts_base = same and not (kind.shares_features or kind.owns_backbones) and spec.layer is None
        if not adapts_base:
            self.reward_model = RewardModel.from_pretrained(reward, with_backbone=not self.shares_base, trust=trust)
        self.base = base
        self.critic_trunk = None if critic is None else critic.trunk
        # Value and reward are read at the same depth where they read the same model.
        critic_base = critic.base if critic is not None and critic.trunk == "own" else None
        comparable = critic is not None and frozen and _same_model(spec.base, critic_base or base)
        self.tap_layer = spec.layer if self.shares_base else None
        self.value_layer = spec.layer if comparable else None

        def attach(backbone: PreTrainedModel) -> None:
            if adapts_base:
                self.reward_model = RewardModel.from_pretrained(reward, lent=backbone, trust=trust)

        # Above the depth at which it reads, the critic holds nothing: nothing there would ever get a gradient.
        self.policy = Policy(
            base,
            lora,
            critic_adapter=self.critic_trunk == "lora",
            critic_depth=self.value_layer,
            start=policy,
            lend=attach,
        )
        if adapts_base:
            self.reward_model.lender = self.policy.reference_backbone
        self.warm = critic is not None and critic.warm_start and comparable
        self.critic: Critic | None = None
        self.critic_start = "zeros"
        if critic is not None:
            self._make_critic(critic, policy)
        self.warm_start_critic()

    def _make_critic(self, spec: CriticSpec, policy: str | None) -> None:
        """The critic, with the weights of the policy it was exported with if they fit."""
        folder = Path(policy) / CRITIC_NAME if policy is not None else None
        path = (spec.base or self.base).path if spec.trunk == "own" else self.base.path
        # Adapters are at home in the model they adapt, which need not be the base.
        self.reads = Reads(spec.trunk, self.policy.start.path if spec.trunk == "lora" else path, self.value_layer)
        trunk = None
        if spec.trunk == "own":
            saved = saved_trunk(folder, self.reads) if folder is not None else None
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

    def warm_start_critic(self) -> None:
        """Start the value head from the ensemble's mean reward, where both read the same hidden states."""
        if self.critic is not None and self.warm and self.critic.warm_start(self.reward_model.head.linear_mean()):
            self.critic_start = "the ensemble's mean reward"

    @torch.no_grad()
    def reference(self, rows: TokenRows, shaping: Shaping) -> ReferencePass:
        """One pass through the frozen base."""
        out = self.policy.hidden("reference", rows.input_ids, rows.lengths, self.tap_layer)
        logprobs = self._logprobs("reference", out.last, rows, shaping)
        features = states = None
        if self.shares_base:
            spec = self.reward_model.spec
            read = content_lengths(rows.input_ids, rows.lengths, rows.prompt_lengths, spec.ends)
            features = pool(out.tapped, read, rows.prompt_lengths, spec.pooling)
        if self.critic_trunk == "reference":
            states = response_states(out.tapped, rows.prompt_lengths, rows.response_mask.shape[1])
        return ReferencePass(logprobs.logprobs, logprobs.entropy, features, states)

    def actor(self, rows: TokenRows, shaping: Shaping) -> TokenLogprobs:
        """Log-probabilities and entropies of the responses under the policy (B, T)."""
        hidden = self.policy.hidden("actor", rows.input_ids, rows.lengths).last
        return self._logprobs("actor", hidden, rows, shaping)

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

    def actor_parameters(self) -> list[nn.Parameter]:
        """What the policy loss trains."""
        return self.policy.actor_parameters()

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the value loss trains; nothing without a critic."""
        if self.critic is None:
            return []
        return [*self.critic.parameters(), *self.policy.critic_parameters()]

    def _logprobs(self, role: Role, hidden: Tensor, rows: TokenRows, shaping: Shaping) -> TokenLogprobs:
        return self.policy.logprobs(role, hidden, rows.input_ids, rows.prompt_lengths, rows.response_mask, shaping)

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


def _same_model(one: Pretrained, other: Pretrained) -> bool:
    """Whether two specifications give the same frozen weights."""
    alike = (one.revision, one.quantization) == (other.revision, other.quantization)
    return alike and same_place(one.path, other.path)

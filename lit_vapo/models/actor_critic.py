"""Actor, critic, reference and reward features in as few forward passes as they allow."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_vapo.folders import check_new
from lit_vapo.functional import TokenLogprobs
from lit_vapo.models.critic import Critic, CriticSpec, own_trunk
from lit_vapo.models.generation import Shaping
from lit_vapo.models.policy import Policy, Role
from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.models.reward import RewardModel, head_class, read_config
from lit_vapo.models.trunk import pool, response_states, run_trunk


class Rows(NamedTuple):
    """Prompts with their responses, right-padded.

    Attributes:
        input_ids: Token ids (B, L).
        prompt_lengths: Tokens of each prompt (B,).
        response_mask: True at the tokens of each response (B, T), from its first token on.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of prompt and response (B,)."""
        return self.prompt_lengths + self.response_mask.sum(1)

    def select(self, index: Tensor) -> Rows:
        """The rows of an index (b,), cut to the longest sequence and the longest response among them."""
        mask = self.response_mask[index]
        prompts = self.prompt_lengths[index]
        size = int(mask.sum(1).max())
        longest = int((prompts + mask.sum(1)).max())
        return Rows(self.input_ids[index, :longest], prompts, mask[:, :size])


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
    reference's pass, which the KL needs anyway; the same goes for the critic's states.

    Args:
        base: The language model to align.
        lora: Adapters to train, or `None` to train all weights.
        critic: What the critic reads; `None` builds no critic.
        reward: Folder of the reward ensemble.
    """

    def __init__(self, base: Pretrained, lora: Lora | None, critic: CriticSpec | None, reward: str) -> None:
        super().__init__()
        config = read_config(reward)
        frozen = not config["own_backbone"] and head_class(config["head"]["class_path"]).shares_features
        self.shares_base = frozen and _same_model(Pretrained(**config["spec"]["base"]), base)
        self.reward_model = RewardModel.from_pretrained(reward, with_backbone=not self.shares_base)
        spec = self.reward_model.spec
        self.base = base
        self.critic_trunk = None if critic is None else critic.trunk
        # Value and reward are read at the same depth where they read the same model.
        critic_base = critic.base if critic is not None and critic.trunk == "own" else None
        comparable = critic is not None and frozen and _same_model(spec.base, critic_base or base)
        self.tap_layer = spec.layer if self.shares_base else None
        self.value_layer = spec.layer if comparable else None
        # Above the depth at which it reads, the critic holds nothing: nothing there would ever get a gradient.
        self.policy = Policy(base, lora, critic_adapter=self.critic_trunk == "lora", critic_depth=self.value_layer)
        self.critic: Critic | None = None
        if critic is not None:
            trunk = own_trunk(critic, base, self.value_layer) if critic.trunk == "own" else None
            self.critic = Critic(int(trunk.config.hidden_size) if trunk is not None else self.policy.hidden_size, trunk)
        self.warm = critic is not None and critic.warm_start and comparable
        self.warm_start_critic()

    def warm_start_critic(self) -> None:
        """Start the value head from the ensemble's mean reward, where both read the same hidden states."""
        if self.critic is not None and self.warm:
            self.critic.warm_start(self.reward_model.head.linear_mean())

    @torch.no_grad()
    def reference(self, rows: Rows, shaping: Shaping) -> ReferencePass:
        """One pass through the frozen base."""
        out = self.policy.hidden("reference", rows.input_ids, rows.lengths, self.tap_layer)
        logprobs = self._logprobs("reference", out.last, rows, shaping)
        features = states = None
        if self.shares_base:
            features = pool(out.tapped, rows.lengths, rows.prompt_lengths, self.reward_model.spec.pooling)
        if self.critic_trunk == "reference":
            states = response_states(out.tapped, rows.prompt_lengths, rows.response_mask.shape[1])
        return ReferencePass(logprobs.logprobs, logprobs.entropy, features, states)

    def actor(self, rows: Rows, shaping: Shaping) -> TokenLogprobs:
        """Log-probabilities and entropies of the responses under the policy (B, T)."""
        hidden = self.policy.hidden("actor", rows.input_ids, rows.lengths).last
        return self._logprobs("actor", hidden, rows, shaping)

    def values(self, rows: Rows, value_states: Tensor | None) -> Tensor:
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

    def _logprobs(self, role: Role, hidden: Tensor, rows: Rows, shaping: Shaping) -> TokenLogprobs:
        return self.policy.logprobs(role, hidden, rows.input_ids, rows.prompt_lengths, rows.response_mask, shaping)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy, its tokenizer, and below `critic` the value head with its trunk or adapters, if any.

        Raises:
            FileExistsError: The folder is not empty.
        """
        folder = check_new(folder, "export")
        self.policy.save_pretrained(folder)
        load_tokenizer(self.base).save_pretrained(folder)
        if self.critic is None:
            return
        critic = folder / "critic"
        critic.mkdir(parents=True)
        trained = {n: p.detach().contiguous() for n, p in self.policy.lm.named_parameters() if ".critic." in n}
        head = {f"value_head.{n}": p.detach() for n, p in self.critic.value_head.state_dict().items()}
        save_file({**head, **trained}, critic / "critic.safetensors")
        if self.critic.trunk is not None:
            self.critic.trunk.save_pretrained(critic / "trunk")


def _same_model(one: Pretrained, other: Pretrained) -> bool:
    """Whether two specifications give the same frozen weights."""
    return (one.path, one.revision, one.quantization) == (other.path, other.revision, other.quantization)

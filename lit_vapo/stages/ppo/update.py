"""The learning half of a PPO iteration: minibatches, losses, steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lit_vapo.advantages.base import AdvantageEstimator
from lit_vapo.functional import approx_kl, explained_variance, masked_sum, policy_loss_terms, value_loss_terms
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.batching import even_batches
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.ranges import PositiveFloat, PositiveInt, check_ranges
from lit_vapo.stages.ppo.experience import Experience
from lit_vapo.stages.ppo.signal import SignalProbe, halves_by_prompt
from lit_vapo.stages.sharing import average_gradients, clip_gradients, sharers, unsynced
from lit_vapo.stages.strategy import sharing_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@dataclass
class UpdateSettings:
    """How PPO learns from a rollout.

    Args:
        epochs: Passes over the rollout.
        minibatches: Weight updates in each pass; the rows are shuffled anew for each pass.
        micro_batch_tokens: Tokens of one forward and backward pass, padding included; gradients accumulate over a
            minibatch, and the result does not depend on this number.
        clip_range: The ratio's gain ends outside 1 ± this.
        value_clip_range: New values stay within this of the old ones; `null` to leave them free. This and the next
            matter only where the advantage needs a critic.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of an entropy bonus.
        max_grad_norm: Gradients are scaled down to this norm.
        max_approx_kl: Stop the passes of an iteration once the policy has moved further than this from the one that
            sampled: KL(π_old‖π_new) by k3 of tokens, in nats per token (`train/approx_kl`), unlike
            `model.kl_target` and `model.kl_budget`, which are about the reference. `null` for never.
        critic_warmup: In this many first iterations only the critic learns.
        sampler_ratio_cap: Where the generator says with what log-probabilities it drew its tokens, the policy loss of
            each token is weighted by π/π_sampler at the time of the rollout, at most by this much; `null` for no
            weights.
    """

    epochs: PositiveInt = 2
    minibatches: PositiveInt = 4
    micro_batch_tokens: PositiveInt = 4096
    clip_range: PositiveFloat = 0.2
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_approx_kl: float | None = None
    critic_warmup: int = 0
    sampler_ratio_cap: PositiveFloat | None = 2.0

    def __post_init__(self) -> None:
        check_ranges(UpdateSettings, vars(self), "model.update.")


def chosen_critic(
    critic: CriticSpec | None, advantage: AdvantageEstimator, settings: UpdateSettings
) -> CriticSpec | None:
    """The critic to build, or `None` where the advantage needs none.

    Raises:
        ValueError: A critic or its warm-up is asked for and would not be used.
    """
    if advantage.needs_critic:
        return critic or CriticSpec()
    name = type(advantage).__name__
    if critic is not None:
        raise ValueError(f"model.critic: expected null, since {name} needs no critic, got {critic}")
    if settings.critic_warmup:
        raise ValueError(
            f"model.update.critic_warmup: expected 0, since {name} needs no critic, got {settings.critic_warmup}"
        )
    return None


class PPOUpdate:
    """Several epochs of minibatch updates on one rollout.

    Args:
        module: The LightningModule, for backward passes and reductions over processes.
        networks: Actor and critic.
        settings: How to learn.
        shaping: How the rollout was sampled.
    """

    def __init__(
        self, module: LightningModule, networks: ActorCritic, settings: UpdateSettings, shaping: Shaping
    ) -> None:
        self.module = module
        self.networks = networks
        self.settings = settings
        self.shaping = shaping

    def run(
        self,
        experience: Experience,
        optimizer: torch.optim.Optimizer,
        train_actor: bool = True,
        num_responses: int = 1,
    ) -> dict[str, Tensor]:
        """Update the weights.

        Args:
            experience: What to learn from.
            optimizer: Steps actor and critic.
            train_actor: Off while only the critic learns.
            num_responses: Responses to each prompt, which stand together.

        Returns:
            Statistics of the update, by name; each a scalar, already over all processes.

        Raises:
            ValueError: The loss or its gradient is not finite; no step was taken with it.
        """
        rows = len(experience.rows.prompt_lengths)
        device = experience.logprobs.device
        done: list[dict[str, Tensor]] = []
        updates, stopped, signal = 0, False, {}
        # Autocast keeps casts of the weights for as long as the training step lasts, across weight updates: with
        # mixed precision every minibatch would see the first one's weights.
        torch.clear_autocast_cache()
        for _ in range(self.settings.epochs):
            for index in torch.randperm(rows).tensor_split(min(self.settings.minibatches, rows)):
                optimizer.zero_grad()
                # The first minibatch is the policy's own: its gradient has no ratios in it yet.
                probe = self._probe(index, num_responses) if train_actor and not done else None
                done.append(self._accumulate(experience.select(index.to(device)), train_actor, probe))
                if probe is not None:
                    signal = probe.statistics()
                limit = self.settings.max_approx_kl
                stopped = limit is not None and float(done[-1]["approx_kl"]) > limit
                if stopped:
                    break
                done[-1].update(self._step(optimizer))
                updates += 1
            if stopped:
                break
        summary = {name: torch.stack([d[name] for d in done if name in d]).mean() for name in done[0]} | signal
        summary["ratio_max"] = torch.stack([d["ratio_max"] for d in done]).max()
        summary["first_ratio"] = done[0]["ratio"]
        summary["first_ratio_max"] = done[0]["ratio_max"]
        summary["updates"] = torch.tensor(float(updates), device=device)
        mask = experience.rows.response_mask
        if experience.values is not None and experience.returns is not None:
            values, returns, tokens = experience.values, experience.returns, self._sum(mask.sum().double())
            summary["explained_variance"] = explained_variance(values, returns, mask, self._sum).to(device)
            summary["value_mean"] = (self._sum(masked_sum(values, mask).double()) / tokens).float()
            summary["return_mean"] = (self._sum(masked_sum(returns, mask).double()) / tokens).float()
        return summary

    def _probe(self, index: Tensor, num_responses: int) -> SignalProbe | None:
        """What looks at the halves of a minibatch, if all processes can cut theirs and gradients are whole in each."""
        if sharing_of(self.module.trainer.strategy) is not None:
            return None
        halves = halves_by_prompt(index, num_responses)
        parameters = self.networks.actor_parameters()
        if not float(self._all_reduce(torch.tensor(float(halves is not None), device=parameters[0].device), "min")):
            return None
        assert halves is not None
        return SignalProbe(parameters, halves, self._sum, sharers(self.module).size)

    def _accumulate(
        self, experience: Experience, train_actor: bool, probe: SignalProbe | None = None
    ) -> dict[str, Tensor]:
        """Gradients of one minibatch, in microbatches of similar length; its statistics over all processes."""
        tokens = self._sum(experience.rows.response_mask.sum().double())
        sums: dict[str, Tensor] = {}
        ratio_max = tokens.new_zeros(())
        parts = (torch.arange(len(experience.rows.lengths)),) if probe is None else probe.halves
        cut = [self._micro_batches(experience.rows, rows.to(tokens.device)) for rows in parts]
        batches = [batch for part in cut for batch in part]
        for number, index in enumerate(batches, start=1):
            part = experience.select(index)
            loss, terms = self._loss(part, train_actor)
            # Summed over tokens and divided by the global count, so that neither the number of microbatches nor
            # that of processes matters. Data-parallel strategies average gradients: undo that.
            loss = loss / tokens.to(loss) * sharers(self.module).size
            with unsynced(self.module, last=number == len(batches)):
                self.module.manual_backward(loss)
            if probe is not None and number == len(cut[0]):
                probe.look()
            ratio_max = torch.maximum(ratio_max, terms.pop("ratio_max").double())
            for name, value in terms.items():
                sums[name] = sums.get(name, tokens.new_zeros(())) + value.double()
        means = {name: (self._sum(value) / tokens).float() for name, value in sums.items()}
        means["ratio_max"] = self._all_reduce(ratio_max, "max").float()
        _check_scalars(means)
        return means

    def _micro_batches(self, rows: TokenRows, chosen: Tensor) -> list[Tensor]:
        """Chosen rows by microbatch; the same number of microbatches in every process, or they would wait forever."""
        batches = even_batches(
            rows.lengths[chosen].tolist(),
            self.settings.micro_batch_tokens,
            lambda count: int(self._all_reduce(torch.tensor(count, device=chosen.device), "max")),
            chosen.device,
        )
        return [chosen[torch.tensor(batch, device=chosen.device)] for batch in batches]

    def _loss(self, part: Experience, train_actor: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss summed over tokens, and sums of statistics."""
        settings, mask = self.settings, part.rows.response_mask
        actor = self.networks.actor(part.rows, self.shaping)
        policy = policy_loss_terms(actor.logprobs, part.logprobs, part.advantages, mask, settings.clip_range)
        policy_loss = (policy.loss if part.weights is None else policy.loss * part.weights).sum()
        actor_loss = policy_loss
        if settings.entropy_coef:
            actor_loss = actor_loss - settings.entropy_coef * masked_sum(actor.entropy, mask)
        # Times zero rather than left out: data-parallel strategies expect a gradient for every parameter.
        loss = actor_loss * float(train_actor)
        terms = {
            "policy_loss": policy_loss,
            "ratio": policy.ratio.sum(),
            "ratio_max": policy.ratio.max(),
            "clip_fraction": policy.clipped.sum(),
            "approx_kl": approx_kl(part.logprobs, actor.logprobs, mask) * mask.sum(),
        }
        if part.values is not None and part.returns is not None:
            values = self.networks.values(part.rows, part.value_states)
            value = value_loss_terms(values, part.values, part.returns, mask, settings.value_clip_range)
            loss = loss + settings.value_coef * value.loss.sum()
            terms.update(value_loss=value.loss.sum(), value_clip_fraction=value.clipped.sum())
        return loss, {name: x.detach() for name, x in terms.items()}

    def _step(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """One weight update; actor and critic are clipped apart, since their gradients have different units."""
        limit = self.settings.max_grad_norm
        average_gradients(self.module)
        norms = {"actor_grad_norm": clip_gradients(self.networks.actor_parameters(), limit)}
        if self.networks.critic is not None:
            norms["critic_grad_norm"] = clip_gradients(self.networks.critic_parameters(), limit)
        _check_scalars(norms)
        optimizer.step()
        torch.clear_autocast_cache()
        return norms

    def _sum(self, x: Tensor) -> Tensor:
        return self._all_reduce(x, "sum")

    def _all_reduce(self, x: Tensor, operation: str) -> Tensor:
        return cast("Tensor", self.module.trainer.strategy.reduce(x, reduce_op=operation))


def _check_scalars(values: dict[str, Tensor]) -> None:
    """Refuse a statistic of the loss or the gradient that is not finite; these are the same in all processes."""
    for name, value in values.items():
        if not torch.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value.item()}; no step was taken with it")

"""An iteration of PPO: rollout, scoring, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.averaging import WeightAverage
from lit_vapo.models.batching import TOKENS_ON_CPU, TOKENS_PER_BATCH
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.pretrained import Lora, Pretrained, decoder_layers
from lit_vapo.models.vocabulary import vocabulary_size
from lit_vapo.models.weightless import weightless
from lit_vapo.plan.draft import Draft, Moment, Phase, Setup, stretched, training_moments
from lit_vapo.plan.dry_run import DryRun, held_bytes, parameter_bytes
from lit_vapo.plan.formulas import microbatch
from lit_vapo.rewards import RewardSource

# Numbers that a rollout keeps for each response token, float32: log-probabilities, entropies, values, rewards,
# advantages, returns and masks, and some of them once more while they are put in order.
KEPT = 12 * 4


@dataclass
class PPOJob:
    """The settings of the ppo stage that memory and time depend on.

    Args:
        base: The language model.
        lora: Adapters, or `None`.
        critic: The critic, or `None`.
        reward: The source of rewards, or `None` for heads on the policy's base, which cost nothing.
        policy: A whole model that the policy starts from, or `None`.
        prompts: Prompts of an iteration, on each device.
        responses: Responses to each prompt.
        prompt_length: Tokens of the longest prompt.
        new: Tokens of the longest response.
        epochs: Passes over a rollout.
        minibatches: Weight updates of a pass.
        micro_batch_tokens: Tokens of a microbatch.
        averaged: Whether an average of what trains is held.
    """

    base: Pretrained
    lora: Lora | None
    critic: CriticSpec | None
    reward: RewardSource | None
    policy: str | None
    prompts: int
    responses: int
    prompt_length: int
    new: int
    epochs: int
    minibatches: int
    micro_batch_tokens: int
    averaged: bool = False


def draft_ppo(job: PPOJob, setup: Setup) -> Draft:
    """What an iteration takes if all prompts and responses are as long as they may be."""
    one = (job.lora is None or job.lora.top_layers is None) and (job.critic is None or job.critic.base is None)
    uniform = one and job.policy is None and _reads_the_end(job)
    return stretched(job.base, uniform, lambda depth: _draft(job, setup, depth))


def _reads_the_end(job: PPOJob) -> bool:
    """Whether rewards come from the last block of the policy's base, or from no model at all."""
    if job.reward is None:
        return True
    reads = job.reward.reads()
    with weightless():
        job.reward.prepare(_networks(job).policy)
    return not job.reward.scorers() and (reads is None or reads.layer is None)


def _networks(job: PPOJob) -> ActorCritic:
    reads = None if job.reward is None else job.reward.reads()
    return ActorCritic(job.base, job.lora, job.critic, job.policy, reads)


def _draft(job: PPOJob, setup: Setup, depth: int) -> Draft:
    with weightless(depth):
        networks = _networks(job)
        averages = [WeightAverage(networks.actor_parameters, 0.5)] if job.averaged else []
        scorers = []
        if job.reward is not None:
            job.reward.prepare(networks.policy)
            scorers = job.reward.scorers()
    everything = nn.ModuleList([networks, *averages, *(scorer.model for scorer in scorers)])
    lm = networks.policy.causal_lm
    run = DryRun(everything, vocabulary_size(lm.config), setup.mixed, setup.on_cpu)
    trained = [*networks.actor_parameters(), *networks.critic_parameters()]
    rows, width = job.prompts * job.responses, job.prompt_length + job.new
    # Rollout.
    reading, drawing = run.generate(networks.policy, job.prompts, job.responses, job.prompt_length, job.new)
    weights = held_bytes(networks.policy.lm)
    # On average half of the response is there to be read.
    cached = drawing.parts.get("cache", 0.0) * (job.prompt_length + job.new / 2) / width
    rollout = Phase(
        "rollout",
        [Moment(parts) for found in (reading, drawing) for parts in found.moments],
        reading.flops + job.new * drawing.flops,
        job.new * (weights + cached),
        gathers=job.new + 1,
    )
    # Scoring.
    kept = KEPT * rows * job.new
    # States are of the weights' type, under autocast too.
    item = 4 if lm.dtype == torch.float32 else 2
    read = job.new if networks.critic_trunk == "reference" else 0
    states = float(rows * (read + (width if networks.lower.depth else 0)) * networks.policy.hidden_size * item)
    batch = microbatch(rows, width, TOKENS_ON_CPU if setup.on_cpu else TOKENS_PER_BATCH)
    passes = -(-rows // batch)
    taps = () if job.reward is None else job.reward.taps
    scored = run.score(networks, batch, job.prompt_length, job.new, taps)
    scoring = [scored]
    # What the passes kept for the critic and below the adapters, put side by side and then in order.
    moments = [Moment({"workspace": 3 * states + kept})]
    flops = scored.flops * passes
    for scorer in scorers:
        found = run.read(scorer.run, batch, width)
        scoring.append(found)
        flops += found.flops * passes
    for parts in (parts for found in scoring for parts in found.moments):
        moments.append(Moment({**parts, "workspace": parts.get("workspace", 0.0) + states + kept}))
    score = Phase("scoring", moments, flops, gathers=2 * passes)
    # Update.
    each = -(-rows // job.minibatches)
    tokens = min(job.micro_batch_tokens, TOKENS_ON_CPU) if setup.on_cpu else job.micro_batch_tokens
    batch = microbatch(each, width, tokens)
    passes = job.minibatches * -(-each // batch)
    learned = run.learn(networks, batch, job.prompt_length, job.new)
    # The rollout, and of it the minibatch.
    held = (states + kept) * (1 + 1 / job.minibatches)
    update = Phase(
        "update",
        training_moments(learned, held, step_bytes(trained, setup), (0, 1) if batch >= each else ()),
        learned.flops * passes * job.epochs,
        gathers=2.0 * passes * job.epochs,
        exchanges=float(job.epochs * job.minibatches),
        backward=float(passes * job.epochs),
    )
    half = setup.mixed is not None or lm.dtype != torch.float32
    trunk = networks.critic.trunk if networks.critic is not None else None
    cut = [
        *((*networks.actor_parameters(), *(x for a in averages for x in a.weights)) if job.lora is None else ()),
        *(trunk.parameters() if trunk is not None else ()),
    ]
    return Draft(
        weights=held_bytes(everything),
        trained=parameter_bytes(trained),
        gathered=gathered_bytes(lm),
        phases=[rollout, score, update],
        half=half,
        cut=parameter_bytes(cut),
        # Reward models of their own, adapters and the value head.
        whole=held_bytes(everything) - held_bytes(networks) + parameter_bytes(trained) - parameter_bytes(cut),
    )


def step_bytes(trained: list[nn.Parameter], setup: Setup) -> float:
    """What a step of AdamW makes for a while: a root of all second moments at once, on a CPU one after another."""
    if setup.on_cpu:
        return 2.0 * max(p.numel() * p.element_size() for p in trained)
    return parameter_bytes(trained) / (setup.devices if setup.sharded else 1)


def gathered_bytes(lm: nn.Module) -> float:
    """What FSDP2 has whole at a time: two blocks (the next one comes while one is at work), embeddings and head."""
    blocks = decoder_layers(lm.base_model)  # type: ignore[arg-type]
    return held_bytes(lm) - held_bytes(*blocks) + 2 * max(held_bytes(block) for block in blocks)

"""A step of reward training, and what comes before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lit_vapo.models.batching import TOKENS_ON_CPU, TOKENS_PER_BATCH
from lit_vapo.models.generation import Sampling
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import (
    Lora,
    Pretrained,
    decoder_layers,
    freeze,
    hidden_size,
    load_backbone,
    model_config,
)
from lit_vapo.models.trunk import Pooling
from lit_vapo.models.vocabulary import vocabulary_size
from lit_vapo.models.weightless import weightless
from lit_vapo.plan.draft import OF_LIGHTNING, Draft, Moment, Phase, Setup, stretched, training_moments
from lit_vapo.plan.dry_run import DryRun, held_bytes, parameter_bytes
from lit_vapo.plan.formulas import microbatch
from lit_vapo.plan.ppo import gathered_bytes, step_bytes
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel


@dataclass
class RewardJob:
    """The settings of the reward stage that memory and time depend on.

    Args:
        base: The backbone.
        head: The estimator, not built yet.
        layer: After how many blocks it reads, or `None`.
        pooling: How it pools.
        frozen: Whether the backbone's weights stay.
        reference: The policy that responds, or `None`.
        sampling: How it does.
        num_reference: To how many prompts.
        pairs: Pairs of a batch, on each device.
        length: Tokens of the longest sequence.
        prompt_length: Tokens of the longest prompt.
    """

    base: Pretrained
    head: RewardHead
    layer: int | None
    pooling: Pooling
    frozen: bool
    reference: Pretrained | None
    sampling: Sampling
    num_reference: int
    pairs: int
    length: int
    prompt_length: int


def draft_reward(job: RewardJob, setup: Setup) -> Draft:
    """What a step takes if all sequences are as long as they may be.

    Where no weight below the heads is trained, features are computed once for each pair, and that is the phase to look
    at; a step then sees the heads alone.
    """
    uniform = job.layer is None and getattr(job.head, "top_layers", None) is None
    fixed = job.head.has_fixed_features(job.frozen)
    draft = stretched(job.base, uniform, lambda depth: (_features if fixed else _training)(job, setup, depth))
    if job.reference is not None:
        draft = _with_reference(draft, job.reference, job, setup)
    return draft


def _run(job: RewardJob, setup: Setup, depth: int, training: bool) -> tuple[DryRun, RewardModel, nn.Module]:
    with weightless(depth):
        width = hidden_size(job.base)
        head = type(job.head)(**job.head.init_args())
        head.present = job.head.present
        head.build(width)
        layer = None if depth else job.layer
        backbone = freeze(load_backbone(job.base, layer))
        whole = head.in_training(backbone, decoder_layers(backbone)) if training else backbone
        model = RewardModel(FeatureSpec(job.base, layer, job.pooling), head, whole)
        vocabulary = vocabulary_size(model_config(job.base))
    return DryRun(model, vocabulary, setup.mixed, setup.on_cpu), model, backbone


def _features(job: RewardJob, setup: Setup, depth: int) -> Draft:
    run, model, backbone = _run(job, setup, depth, training=False)
    rows = microbatch(2 * job.pairs, job.length, TOKENS_ON_CPU if setup.on_cpu else TOKENS_PER_BATCH)
    found = run.read(model.encode, rows, job.length)
    passes = 2 * job.pairs / rows
    heads = [p for p in model.head.parameters() if p.requires_grad]
    # Heads see features (2B, H) in float32, and the way back makes as much again.
    step = {"workspace": 3.0 * 2 * job.pairs * (model.head.hidden_size or 0) * 4 + step_bytes(heads, setup)}
    phases = [
        Phase("features", [Moment(parts) for parts in found.moments], found.flops * passes),
        Phase("training", [Moment(step)]),
    ]
    half = setup.mixed is not None or backbone.dtype != torch.float32
    note = "features are computed once for each pair; `features` is the time for those of a batch"
    # Features are computed by one process, with the whole backbone.
    return Draft(held_bytes(model), parameter_bytes(heads), 0.0, phases, half, [note], whole=held_bytes(model))


def _training(job: RewardJob, setup: Setup, depth: int) -> Draft:
    run, model, backbone = _run(job, setup, depth, training=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = run.compare(model.encode, model.head.rewards, trained, 2 * job.pairs, job.length)
    moments = training_moments(found, 0.0, step_bytes(trained, setup), OF_LIGHTNING)
    phase = Phase("training", moments, found.flops, gathers=2.0, exchanges=1.0, backward=1.0)
    half = setup.mixed is not None or backbone.dtype != torch.float32
    # Adapters and heads are whole on each device.
    own = parameter_bytes([p for p in model.head.parameters() if p.requires_grad])
    total, gathered = parameter_bytes(trained), gathered_bytes(backbone)
    return Draft(held_bytes(model), total, gathered, [phase], half, cut=total - own, whole=held_bytes(model.head))


def _with_reference(draft: Draft, reference: Pretrained, job: RewardJob, setup: Setup) -> Draft:
    """The same with the reference's responses before; its model is gone when training begins."""

    def responses(depth: int) -> Draft:
        with weightless(depth):
            policy = Policy(reference, Lora(rank=1, target_modules="all-linear"), keep_reference=False)
        lm = policy.causal_lm
        run = DryRun(policy, vocabulary_size(lm.config), setup.mixed, setup.on_cpu)
        new, prompts = job.sampling.max_new_tokens, min(job.pairs, job.num_reference)
        reading, drawing = run.generate(policy, prompts, 1, job.prompt_length, new)
        batches = job.num_reference / prompts
        held = held_bytes(policy)
        phase = Phase(
            "reference",
            [Moment(parts, gradients=False) for found in (reading, drawing) for parts in found.moments],
            batches * (reading.flops + new * drawing.flops),
            batches * new * held,
        )
        return Draft(held, 0.0, 0.0, [phase], draft.half)

    made = stretched(reference, True, responses)
    phase = made.phases[0]
    # Instead of the backbone and the heads.
    instead = {"weights": made.weights - draft.weights, "optimiser": -2 * draft.trained}
    phase.moments = [Moment({**moment.parts, **instead}, gradients=False) for moment in phase.moments]
    note = "`reference` comes once, at the start; its time is for all its responses"
    draft.phases.insert(0, phase)
    draft.notes.append(note)
    return draft

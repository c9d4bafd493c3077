"""A step of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.vocabulary import vocabulary_size
from lit_vapo.models.weightless import weightless
from lit_vapo.plan.draft import OF_LIGHTNING, Draft, Phase, Setup, stretched, training_moments
from lit_vapo.plan.dry_run import DryRun, held_bytes, parameter_bytes
from lit_vapo.plan.ppo import gathered_bytes, step_bytes


@dataclass
class SFTJob:
    """The settings of the sft stage that memory and time depend on.

    Args:
        base: The language model.
        lora: Adapters, or `None`.
        rows: Rows of a batch, on each device.
        length: Tokens of the longest row.
    """

    base: Pretrained
    lora: Lora | None
    rows: int
    length: int


def draft_sft(job: SFTJob, setup: Setup) -> Draft:
    """What a step takes if all rows are as long as they may be."""
    uniform = job.lora is None or job.lora.top_layers is None
    return stretched(job.base, uniform, lambda depth: _draft(job, setup, depth))


def _draft(job: SFTJob, setup: Setup, depth: int) -> Draft:
    with weightless(depth):
        policy = Policy(job.base, job.lora, keep_reference=False)
    lm, trained = policy.causal_lm, policy.actor_parameters()
    run = DryRun(policy, vocabulary_size(lm.config), setup.mixed, setup.on_cpu)
    found = run.imitate(policy, job.rows, job.length)
    moments = training_moments(found, 0.0, step_bytes(trained, setup), OF_LIGHTNING)
    phase = Phase("training", moments, found.flops, gathers=2.0, exchanges=1.0, backward=1.0)
    half = setup.mixed is not None or lm.dtype != torch.float32
    total = parameter_bytes(trained)
    cut = total if job.lora is None else 0.0
    return Draft(held_bytes(policy), total, gathered_bytes(lm), [phase], half, cut=cut, whole=total - cut)

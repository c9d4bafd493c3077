"""What a study prepares once: responses of the reference, and what ensembles read of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import freeze, load_backbone, load_causal_lm, load_tokenizer
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.rollout import sample_references
from lit_vapo.types import TokenSequence


def feature_model(spec: FeatureSpec) -> RewardModel:
    """A reward model for its features alone: the layers that `spec` reads, and a head that scores nothing."""
    head = HeadEnsemble(1)
    head.build(1)
    return RewardModel(spec, head, freeze(load_backbone(spec.base, spec.layer)))


def reference_responses(
    spec: FeatureSpec, prompts: str | Path, tokens: int, seed: int, batch_size: int = 96
) -> tuple[Tensor, Iterator[list[TokenSequence]]]:
    """Responses of the reference, one to each prompt, again and again.

    Args:
        spec: Whose base is the reference.
        prompts: A file of prompts.
        tokens: Most tokens of a response.
        seed: Seed of the responses.
        batch_size: Prompts answered at once; the responses depend on it.

    Returns:
        Identities (P,) int64 of the prompts, as in `PromptBatch`, and an endless iterator of their responses.
    """
    data = PromptDataModule(spec.base.path, prompts=str(prompts), batch_size=batch_size, validation_fraction=0.0)
    batches = data.prompt_batches("train", sys.maxsize)
    lm, tokenizer = load_causal_lm(spec.base), load_tokenizer(spec.base)

    def answers() -> Iterator[list[TokenSequence]]:
        torch.manual_seed(seed)
        while True:
            yield sample_references(lm, tokenizer, batches, Sampling(tokens))

    return torch.cat([batch.example_ids for batch in batches]), answers()

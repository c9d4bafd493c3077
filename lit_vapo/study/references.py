"""What a study prepares once: responses of the reference, and what ensembles read of them."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import freeze, load_backbone, load_causal_lm, load_tokenizer
from lit_vapo.models.reward import FeatureSpec, RewardModel
from lit_vapo.rollout import sample_references
from lit_vapo.types import TokenSequence
from lit_vapo.uncertainty.head_ensemble import HeadEnsemble


def feature_model(spec: FeatureSpec) -> RewardModel:
    """A reward model for its features alone: the layers that `spec` reads, and a head that scores nothing."""
    head = HeadEnsemble(1)
    head.build(1)
    return RewardModel(spec, head, freeze(load_backbone(spec.base, spec.layer)))


def reference_responses(
    spec: FeatureSpec, prompts: str | Path, count: int, tokens: int, seed: int, batch_size: int = 96
) -> list[TokenSequence]:
    """One response of the reference to each prompt.

    Args:
        spec: Whose base is the reference.
        prompts: A file of prompts.
        count: How many to answer at most.
        tokens: Most tokens of a response.
        seed: Seed of the responses.
        batch_size: Prompts answered at once; the responses depend on it.
    """
    data = PromptDataModule(spec.base.path, prompts=str(prompts), batch_size=batch_size, validation_fraction=0.0)
    lm, tokenizer = load_causal_lm(spec.base), load_tokenizer(spec.base)
    torch.manual_seed(seed)
    return sample_references(lm, tokenizer, list(data.prompt_batches("train", count)), Sampling(tokens))

"""What a study prepares once: responses of the reference, and what ensembles read of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lit_vapo.data.collate import PromptBatch
from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.features import compute_features
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
    return next(_answers(spec, _batches(spec, prompts, count, batch_size), tokens, seed))


def prompt_values(
    spec: FeatureSpec,
    prompts: str | Path,
    tokens: int,
    times: int,
    seed: int,
    value: Callable[[Tensor], Tensor],
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """What the reference's responses to each prompt are worth on average.

    Args:
        spec: Whose base is the reference, and what is read of its responses.
        prompts: A file of prompts.
        tokens: Most tokens of a response.
        times: Responses to each prompt.
        seed: Seed of the responses.
        value: Worth (N,) of features (N, H).
        batch_size: Prompts answered at once.

    Returns:
        Identities (P,) int64 of all prompts, as in `PromptBatch`, and their values (P,).
    """
    model, batches = feature_model(spec), _batches(spec, prompts, sys.maxsize, batch_size)
    answers = islice(_answers(spec, batches, tokens, seed), times)
    worth = [value(compute_features(model, found, torch.device("cpu"))) for found in answers]
    return torch.cat([batch.example_ids for batch in batches]), torch.stack(worth).mean(0)


def _batches(spec: FeatureSpec, prompts: str | Path, count: int, batch_size: int) -> list[PromptBatch]:
    data = PromptDataModule(spec.base.path, prompts=str(prompts), batch_size=batch_size, validation_fraction=0.0)
    return list(data.prompt_batches("train", count))


def _answers(spec: FeatureSpec, batches: list[PromptBatch], tokens: int, seed: int) -> Iterator[list[TokenSequence]]:
    """A response to each prompt, again and again."""
    lm, tokenizer = load_causal_lm(spec.base), load_tokenizer(spec.base)
    torch.manual_seed(seed)
    while True:
        yield sample_references(lm, tokenizer, batches, Sampling(tokens))

"""Responses of a reference policy alone, to calibrate an ensemble on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from lit_vapo.data.collate import PromptBatch
from lit_vapo.models.generation import Sampling, stop_ids
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.vocabulary import check_embeddings
from lit_vapo.rollout.rollout import assemble_rows
from lit_vapo.types import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sample_references(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[PromptBatch],
    sampling: Sampling,
) -> list[TokenSequence]:
    """Responses of a frozen language model to prompts, as token sequences.

    Args:
        lm: The reference policy, on its device.
        tokenizer: Its tokenizer.
        batches: Prompts, left-padded.
        sampling: How it responds; once to each prompt, whatever `num_responses` says.
    """
    sampling, generator = replace(sampling, num_responses=1), TransformersGenerator()
    stops = stop_ids(lm, sampling, tokenizer.eos_token_id)
    sequences = []
    for batch in batches:
        check_embeddings(lm.config, tokenizer, int(batch.input_ids.max()), "a prompt", "the reference")
        ids, lengths = batch.input_ids.to(lm.device), batch.lengths.to(lm.device)
        generated = generator(lm, tokenizer, ids, lengths, sampling, stops)
        rows = assemble_rows(batch._replace(input_ids=ids, lengths=lengths), generated)
        for row, prompt, length in zip(
            rows.input_ids.tolist(), rows.prompt_lengths.tolist(), rows.lengths.tolist(), strict=True
        ):
            sequences.append(TokenSequence(row[:length], prompt))
    return sequences

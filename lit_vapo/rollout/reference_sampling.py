"""Responses of a language model alone: of a reference, to calibrate rewards on, or of policies to compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lit_vapo.data.collate import PromptBatch
from lit_vapo.models.generation import Sampling, stop_ids
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.vocabulary import check_embeddings, vocabulary_size
from lit_vapo.progress import watched
from lit_vapo.rewards.source import Responses
from lit_vapo.rollout.responses import Encoders, token_responses
from lit_vapo.rollout.rollout import assemble_rows
from lit_vapo.types import Prompt, TokenSequence

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
    once = replace(sampling, num_responses=1)
    return [sequence for _, sequence, _ in _sampled(lm, tokenizer, batches, once, "reference")]


def reference_responses(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[PromptBatch],
    sampling: Sampling,
) -> Responses:
    """The same as any source of rewards may want them."""
    return sampled_responses(lm, tokenizer, batches, replace(sampling, num_responses=1), "reference")


def sampled_responses(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[PromptBatch],
    sampling: Sampling,
    name: str,
) -> Responses:
    """Responses of any language model to prompts, `sampling.num_responses` to each, those to a prompt together.

    Args:
        lm: The model, on its device.
        tokenizer: Its tokenizer.
        batches: Prompts, left-padded.
        sampling: How it responds.
        name: What messages call the model.
    """
    prompts, sequences, finished = zip(*_sampled(lm, tokenizer, batches, sampling, name), strict=True)
    size = vocabulary_size(lm.config)
    return token_responses(list(prompts), list(sequences), list(finished), tokenizer, size, Encoders(), lm.device)


def _sampled(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[PromptBatch],
    sampling: Sampling,
    name: str,
) -> Iterator[tuple[Prompt, TokenSequence, bool]]:
    """Each prompt, its tokens with those of the response, and whether that ended by itself."""
    generator, each = TransformersGenerator(), sampling.num_responses
    stops = stop_ids(lm, sampling, tokenizer.eos_token_id)
    for batch in watched(list(batches), f"{name}: batch"):
        check_embeddings(lm.config, tokenizer, int(batch.input_ids.max()), "a prompt", f"the {name}")
        ids, lengths = batch.input_ids.to(lm.device), batch.lengths.to(lm.device)
        generated = generator(lm, tokenizer, ids, lengths, sampling, stops)
        rows = assemble_rows(batch._replace(input_ids=ids, lengths=lengths), generated)
        asked = [prompt for prompt in batch.asked or map(Prompt, batch.prompts) for _ in range(each)]
        yield from zip(asked, rows.sequences, generated.stopped.tolist(), strict=True)

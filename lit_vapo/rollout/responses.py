"""From texts to what a source of rewards is offered: for rollouts, services and pairs of a file alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lit_vapo.data.encoder import Encoder
from lit_vapo.data.stopping import find_stops
from lit_vapo.models.batching import right_pad
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import length_mask
from lit_vapo.rewards.source import Encode, Responses
from lit_vapo.types import Prompt, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoders:
    """Writes responses down as other models read them; it keeps one encoder for each model."""

    def __init__(self) -> None:
        # By the tokenizer too: two revisions of one model may have two.
        self._encoders: dict[tuple[str, int], Encoder] = {}

    def writer(self, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]) -> Encode:
        """What writes these B responses to these prompts.

        Args:
            prompts: What each response answers.
            texts: What each says.
            finished: Whether it ended by itself.
        """

        def encode(tokenizer: PreTrainedTokenizerBase, path: str, *, closed: bool = False) -> list[TokenSequence]:
            key = (path, id(tokenizer))
            encoder = self._encoders.get(key)
            if encoder is None:
                encoder = self._encoders[key] = Encoder(tokenizer, find_stops(path, tokenizer))
            if closed:
                return [encoder.closed(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
            answered = zip(prompts, texts, finished, strict=True)
            return [encoder.response(prompt, text, ended) for prompt, text, ended in answered]

        return encode


def token_responses(
    prompts: list[Prompt],
    sequences: list[TokenSequence],
    finished: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    encoders: Encoders,
    device: torch.device | str = "cpu",
    texts: list[str] | None = None,
) -> Responses:
    """Responses of which the tokens are known.

    Args:
        prompts: What each of the B responses answers.
        sequences: Prompts and responses in the tokens of `tokenizer`.
        finished: Whether each ended by itself.
        tokenizer: Whose tokens these are.
        vocabulary_size: How many tokens there are.
        encoders: Writes responses down for other models.
        device: Where estimates are wanted.
        texts: What each response says; what its tokens say, if not given.
    """
    if texts is None:
        texts = [tokenizer.decode(ids[start:], skip_special_tokens=True) for ids, start in sequences]
    ids, lengths = right_pad([s.ids for s in sequences], torch.device(device))
    starts = torch.tensor([s.prompt_length for s in sequences], device=device)
    sizes = lengths - starts
    return replace(
        text_responses(prompts, texts, finished, encoders, device),
        rows=TokenRows(ids, starts, length_mask(sizes, int(sizes.max()))),
        tokenizer=tokenizer,
        vocabulary_size=vocabulary_size,
    )


def text_responses(
    prompts: list[Prompt],
    texts: list[str],
    finished: Sequence[bool],
    encoders: Encoders,
    device: torch.device | str = "cpu",
    columns: Mapping[str, list[Any]] | None = None,
) -> Responses:
    """Responses of which the texts alone are known.

    Args:
        prompts: What each of the B responses answers.
        texts: What each says, without control tokens.
        finished: Whether it ended by itself.
        encoders: Writes them down for models.
        device: Where estimates are wanted.
        columns: Further columns by name, B values each.
    """
    return Responses(
        prompts=prompts,
        texts=texts,
        finished=torch.tensor(list(finished), dtype=torch.bool, device=device),
        encode=encoders.writer(prompts, texts, finished),
        columns=columns or {},
    )

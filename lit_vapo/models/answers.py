"""Answers to one prompt as texts, and one of them piece by piece while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lit_vapo.models.generation import Sampling, generation_config, stop_ids


class Answer(NamedTuple):
    """What a model says.

    Attributes:
        text: Without control tokens.
        ended: Whether it ended by itself.
    """

    text: str
    ended: bool


@torch.no_grad()
def answers(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    tell: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer a prompt `sampling.num_responses` times.

    Args:
        lm: The model.
        tokenizer: Its tokenizer.
        prompt_ids: The prompt.
        sampling: How answers are drawn.
        tell: Called with each piece of the answer as it is written, and with a line break at its end; for one alone.
    """
    stops = stop_ids(lm, sampling, tokenizer.eos_token_id)
    ids = torch.tensor([list(prompt_ids)], device=lm.device)
    out = cast("Any", lm).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=generation_config(sampling, stops, num_return_sequences=sampling.num_responses),
        streamer=None if tell is None else _Pieces(tokenizer, tell),
        **({"tokenizer": tokenizer} if sampling.stop_strings else {}),
    )
    found = []
    for row in out[:, ids.shape[1] :].tolist():
        last = next((i for i, token in enumerate(row) if token in stops), None)
        text = str(tokenizer.decode(row[:last], skip_special_tokens=True))
        found.append(Answer(text, last is not None))
    return found


class _Pieces(TextStreamer):
    """Hands pieces of a text on once they are whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        super().__init__(cast("Any", tokenizer), skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece is there."""
        self.tell(text + "\n" * stream_end)

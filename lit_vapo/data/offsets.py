"""Tokens with the place in the text at which each ends, so that a text can be cut after it was tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """Tokens of a text, without those with which a tokenizer ends every text.

    Attributes:
        ids: Token ids.
        spans: The characters of the text that each stands for, from and up to; `None` where a tokenizer does not tell.
        added: How many at the beginning the tokenizer has added.
    """

    ids: list[int]
    spans: list[tuple[int, int]] | None
    added: int

    @classmethod
    def of(cls, ids: Sequence[int], special: Sequence[int], spans: Sequence[tuple[int, int]] | None) -> Tokens:
        """From what tokenizers return: ids, 1 for each token that is not of the text, and offsets."""
        stop = next((i + 1 for i in reversed(range(len(ids))) if not special[i]), 0)
        added = next((i for i in range(stop) if not special[i]), stop)
        return cls(list(ids[:stop]), None if spans is None else list(spans[:stop]), added)


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> Tokens:
    """The tokens of a text, as the tokenizer makes them.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        add_special_tokens: Begin with those with which the tokenizer begins every text.
    """
    fast = tokenizer.is_fast
    found: Any = tokenizer(
        text, add_special_tokens=add_special_tokens, return_special_tokens_mask=True, return_offsets_mapping=fast
    )
    return Tokens.of(found["input_ids"], found["special_tokens_mask"], found["offset_mapping"] if fast else None)


def added_at_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which a tokenizer ends every text; most that belong to decoders add none."""
    whole: Any = tokenizer("a")
    return list(whole["input_ids"][len(tokens_of(tokenizer, "a", True).ids) :])

"""Whether a model can read the tokens that a tokenizer writes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def vocabulary_size(config: Any) -> int:
    """How many tokens a model has embeddings for, V."""
    return int(config.get_text_config().vocab_size)


def check_embeddings(
    config: Any, tokenizer: PreTrainedTokenizerBase, largest: int, place: str, key: str = "model.base"
) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        config: The model's configuration.
        tokenizer: The tokenizer of the data.
        largest: The largest token id that the model is to read.
        place: Where it stands.
        key: The option that names the model, for the message.

    Raises:
        ValueError: The model has too few embeddings.
    """
    size = vocabulary_size(config)
    if largest >= size:
        raise ValueError(
            f"data.tokenizer: expected token ids below {size}, for which {key} ({config.name_or_path!r}) has "
            f"embeddings, got {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) from "
            f"{tokenizer.name_or_path!r} in {place}"
        )


def same_language(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a model of the other tokenizer can read the tokens of the first one as they are.

    They have the same tokens, named ones included, and no two chat templates. A model without a template was trained
    with another's.
    """
    return (
        one.get_vocab() == other.get_vocab()
        and one.special_tokens_map == other.special_tokens_map
        and other.chat_template in (None, one.chat_template)
    )

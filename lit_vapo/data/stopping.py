"""The tokens that stop the model of a tokenizer, found without loading its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from lit_vapo.stops import stop_tokens

FILES = ("generation_config.json", "config.json")


def find_stops(
    path: str, tokenizer: PreTrainedTokenizerBase, more: list[int] | None = None, key: str = "data.stop_token_ids"
) -> tuple[int, ...]:
    """What stops the model beside a tokenizer: what its two configurations say, the tokenizer's end, and the user.

    Args:
        path: Folder or hub name of the tokenizer, usually that of a model.
        tokenizer: The tokenizer.
        more: Further tokens.
        key: The option that names these, for the error.

    Raises:
        ValueError: One of `more` is no token, or a configuration cannot be read or names something else.
    """
    wrong = [i for i in more or [] if not 0 <= i < len(tokenizer)]
    if wrong:
        raise ValueError(
            f"{key}: expected token ids 0 … {len(tokenizer) - 1} of {tokenizer.name_or_path!r}, got {wrong}"
        )
    found = [_configured(path, name) for name in FILES]
    return stop_tokens(*(i for ids in found for i in ids), tokenizer.eos_token_id, more)


def _configured(path: str, name: str) -> list[int]:
    """The `eos_token_id` of a configuration, and that of the text model in it; nothing where there is no such file."""
    try:
        file = cached_file(
            str(Path(path).expanduser()) if path.startswith("~") else path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return []
    if file is None:
        return []
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON object, got malformed JSON ({error})") from error
    ids: list[int] = []
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        value: Any = part.get("eos_token_id") if isinstance(part, dict) else None
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in values):
            raise ValueError(f"{file}: expected a token id or a list of them in 'eos_token_id', got {value!r}")
        ids += values
    return ids

"""What is common to all that makes tokens: the tokenizer, the length of sequences, and the identity of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase


class Truncation(NamedTuple):
    """How many prompts lost their beginning, and how many responses their end."""

    prompts: int
    responses: int


def load_text_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer. It needs no padding token, since masks come from lengths.

    Args:
        path: Folder or hub name.
        trust_remote_code: Whether code that lies beside the tokenizer may run.

    Raises:
        ValueError: There is no tokenizer at `path`, or it brings code.
    """
    place = str(Path(path).expanduser()) if path.startswith("~") else path
    try:
        found = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"data.tokenizer: expected a tokenizer without code of its own, got {path!r}; if you trust the code, "
                "allow it with data.trust_remote_code=true"
            ) from error
        raise ValueError(
            f"data.tokenizer: expected a folder or hub name of a tokenizer, got {path!r} ({error})"
        ) from error
    return cast("PreTrainedTokenizerBase", found)


def fit(
    prompt: list[int], responses: Sequence[list[int]], max_length: int, bos: int | None
) -> tuple[list[int], list[list[int]], Truncation]:
    """Prompt and responses of at most `max_length` tokens together.

    The prompt loses its beginning (but not its beginning-of-sequence token), down to one token; only then do responses
    lose their ends.

    Args:
        prompt: Token ids of the prompt.
        responses: Those of each response to it.
        max_length: Most tokens of the prompt and a response.
        bos: The beginning-of-sequence token, if there is one.

    Returns:
        What is left of the prompt and of each response, and how many were cut.
    """
    # A response needs a position before it that predicts its first token.
    least = min(1, len(prompt))
    room = max(least, max_length - max(map(len, responses)))
    kept = _end(prompt, room, bos)
    longest = max_length - len(kept)
    cut = Truncation(int(len(kept) < len(prompt)), sum(len(ids) > longest for ids in responses))
    return kept, [ids[:longest] for ids in responses], cut


def _end(prompt: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` tokens of a prompt; many models lose their way without the first, so that one stays."""
    if len(prompt) <= room:
        return prompt
    return [prompt[0], *prompt[1 - room :]] if room > 1 and prompt[0] == bos else prompt[-room:]


def stable_id(*texts: str) -> int:
    """A 63-bit identity that depends on the texts alone."""
    digest = hashlib.sha256("\x1f".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def position(identity: int) -> float:
    """Where an identity falls in [0, 1); independent of all other rows and of any seed."""
    return (identity % 1_000_003) / 1_000_003

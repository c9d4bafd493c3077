"""From texts to token ids: prompt and response apart, so that every stage sees the same prompt tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_vapo.data.conversation import Messages
from lit_vapo.types import TokenSequence


class Truncation(NamedTuple):
    """How many prompts lost their beginning, and how many responses their end."""

    prompts: int
    responses: int


def load_text_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer with a padding token: its own, or the end of sequence.

    Padding may equal the end of sequence, since masks come from lengths.

    Args:
        path: Folder or hub name.
        trust_remote_code: Whether code that lies beside the tokenizer may run.

    Raises:
        ValueError: There is no tokenizer at `path`, it brings code, or it has neither token.
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
    tokenizer = cast("PreTrainedTokenizerBase", found)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"data.tokenizer: expected a pad or an end-of-sequence token, got neither in {path!r}")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, templated: bool) -> list[int]:
    """Tokens of a prompt; special tokens are added unless a chat template wrote them."""
    return (
        cast("list[int]", tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if templated
        else _plain(tokenizer, prompt)
    )


def _plain(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = cast("list[int]", tokenizer(prompt)["input_ids"])
    # Some texts bring the beginning of sequence that the tokenizer adds.
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    # Some tokenizers end every text with the end of sequence; a prompt goes on.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def response_ids(tokenizer: PreTrainedTokenizerBase, response: str, append_eos: bool) -> list[int]:
    """Tokens of a response, ended by the end of sequence if asked and not there."""
    ids = cast("list[int]", tokenizer(response, add_special_tokens=False)["input_ids"])
    if append_eos and tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids = [*ids, tokenizer.eos_token_id]
    return ids


class PairEncoder(Protocol):
    """Prompt, response, and whether that ended by itself, as token ids.

    The prompt comes as text, and as the messages it was made of, if it was.
    """

    def __call__(self, prompt: str, response: str, ended: bool, messages: Messages | None = None) -> TokenSequence:
        """Token ids."""
        ...


def pair_encoder(tokenizer: PreTrainedTokenizerBase) -> PairEncoder:
    """Reads texts with this tokenizer, and messages with its chat template, whatever wrote the text of the prompt.

    Without a template of its own it reads the prompt's text as it is.
    """

    def encode(prompt: str, response: str, ended: bool, messages: Messages | None = None) -> TokenSequence:
        # A chat template has written the special tokens already.
        templated = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
        if messages is not None and tokenizer.chat_template:
            prompt, response, ended = _as_templated(tokenizer, messages, response, ended)
            templated = True
        start = prompt_ids(tokenizer, prompt, templated)
        return TokenSequence(start + response_ids(tokenizer, response, append_eos=ended), len(start))

    return encode


def _as_templated(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, response: str, ended: bool
) -> tuple[str, str, bool]:
    """Texts of prompt and response as training wrote them, and whether an end of sequence is to be added.

    Raises:
        ValueError: The template refuses the messages.
    """
    prompt = apply_template(messages, tokenizer, True, "reward")
    answer = {"role": "assistant", "content": response}
    whole = apply_template([*messages, answer], tokenizer, False, "reward")
    if not ended or not whole.startswith(prompt):
        return prompt, response, ended
    # The template ends a turn in its own way.
    return prompt, end_at_stop(whole[len(prompt) :], tokenizer), False


def apply_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, respond: bool, place: str) -> str:
    """Messages as the tokenizer's chat template writes them.

    Args:
        messages: The messages.
        tokenizer: Whose template.
        respond: Open the assistant's turn at the end.
        place: Where the messages are from, for the error.

    Raises:
        ValueError: The template refuses them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=respond))
    except Exception as error:  # whatever the template raises, such as that roles must alternate
        raise ValueError(
            f"{place}: expected messages that the chat template of {tokenizer.name_or_path!r} takes, got: {error}"
        ) from error


def end_at_stop(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Without the white space that a template writes after a turn's stop token, where a sampled response ends."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(tuple(tokenizer.all_special_tokens)) else text


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

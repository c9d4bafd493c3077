"""Strings of control tokens that users wrote: they stay ordinary text, while those of a chat template act."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from lit_vapo.data.offsets import Tokens

# Private-use characters: none has a meaning, and no tokenizer was trained on them.
_ALIASES, _STAND_INS = range(0xF0000, 0xF8000), range(0xF8000, 0xFFFFD)
_NAMELESS = 0xFFFFD
_PRIVATE = re.compile(f"[{chr(_ALIASES[0])}-{chr(_STAND_INS[-1])}]")
_LEFT_OVER = re.compile(f"[{chr(_STAND_INS[0])}-{chr(_STAND_INS[-1])}]")


class Control(NamedTuple):
    """The control tokens of a tokenizer.

    Attributes:
        ids: Id of each by its string: all special tokens, and all others that stop the model.
        pattern: Matches any of the strings, the longest first.
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> Control:
        """The control tokens of a tokenizer of a model that `stops` stop."""
        named = set(tokenizer.all_special_tokens)
        ids = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or token.content in named or number in stops)
        }
        strings = sorted(ids, key=len, reverse=True)
        return cls(ids, re.compile("|".join(map(re.escape, strings)) or "(?!)"))

    def inside(self, value: Any) -> bool:
        """Whether a text, or any string in a structure of lists and mappings, mentions one."""
        if isinstance(value, str):
            return self.pattern.search(value) is not None
        if isinstance(value, dict):
            return any(self.inside(key) or self.inside(item) for key, item in value.items())
        return isinstance(value, (list, tuple)) and any(map(self.inside, value))


class LiteralEncoder:
    """Encodes texts that mention control tokens.

    The users' mentions are hidden from the template behind stand-ins of the same length. In the rendering the control
    tokens that are left are therefore the template's own; each becomes an alias of the same length, and the stand-ins
    become the strings again. One pass of a copy of the tokenizer, which knows the aliases and takes no string for a
    control token, then encodes the whole: what stands beside a token is treated as ever.

    Args:
        tokenizer: The tokenizer.
        control: Its control tokens.

    Raises:
        ValueError: The tokenizer cannot be copied with aliases.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Control) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"expected a fast tokenizer to read control tokens as text, got {type(tokenizer).__name__}"
            )
        self.control = control
        self.aliases = {string: chr(_ALIASES[i]) * len(string) for i, string in enumerate(control.ids)}
        self.stand_ins = {string: chr(_STAND_INS[i]) * len(string) for i, string in enumerate(control.ids)}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        added = {token["content"]: token for token in state["added_tokens"]}
        for string, number in control.ids.items():
            # Only special tokens can be taken for text.
            added[string]["special"] = True
            if state["model"]["type"] == "Unigram" and number < len(state["model"]["vocab"]):
                # Its pieces are what a text is made of, control tokens or not: this one's name must not be found.
                state["model"]["vocab"][number][0] = chr(_NAMELESS) + string
        self.backend = Tokenizer.from_str(json.dumps(state))
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        self.backend.add_tokens(
            [
                AddedToken(alias, special=False, **{name: added[string][name] for name in flags})
                for string, alias in self.aliases.items()
            ]
        )
        known = {string: token["id"] for string, token in added.items()}
        known |= {alias: control.ids[string] for string, alias in self.aliases.items()}
        self._original = {self.backend.token_to_id(string): number for string, number in known.items()}
        self._aliases = {self.backend.token_to_id(alias) for alias in self.aliases.values()}
        self._forbidden = set(control.ids.values()) - {tokenizer.unk_token_id}

    def hide(self, value: Any) -> Any:
        """A text, or a structure of lists and mappings, in which stand-ins hide control tokens.

        Raises:
            ValueError: It has characters that are needed as stand-ins.
        """
        if isinstance(value, str):
            if _PRIVATE.search(value):
                raise ValueError("expected no private-use characters (plane 15) beside strings of control tokens")
            return self.control.pattern.sub(lambda match: self.stand_ins[match[0]], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    def show(self, text: str) -> str:
        """The text with its control tokens shown again.

        Raises:
            ValueError: A template tore one apart.
        """
        if not _LEFT_OVER.search(text):
            return text
        for string, stand_in in self.stand_ins.items():
            text = text.replace(stand_in, string)
        if _LEFT_OVER.search(text):
            raise ValueError("expected a chat template that leaves strings of control tokens in messages whole")
        return text

    def encode(self, hidden: str, add_special_tokens: bool) -> Tokens:
        """The tokens of a text in which stand-ins hide what is text.

        Raises:
            ValueError: As in `show`, or the tokenizer makes a control token of text all the same.
        """
        text = self.show(self.control.pattern.sub(lambda match: self.aliases[match[0]], hidden))
        self.backend.encode_special_tokens = True  # not part of a pickle
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        ids = [self._original.get(i, i) for i in encoding.ids]
        for own, number, special in zip(encoding.ids, ids, encoding.special_tokens_mask, strict=True):
            if number in self._forbidden and own not in self._aliases and not special:
                string = next(string for string, i in self.control.ids.items() if i == number)
                raise ValueError(f"expected a tokenizer that can read {string!r} as text, got one that cannot")
        return Tokens.of(ids, encoding.special_tokens_mask, encoding.offsets)

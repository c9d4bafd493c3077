"""Chat templates: how they write a conversation, and where an answer begins in it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_vapo.data.bounded import TooLongError
from lit_vapo.types import Message, Messages

# Templates that write the day write this one, so that a run, its resumptions and its ensembles read the same prompts.
# It is the day to which the templates of Llama 3 fall back.
DAY = date(2024, 7, 26)
# Most characters of a conversation, which hardly exceeds its messages unless the template runs wild.
SIZE = 10_000_000
# Stands for an answer where only the place at which it begins is asked for; a private-use character.
PROBE = "\ue0a5"
# Arguments of `apply_chat_template` that are no arguments of a template.
RESERVED = {
    *("conversation", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens"),
}
_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"'\\]*)(?P=quote)\s*\)""")
Tools = list[dict[str, Any]] | None


class ChatTemplate:
    """Writes conversations as a tokenizer's chat template does, as if always on the same day.

    Args:
        tokenizer: Whose template.
        options: Further arguments of the template (`data.chat_template_kwargs`), such as `enable_thinking: false`;
            `chat_template` replaces the template, or chooses one of several by name.

    Raises:
        ValueError: An option is set for each row, and so not the user's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        reserved = sorted(RESERVED & self.options.keys())
        if reserved:
            raise ValueError(
                f"data.chat_template_kwargs: expected arguments of the template itself, got {reserved}, which are set "
                "for each row"
            )
        self._chosen = self.options.pop("chat_template", None)
        self._warned: set[str] = set()

    def render(self, messages: Messages, tools: Tools, place: str, respond: bool = False) -> str:
        """Messages as the template writes them.

        Args:
            messages: The messages.
            tools: JSON schemas of functions that the assistant may call.
            place: Where they are from, for errors.
            respond: Open the assistant's turn at the end.

        Raises:
            ValueError: There is no template, or it refuses the messages or writes too much.
        """
        if not self.tokenizer.chat_template and self._chosen is None:
            raise ValueError(
                f"{place}: expected a tokenizer with a chat template for conversational data, got "
                f"{self.tokenizer.name_or_path!r}, which has none"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=respond,
                chat_template=self._on_the_day(self.tokenizer.get_chat_template(self._chosen, tools)),
                **self.options,
            )
        except TooLongError:
            raise
        except Exception as error:  # whatever the template raises, such as that roles must alternate
            raise ValueError(
                f"{place}: expected messages that the {self._name} takes, got: {error or type(error).__name__}"
            ) from error
        if len(text) > SIZE:
            raise ValueError(f"{place}: expected the {self._name} to write at most {SIZE} characters, got {len(text)}")
        return str(text)

    def opening(self, messages: Messages, tools: Tools, place: str) -> str:
        """What conversations that begin with these messages have in common: those with an answer, and one without.

        After messages that end with the assistant's, the answer goes on with that one.

        Raises:
            ValueError: As in `render`, or the template does not read the tools, or changes the messages themselves
                where an answer follows.
        """
        if not messages:
            raise ValueError(f"{place}: expected a prompt of at least one message, got none")
        if tools and self.render(messages, tools, place) == self.render(messages, None, place):
            raise ValueError(
                f"{place}: expected a chat template that reads tools, got the {self._name}, which does not"
            )
        if messages[-1].get("role") == "assistant":
            return self.unfinished(messages, tools, place)
        waiting = self.render(messages, tools, place, respond=True)
        answered = self.render([*messages, {"role": "assistant", "content": PROBE}], tools, place)
        opening = waiting[: shared(waiting, answered)]
        if shared(waiting, self.render(messages, tools, place)) > len(opening):
            raise self._parting(waiting, answered, place)
        if opening != waiting:
            self._warn_once(
                f"the {self._name} opens an answer with {waiting[len(opening) :]!r}, which an answered conversation "
                "does not have in that place. Prompts end before it in every stage, and the policy writes it. Or "
                "pass an argument to the template in data.chat_template_kwargs (enable_thinking: false, say)."
            )
        return opening

    def finished(self, messages: Messages, tools: Tools, opening: str, place: str) -> str:
        """A conversation with its answer.

        Args:
            messages: The messages, answer included.
            tools: As in `render`.
            opening: That of its prompt.
            place: Where they are from, for errors.

        Raises:
            ValueError: As in `render`, or it does not begin with the opening, or tool calls are not written.
        """
        text = self.render(messages, tools, place)
        if any(message.get("tool_calls") for message in messages) and text == self._without_calls(messages, tools):
            raise ValueError(f"{place}: expected a chat template that writes tool calls, got the {self._name}")
        if not text.startswith(opening):
            raise self._parting(opening, text, place)
        return text

    def unfinished(self, messages: Messages, tools: Tools, place: str) -> str:
        """A conversation up to the end of the text of its last message, and nothing after it.

        Raises:
            ValueError: As in `render`, or that message has no text, or the template changes it.
        """
        text = self.render(continued(messages, {"role": "assistant", "content": PROBE}, place), tools, place)
        if PROBE not in text:
            raise ValueError(
                f"{place}: expected a chat template that writes the text of the assistant's last message as it is, so "
                f"that the response goes on from it, got the {self._name}, which does not"
            )
        return text[: text.rindex(PROBE)]

    @property
    def _name(self) -> str:
        return f"chat template of {self.tokenizer.name_or_path!r}"

    def _without_calls(self, messages: Messages, tools: Tools) -> str | None:
        """The conversation without its tool calls; `None` where the template asks for them."""
        bare = [{k: v for k, v in {"content": "", **m}.items() if k != "tool_calls"} for m in messages]
        try:
            return self.render(bare, tools, "")
        except ValueError:
            return None

    def _on_the_day(self, template: str) -> str:
        """The template with the day written in."""
        fixed = _TODAY.sub(lambda call: repr(DAY.strftime(call["format"])), template)
        if "strftime_now(" in fixed:
            self._warn_once(
                f"the {self._name} asks for the day in a way that cannot be fixed: prompts change from day to day. "
                "Pass it the day in data.chat_template_kwargs if it takes one (date_string, say)."
            )
        return fixed

    def _parting(self, one: str, other: str, place: str) -> ValueError:
        """The error of two renderings that should begin alike, with what is written where they part."""
        size = shared(one, other)
        start = max(0, size - 40)
        return ValueError(
            f"{place}: expected the {self._name} to write a prompt alike before its answer and with it, got "
            f"{one[start : size + 40]!r} and {other[start : size + 40]!r}. data.chat_template_kwargs passes arguments "
            "to the template or replaces it (chat_template)."
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items, or characters, two sequences have in common at their beginning.

    Examples:
        >>> shared("assistant", "assign")
        4
    """
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def joined(prompt: Messages, answer: Messages, place: str) -> Messages:
    """A conversation: after messages that end with the assistant's, the answer goes on with that one."""
    if prompt[-1].get("role") != "assistant":
        return [*prompt, *answer]
    return [*continued(prompt, answer[0], place), *answer[1:]]


def continued(messages: Messages, more: Message, place: str) -> Messages:
    """Messages with more at the end of the last one.

    Raises:
        ValueError: The last one has no text that could go on.
    """
    last, text = messages[-1], more.get("content") or ""
    content = last.get("content")
    if isinstance(content, str) and isinstance(text, str):
        content = content + text
    elif isinstance(content, list) and isinstance(text, str) and "text" in (content or [None])[-1]:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]
    else:
        raise ValueError(
            f"{place}: expected text at the end of the prompt's last message, the assistant's, so that the response "
            f"goes on from it, got {content!r} and {text!r}"
        )
    return [*messages[:-1], {**last, **more, "content": content}]

"""What a row says before any tokenizer has seen it: prompts and preferences as texts or as messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lit_vapo.data.labels import Stated

# Role and content, and whatever else a chat template may read (tool_calls, name, reasoning_content …).
Message = dict[str, Any]
Messages = list[Message]


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        content: A text, or messages, at least one. After messages that end with the assistant's the response goes on
            with that message; after any other it is a message of its own.
        tools: JSON schemas of functions that the assistant may call, for the chat template; messages only.
    """

    content: str | Messages
    tools: list[dict[str, Any]] | None = None

    @property
    def identity(self) -> str:
        """What the row says, in one text that no template, tokenizer or day changes."""
        if isinstance(self.content, str):
            return self.content
        return json.dumps(
            [self.content, self.tools] if self.tools else self.content, sort_keys=True, ensure_ascii=False
        )


@dataclass(frozen=True)
class Preference:
    """A stated preference.

    Attributes:
        prompt: What both responses answer.
        chosen: The preferred response: a text to a text; to messages, one or several messages.
        rejected: The other one.
        labels: How clear the preference is, and how much it counts.
    """

    prompt: Prompt
    chosen: str | Messages
    rejected: str | Messages
    labels: Stated

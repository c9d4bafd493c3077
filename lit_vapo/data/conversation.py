"""What a row of preferences says before any tokenizer has seen it."""

from __future__ import annotations

from dataclasses import dataclass

from lit_vapo.data.labels import Stated
from lit_vapo.types import Messages, Prompt


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

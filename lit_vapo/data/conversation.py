"""What a row of preferences says before any tokenizer has seen it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lit_vapo.data.labels import Stated
from lit_vapo.data.templates import joined
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


def last_answer(prompt: Prompt, answer: str | Messages, place: str) -> tuple[Prompt, str]:
    """A response as one text: of several messages the last one, which answers all before it.

    Args:
        prompt: What was answered.
        answer: A text to a text, or messages.
        place: Where it is from, for errors.

    Raises:
        ValueError: The last message is no text.

    Examples:
        >>> calls = [{"role": "assistant", "content": "Wait."}, {"role": "user", "content": "Yes?"}]
        >>> asked = Prompt([{"role": "user", "content": "Hello"}])
        >>> prompt, text = last_answer(asked, [*calls, {"role": "assistant", "content": "Here."}], "a file")
        >>> [message["content"] for message in prompt.content], text
        (['Hello', 'Wait.', 'Yes?'], 'Here.')
    """
    if isinstance(answer, str) or isinstance(prompt.content, str):
        if isinstance(answer, str) and isinstance(prompt.content, str):
            return prompt, answer
        raise ValueError(f"{place}: expected a text in answer to a text, or messages to messages")
    *before, last = answer
    text = last.get("content")
    if not isinstance(text, str) or last.get("tool_calls"):
        raise ValueError(f"{place}: expected an answer that ends with a text, got {last}")
    return (replace(prompt, content=joined(prompt.content, before, place)) if before else prompt), text

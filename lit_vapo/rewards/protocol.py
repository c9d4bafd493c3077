"""What travels between a reward service and those who ask it: JSON over HTTP, one POST a batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lit_vapo.models.settings import STRICT, explain, shortened
from lit_vapo.types import Prompt

# A request or an answer above this size is no batch of rewards; nobody reads on.
LARGEST_BODY = 64 * 2**20
LARGEST_REWARD = torch.finfo(torch.float32).max


class Row(BaseModel):
    """One response.

    Attributes:
        prompt: What it answers: a text, or messages with role and content.
        response: What it says, without control tokens.
        finished: Whether it ended by itself; false where it was cut off.
        tools: JSON schemas of functions that the assistant may call; with messages only.
    """

    model_config = STRICT

    prompt: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    response: str
    finished: bool = True
    tools: list[dict[str, Any]] | None = None

    def asked(self) -> Prompt:
        """The prompt."""
        return Prompt(self.prompt, self.tools)


class Request(BaseModel):
    """What is asked.

    Attributes:
        rows: The responses, at least one.
    """

    model_config = STRICT

    format_version: Literal[1] = 1
    rows: Annotated[list[Row], Field(min_length=1)]


class Answer(BaseModel):
    """What is answered; further keys are left alone.

    Attributes:
        rewards: A number for each row, or a list of one number for each of K members; higher is better.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=True)

    rewards: list[float | list[float]]


def read_request(body: bytes) -> Request:
    """The request in a body.

    Raises:
        ValueError: It is none; the message says where.
    """
    try:
        return Request.model_validate_json(body)
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def read_answer(body: bytes, rows: int, members: int) -> list[list[float]]:
    """The rewards (B, K) in a body.

    Args:
        body: What a service answered.
        rows: Rows B that were asked for.
        members: Members K that are expected.

    Raises:
        ValueError: It holds something else; the message names the row.
    """
    expected = "a number" if members == 1 else f"a list of {members} numbers"
    try:
        rewards = Answer.model_validate_json(body).rewards
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            said = body[:80].decode("utf-8", "replace")
            raise ValueError(f'expected JSON, {{"rewards": […]}}, got {said!r}') from None
        place = first["loc"]
        if len(place) > 1:
            raise ValueError(f"row {place[1]}: expected {expected}, got {shortened(first['input'])}") from None
        raise ValueError(f'expected {{"rewards": […]}}, got something else ({explain(error)})') from None
    if len(rewards) != rows:
        raise ValueError(f"expected rewards of {rows} rows, got {len(rewards)}")
    each = [x if isinstance(x, list) else [x] for x in rewards]
    for row, found in enumerate(each):
        if len(found) != members or (members > 1 and not isinstance(rewards[row], list)):
            raise ValueError(f"row {row}: expected {expected}, got {shortened(rewards[row])}")
        # Rewards are float32: what is larger than that holds would become infinite.
        if not all(abs(x) <= LARGEST_REWARD for x in found):
            raise ValueError(f"row {row}: expected finite rewards, got {shortened(rewards[row])}")
    return each

"""Rewards from an HTTP service: an ensemble on another machine, or whatever speaks the protocol."""

from __future__ import annotations

import json
from typing import Annotated

import torch
from torch import Tensor

from lit_vapo.http_client import check_url, post, read_token
from lit_vapo.ranges import NonNegativeInt, PositiveInt, Range, check_ranges
from lit_vapo.rewards.normalised import NormalisedSource
from lit_vapo.rewards.protocol import LARGEST_BODY, Request, Row, read_answer
from lit_vapo.rewards.source import Responses

Seconds = Annotated[float, Range("seconds above 0", above=0)]


class RemoteReward(NormalisedSource):
    """Scores responses by asking an HTTP service, one POST a batch (docs/rewards.md has the protocol).

    Rewards are taken as they are delivered, unless `normalise`. With two members or more, their typical variance is
    measured on responses of the reference policy. In a distributed run each process asks for its own responses.

    Args:
        url: The service, `http://…` or `https://…`.
        num_members: Numbers K that it returns for each response.
        normalise: Centre and scale each member on responses of the reference policy. `lit-vapo reward serve` delivers
            members that are.
        timeout: Longest wait for an answer, in seconds.
        retries: How often to ask again where nobody answers, too late, or with a status of 5xx.
        pause: First pause before asking again, in seconds; each further one is twice as long.
        token_env: Name of the environment variable that holds a bearer token; never the token itself.

    Raises:
        ValueError: An argument is out of its range, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        num_members: PositiveInt = 1,
        normalise: bool = False,
        timeout: Seconds = 60.0,
        retries: NonNegativeInt = 3,
        pause: Seconds = 1.0,
        token_env: str | None = None,
    ) -> None:
        super().__init__()
        check_url(url, "reward.url")
        check_ranges(RemoteReward, locals(), "reward.")
        self.url = url
        self._num_members = num_members
        self.normalise = normalise
        self.timeout = timeout
        self.retries = retries
        self.pause = pause
        self.token_env = token_env

    @property
    def num_members(self) -> int:
        """Members K."""
        return self._num_members

    def check(self) -> None:
        """See that there is a token, where one is needed. The service may come later.

        Raises:
            ValueError: The environment variable is not set.
        """
        read_token(self.token_env, "reward.token_env")

    @property
    def centred(self) -> bool:
        """As `normalise` says."""
        return self.normalise

    def raw(self, responses: Responses) -> tuple[Tensor, None]:
        """What the service says (B, K), on the responses' device.

        Raises:
            ValueError: The service does not answer, or with something else; the message names the URL and the row.
        """
        asked = zip(responses.prompts, responses.texts, responses.finished.tolist(), strict=True)
        rows = [
            Row.model_construct(prompt=prompt.content, response=text, finished=finished, tools=prompt.tools)
            for prompt, text, finished in asked
        ]
        body = json.dumps(Request.model_construct(rows=rows).model_dump(), allow_nan=False).encode("ascii")
        token = read_token(self.token_env, "reward.token_env")
        answer = post(self.url, body, token, self.timeout, self.retries, self.pause, LARGEST_BODY)
        try:
            rewards = read_answer(answer, len(rows), self.num_members)
        except ValueError as error:
            raise ValueError(f"{self.url}: {error}") from None
        # The rows stay on the CPU until all are there: K numbers each.
        return torch.tensor(rewards, dtype=torch.float32).to(responses.device), None

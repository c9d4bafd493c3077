"""Rewards from an HTTP service: an ensemble on another machine, or whatever speaks the protocol."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor

from lit_vapo.functional import ensemble_estimate
from lit_vapo.models.policy import Policy
from lit_vapo.ranges import NonNegativeInt, PositiveInt, Range, check_ranges
from lit_vapo.rewards.http_client import check_url, post
from lit_vapo.rewards.normaliser import Normaliser
from lit_vapo.rewards.protocol import LARGEST_BODY, Request, Row, read_answer
from lit_vapo.rewards.source import Responses, RewardSource
from lit_vapo.types import RewardEstimate

Seconds = Annotated[float, Range("seconds above 0", above=0)]


class RemoteReward(RewardSource):
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
        self.normaliser: Normaliser | None = None

    @property
    def num_members(self) -> int:
        """Members K."""
        return self._num_members

    def check(self) -> None:
        """See that there is a token, where one is needed. The service may come later.

        Raises:
            ValueError: The environment variable is not set.
        """
        self._token()

    def prepare(self, policy: Policy | None) -> None:
        """Make room for what `calibrate` measures."""
        self.normaliser = self.normaliser or Normaliser(self.num_members)

    def _token(self) -> str | None:
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "").strip()
        # What has no such characters can neither end a header nor begin another.
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError(
                f"reward.token_env: expected the name of an environment variable with a token, got {self.token_env!r}, "
                f"which holds {'something else' if token else 'none'}"
            )
        return token

    @property
    def calibrated(self) -> bool:
        """Whether the reference variance is known, or there is none to know."""
        return not (self.normalise or self.num_members > 1) or bool(self._normaliser.calibrated)

    @property
    def unit(self) -> str:
        """Standard deviations, if they are normalised here."""
        return self._normaliser.unit if self.normalise else super().unit

    @property
    def _normaliser(self) -> Normaliser:
        assert self.normaliser is not None, "`prepare` comes first"
        return self.normaliser

    def calibrate(self, references: Iterable[Responses]) -> None:
        """Measure the members' typical variance, and centre and scale them if that was asked for."""
        rewards = torch.cat([self._rewards(responses) for responses in references])
        if self.normalise:
            self._normaliser.fit_to(rewards)
        else:
            self._normaliser.measure(ensemble_estimate(rewards).variance)

    def score(self, responses: Responses) -> RewardEstimate:
        """Mean, variance and members (B, K), in the service's own unit or in standard deviations of the reference's.

        Raises:
            ValueError: The service does not answer, or with something else; the message names the URL and the row.
        """
        estimate = ensemble_estimate(self._normaliser.normalise(self._rewards(responses)))
        known = bool(self._normaliser.calibrated) and self.num_members > 1
        return estimate._replace(reference_variance=self._normaliser.reference_variance if known else None)

    def _rewards(self, responses: Responses) -> Tensor:
        """What the service says (B, K), on the responses' device."""
        asked = zip(responses.prompts, responses.texts, responses.finished.tolist(), strict=True)
        rows = [
            Row.model_construct(prompt=prompt.content, response=text, finished=finished, tools=prompt.tools)
            for prompt, text, finished in asked
        ]
        body = json.dumps(Request.model_construct(rows=rows).model_dump(), allow_nan=False).encode("ascii")
        answer = post(self.url, body, self._token(), self.timeout, self.retries, self.pause, LARGEST_BODY)
        try:
            rewards = read_answer(answer, len(rows), self.num_members)
        except ValueError as error:
            raise ValueError(f"{self.url}: {error}") from None
        # The rows stay on the CPU until all are there: K numbers each.
        return torch.tensor(rewards, dtype=torch.float32).to(responses.device)

    def own_state(self) -> set[str]:
        """Origins, units and the reference variance."""
        return set(self.state_dict())

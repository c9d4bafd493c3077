"""The passes through the networks that score a rollout, as few as will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_vapo.functional import TokenLogprobs
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.batching import even_batches
from lit_vapo.models.policy import Role
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import Tap, widen

# Nats that log-probabilities of one token differ by at most, if two ways to compute them in float32 are right.
_ROUNDING = 1e-3


class Scored(NamedTuple):
    """What the networks say of rows.

    Attributes:
        logprobs: Log-probabilities of the responses under whoever answered (B, T).
        entropy: Its entropies (B, T), nats.
        ref_logprobs: Log-probabilities under the reference (B, T).
        values: The critic's (B, T), if it was asked.
        value_states: What the critic reads (B, T, H), if that is the reference's pass.
        kl: Exact KL of each token's distribution from the reference's (B, T), if wanted.
        lower_states: What the blocks below the adapters make of all tokens (B, L, H), for the update.
        pooled: Pooled hidden states of the reference (B, H) for each tap.
    """

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    value_states: Tensor | None
    kl: Tensor | None
    lower_states: Tensor | None
    pooled: list[Tensor]


_OF_TOKENS = ("logprobs", "entropy", "ref_logprobs", "values", "value_states", "kl")


class Passes:
    """Reads rows with the networks, in batches of similar length.

    What sampling found in float32 is not computed again. A pass checks that first, and again for rows that are longer
    than any before: with a cache and padding on the left a model may compute otherwise, or only beyond some length.

    Args:
        networks: Actor, critic and reference.
        shaping: How the responses were drawn.
        tokens_per_batch: Tokens of a pass, padding included.
        exact_kl: Where the rollout is learned from, also find the exact KL.
    """

    def __init__(self, networks: ActorCritic, shaping: Shaping, tokens_per_batch: int, exact_kl: bool) -> None:
        self.networks = networks
        self.shaping = shaping
        self.tokens_per_batch = tokens_per_batch
        self.exact_kl = exact_kl
        # Up to which length sampling was seen to find what a pass finds; `None` once it was not. Two models may differ.
        self._held_up_to: dict[Role, int | None] = {"actor": 0, "reference": 0}

    def score(
        self,
        rows: TokenRows,
        role: Role,
        taps: Sequence[Tap],
        values: bool,
        learns: bool = False,
        own: TokenLogprobs | None = None,
    ) -> Scored:
        """Read rows.

        Args:
            rows: Prompts and responses.
            role: Who answered.
            taps: What rewards read of the reference's pass.
            values: Whether the critic is asked.
            learns: Whether the rollout is learned from.
            own: What sampling found of whoever answered.
        """
        parts: list[Tensor] = []
        outputs: list[Scored] = []
        for chosen in even_batches(
            rows.lengths.tolist(), self.tokens_per_batch, self.networks.policy.most, rows.input_ids.device
        ):
            index = torch.tensor(chosen, device=rows.input_ids.device)
            told = None if own is None else TokenLogprobs(*(x[index] for x in own))
            outputs.append(self._read(rows.select(index), role, taps, values, learns, told))
            parts.append(index)
        order = torch.cat(parts).argsort()
        widths = dict.fromkeys(_OF_TOKENS, rows.response_mask.shape[1]) | {"lower_states": rows.input_ids.shape[1]}
        columns = {name: _joined([getattr(x, name) for x in outputs], order, width) for name, width in widths.items()}
        pooled = zip(*(x.pooled for x in outputs), strict=True)
        return Scored(**columns, pooled=[torch.cat(each)[order] for each in pooled])

    def _read(
        self, rows: TokenRows, role: Role, taps: Sequence[Tap], values: bool, learns: bool, own: TokenLogprobs | None
    ) -> Scored:
        """One batch."""
        if role == "reference" and not values and own is not None and self._holds_for(role, rows):
            found = _masked(own, rows)
            pooled = self.networks.features(rows, taps)
            return Scored(found.logprobs, found.entropy, found.logprobs, None, None, None, None, pooled)
        reference = self.networks.reference(rows, self.shaping, taps, keep_states=self.exact_kl and learns)
        rows = rows._replace(lower_states=reference.lower_states)
        ref_logprobs, kl = reference.logprobs, None
        if reference.states is not None:
            answered, kl = self.networks.actor_with_kl(rows, self.shaping, reference.states)
        elif role == "actor":
            answered = self._actor(rows, own)
        else:
            answered = self._checked(role, rows, own, TokenLogprobs(reference.logprobs, reference.entropy))
            ref_logprobs = answered.logprobs
        return Scored(
            answered.logprobs,
            answered.entropy,
            ref_logprobs,
            self.networks.values(rows, reference.value_states) if values else None,
            reference.value_states if values else None,
            kl,
            rows.lower_states if learns else None,
            reference.pooled,
        )

    def _actor(self, rows: TokenRows, own: TokenLogprobs | None) -> TokenLogprobs:
        """Log-probabilities under the policy: what sampling found, if it was found right, or those of another pass."""
        if own is not None and self._holds_for("actor", rows):
            return _masked(own, rows)
        return self._checked("actor", rows, own, self.networks.actor(rows, self.shaping))

    def _holds_for(self, role: Role, rows: TokenRows) -> bool:
        """Whether sampling was seen to find what a pass finds, for rows that are no shorter."""
        held = self._held_up_to[role]
        return held is not None and int(rows.lengths.max()) <= held

    def _checked(self, role: Role, rows: TokenRows, own: TokenLogprobs | None, read: TokenLogprobs) -> TokenLogprobs:
        """What sampling found, if a pass found the same. If not, the pass's, and sampling is not believed again."""
        held = self._held_up_to[role]
        if own is None or held is None:
            return read
        told = _masked(own, rows)
        holds = bool((told.logprobs - read.logprobs).abs().amax() <= _ROUNDING)
        self._held_up_to[role] = max(held, int(rows.lengths.max())) if holds else None
        # Not the pass's, though it is there: whether there was one depends on what came before, the figures must not.
        return told if holds else read


def _masked(own: TokenLogprobs, rows: TokenRows) -> TokenLogprobs:
    """The same (B, T), with zeros where there is no token."""
    mask = rows.response_mask
    return TokenLogprobs(*(x[:, : mask.shape[1]].masked_fill(~mask, 0.0) for x in own))


def _joined(parts: list[Any], order: Tensor, width: int) -> Any:
    """A column of several batches, padded to one width, in the order of the rows; `None` where there is none."""
    return None if parts[0] is None else torch.cat([widen(x, width) for x in parts])[order]

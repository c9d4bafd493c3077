"""Watches whether the reward tells finished responses from cut-off ones rather than good ones from bad."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# Of each kind, before anything is said.
ENOUGH = 8


class EndingWatch:
    """Warns once where rewards of finished and of cut-off responses differ by more than content does.

    Content is the spread within the kinds: √(mean of the two variances). The first rollouts with enough of both kinds
    decide.
    """

    def __init__(self) -> None:
        self.finished: list[Tensor] = []
        self.cut_off: list[Tensor] = []
        self.decided = False

    def look(self, rewards: Tensor, stopped: Tensor) -> None:
        """Add the ensemble's rewards (B,) of responses, of which `stopped` (B,) ended by themselves."""
        if self.decided:
            return
        self.finished.append(rewards[stopped].float().cpu())
        self.cut_off.append(rewards[~stopped].float().cpu())
        finished, cut_off = torch.cat(self.finished), torch.cat(self.cut_off)
        if min(len(finished), len(cut_off)) < ENOUGH:
            return
        self.decided = True
        gap = float(finished.mean() - cut_off.mean())
        content = float(((finished.var() + cut_off.var()) / 2).sqrt())
        if abs(gap) > content:
            warnings.warn(
                f"finished responses are rewarded {gap:+.2f} against cut-off ones, where content moves rewards by "
                f"{content:.2f} (standard deviation within both kinds): PPO will learn to "
                f"{'end' if gap > 0 else 'go on'} first of all. Give responses more room "
                "(model.sampling.max_new_tokens), say yourself what an end is worth (model.missing_eos_penalty), or "
                "train the ensemble on responses as long as these.",
                stacklevel=2,
            )

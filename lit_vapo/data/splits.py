"""Splits: rows by hash of their text, pairs as token sequences or as features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_vapo.data.tokenise import in_fraction, stable_id
from lit_vapo.types import FeaturePairs, PairLabels, TokenSequence

Rows = list[dict[str, Any]]


class Pairs(NamedTuple):
    """Both sides of all preferences of a split, in the split's order."""

    chosen: list[TokenSequence]
    rejected: list[TokenSequence]


class FeatureRows(Dataset[FeaturePairs]):
    """Pairs as features; whole batches are indexed at once."""

    def __init__(self, chosen: Tensor, rejected: Tensor, labels: PairLabels) -> None:
        self.columns = FeaturePairs(chosen, rejected, labels)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.columns.chosen)

    def __getitem__(self, index: int) -> FeaturePairs:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> FeaturePairs:
        """A batch; DataLoader asks for it this way."""
        index = torch.tensor(indices)
        columns = self.columns
        labels = PairLabels(*(column[index] for column in columns.labels))
        return FeaturePairs(columns.chosen[index], columns.rejected[index], labels)


def set_aside(rows: Rows, fraction: float) -> tuple[Rows, Rows]:
    """Rows outside and inside a fraction, by the hash of their prompt.

    Where nearly all rows share one prompt, it cannot tell them apart: the whole example does.
    """
    prompts = {row["prompt"] for row in rows}
    by_prompt = 2 * len(prompts) > len(rows) or len(prompts) >= 100
    inside = [in_fraction(stable_id(r["prompt"]) if by_prompt else r["example_id"], fraction) for r in rows]
    train = [r for r, held in zip(rows, inside, strict=True) if not held]
    return train, [r for r, held in zip(rows, inside, strict=True) if held]

"""Splits: rows by hash of their text, pairs as token sequences or as features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_vapo.data.mixing import Sources
from lit_vapo.data.tokenise import position, stable_id
from lit_vapo.types import FeaturePairs, PairLabels, TokenSequence

Rows = list[dict[str, Any]]


class Pairs(NamedTuple):
    """Both sides of all preferences of a split, in the split's order."""

    chosen: list[TokenSequence]
    rejected: list[TokenSequence]


class DealtRows(Dataset[dict[str, Any]]):
    """Rows as they are shared out to processes.

    A number past the end asks for a row that stands in where rows do not come out even: it does not count.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Number of rows that count."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row; `counts` is False in one that stands in."""
        size = len(self.rows)
        return self.rows[index] if index < size else {**self.rows[index - size], "counts": False}


class FeatureRows(Dataset[FeaturePairs]):
    """Pairs as features; whole batches are indexed at once. Numbers past the end are as in `DealtRows`."""

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
        dealt, size = torch.tensor(indices), len(self)
        index, columns = dealt % size, self.columns
        labels = columns.labels.select(index)._replace(counts=dealt < size)
        return FeaturePairs(columns.chosen[index], columns.rejected[index], labels)


def set_aside(rows: Rows, validation: float, test: float = 0.0) -> tuple[Rows, Rows, Rows]:
    """Rows to train on, to validate on and to test on, by the hash of their prompt.

    Validation takes the lowest hashes and the test the highest, so that neither depends on the other's size.
    Where nearly all rows share one prompt, it cannot tell them apart: the whole example does.
    """
    prompts = {row["identity"] for row in rows}
    by_prompt = 2 * len(prompts) > len(rows) or len(prompts) >= 100
    parts: tuple[Rows, Rows, Rows] = ([], [], [])
    for row in rows:
        where = position(stable_id(row["identity"]) if by_prompt else row["example_id"])
        parts[1 if where < validation else 2 if where >= 1 - test else 0].append(row)
    return parts


def load_splits(
    key: str,
    sources: Mapping[str, Sources | None],
    load: Callable[[Sources, str], Rows],
    validation: float,
    test: float,
    streams: bool = False,
) -> dict[str, Rows]:
    """The rows of every split.

    Args:
        key: The configuration key of the training part; `_validation`, `_test` and `_ood` name the others.
        sources: Where the rows of `train`, `val`, `test` and `ood` come from; without a source of their own, the
            second and the third are set aside from the first, and the third is the second if nothing is.
        load: Reads the rows of sources that stand under a key.
        validation: Part set aside for validation.
        test: Part set aside for testing.
        streams: Do not load the training part.

    Raises:
        ValueError: There is no source of the training part, or nothing is left of it.
    """
    if sources["train"] is None:
        raise ValueError(f"{key}: expected files or hub names, got null")
    found: dict[str, Rows] = {"train": [], "val": [], "test": [], "ood": []}
    if not streams:
        shares = (validation if sources["val"] is None else 0.0, test if sources["test"] is None else 0.0)
        found["train"], found["val"], found["test"] = set_aside(load(sources["train"], key), *shares)
    for split, suffix in (("val", "validation"), ("test", "test"), ("ood", "ood")):
        given = sources.get(split)
        if given is not None:
            found[split] = load(given, f"{key}_{suffix}")
    if sources["test"] is None and not test:
        found["test"] = found["val"]
    if not found["train"] and not streams:
        raise ValueError(f"{key}: expected rows to train on, got none outside the validation and test parts")
    return found


def check_fractions(validation: float, test: float) -> None:
    """Refuse parts set aside that leave nothing.

    Raises:
        ValueError: Together they are 1 or more.
    """
    if validation + test >= 1:
        raise ValueError(
            f"data.test_fraction: expected less than 1 together with data.validation_fraction, got {validation + test}"
        )


def check_streaming(
    sources: Mapping[str, Sources | None],
    validation: float,
    test: float,
    buffer: int,
    batch_size: int,
    sample: int | None = None,
) -> None:
    """Refuse options that a stream cannot follow.

    Raises:
        ValueError: A part would have to be set aside from it (by which rule depends on all rows), the buffer is too
            small, or a sample is asked for.
    """
    if sample is not None:
        raise ValueError(f"data.sample: expected null with data.streaming (see trainer.max_steps), got {sample}")
    for split, name, fraction in (("val", "validation", validation), ("test", "test", test)):
        if fraction and sources[split] is None:
            raise ValueError(
                f"data.streaming: expected data.preferences_{name} or a data.{name}_fraction of 0, since nothing is "
                f"set aside from a stream; got a fraction of {fraction}"
            )
    if buffer < 2 * batch_size:
        raise ValueError(f"data.stream_buffer: expected at least two batches ({2 * batch_size} pairs), got {buffer}")


def check_preferred(preferred: bool, key: str) -> None:
    """Refuse pairs that teach no preference.

    Raises:
        ValueError: There are only ties, or pairs of weight 0.
    """
    if not preferred:
        raise ValueError(f"{key}: expected at least one pair with a preference, got only ties or pairs of weight 0")


def prefers(row: dict[str, Any]) -> bool:
    """Whether a tokenised pair is no tie, and counts."""
    return bool(row["probability"] > 0.5 and row["weight"] > 0)

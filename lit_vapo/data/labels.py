"""The columns of a preference beside its texts: how clear it is, how much it counts, and where it belongs."""

from __future__ import annotations

import math
from typing import NamedTuple

from lit_vapo.data.sources import Row


class Stated(NamedTuple):
    """What a row says of its preference.

    Attributes:
        margin: By how much the chosen response was preferred, in units of reward.
        probability: Probability that it is the better one, in [0.5, 1].
        weight: How often the pair counts.
        subset: Name of the part of the data set it belongs to.
    """

    margin: float
    probability: float
    weight: float
    subset: str | None


def read_labels(row: Row) -> Stated:
    """The columns `margin`, `agreement`, `tie`, `weight` and `subset`, each of which may be missing or null.

    Raises:
        ValueError: A column is of another type or out of its range, or two contradict each other.
    """
    margin = _number(row, "margin")
    weight = _number(row, "weight")
    if weight is not None and weight < 0:
        raise ValueError(f"{row.place}: expected a number of at least 0 in column 'weight', got {weight}")
    probability = _probability(row)
    if probability == 0.5 and margin:
        raise ValueError(f"{row.place}: expected no margin beside a tie, got {margin} in column 'margin'")
    subset = row.values.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise ValueError(f"{row.place}: expected text in column 'subset', got {type(subset).__name__}")
    return Stated(margin or 0.0, probability, 1.0 if weight is None else weight, subset)


def _probability(row: Row) -> float:
    agreement, tie = _number(row, "agreement"), row.values.get("tie")
    if agreement is not None and not 0.5 <= agreement <= 1:
        raise ValueError(
            f"{row.place}: expected the share of annotators behind the majority, from 0.5 to 1, in column "
            f"'agreement', got {agreement}"
        )
    if tie is not None and not isinstance(tie, bool):
        raise ValueError(f"{row.place}: expected true or false in column 'tie', got {tie!r}")
    if not tie:
        return 1.0 if agreement is None else agreement
    if agreement not in (None, 0.5):
        raise ValueError(f"{row.place}: expected an agreement of 0.5 beside a tie, got {agreement} in 'agreement'")
    return 0.5


def _number(row: Row, name: str) -> float | None:
    value = row.values.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value)):
        raise ValueError(f"{row.place}: expected a number in column {name!r}, got {value!r}")
    return float(value)

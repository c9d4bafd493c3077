"""The columns of a preference beside its texts: how clear it is, how much it counts, and where it belongs."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from lit_vapo.data.row import Row
from lit_vapo.data.schema import Number, Text, expect, validated


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


def _share(value: float) -> float:
    if not 0.5 <= value <= 1:
        raise expect("the share of annotators behind the majority, from 0.5 to 1,")
    return value


def _count(value: float) -> float:
    if value < 0:
        raise expect("a number of at least 0")
    return value


class _Labels(BaseModel):
    model_config = ConfigDict(strict=True)

    margin: Number | None = None
    agreement: Annotated[Number, AfterValidator(_share)] | None = None
    tie: bool | None = None
    weight: Annotated[Number, AfterValidator(_count)] | None = None
    subset: Text | None = None

    @property
    def probability(self) -> float:
        """Probability that the chosen response is the better one."""
        return 0.5 if self.tie else 1.0 if self.agreement is None else self.agreement

    @model_validator(mode="after")
    def _agree(self) -> _Labels:
        if self.tie and self.agreement not in (None, 0.5):
            raise expect("an agreement of 0.5 beside a tie", f"{self.agreement} in 'agreement'")
        if self.probability == 0.5 and self.margin:
            raise expect("no margin beside a tie", f"{self.margin} in column 'margin'")
        return self


def read_labels(row: Row) -> Stated:
    """The columns `margin`, `agreement`, `tie`, `weight` and `subset`, each of which may be missing or null.

    Raises:
        ValueError: A column is of another type or out of its range, or two contradict each other.
    """
    found = validated(_Labels, row)
    weight = 1.0 if found.weight is None else found.weight
    return Stated(found.margin or 0.0, found.probability, weight, found.subset)

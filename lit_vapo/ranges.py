"""Numbers with a range: said once, in the annotation of a parameter.

    def __init__(self, penalty: NonNegativeFloat = 1.0) -> None:
        check_ranges(LowerConfidence, locals())

`--help_all` shows the range with the type, and whoever makes the class is refused in the same words, be it a command, a
file or Python. The number itself stays a plain one. Therefore these are annotations, and not the types of
`jsonargparse.typing`. Their values are of classes of their own: a learning rate would take its class into the optimiser
and into checkpoints, where nothing but plain numbers can be read. And they check nothing where Python makes a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True, repr=False)
class Range:
    """Finite numbers between two bounds.

    Args:
        words: What is expected, for people.
        least: Smallest number.
        most: Largest number.
        above: Every number is above this.
        below: Every number is below this.
    """

    words: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __repr__(self) -> str:
        return self.words

    def __contains__(self, value: Any) -> bool:
        # NaN is in no range.
        return isinstance(value, (int, float)) and self.least <= value <= self.most and self.above < value < self.below


PositiveInt = Annotated[int, Range("at least 1", least=1)]
NonNegativeInt = Annotated[int, Range("a number of 0 or more", least=0)]
TwoOrMore = Annotated[int, Range("at least 2", least=2)]
PositiveFloat = Annotated[float, Range("a number above 0", above=0)]
NonNegativeFloat = Annotated[float, Range("a number of 0 or more", least=0)]
ClosedUnitInterval = Annotated[float, Range("a number from 0 to 1", least=0, most=1)]
Share = Annotated[float, Range("a number above 0 and at most 1", above=0, most=1)]
OpenUnitInterval = Annotated[float, Range("a number between 0 and 1", above=0, below=1)]
Fraction = Annotated[float, Range("a number from 0 to below 1", least=0, below=1)]
Smoothing = Annotated[float, Range("a number in [0, 0.5)", least=0, below=0.5)]


def check_ranges(kind: Callable[..., Any], given: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a number that is not in the range of its parameter. None passes where None may be given.

    Args:
        kind: The class that is made.
        given: Values by parameter; `locals()` at the start of a constructor, `vars(self)` at the end of a dataclass's.
        prefix: What stands before the parameter's name where it is an option (`model.`).

    Raises:
        ValueError: A number is out of its range; the message names it, what was expected and what came.
    """
    for name, annotation in get_type_hints(kind.__init__, include_extras=True).items():
        allowed = _range(annotation)
        value = given.get(name)
        if allowed is not None and value is not None and value not in allowed:
            raise ValueError(f"{prefix}{name}: expected {allowed.words}, got {value}")


def _range(annotation: Any) -> Range | None:
    """The range in an annotation: `Annotated[float, Range(…)]`, or a union with it."""
    parts = get_args(annotation)
    inner = (_range(part) for part in parts)
    return next((part for part in parts if isinstance(part, Range)), None) or next(filter(None, inner), None)

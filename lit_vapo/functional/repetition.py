"""Signs of degenerate text, from the words of responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Repetition(NamedTuple):
    """How much a set of responses repeats itself; a share is NaN where there is nothing to take it of.

    Attributes:
        distinct_pairs: Distinct word pairs among all word pairs of all responses. It falls with the number of
            responses: compare sets of one size.
        repeated_words: Word pairs that are one word twice, among all word pairs.
        distinct_responses: Distinct responses among all.
    """

    distinct_pairs: float
    repeated_words: float
    distinct_responses: float


def repetition(responses: Sequence[str]) -> Repetition:
    """How much a set of responses repeats itself, within and between them.

    Words are what white space separates, in lower case. `distinct_pairs` is the distinct-2 of Li et al., arXiv
    1510.03055, divided by the number of pairs where they divide by that of words, so that 1 says that none comes twice.

    Args:
        responses: B texts.

    Returns:
        Repetition.

    Examples:
        Three word pairs, "so so" and twice "so good":

        >>> repetition(["So so good", "so good"])
        Repetition(distinct_pairs=0.6666666666666666, repeated_words=0.3333333333333333, distinct_responses=1.0)
    """
    pairs = [pair for response in responses for pair in pairwise(response.lower().split())]
    return Repetition(
        _share(len(set(pairs)), len(pairs)),
        _share(sum(a == b for a, b in pairs), len(pairs)),
        _share(len(set(responses)), len(responses)),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan

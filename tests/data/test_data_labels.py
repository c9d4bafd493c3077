"""Columns beside the texts: agreement, ties, weights, subsets, and what contradicts them."""

import math
import re

import pytest

from lit_vapo.data.labels import Stated, read_labels
from lit_vapo.data.sources import Row


def labels(**values):
    return read_labels(Row(values, "pairs.jsonl, line 3"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Stated(0.0, 1.0, 1.0, None)),
        (dict.fromkeys(("margin", "agreement", "tie", "weight", "subset")), Stated(0.0, 1.0, 1.0, None)),
        ({"margin": -2, "weight": 3, "subset": "chat"}, Stated(-2.0, 1.0, 3.0, "chat")),
        # Two of three annotators.
        ({"agreement": 2 / 3, "tie": False}, Stated(0.0, 2 / 3, 1.0, None)),
        ({"agreement": 1}, Stated(0.0, 1.0, 1.0, None)),
        ({"tie": True, "margin": 0, "weight": 0}, Stated(0.0, 0.5, 0.0, None)),
        ({"tie": True, "agreement": 0.5}, Stated(0.0, 0.5, 1.0, None)),
        ({"agreement": 0.5, "margin": 0.0}, Stated(0.0, 0.5, 1.0, None)),
    ],
)
def test_columns_are_read(values, expected):
    assert labels(**values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"agreement": 1 / 3}, "expected the share of annotators behind the majority, from 0.5 to 1, in column"),
        ({"agreement": 1.01}, "expected the share of annotators behind the majority, from 0.5 to 1, in column"),
        ({"agreement": "0.8"}, "expected a number in column 'agreement', got '0.8'"),
        ({"agreement": True}, "expected a number in column 'agreement', got True"),
        ({"tie": 1}, "expected true or false in column 'tie', got 1"),
        ({"tie": True, "agreement": 0.8}, "expected an agreement of 0.5 beside a tie, got 0.8 in 'agreement'"),
        ({"tie": True, "margin": 1}, "expected no margin beside a tie, got 1.0 in column 'margin'"),
        ({"agreement": 0.5, "margin": -1}, "expected no margin beside a tie, got -1.0 in column 'margin'"),
        ({"weight": -1}, "expected a number of at least 0 in column 'weight', got -1"),
        ({"weight": math.nan}, "expected a number in column 'weight', got nan"),
        ({"weight": math.inf}, "expected a number in column 'weight', got inf"),
        ({"weight": "1"}, "expected a number in column 'weight', got '1'"),
        ({"subset": 3}, "expected text in column 'subset', got 3"),
    ],
)
def test_bad_columns_are_named(values, message):
    with pytest.raises(ValueError, match=re.escape("pairs.jsonl, line 3: " + message)):
        labels(**values)

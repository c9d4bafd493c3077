"""Ranges of numbers: said in an annotation, shown by --help, checked wherever a class is made."""

import math
import re
from dataclasses import dataclass

import pytest

from lit_vapo.advantages import Gae
from lit_vapo.cli import main
from lit_vapo.models.settings import construct
from lit_vapo.objectives import LowerConfidence
from lit_vapo.ranges import (
    ClosedUnitInterval,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Smoothing,
    TwoOrMore,
    check_ranges,
)
from lit_vapo.rewards.members import LoraEnsemble
from lit_vapo.stages.ppo.control import KLControl


class Thing:
    """A thing."""

    def __init__(self, a: PositiveFloat, b: PositiveInt | None = None, c: str = "", d: float = 1.0) -> None:
        check_ranges(Thing, locals(), "thing.")


@dataclass
class Record:
    """A record."""

    a: ClosedUnitInterval = 0.5
    b: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_ranges(Record, vars(self))


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (PositiveFloat, [1e-30, 5, 1e30], [0, -1e-30]),
        (NonNegativeFloat, [0, 0.0, 3], [-1e-30]),
        (ClosedUnitInterval, [0, 1, 0.5], [-1e-9, 1.1]),
        (OpenUnitInterval, [0.5, 1e-9], [0, 1]),
        (Fraction, [0, 0.999], [1, -0.1]),
        (Smoothing, [0, 0.49], [0.5, -0.1]),
        (PositiveInt, [1, 10**9], [0, -1]),
        (NonNegativeInt, [0, 7], [-1]),
        (TwoOrMore, [2], [1]),
    ],
)
def test_a_range_ends_where_it_says(kind, inside, outside):
    (allowed,) = kind.__metadata__
    assert all(x in allowed for x in inside)
    assert not any(x in allowed for x in (*outside, math.nan, math.inf, -math.inf, "1", [1]))


def test_a_number_out_of_range_is_named():
    Thing(1.0)
    Thing(2, None, "x", -5.0)
    Thing(2.5, 3)
    with pytest.raises(ValueError, match=r"^thing.a: expected a number above 0, got 0$"):
        Thing(0)
    with pytest.raises(ValueError, match=r"^thing.a: expected a number above 0, got nan$"):
        Thing(math.nan)
    with pytest.raises(ValueError, match=r"^thing.b: expected at least 1, got 0$"):
        Thing(1.0, 0)
    Record(1, 0)
    with pytest.raises(ValueError, match=r"^a: expected a number from 0 to 1, got 1.5$"):
        Record(1.5)
    with pytest.raises(ValueError, match=r"^b: expected a number of 0 or more, got -1$"):
        Record(b=-1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LowerConfidence(-1), "penalty: expected a number of 0 or more, got -1"),
        (lambda: LoraEnsemble(alpha=math.inf), "alpha: expected a number above 0, got inf"),
        (lambda: LoraEnsemble(0), "num_members: expected at least 1, got 0"),
        (lambda: Gae(gae_lambda=2), "model.advantage.gae_lambda: expected a number from 0 to 1, got 2"),
        (lambda: KLControl(0.1, -1), "model.kl_target: expected a number above 0, got -1"),
        # As where a checkpoint or an ensemble names them.
        (lambda: construct(LowerConfidence, {"penalty": -1}), "penalty: expected a number of 0 or more, got -1.0"),
        (lambda: construct(LoraEnsemble, {"rank": 0}), "rank: expected at least 1, got 0"),
    ],
)
def test_python_and_files_are_refused_in_the_same_words(make, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        make()


def test_numbers_stay_plain():
    made = construct(LowerConfidence, {"penalty": 2})
    assert type(made.penalty) in (int, float)
    assert type(LowerConfidence(0.5).penalty) is float


def helped(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_ranges(capsys):
    said = helped(["ppo", "fit", "--help_all"], capsys)
    assert "(type: Annotated[float, a number above 0], default: 1e-05)" in said
    assert "(type: Optional[Annotated[float, a number above 0]], default: null)" in said
    assert "prompts of an iteration in the ppo stage; for each process. (type: Annotated[int, at least 1]" in said
    said = helped(["ppo", "fit", "--model.objective.help=LowerConfidence"], capsys)
    assert "gives `MeanReward`. (type: Annotated[float, a number of 0 or more], default: 1.0)" in said
    said = helped(["ppo", "fit", "--model.sampling.help"], capsys)
    assert "Longest response. (type: Annotated[int, at least 1], default: 64)" in said


def test_the_command_line_is_refused_in_the_same_words(stage_args, tmp_path, untrained):
    with pytest.raises(ValueError, match=r"^model.learning_rate: expected a number above 0, got -1"):
        main(stage_args("sft", "fit", tmp_path / "run", model__learning_rate=-1))

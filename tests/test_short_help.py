"""The short help of a stage: read off the source, and the same as what the parser has."""

import contextlib
import dataclasses
import inspect
import io
import re
import typing

import pytest
import yaml
from helpers import concrete_subclasses

from lit_vapo import advantages, models, objectives
from lit_vapo.advantages.base import AdvantageEstimator
from lit_vapo.cli import COMMANDS, STAGES, main
from lit_vapo.commands import stages
from lit_vapo.commands.short_help import CLASSES, JUDGED, REQUIRED, classes, options, short_help
from lit_vapo.models.generation import Generator
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.objectives.base import Objective
from lit_vapo.rewards import members
from lit_vapo.rewards.members.base import RewardHead

CASES = [(stage, part) for stage in STAGES for part in ("fit", COMMANDS[stage].parts[-1])]


def said(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(words)
    return out.getvalue()


def in_force(values, module, name):
    """The value of an option in a printed configuration; of settings that are not given, what they begin with."""
    keys = name.split(".")
    for i, key in enumerate(keys):
        if values is None:
            kinds = typing.get_args(typing.get_type_hints(module.__init__)[keys[i - 1]])
            (settings,) = filter(dataclasses.is_dataclass, kinds)
            return {field.name: field.default for field in dataclasses.fields(settings)}[key]
        values = values[key]
    return values


@pytest.mark.parametrize(("stage", "part"), CASES)
def test_each_option_is_the_parser_s_with_its_default(stage, part):
    values = yaml.safe_load(said(stage, part, "--print_config"))
    found = options(stage, part)
    assert 10 < len(found) < 30
    for option in found:
        assert option.about, option.name
        real = in_force(values, stages.STAGES[stage].load(), option.name)
        if option.default == REQUIRED:
            assert real is None
        else:
            # YAML of its own reads 1e-05 as a text.
            assert yaml.safe_load(option.default) == real or float(option.default) == real, option.name
    assert {option.name for option in found} >= JUDGED.keys() or part == "fit"


@pytest.mark.parametrize(
    ("name", "package", "base"),
    [
        ("model.objective", objectives, Objective),
        ("model.advantage", advantages, AdvantageEstimator),
        ("model.head", members, RewardHead),
        ("model.generator", models, Generator),
    ],
)
def test_classes_are_those_that_an_option_takes(name, package, base):
    assert set(classes(CLASSES[name])) == {kind.__name__ for kind in concrete_subclasses(package, base)}


def test_what_null_stands_for_is_what_the_constructor_takes():
    found = {
        (stage, option.name): re.search(r"`?null`? is `(\w+)`|`(\w+)` \(`null`\)", option.about)
        for stage in STAGES
        for option in options(stage, "fit")
        if option.name in CLASSES and option.name != "model.generator"
    }
    assert len(found) == 3
    for (stage, name), match in found.items():
        constructor = inspect.getsource(stages.STAGES[stage].load().__init__)
        assert f"{name.removeprefix('model.')} or {match[1] or match[2]}()" in constructor


def test_values_of_a_literal_are_all_there():
    (option,) = [option for option in options("ppo", "fit") if option.name == "model.base.quantization"]
    (literal, _) = typing.get_args(typing.get_type_hints(Pretrained)["quantization"])
    assert option.choices == typing.get_args(literal)
    (mixed,) = [option for option in options("reward", "fit") if option.name == "model.reference"]
    # It takes a model as well.
    assert not mixed.choices


def test_it_is_short_and_leads_to_the_rest(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for words in (["--help"], ["-h"], ["--config", "some.yaml", "--help"]):
        text = said("ppo", "fit", *words)
        assert text == short_help("ppo", "fit") + "\n"
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 120
    assert "lit-vapo ppo fit --help_all " in text
    whole = said("ppo", "fit", "--help_all")
    assert "--model.critic_learning_rate" in whole
    assert said("ppo", "fit", "--help-all") == whole


def test_an_error_leads_to_all_options(capsys):
    with pytest.raises(SystemExit):
        main(["ppo", "fit", "--model.lernrate=1"])
    assert capsys.readouterr().err.endswith("All options: lit-vapo ppo fit --help_all\n")

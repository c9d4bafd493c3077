"""What docs/data.md shows must work: its rows are read, its commands name options that exist, its numbers are right."""

import inspect
import json
import re
import shlex

import pytest
import yaml
from helpers import CONFIGS
from jsonargparse import ArgumentParser

from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.data.formats import read_preference
from lit_vapo.data.mixing import shares
from lit_vapo.data.sources import Row
from lit_vapo.data.stream import LOOK

PAGE = (CONFIGS.parent / "docs" / "data.md").read_text(encoding="utf-8")
DEFAULTS = {name: p.default for name, p in inspect.signature(PreferenceDataModule.__init__).parameters.items()}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_rows_are_read():
    (block,) = blocks("json")
    clear, tie = (read_preference(Row(json.loads(line), "p")).labels for line in block.splitlines())
    assert (clear.probability, clear.subset) == (0.8, "maths")
    assert tie.probability == 0.5


def test_mixtures_are_taken():
    (block,) = blocks("yaml")
    assert shares(yaml.safe_load(block)["preferences"], "k") == [0.7, 0.3]


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines()])
def test_commands_are_parsed(command, tiny_model_dir):
    words = [word for word in shlex.split(command) if word.startswith("--data.")]
    assert words
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PreferenceDataModule, "data")
    config = parser.parse_args([*words, f"--data.tokenizer={tiny_model_dir}", "--data.validation_fraction=0"])
    PreferenceDataModule(**config.data.as_dict())


def test_options_and_defaults_are_the_right_ones():
    named = set(re.findall(r"`((?:preferences|prompts|validation|test|skip|stream)\w*)`", PAGE))
    assert len(named) > 8
    assert named - DEFAULTS.keys() == set()
    for name in ("validation_fraction", "test_fraction", "stream_buffer"):
        assert re.search(rf"`{name}` \({DEFAULTS[name]:g}\)", PAGE), name
    assert f"first {LOOK} pairs" in PAGE

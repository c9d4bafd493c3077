"""What docs/data.md shows must work: its rows are read, its commands name options that exist, its numbers are right."""

import inspect
import json
import re
import shlex

import pytest
import yaml
from helpers import CONFIGS, tiny_tokenizer
from jsonargparse import ArgumentParser

from lit_vapo.cli import main
from lit_vapo.data.columns import further
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.data.formats import read_preference, read_prompt
from lit_vapo.data.mixing import shares
from lit_vapo.data.sources import Row
from lit_vapo.data.stream import LOOK

PAGE = (CONFIGS.parent / "docs" / "data.md").read_text(encoding="utf-8")
DEFAULTS = {name: p.default for name, p in inspect.signature(PreferenceDataModule.__init__).parameters.items()}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_rows_are_read():
    rows = [json.loads(line) for block in blocks("json") for line in block.splitlines()]
    found = [read_preference(Row(row, "p")) for row in rows if "answer" not in row]
    assert len(found) > 8
    (prompt,) = (row for row in rows if "answer" in row)
    assert read_prompt(Row(prompt, "p")).content == "What is 2 + 2?"
    assert further(prompt) == {"answer": "4", "level": 1}
    # All shapes of one preference say the same.
    prime = [{"role": "user", "content": "Name a prime."}]
    assert sum(preference.prompt.content == prime for preference in found) == 3
    clear, tie = (preference.labels for preference in found[-2:])
    assert (clear.probability, clear.subset) == (0.8, "maths")
    assert tie.probability == 0.5


def test_the_example_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    tiny_tokenizer(tmp_path / "my" / "model", chat_template=True)
    (tmp_path / "pairs.jsonl").write_text(blocks("json")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (command,) = (line for block in blocks("bash") for line in block.splitlines() if " data show " in line)
    main(shlex.split(command)[1:])
    (shown,) = blocks("text")
    assert capsys.readouterr().out == shown


def test_mixtures_are_taken():
    (block,) = blocks("yaml")
    assert shares(yaml.safe_load(block)["preferences"], "k") == [0.7, 0.3]


@pytest.mark.parametrize(
    "command", [line for line in "\n".join(blocks("bash")).splitlines() if line and " data show " not in line]
)
def test_commands_are_parsed(command, tiny_model_dir):
    words = [word for word in shlex.split(command) if word.startswith("--data.")]
    assert words
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PreferenceDataModule, "data")
    config = parser.parse_args([*words, f"--data.tokenizer={tiny_model_dir}", "--data.validation_fraction=0"])
    PreferenceDataModule(**config.data.as_dict())


def test_options_and_defaults_are_the_right_ones():
    named = set(
        re.findall(
            r"`((?:preferences|prompts|validation|test|skip|stream|max|chat|stop|trust|append|columns)\w*)`", PAGE
        )
    )
    assert len(named) > 8
    assert named - DEFAULTS.keys() == set()
    for name in ("validation_fraction", "test_fraction", "stream_buffer", "max_length", "max_prompt_length"):
        assert re.search(rf"`{name}` \({DEFAULTS[name]:g}\)", PAGE), name
    assert f"first {LOOK} pairs" in PAGE

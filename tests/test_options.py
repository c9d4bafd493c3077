"""Options: errors are one message, `~` is the home folder, and YAML neither loses a key nor takes for ever."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lit_vapo.commands.options import MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, Parser, check_models, find_models
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.pretrained import Pretrained


@dataclass
class Inner:
    """A group.

    Args:
        path: A path.
        number: A number.
    """

    path: str = "p"
    number: int = 1


@pytest.fixture
def parser():
    made = Parser(prog="some command")
    made.add_argument("--config", action="config")
    made.add_class_arguments(Inner, "group")
    made.add_argument("--maybe", type=Inner | None)
    made.add_argument("--mix", type=str | list[str] | dict[str, float])
    made.add_argument("--plain", type=str, default="x")
    return made


def refusal(parser, capsys, *words):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.fixture
def refused(parser, capsys, tmp_path):
    """What is said about a file with this text, without its name."""

    def said(text):
        path = tmp_path / "options.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        err = refusal(parser, capsys, f"--config={path}")
        assert len(err) < 1000
        assert str(path) in err
        return err

    return said


# Errors.


@pytest.mark.parametrize("word", ["--gruop.number=1", "--group.number=many", "--maybe.nubmer=1", "--config=gone.yaml"])
def test_an_error_is_one_message_and_where_help_is(parser, capsys, word):
    err = refusal(parser, capsys, word)
    assert err.startswith("lit-vapo: error: ")
    assert err.endswith("\nAll options: some command --help\n")
    assert "usage" not in err
    assert "Traceback" not in err


def test_the_traceback_is_there_for_who_asks(parser, capsys, monkeypatch):
    monkeypatch.setenv("LIT_VAPO_DEBUG", "1")
    assert "Traceback" in refusal(parser, capsys, "--group.number=many")


# Home.


def test_home_is_found_wherever_a_value_begins_with_it(parser, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "o.yaml").write_text("group: {path: ~/a}\nmix: {~/b: 0.5}\nmaybe: {path: ~/c}\n")
    given = parser.parse_args([f"--config={tmp_path / 'o.yaml'}"])
    assert given.group.path == f"{tmp_path}/a"
    assert given.mix == {f"{tmp_path}/b": 0.5}
    assert given.maybe.path == f"{tmp_path}/c"
    given = parser.parse_args(["--group.path=~/a", '--mix=["~/b", "c~"]', "--maybe.path=~/c", "--plain=~"])
    assert (given.group.path, given.maybe.path, given.plain) == (f"{tmp_path}/a", f"{tmp_path}/c", str(tmp_path))
    assert given.mix == [f"{tmp_path}/b", "c~"]
    assert parser.parse_args(["--config=~/o.yaml"]).group.path == f"{tmp_path}/a"


# YAML.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "group: {number: 2}\nplain: y\ngroup: {path: q}\n",
            "line 3: expected each key once, got 'group' here and in line 1",
        ),
        (
            "group:\n  path: q\n  number: 1\n  path: r\n",
            "line 4: expected each key once, got 'path' here and in line 2",
        ),
        ("mix: {a: 1, b: 2, a: 3}\n", "line 1: expected each key once, got 'a' here and in line 1"),
        ("mix:\n- {a: {b: 1, b: 2}}\n", "line 2: expected each key once, got 'b'"),
        ("maybe: [\n", "line 2: expected YAML, got "),
        ("plain: 'a\n", "expected YAML, got "),
        (
            "plain: !!python/object/apply:os.system ['exit 1']\n",
            "line 1: expected YAML, got could not determine a constr",
        ),
        ("plain: !!int ''\n", "expected YAML, got "),
        ("plain: !!timestamp x\n", "expected YAML, got "),
        ("group: {number: " + "9" * 5000 + "}\n", "expected YAML, got "),
        ("plain: \x00\n", "expected YAML, got "),
        ("plain: *nowhere\n", "expected YAML, got "),
        ("---\nplain: a\n---\nplain: b\n", "expected YAML, got "),
        (b"plain: \xe9\n", "expected a text in UTF-8, got "),
    ],
)
def test_what_cannot_be_meant_is_refused_by_file_and_line(refused, text, said):
    assert said in refused(text)


def lists(depth):
    return "mix: " + "[" * depth + "]" * depth


def bomb(levels, width=9):
    first = f"a0: &a0 [{', '.join('x' * width)}]\n"
    return first + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]\n" for i in range(1, levels))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(7), f"line 6: expected at most {MAX_NODES} values, aliases spelt out, got more"),
        (bomb(40, 2), f"expected at most {MAX_NODES} values, aliases spelt out, got more"),
        (bomb(7).replace("[", "{k: [").replace("]", "]}"), f"expected at most {MAX_NODES} values"),
        ("mix: &a [*a]\n", f"line 1: expected at most {MAX_NODES} values, aliases spelt out, got more"),
        (lists(500), f"line 1: expected at most {MAX_DEPTH} levels, got more"),
        (lists(100_000), "line 1: expected YAML, got exceeded maximum nesting depth"),
        ("\n".join(" " * i + "k:" for i in range(MAX_DEPTH + 5)), f"expected at most {MAX_DEPTH} levels, got more"),
        ("mix: [" + "x," * (MAX_NODES + 1) + "]\n", f"expected at most {MAX_NODES} values"),
        ("plain: " + "x" * MAX_CHARACTERS, f"expected options of at most {MAX_CHARACTERS} characters, got"),
    ],
)
def test_what_would_take_for_ever_is_refused_at_once(refused, text, said):
    started = time.perf_counter()
    assert said in refused(text)
    assert time.perf_counter() - started < 5


def test_what_is_harmless_passes(parser, tmp_path):
    path = tmp_path / "o.yaml"
    path.write_text("# comment\nmaybe: &a {path: ä, number: 2}\ngroup:\n  <<: *a\n  number: 3\n", encoding="utf-8-sig")
    given = parser.parse_args([f"--config={path}"])
    assert (given.group.path, given.group.number) == ("ä", 3)
    assert given.maybe.as_dict() == {"path": "ä", "number": 2}


@pytest.mark.parametrize("text", ["text\n", "1\n", "true", "[]", "- a\n", "null: 1\n", "1: 2\n", "&plain: x\n"])
def test_a_file_that_names_no_options_is_refused(refused, text):
    assert "expected options by name (key: value)" in refused(text)


@pytest.mark.parametrize("name", ["#1", "&a", "# b"])
def test_a_text_that_yaml_takes_for_nothing_is_a_text(parser, tmp_path, name):
    parser.add_argument("--folder", type=str | None, default="x")
    path = tmp_path / "o.yaml"
    path.write_text(f"folder: '{name}'\n")
    assert parser.parse_args([f"--config={path}"]).folder == name
    path.write_text("folder: null\n")
    assert parser.parse_args([f"--config={path}"]).folder is None
    assert parser.parse_args(["--folder=null"]).folder is None


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing set\n", "---\n"])
def test_a_file_without_options_sets_nothing(parser, tmp_path, text):
    path = tmp_path / "o.yaml"
    path.write_text(text)
    given, default = parser.parse_args([f"--config={path}"]), parser.parse_args([])
    assert given.group == default.group
    assert given.plain == default.plain
    given = parser.parse_args([f"--group={path}"])
    assert (given.group.path, given.group.number) == ("p", 1)


def test_files_are_utf8_whatever_the_locale(parser, tmp_path, monkeypatch):
    import locale

    monkeypatch.setattr(locale, "getencoding", lambda: "latin-1")
    monkeypatch.setattr("io.text_encoding", lambda encoding, *args: encoding or "latin-1")
    path = tmp_path / "o.yaml"
    path.write_bytes("plain: 方差\n".encode())
    assert parser.parse_args([f"--config={path}"]).plain == "方差"


# Models.


def test_every_setting_of_a_model_is_found_and_known_by_its_absolute_path(tiny_model_dir, monkeypatch):
    @dataclass
    class Whole:
        base: Pretrained
        other: Pretrained | None = None
        critic: CriticSpec | None = None

    parser = Parser(prog="some command")
    parser.add_class_arguments(Whole, "model")
    monkeypatch.chdir(Path(tiny_model_dir).parent)
    keys = ("model.base", "model.other", "model.critic.base")
    given = parser.parse_args([f"--{key}.path=model" for key in keys])
    assert [key for key, _ in find_models(given)] == list(keys)
    check_models(given)
    assert {model.path for _, model in find_models(given)} == {tiny_model_dir}
    given = parser.parse_args(["--model.base.path=model", "--model.critic.base.path=./gone"])
    with pytest.raises(
        ValueError, match=r"^model.critic.base.path: expected a folder .*, got './gone' \(it does not exist"
    ):
        check_models(given)

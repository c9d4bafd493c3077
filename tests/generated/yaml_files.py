"""YAML files: what is read is what another reader of YAML says, or nothing is."""

import contextlib
import io
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

from lit_vapo.cli import main
from tests.generated.harm import SHARE
from tests.generated.outcome import Kind, WrongError
from tests.generated.pairs import absent_or
from tests.generated.texts import LETTERS, PLAIN

# Texts that YAML takes for something else where they are not quoted.
# (A quoted null is one for jsonargparse, too.)
TRICKY = "no 1e3 1_000 0x10 [a] é 中文 🙂 ' \" #x %x &a *a !t 2020-01-01 a\\b true = << a#b . { nan"
STRINGS = st.one_of(
    PLAIN,
    st.sampled_from(["a: b", "- x", "a\nb", "x y", "a: ", "{a: 1}", *TRICKY.split()]),
)
# Where a list or a mapping may stand, a text that reads as one is one, even in quotes.
FILES = STRINGS.filter(lambda text: text[0] not in "[{")
COUNT, FLAG, FRACTION = st.integers(1, 9), st.booleans(), st.floats(0, 0.4)
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "trainer": {"max_epochs": COUNT, "max_steps": COUNT, "enable_progress_bar": FLAG, "default_root_dir": STRINGS},
    "model": {
        "learning_rate": st.floats(1e-9, 1e3),
        "num_reference": COUNT,
        "pooling": st.sampled_from(("last", "mean")),
    },
    "data": {
        "preferences": st.one_of(
            FILES, st.lists(FILES, min_size=1, max_size=3), st.dictionaries(FILES, st.floats(0.1, 9), min_size=1)
        ),
        "prompts": absent_or(FILES),
        "batch_size": COUNT,
        "skip_invalid": FLAG,
        "validation_fraction": FRACTION,
    },
}


class Config(NamedTuple):
    """A file, and what it sets; `None`: it is to be refused, and `...`: whatever PyYAML says."""

    content: bytes
    sets: Any


@st.composite
def settings(draw) -> dict[str, Any]:
    """Sound settings."""
    found = {section: draw(st.fixed_dictionaries({}, optional=options)) for section, options in OPTIONS.items()}
    found["model"]["base"] = {"path": draw(STRINGS)}
    found["data"]["tokenizer"] = draw(STRINGS)
    return dict(draw(st.permutations(list(found.items()))))


def bomb(levels: int) -> str:
    """Aliases that stand for exponentially many values."""
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(["a0: &a0 [x, x]", *lines, ""])


# What may be added to a sound file and makes it none.
ADDED = st.sampled_from(
    (
        *("data: {batch_size: 3}\n", "data:\n  batch_size: 3\n  batch_size: 3\n", "trainer: {}\n", "model: null\n"),
        *(
            "modle: {x: 1}\n",
            "x: !!python/object/apply:os.system ['exit 1']\n",
            "x: !!python/name:os.system\n",
            "\tx: 1\n",
        ),
        *("x: [\n", "x: 'a\n", "x: *nowhere\n", "---\nx: 1\n", "x: \x00\n", "? x\n", "x: &a [*a]\n", "]\n", "- x\n"),
        *("x: " + "[" * 200 + "]" * 200, "x: " + "[" * 100_000, "x: " + "9" * 5000, bomb(7), bomb(30)),
        *("x: " + "y" * 2_000_000, "x: !!int ''\n", "x: !!timestamp x\n", "x: !!set {a, b}\n", "x: 1: 2\n"),
    )
)
TOP = ["[]", "text", "1", "null", "{}", "---", "...", "true", "}"]
WHOLE = st.sampled_from(["- a\n", "", "# nothing\n", "\ufeff", "{a: b", *TOP])


@st.composite
def configs(draw) -> Config:
    values = draw(settings())
    text = yaml.safe_dump(
        values,
        default_flow_style=draw(st.sampled_from((None, True, False))),
        allow_unicode=draw(FLAG),
        sort_keys=False,
        width=draw(st.sampled_from((20, 80, 1000))),
    )
    way = draw(st.sampled_from(("sound", "sound", "added", "added", "whole", "letter", "bytes")))
    if way == "added":
        block = yaml.safe_dump(values, default_flow_style=False, allow_unicode=True, sort_keys=False)
        return Config((block + draw(ADDED)).encode(), None)
    if way == "whole":
        return Config(draw(WHOLE).encode(), ...)
    if way == "letter":
        at = int(draw(SHARE) * len(text))
        return Config((text[:at] + draw(st.sampled_from("':,[]{}#&*!|>%@`\"\n\t -x1")) + text[at + 1 :]).encode(), ...)
    if way == "bytes":
        return Config(text.encode() + b"# " + draw(st.sampled_from((b"\xe9", b"\xff\xfe", b"\x80", b"\xc3"))), None)
    comment = f"# {draw(LETTERS)}\n" if draw(FLAG) else ""
    return Config((("\ufeff" if draw(FLAG) else "") + comment + text).encode(), values)


def check_config(config: Config, folder) -> None:
    """Read the file, and compare what is printed."""
    path = folder / "config.yaml"
    path.write_bytes(config.content)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            main(["reward", "fit", f"--config={path}", "--print_config"])
    except SystemExit as end:
        if end.code:
            if isinstance(config.sets, dict) and not any(map(breaks, texts(config.sets))):
                raise WrongError("refused though all is well") from end
            raise
    if config.sets is None:
        raise WrongError("read though it is to be refused")
    sets = yaml.safe_load(config.content) if config.sets is ... else config.sets
    differ = differences(sets or {}, yaml.safe_load(printed.getvalue()))
    if differ:
        raise WrongError(f"expected the settings of the file, got others: {differ[:3]}")


def texts(settings: Any) -> list[str]:
    """Texts among settings."""
    if isinstance(settings, dict):
        return [text for value in settings.values() for text in texts(value)]
    if isinstance(settings, list):
        return [text for value in settings for text in texts(value)]
    return [settings] if isinstance(settings, str) else []


def breaks(text: str) -> bool:
    """Whether a text is no YAML by itself; an option that may be null does not take such a one, even in quotes."""
    try:
        yaml.safe_load(text)
    except yaml.YAMLError:
        return True
    return False


def differences(given: Any, got: Any, key: str = "") -> list[str]:
    """Where what was given is not what is there."""
    if isinstance(given, dict) and isinstance(got, dict):
        return [x for name, value in given.items() for x in differences(value, got.get(name, ...), f"{key}.{name}")]
    return [] if given == got and type(given) is type(got) else [f"{key}: {given!r} became {got!r}"]


KINDS = [Kind("YAML", configs(), check_config, 2)]

"""What comes of a generated input: right, refused by a sentence, or one of the faults."""

import contextlib
import io
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis.strategies import SearchStrategy

from lit_vapo.console import USAGE_ERROR, reported

ACCEPTED, REFUSED = "right", "refused"
DEEP, WRONG, UNCLEAR, HANG = "traceback", "wrong", "unclear", "hang"
FAULTS = (DEEP, WRONG, UNCLEAR, HANG)
LONGEST, LINES = 1000, 20
# What a library would have the user switch off or look up, in place of what is wrong with the input.
ADVICE = ("weights_only=False", "weights_only` argument", "trust_remote_code=True", "huggingface.co", "Traceback (most")
# A file's line, an option, or a key of a file; the folder of the input counts as well.
PLACE = re.compile(
    r"\b(line|row) \d+|--\w+|\b(data|model|trainer|checkpoint|samples)\.\w+|\.(yaml|json|jsonl)\b"
    r"|^\w+: expected|Trainer\(\w+=|[Oo]ption '[^']+'|key \"[\w.]+\""
)


class WrongError(Exception):
    """The input was taken, and not for what it is; or it is sound, and was refused."""


class Kind(NamedTuple):
    """One kind of input.

    Attributes:
        name: What it is called in the table.
        cases: Its inputs.
        check: Gives one to the package in an empty folder; returns where the result is right, raises `WrongError` where
            it is not, and lets what the package raises pass.
        weight: Its share among the inputs of all kinds.
    """

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any, Path], None]
    weight: int = 1


class Outcome(NamedTuple):
    """One of the words above, and what was said."""

    word: str
    said: str = ""

    @property
    def fault(self) -> bool:
        return self.word in FAULTS


def outcome(kind: Kind, case: Any) -> Outcome:
    """Give an input to the package and judge what comes."""
    folder = Path(tempfile.mkdtemp(prefix="input-"))
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            # As on the command line, where an error of the user is one message, and every other keeps its traceback.
            with reported():
                kind.check(case, folder)
    except WrongError as wrong:
        return Outcome(WRONG, str(wrong))
    except SystemExit as end:
        return refusal(said.getvalue(), folder) if end.code == USAGE_ERROR else Outcome(DEEP, f"exit code {end.code}")
    except BaseException as error:
        return Outcome(DEEP, "".join(traceback.format_exception(error)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(ACCEPTED)


def refusal(printed: str, folder: Path) -> Outcome:
    """A refusal, if it is one short message with which a person can do something."""
    said = printed.rpartition("lit-vapo: error: ")[2].strip()
    sentence = said.partition("\nAll options: ")[0]
    # Types of options have a line for each way to read a value.
    short = 0 < len(sentence) <= LONGEST and len(sentence.splitlines()) <= LINES
    says_where = str(folder) in sentence or PLACE.search(sentence)
    advises = any(advice in said for advice in ADVICE)
    return Outcome(REFUSED if short and says_where and not advises else UNCLEAR, said[: 2 * LONGEST])

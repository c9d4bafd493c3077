"""docs/faults.md says what the code says."""

import ast
import re
from pathlib import Path

import pytest

from lit_vapo import console

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text()
TABLE = PAGE.partition("## Messages")[2]
MESSAGES = re.findall(r"^\| `(.+?)` \|", TABLE, flags=re.MULTILINE)


def templates(tree):
    """Every text of a module, with … for what it fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def said():
    files = (ROOT / "lit_vapo").rglob("*.py")
    return [text for path in files for text in templates(ast.parse(path.read_text()))]


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_of_the_page_is_one_of_the_code(said, message):
    assert any(message.rstrip("…") in text for text in said), message


def test_there_are_messages():
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("page", ["faults.md", "runs.md"])
def test_the_exit_codes_are_those_of_the_code(page):
    text = (ROOT / "docs" / page).read_text()
    codes = {int(code) for line in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in line.split(", ")}
    ends = {console.INTERRUPTED, console.REQUEUED, console.TERMINATED}
    known = {0, console.FAILED, console.USAGE_ERROR, *ends}
    assert codes == known

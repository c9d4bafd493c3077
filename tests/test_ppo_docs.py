"""The checklist of docs/ppo.md names tests and statistics that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
CHECKLIST = (TESTS.parent / "docs" / "ppo.md").read_text().partition("## Checklist")[2].partition("\n## ")[0]
METRICS = (TESTS.parent / "docs" / "metrics.md").read_text()


def test_named_tests_exist():
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)`(?: \(([\w, ]+)\))?", CHECKLIST)
    assert len(named) > 30
    for file, words in named:
        names = re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), flags=re.MULTILINE)
        for word in words.split(", ") if words else []:
            assert any(word in name for name in names), (file, word)


def test_named_statistics_are_defined():
    statistics = re.findall(r"`(?:train|val|test)/(\w+)`", CHECKLIST)
    assert len(statistics) > 30
    for name in statistics:
        assert re.search(rf"`(?:\w+/)?{name}`", METRICS), name

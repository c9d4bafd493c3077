"""Pages in plain words: sentences are short."""

from pathlib import Path

import pytest
from prose import measured, paragraphs, sentences, words

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MEAN, LONGEST = 18, 40


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_sentences_are_short(page):
    mean, found = measured(page)
    assert mean <= MEAN
    assert [sentence for sentence in found if words(sentence) > LONGEST] == []


def test_prose_is_told_from_the_rest():
    text = """# A heading of words

First one. Second `code with words` [link words](a.md) here!
It goes on, e.g. so, and ends.

```bash
not a word
```

| a | table |
- a point
  of two lines
1. another: with a colon; and more
![picture](x.png)
> a quote
"""
    assert paragraphs(text)[1:] == ["a point of two lines", "another: with a colon; and more", "a quote"]
    assert sentences(text)[:3] == [
        "First one.",
        "Second code link words here!",
        "It goes on, e.g. so, and ends.",
    ]
    assert [words(s) for s in sentences(text)[:3]] == [2, 5, 7]

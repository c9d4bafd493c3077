"""What a reader reads of a page of Markdown: sentences, without code, tables, headings and addresses."""

from __future__ import annotations

import re
from pathlib import Path

# A full stop after these ends no sentence.
ABBREVIATIONS = r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bcf\.)(?<!\bvs\.)(?<!\bNo\.)"


def paragraphs(text: str) -> list[str]:
    """Paragraphs and points of lists, each as one line."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        bare = line.strip()
        if not bare or bare.startswith(("|", "#", "![")):
            blocks.append([])
        elif re.match(r"(?:[-*]|\d+\.)\s", bare):
            blocks.append([re.sub(r"^(?:[-*]|\d+\.)\s+", "", bare)])
        else:
            blocks[-1].append(bare.lstrip("> "))
    return [" ".join(block) for block in blocks if block]


def sentences(text: str) -> list[str]:
    """Sentences of a page; links are their words, code in a line is one word."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
        plain = re.sub(r"`[^`]*`", "code", plain)
        found += re.split(rf"(?<=[.!?]){ABBREVIATIONS}[)*_\"”]*\s+(?=[\w`*(\"“±−–>])", plain)
    return [sentence for sentence in found if words(sentence)]


def words(sentence: str) -> int:
    """Words of a sentence; what has no letter is none."""
    return sum(any(c.isalpha() for c in word) for word in sentence.split())


def measured(path: Path) -> tuple[float, list[str]]:
    """Mean words of a page's sentences, and its sentences from the longest on."""
    found = sorted(sentences(path.read_text(encoding="utf-8")), key=words, reverse=True)
    return sum(map(words, found)) / max(len(found), 1), found
